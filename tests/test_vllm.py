"""The options of vLLM's plugin, which need no vLLM. What the engine does with them: tests/with_vllm, by `make vllm`."""

import pickle
import re
import sys
import types

import pytest
from processes import fresh

from condense_kernels.vllm import condensed, register
from condense_kernels.vllm.options import Options, from_environment
from condense_kernels.vllm.plan import Plan

NAMES = ("NUM_TOKENS", "BACKGROUND_RATIO", "SUPPRESSION", "SPATIAL_WEIGHT", "BACKGROUND_SUPPRESSION")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(f"CONDENSE_{name}", raising=False)


@pytest.fixture(autouse=True)
def release(monkeypatch):
    """Of vLLM, as far as it says which one it is; all else of it is not there."""

    def is_there(version: str) -> None:
        monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__=version))

    is_there("0.32.0")
    return is_there


class Config(types.SimpleNamespace):
    """What is asked of a config of transformers."""

    def update(self, values):
        vars(self).update(values)


def llava(model_type="llava", tower="clip_vision_model", strategy="default"):
    vision = types.SimpleNamespace(model_type=tower, image_size=336, patch_size=14)
    return Config(model_type=model_type, vision_config=vision, vision_feature_select_strategy=strategy)


def imports_the_plugin() -> set[str]:
    import condense_kernels.vllm  # noqa: F401

    return {name for name in sys.modules if name.partition(".")[0] in ("vllm", "transformers", "condense_kernels")}


def test_the_plugin_imports_no_model():
    """Every process of vLLM imports it."""
    brought = fresh(imports_the_plugin)
    assert {name for name in brought if "vllm" in name} == {
        f"condense_kernels.vllm{part}" for part in ("", ".options", ".plan", ".release")
    }
    assert not {name for name in brought if name.startswith(("transformers", "condense_kernels.models"))}


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "0.320.0", "1.32.0", "0.1.dev1+g32", "dev"])
def test_another_release_of_vllm_is_left_alone_or_refused(monkeypatch, release, version):
    release(version)
    register()  # which finds none of what it needs to do anything
    said = f"^condense_kernels.vllm needs vLLM 0.32, got {re.escape(version)}. Remedy: pip install 'vllm==0.32"
    with pytest.raises(ImportError, match=said):
        condensed()(llava())
    monkeypatch.setenv("CONDENSE_NUM_TOKENS", "64")
    with pytest.raises(ImportError, match=said):
        register()


@pytest.mark.parametrize(("model_type", "name"), [("llava", "Llava"), ("llava_next", "LlavaNext")])
def test_options_make_a_config_that_of_a_condensed_model(model_type, name):
    options = pickle.loads(pickle.dumps(condensed(64, suppression=0.5)))  # as they reach the engine's processes
    config = options(llava(model_type))
    assert config.architectures == [f"Condensed{name}ForConditionalGeneration"]
    assert config.condense == {
        "num_tokens": 64, "background_ratio": 0.25, "suppression": 0.5, "spatial_weight": 1.0,
        "background_suppression": None, "scale_prior": True,
    }  # fmt: skip
    assert Options.of(config) == options
    plan = Plan.of(config)
    assert (plan.side, plan.keep, plan.keeps_all) == (24, 64, False)


def test_a_config_without_images_stays_as_it_is():
    draft = Config(model_type="llama")
    assert vars(condensed()(draft)) == {"model_type": "llama"}


def test_a_ratio_is_of_the_images_tokens():
    assert Plan.of(condensed(0.111)(llava())).keep == 64
    assert Plan.of(condensed(1.0)(llava())).keeps_all
    assert Plan.of(condensed(64)(llava(tower="siglip_vision_model", strategy="full"))).keep == 64


def test_the_environment(monkeypatch):
    assert from_environment() is None
    monkeypatch.setenv("CONDENSE_NUM_TOKENS", "0.25")
    assert from_environment() == Options(0.25)
    for name, value in zip(NAMES, ("64", "0.5", "0", "2.5", "0.75"), strict=True):
        monkeypatch.setenv(f"CONDENSE_{name}", value)
    assert from_environment() == Options(64, 0.5, 0.0, 2.5, 0.75)
    assert Options.of(llava()) == Options(64, 0.5, 0.0, 2.5, 0.75)
    assert Options.of(condensed(32)(llava())) == Options(32)


@pytest.mark.parametrize("name", NAMES[1:])
def test_an_option_without_a_count(monkeypatch, name):
    monkeypatch.setenv(f"CONDENSE_{name}", "0.5")
    with pytest.raises(ValueError, match=f"^CONDENSE_{name}: expected CONDENSE_NUM_TOKENS beside it, got none. Rem"):
        from_environment()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens: expected 1 <= num_tokens"),
        ({"num_tokens": 1.5}, ValueError, "num_tokens: expected a ratio in"),
        ({"num_tokens": "64"}, TypeError, "num_tokens: expected an int count or a float ratio"),
        ({"background_ratio": 2}, ValueError, "background_ratio: expected a share"),
        ({"suppression": -1.0}, ValueError, "suppression: expected a finite number >= 0"),
        ({"background_suppression": -1.0}, ValueError, "background_suppression: expected a finite number >= 0"),
        ({"spatial_weight": "1"}, TypeError, "spatial_weight: expected a number"),
    ],
)
def test_wrong_options(options, error, said):
    with pytest.raises(error, match=f"^{said}"):
        condensed(**options)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (llava(), "condense: expected options of a condensed model, .* got none. Remedy: hf_overrides="),
        (Config(**vars(llava()), condense={}), "condense: expected a dict with num_tokens, .* got {}"),
        (Config(**vars(llava()), condense=64), "condense: expected a dict with num_tokens, .* got 64"),
        (
            Config(**vars(llava()), condense={"num_tokens": 4, "keep": 4}),
            "condense: expected .* got {'num_tokens': 4, ",
        ),
        (Config(**vars(llava()), condense={"num_tokens": 577}), "num_tokens: expected 1 <= num_tokens <= 576 tokens"),
        (llava(strategy="full"), "model: expected a vision_config, .* got clip_vision_model with 'full'. Remedy"),
        (llava(tower="pixtral"), "model: expected a vision_config, .* got pixtral with 'default'. Remedy"),
    ],
)
def test_wrong_configs(config, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        Plan.of(config)


def test_a_model_of_another_type():
    with pytest.raises(ValueError, match="^model: expected one of the types llava, llava_next, got 'qwen2_vl'. Remedy"):
        condensed()(llava("qwen2_vl"))


def test_each_option_is_in_the_keys_of_vllms_caches():
    """Two engines that share a cache share what they agree on, and nothing else."""
    options = [condensed(64), condensed(32), condensed(0.25), condensed(background_ratio=0.5)]
    options += [condensed(suppression=0.5), condensed(spatial_weight=0.5), condensed(background_suppression=0.5)]
    options += [condensed(scale_prior=False)]
    assert len({str(of_engine) for of_engine in options}) == len(options)
    assert str(condensed(64)) == "condensed-64-0.25-1.0-1.0-None-True"
