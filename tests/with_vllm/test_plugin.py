"""What the plugin leaves alone, what its keys hold, and what it refuses."""

import os
import subprocess
import sys

import pytest
from engines import picture
from transformers import AutoConfig, PixtralVisionConfig, Qwen2VLConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs

from condense_kernels.vllm import condensed
from condense_kernels.vllm.plan import Plan

STARTED = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ModelRegistry
print(*(module for module in sys.modules if module.startswith("condense_kernels.") and "model" in module))
for name in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"):
    print(ModelRegistry.models[name].module_name, ModelRegistry.models["Condensed" + name].module_name)
"""


def started(**variables: str) -> subprocess.CompletedProcess:
    """A process of vLLM, up to its plugins."""
    return subprocess.run(
        [sys.executable, "-c", STARTED], env={**os.environ, **variables}, capture_output=True, text=True
    )


def test_without_configuration_nothing_is_changed_and_no_model_imported():
    done = started()
    assert done.stdout.splitlines()[-3:] == [
        "",
        "vllm.model_executor.models.llava condense_kernels.vllm.models",
        "vllm.model_executor.models.llava_next condense_kernels.vllm.models",
    ], done.stderr


def test_the_environment_gives_the_models_their_names():
    lines = started(CONDENSE_NUM_TOKENS="0.25").stdout.splitlines()
    assert lines[-2:] == ["condense_kernels.vllm.models condense_kernels.vllm.models"] * 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CONDENSE_NUM_TOKENS": "many"}, "CONDENSE_NUM_TOKENS: expected a count of tokens, as 64, or a ratio"),
        ({"CONDENSE_SUPPRESSION": "0.5"}, "CONDENSE_SUPPRESSION: expected CONDENSE_NUM_TOKENS beside it, got none."),
    ],
)
def test_a_wrong_variable_ends_the_process(variables, said):
    """Not a line in the log of an engine that goes on without: vLLM catches what the import of a plugin raises."""
    done = started(**variables)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: {said}"), done.stderr


def processor(folder, overrides):
    config = EngineArgs(str(folder), hf_overrides=overrides, max_model_len=512).create_model_config()
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.mark.parametrize("uuid", [None, "a name that the caller gave"])
def test_keys_hold_the_options(llava, uuid):
    """An image has another key for each K, and for each weight: caches of KV and of encoder outputs go by it."""

    def key(overrides):
        of_model = processor(llava, overrides)
        items = of_model.info.parse_mm_data({"image": [picture(0)]})
        uuids = None if uuid is None else {"image": [uuid]}
        return of_model._get_mm_hashes(ProcessorInputs([], items, uuids))["image"][0]

    keys = [
        key(overrides)
        for overrides in ({}, condensed(20), condensed(36), condensed(0.25), condensed(36, suppression=0.5))
    ]
    assert len(set(keys)) == 5
    assert all(longer.startswith(f"{keys[0]}-condensed-") for longer in keys[1:])
    assert key(condensed(20)) == keys[1]


BY_NAME = {"architectures": ["CondensedLlavaForConditionalGeneration"]}


@pytest.mark.parametrize(
    ("overrides", "variable", "said"),
    [
        (condensed(145), "", "num_tokens: expected 1 <= num_tokens <= 144 tokens, got 145"),
        (
            {**BY_NAME, "condense": {"num_tokens": 145}},
            "",
            "num_tokens: expected 1 <= num_tokens <= 144 tokens, got 145",
        ),
        ({"condense": {"num_tokens": 64}}, "", "condense: expected a condensed model beside it, got LlavaForCond"),
        (BY_NAME, "145", "num_tokens: expected 1 <= num_tokens <= 144 tokens, got 145"),
        (BY_NAME, "", "condense: expected options of a condensed model, .* got none. Remedy: hf_overrides=condense"),
        ({**BY_NAME, "condense": {"keep": 64}}, "", r"condense: expected a dict with num_tokens, .*got {'keep': 64}"),
        ({**BY_NAME, "condense": {"num_tokens": 0}}, "", "num_tokens: expected 1 <= num_tokens"),
    ],
)
def test_wrong_options_are_an_error_before_there_is_an_engine(llava, monkeypatch, overrides, variable, said):
    monkeypatch.setenv("CONDENSE_NUM_TOKENS", variable)
    with pytest.raises(ValueError, match=said):
        EngineArgs(str(llava), hf_overrides=overrides).create_model_config()


def test_what_the_config_says_goes_before_the_environment_which_is_written_there(llava, monkeypatch):
    monkeypatch.setenv("CONDENSE_NUM_TOKENS", "36")
    assert processor(llava, condensed(20)).info.plan.keep == 20
    model_config = EngineArgs(str(llava), hf_overrides=BY_NAME).create_model_config()
    monkeypatch.delenv("CONDENSE_NUM_TOKENS")  # as of a process on another machine
    assert MULTIMODAL_REGISTRY.create_processor(model_config).info.plan.keep == 36


def test_other_models_are_refused(llava):
    with pytest.raises(ValueError, match="model: expected one of the types llava, llava_next, got 'qwen2_vl'"):
        condensed()(Qwen2VLConfig())
    config = condensed()(AutoConfig.from_pretrained(llava))
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="expected a vision_config, .* got clip_vision_model with 'full'"):
        Plan.of(config)
    config.vision_config, config.vision_feature_select_strategy = PixtralVisionConfig(), "default"
    with pytest.raises(ValueError, match="expected a vision_config, .* got pixtral with 'default'"):
        Plan.of(config)
