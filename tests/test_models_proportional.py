"""proportional=True: a visual token counts as often in the language model as there are tokens in it, against oracles
that are told the sizes."""

import pytest
import torch
import transformers
import zoo
from languages import llava_on
from test_models_positions import forced
from weighed import Condensed, followed_by, repeated, with_bias
from zoo import MIXED

import oracles
from condense_kernels.models import apply_condense

KEEP, NEW = 5, 4
CACHES = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
# Linear attention, expert layers, soft caps, sinks, windows, planes, crops: each differs from the others in something.
SOME = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def by_oracle(case, tokens=None):
    """Logits of each row of MIXED; with tokens [B, n] those that predict them and the one after."""
    found = []
    for row, (alone, logs) in enumerate(Condensed(case, MIXED, KEEP).prompts()):
        given = alone if tokens is None else followed_by(case, alone, tokens[row, None])
        logits = with_bias(case.model, logs)(**given).logits[0]
        found.append(logits if tokens is None else logits[-tokens.shape[1] - 1 : -1])
    return found


@pytest.mark.parametrize("name", zoo.NAMES)
def test_logits_are_those_of_eager_attention_with_the_bias(name):
    case = zoo.case(name)
    expected = by_oracle(case)
    for side in ("left", "right"):
        with apply_condense(case.model, KEEP, proportional=True):
            logits = case.model(**case.inputs(MIXED, side)).logits
        for row, of_oracle in zip(oracles.of_rows(logits, map(len, expected), side), expected, strict=True):
            torch.testing.assert_close(row, of_oracle, rtol=1e-4, atol=2e-4)


def test_logits_are_those_of_tokens_repeated():
    case = zoo.case("llava")
    rows = ((0,), (1, 2))
    with apply_condense(case.model, KEEP, proportional=True):
        logits = case.model(**case.inputs(rows)).logits
    for row, (alone, logs) in zip(logits, Condensed(case, rows, KEEP).prompts(), strict=True):
        given, first = repeated(case, alone, logs)
        expected = case.model(**given).logits[0, first]
        torch.testing.assert_close(row[len(row) - len(first) :], expected, rtol=1e-5, atol=1e-5)
