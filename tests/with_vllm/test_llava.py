"""The engine's greedy tokens are those of transformers with apply_condense, on the same checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import answers
from engines import REQUESTS, engine, outputs, tokens

from condense_kernels.vllm import condensed

SERVE = Path(__file__).with_name("serve.py")


def test_in_a_batch_in_chunks_and_from_the_prefix_cache(llava):
    """Of prompts of up to 78 tokens a step takes 48; the second time, whole blocks come from the cache."""
    expected = answers(llava, REQUESTS, 36)
    assert len({tuple(answer) for answer in expected}) == len(REQUESTS)  # another picture, another answer
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 4, "block_size": 32, "enable_prefix_caching": True}
    with engine(llava, hf_overrides=condensed(num_tokens=36), **options) as llm:
        first, second = outputs(llm, REQUESTS), outputs(llm, REQUESTS)
    for found in first, second:
        assert [list(output.outputs[0].token_ids) for output in found] == expected
    assert [len(output.prompt_token_ids) for output in first] == [41, 41, 41, 41, 4, 78, 78]
    assert [output.num_cached_tokens for output in second] == [32, 32, 32, 32, 0, 64, 64]


def test_options_by_a_dict(llava):
    """As the command line has them, in JSON."""
    options = {"background_ratio": 0.5, "suppression": 0.25, "spatial_weight": 3.0, "background_suppression": 0.75}
    expected = answers(llava, REQUESTS, 0.1, **options)
    by_default = answers(llava, REQUESTS, 0.1)
    assert all(found != other for found, other in zip(expected, by_default, strict=True) if found != expected[4])
    overrides = {
        "architectures": ["CondensedLlavaForConditionalGeneration"],
        "condense": {"num_tokens": 0.1, **options},
    }
    with engine(llava, hf_overrides=overrides) as llm:
        assert tokens(llm, REQUESTS) == expected


def test_a_tower_without_cls(llava_siglip):
    """Scores are the mean over all rows of its attention."""
    expected = answers(llava_siglip, REQUESTS, 20)
    with engine(llava_siglip, hf_overrides=condensed(num_tokens=20)) as llm:
        assert tokens(llm, REQUESTS) == expected


def test_the_stock_model_stays_as_it_is_and_all_tokens_are_the_same_as_it(llava):
    with engine(llava) as llm:
        assert llm.apply_model(lambda model: type(model).__module__) == ["vllm.model_executor.models.llava"]
        expected = outputs(llm, REQUESTS)
    with engine(llava, hf_overrides=condensed(num_tokens=1.0)) as llm:
        assert llm.apply_model(lambda model: type(model).__module__) == ["condense_kernels.vllm.models"]
        found = outputs(llm, REQUESTS)
    assert answers(llava, REQUESTS) == [list(output.outputs[0].token_ids) for output in expected]
    for ours, stock in zip(found, expected, strict=True):
        assert ours.prompt_token_ids == stock.prompt_token_ids
        assert ours.outputs[0].token_ids == stock.outputs[0].token_ids
        assert ours.outputs[0].logprobs == stock.outputs[0].logprobs


@pytest.mark.parametrize(
    ("variables", "options"),
    [({"CONDENSE_NUM_TOKENS": "20"}, {}), ({}, {"num_tokens": 20, "tensor_parallel_size": 2})],
    ids=["environment", "two ranks"],
)
def test_the_engine_in_processes_of_its_own(llava, tmp_path, variables, options):
    """Each finds the plugin by its entry point. Of two ranks each has half of the tower's heads."""
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **variables}
    done = subprocess.run(
        [sys.executable, SERVE, llava, json.dumps(options), tmp_path / "tokens.json"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "tokens.json").read_text()) == answers(llava, REQUESTS, 20)
