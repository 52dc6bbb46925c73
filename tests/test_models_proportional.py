"""proportional=True: a visual token counts as often in the language model as there are tokens in it, against oracles
that are told the sizes."""

import copy

import oracles
import pytest
import torch
import transformers
import zoo
from languages import llava_on
from test_models_positions import CACHE, forced
from weighed import Condensed, followed_by, repeated, with_bias
from zoo import MIXED

from condense_kernels.models import apply_condense

KEEP, NEW = 5, 4
ONE_EACH = ((0,), (), (1,))  # on transformers 5.18 the oracle's generate mixes several images of a row up
CACHES = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
# Plain, crops, M-RoPE, planes, linear attention in other layers, images that see themselves in both directions.
SOME = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def by_oracle(case, tokens=None, rows=MIXED):
    """Logits of each row; with tokens [B, n] those that predict them."""
    found = []
    for row, (alone, logs) in enumerate(Condensed(case, rows, KEEP).prompts()):
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


# Steps of decoding


def steps(case, tokens, rows=MIXED, **options):
    with apply_condense(case.model, KEEP, proportional=True):
        return forced(case, case.inputs(rows), tokens, **options)


ALONE = ((0,),)  # no padding, so that sdpa gets no mask


@pytest.mark.parametrize("rows", [MIXED, ALONE], ids=str)
@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_steps_of_generate(name, options, rows):
    case, tokens = zoo.case(name), torch.randint(5, 80, (len(rows), NEW))
    expected = torch.stack(by_oracle(case, tokens, rows))
    torch.testing.assert_close(steps(case, tokens, rows, **options), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("rows", [MIXED, ALONE], ids=str)
@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("window", [3, 8, 14])
def test_windows_that_slide_over_the_prompt(window, options, rows):
    """A layer's cache then holds the last tokens only, the first of which is no longer the first of the prompt."""
    config = dict(sliding_window=window, layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2)
    case = llava_on("cohere2", **config)
    tokens = torch.randint(5, 80, (len(rows), 6))
    expected = torch.stack(by_oracle(case, tokens, rows))
    torch.testing.assert_close(steps(case, tokens, rows, **options), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams(name, options):
    """Of each row alone those of the oracle, which reorders no cache, as it has none."""
    case, options = zoo.case(name), {"max_new_tokens": NEW, "do_sample": False, **options}
    with apply_condense(case.model, KEEP, proportional=True):
        found = case.model.generate(**case.inputs(ONE_EACH), **options)[:, -NEW:].chunk(3)
    for tokens, (alone, logs) in zip(found, Condensed(case, ONE_EACH, KEEP).prompts(), strict=True):
        expected = with_bias(case.model, logs).generate(**alone, **{**options, "use_cache": False})
        assert torch.equal(tokens, expected[:, -NEW:])


def test_each_sequence_of_a_prompt_has_its_sizes():
    case = zoo.case("llava")
    options = dict(max_new_tokens=NEW, do_sample=True, top_k=1)
    with apply_condense(case.model, KEEP, proportional=True):
        expected = case.model.generate(**case.inputs(MIXED), **options)
        found = case.model.generate(**case.inputs(MIXED), **options, num_return_sequences=3)
    assert torch.equal(found, expected.repeat_interleave(3, 0))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_forward_goes_on_from_its_own_cache(name, static):
    """A token at a time, and several; two conversations in turn, each with its sizes."""
    case, tokens = zoo.case(name), torch.randint(5, 80, (3, NEW))
    expected = [row[-1:] for row in by_oracle(case)], torch.stack(by_oracle(case, tokens))[:, 1:]
    text = case.model.config.get_text_config()

    def begun(rows):
        cache = transformers.StaticCache(config=text, max_cache_len=80) if static else None
        output = case.model(**case.inputs(rows), use_cache=True, **({} if cache is None else {CACHE: cache}))
        return output.logits[:, -1], output[CACHE]

    def goes_on(cache, ids):
        lengths = torch.tensor(oracles.row_lengths(case, MIXED, KEEP))
        behind = int(cache.get_seq_length()) + ids.shape[1] - int(lengths.max())
        mask = torch.arange(int(lengths.max()) + behind) >= (lengths.max() - lengths)[:, None]
        return case.model(input_ids=ids, attention_mask=mask.long(), **{CACHE: cache}).logits

    with apply_condense(case.model, KEEP, proportional=True):
        last, cache = begun(MIXED)
        several = copy.deepcopy(cache)
        begun(((3,), (4,)))
        found = [goes_on(cache, ids) for ids in tokens.split(1, 1)][:-1]
        torch.testing.assert_close(last, torch.cat(expected[0]), rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(torch.cat(found, 1), expected[1], rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(goes_on(several, tokens)[:, :-1], expected[1], rtol=1e-4, atol=2e-4)


def test_a_cache_that_was_reset_is_of_the_next_prompt():
    case = zoo.case("llava")
    text = case.inputs(((), ()))
    cache = transformers.StaticCache(config=case.model.config.get_text_config(), max_cache_len=80)
    expected = case.model(**text).logits
    with apply_condense(case.model, KEEP, proportional=True):
        case.model(**case.inputs(((0,), (1,))), **{CACHE: cache})
        cache.reset()
        torch.testing.assert_close(case.model(**text, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("gemma2", dict(head_dim=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)),
        ("gpt_oss", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
        ("llama4_text", dict(head_dim=16, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=32)),
        ("opt", dict(ffn_dim=64, word_embed_proj_dim=64)),
    ],
)
def test_soft_caps_sinks_and_chunks_stay(text, config):
    case = llava_on(text, **config)
    case.model.set_attn_implementation("eager")  # older releases have sdpa for Gemma 2, which leaves the cap out
    tokens = torch.randint(5, 80, (3, NEW))
    expected = torch.stack(by_oracle(case, tokens))
    torch.testing.assert_close(steps(case, tokens), expected, rtol=1e-4, atol=2e-4)
