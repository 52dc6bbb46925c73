"""positions="original": tokens stay where they were in the prompt as it was given, and so do those that follow."""

import copy

import oracles
import pytest
import torch
import transformers
import zoo
from languages import llava_on
from oracles import language_model_positions, pick
from test_models_handle import left_as_it_was, model_of
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo import MIXED

from condense_kernels.models import apply_condense

KEEP, NEW = 5, 5
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # renamed in transformers 5.24
CROPS = ("llava_next", "llava_onevision")
ONE_AXIS = [family.name for family in zoo.FAMILIES if not family.mrope and family.name not in CROPS]
MROPE = ["qwen2_5_vl", "glm4v"]
SOME = ["llava", "gemma3", "paligemma", "exaone4_5"]  # plain, sliding windows, counted from 1, no positions in generate


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def selection(case, rows):
    return oracles.best(oracles.scores(case, rows, case.inputs(rows)), KEEP)


def hidden(case, rows, side="left"):
    return oracles.masked(case, rows, side, selection(case, rows), original=True)


def real_rows(logits, mask):
    return [row[real == 1] for row, real in zip(logits, mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ONE_AXIS)
def test_selected_tokens_see_what_they_saw_at_their_places(name, side):
    case = zoo.case(name)
    given = hidden(case, MIXED, side)
    with apply_condense(case.model, KEEP, method=pick, positions="original"):
        logits = case.model(**case.inputs(MIXED, side)).logits
    found = oracles.of_rows(logits, oracles.row_lengths(case, MIXED, KEEP), side)
    expected = real_rows(case.model(**given).logits, given["attention_mask"])
    for row, of_all in zip(found, expected, strict=True):
        torch.testing.assert_close(row, of_all, rtol=1e-5, atol=1e-5)
    with apply_condense(case.model, KEEP, method=pick):
        assert not torch.allclose(case.model(**case.inputs(MIXED, side)).logits, logits, atol=1e-2)


def continued(case, rows=MIXED, **options):
    batch = case.inputs(rows)
    with apply_condense(case.model, KEEP, method=pick, positions="original"):
        whole = case.model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return whole[:, batch["input_ids"].shape[1] :]


def forced(case, given, tokens, **options):
    """Logits of each step, of a model that has to say ``tokens`` [B, n]: [B, n, V]."""
    length = given["input_ids"].shape[1]

    def say(row, ids):
        return [int(tokens[row, ids.shape[0] - length])]

    result = case.model.generate(
        **given,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        prefix_allowed_tokens_fn=say,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(result.logits, 1)


WITHOUT_CACHE, STATIC = {"use_cache": False}, {"cache_implementation": "static"}
STEPS = [(name, {}) for name in ONE_AXIS] + [(name, options) for name in SOME for options in (WITHOUT_CACHE, STATIC)]


@pytest.mark.parametrize(("name", "options"), STEPS, ids=str)
def test_each_step_goes_on_after_the_last_position(name, options):
    """The logits of five steps."""
    case = zoo.case(name)
    tokens = torch.randint(5, 80, (3, NEW))
    with apply_condense(case.model, KEEP, method=pick, positions="original"):
        found = forced(case, case.inputs(MIXED), tokens, **options)
    torch.testing.assert_close(found, by_stock(case, hidden(case, MIXED), tokens), rtol=1e-5, atol=1e-5)


def by_stock(case, given, tokens):
    """In one call for all tokens, without generate and without a cache; of PaliGemma, whose prompt sees itself in both
    directions, by generate."""
    if case.name == "paligemma":
        return forced(case, given, tokens)
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    more |= {name: torch.full_like(tokens, text) for name, (text, _) in case.family.types.items()}
    more["position_ids"] = given["position_ids"].amax(1, keepdim=True) + 1 + torch.arange(NEW)
    given = {**given, **{name: torch.cat([given[name], values], 1) for name, values in more.items()}}
    return case.model(**given).logits[:, -NEW - 1 : -1]


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_sequences_of_a_prompt_go_on_from_its_positions(name, options):
    case, rows = zoo.case(name), ((0,), (), (1,))
    with language_model_positions(case) as seen:
        found = continued(case, rows, **options)
    last = compact_of(case, rows).amax(1) + (name == "paligemma")  # which counts from 1
    each = last.repeat_interleave(len(seen[-1]) // 3)
    assert torch.equal(seen[-1][:, -1], each + NEW - 1)
    if "num_beams" in options and name != "exaone4_5":  # whose generate drops the positions of the oracle
        given = hidden(case, rows)
        expected = case.model.generate(**given, max_new_tokens=NEW, do_sample=False, **options)
        assert torch.equal(found, expected[:, given["input_ids"].shape[1] :])


def compact_of(case, rows, side="left"):
    return oracles.compact(case.inputs(rows, side)["attention_mask"])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_forward_goes_on_from_its_own_cache(name, static):
    """Without position_ids, which the stock model would count by the length of the cache."""
    case, steps = zoo.case(name), torch.randint(5, 80, (3, NEW))
    batch = case.inputs(MIXED)
    cache = {CACHE: transformers.StaticCache(config=case.model.config.get_text_config(), max_cache_len=80)}
    with apply_condense(case.model, KEEP, method=pick, positions="original"), language_model_positions(case) as seen:
        output = case.model(**batch, use_cache=True, **(cache if static else {}))
        one, two = copy.deepcopy(output[CACHE]), output[CACHE]
        for token in steps.split(1, 1):
            case.model(input_ids=token, **{CACHE: one})
        case.model(inputs_embeds=case.model.get_input_embeddings()(steps), **{CACHE: two})
    expected = compact_of(case, MIXED).amax(1, keepdim=True) + 1 + torch.arange(NEW)
    assert torch.equal(torch.cat(seen[1:-1], 1), expected) and torch.equal(seen[-1], expected)


def test_a_cache_that_was_reset_is_of_the_next_prompt():
    case = zoo.case("llava")
    text = case.inputs(((), ()))
    cache = transformers.StaticCache(config=case.model.config.get_text_config(), max_cache_len=80)
    expected = case.model(**text).logits
    with apply_condense(case.model, KEEP, positions="original"):
        case.model(**case.inputs(((0,), (1,))), **{CACHE: cache})
        cache.reset()
        torch.testing.assert_close(case.model(**text, **{CACHE: cache}).logits, expected)
        alone = case.model(**case.inputs(((0,), (1,)))).logits
        cache.reset()
        torch.testing.assert_close(case.model(**case.inputs(((0,), (1,))), **{CACHE: cache}).logits, alone)


@pytest.mark.parametrize(("text", "config"), [("opt", dict(ffn_dim=64, word_embed_proj_dim=64)), ("gpt2", {})])
def test_positions_that_were_learned(text, config):
    """They are absolute: padding counts for nothing."""
    case = llava_on(text, **config)
    given, tokens = hidden(case, MIXED), torch.randint(5, 80, (3, NEW))
    with apply_condense(case.model, KEEP, method=pick, positions="original"):
        found = forced(case, case.inputs(MIXED), tokens)
    torch.testing.assert_close(found, by_stock(case, given, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["forward", "generate"])
def test_position_ids_of_the_caller_stay_what_they_are(where):
    case = zoo.case("llava")
    batch = case.inputs(MIXED)
    own = 3 * compact_of(case, MIXED) + 7
    for positions in ("compact", "original"):
        with apply_condense(case.model, KEEP, method=pick, positions=positions), language_model_positions(case) as seen:
            if where == "forward":
                case.model(**batch, position_ids=own)
            else:
                case.model.generate(**batch, position_ids=own, max_new_tokens=2, do_sample=False)
        stays = hidden(case, MIXED)["attention_mask"] == 1
        for row, whole, kept in zip(seen[0], own, stays, strict=True):
            assert torch.equal(row[len(row) - int(kept.sum()) :], whole[kept])
        assert len(seen) == 1 or torch.equal(seen[1], own[:, -1:] + 1)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", [*ONE_AXIS, *MROPE])
def test_all_tokens_are_the_stock_model_bit_for_bit(name, positions):
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    expected = case.model(**batch).logits
    tokens = case.model.generate(**batch, max_new_tokens=2, do_sample=False)
    with apply_condense(case.model, 1.0, method="topk", positions=positions):
        torch.testing.assert_close(case.model(**batch).logits, expected, rtol=0, atol=0)
        assert torch.equal(case.model.generate(**batch, max_new_tokens=2, do_sample=False), tokens)


@pytest.mark.parametrize("name", MROPE)
def test_places_in_the_picture_stay_in_either_case(name):
    case = zoo.case(name)
    found = []
    for positions in ("compact", "original"):
        with apply_condense(case.model, KEEP, positions=positions):
            found.append(case.model(**case.inputs(MIXED)).logits)
    assert torch.equal(*found)


def test_labels_are_those_of_the_tokens_at_their_places():
    case = zoo.case("llava")
    batch = case.inputs(MIXED, labels=True)
    given = hidden(case, MIXED)
    seen = torch.where(given["attention_mask"] == 1, batch["labels"], -100)
    with apply_condense(case.model, KEEP, method=pick, positions="original"):
        found = case.model(**batch).loss
    logits = real_rows(case.model(**given).logits, given["attention_mask"])
    labels = real_rows(seen, given["attention_mask"])
    logits, labels = torch.cat([row[:-1] for row in logits]), torch.cat([row[1:] for row in labels])
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, labels))


# What is refused


@pytest.mark.parametrize(
    ("model", "positions", "words"),
    [
        (
            lambda: model_of("llava"),
            "absolute",
            "positions: expected 'compact' or 'original', got 'absolute'. Remedy: ",
        ),
        (lambda: model_of("llava"), None, "positions: expected 'compact' or 'original', got None. Remedy: "),
        (lambda: model_of("llava_next"), "original", "positions: expected 'compact', as the crops of .*Remedy: leave"),
        (lambda: llava_on("bloom").model, "original", "positions: .* BloomModel takes no position_ids.*Remedy: leave"),
    ],
)
def test_refused(model, positions, words):
    model = model()
    with left_as_it_was(model), pytest.raises(ValueError, match=words):
        apply_condense(model, KEEP, positions=positions)
