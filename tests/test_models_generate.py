"""model.generate with condensed images, against the stock model's where dropped placeholders are hidden."""

import copy

import oracles
import pytest
import torch
import zoo
from oracles import language_model_positions, pick, row_lengths
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo import MIXED

from condense_kernels.models import apply_condense, generation

KEEP, NEW = 5, 6
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # renamed in transformers 5.24
IGNORING = ("exaone4_5",)  # position_ids, in generate
HIDDEN = [family.name for family in zoo.FAMILIES if not family.recurrent and family.name not in IGNORING]
MROPE = [family.name for family in zoo.FAMILIES if family.mrope]
SOME = ["llava", "llava_next", "gemma3", "qwen2_5_vl"]  # for what is the same code for all
ONE_EACH = ((0,), (), (1,))


def selection(case, rows):
    return oracles.best(oracles.scores(case, rows, case.inputs(rows)), KEEP)


def continued(case, rows=MIXED, **options) -> torch.Tensor:
    """The new tokens, behind the prompt as it was given."""
    batch = case.inputs(rows)
    with apply_condense(case.model, KEEP, method=pick):
        whole = case.model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})
    prompt = batch["input_ids"].repeat_interleave(len(whole) // len(rows), 0)
    assert torch.equal(whole[:, : prompt.shape[1]], prompt)
    return whole[:, prompt.shape[1] :]


def continued_by_stock(case, rows, **options) -> torch.Tensor:
    hidden = oracles.masked(case, rows, "left", selection(case, rows))
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return case.model.generate(**hidden, **options)[:, hidden["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", HIDDEN)
def test_greedy_tokens_are_those_of_the_stock_model_with_the_others_hidden(name):
    case = zoo.case(name)
    assert torch.equal(continued(case), continued_by_stock(case, MIXED))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_greedy_tokens_are_those_of_prompts_that_never_had_the_others(name):
    """Recurrent layers included; each row alone, which also says that a batch is its rows."""
    case = zoo.case(name)
    found = continued(case)
    for tokens, alone in zip(found, oracles.removed(case, MIXED, selection(case, MIXED)), strict=True):
        expected = case.model.generate(**alone, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(tokens, expected[0, alone["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_all_tokens_are_the_stock_model(name):
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    expected = case.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    with apply_condense(case.model, 1.0, method=pick):
        assert torch.equal(case.model.generate(**batch, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_cache_changes_nothing(name):
    case = zoo.case(name)
    assert torch.equal(continued(case, use_cache=False), continued(case))


@pytest.mark.parametrize("name", HIDDEN)
def test_beams_are_those_of_the_stock_model(name):
    case = zoo.case(name)
    options = dict(num_beams=3, num_return_sequences=2)
    assert torch.equal(continued(case, ONE_EACH, **options), continued_by_stock(case, ONE_EACH, **options))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_each_sequence_of_a_row_has_the_images_in_their_order(name):
    """Sampling from one token is greedy: all sequences of a row are the same."""
    case = zoo.case(name)
    rows = MIXED if images_stay_in_order(case) else ONE_EACH
    expected = continued(case, rows).repeat_interleave(3, 0)
    assert torch.equal(continued(case, rows, do_sample=True, top_k=1, num_return_sequences=3), expected)


def images_stay_in_order(case) -> bool:
    """transformers 5.18 repeats images one by one, A A B B, where a row has A B. Entries of a list can be rows
    instead; where the model wants one tensor of all images, nothing can be done."""
    batch = case.inputs(((1, 2),))
    output = case.base.get_image_features(**oracles.encoder_inputs(case, batch), return_dict=True)
    if not isinstance(output.pooler_output, torch.Tensor):
        return True
    before = output.pooler_output
    case.model._expand_multimodal_outputs(batch["input_ids"], {"image": output}, expand_size=2)
    return torch.equal(output.pooler_output, torch.cat([before, before]))


@pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("name", ["gemma3", "internvl"])
def test_images_of_a_row_that_transformers_would_mix_up_are_refused(name, option, monkeypatch):
    monkeypatch.setattr(generation, "release", lambda: (5, 18))
    case = zoo.case(name)
    options = {"max_new_tokens": 1, "do_sample": True, option: 2}
    with apply_condense(case.model, KEEP):
        case.model.generate(**case.inputs(ONE_EACH), **options)
        with pytest.raises(ValueError, match=f"^{option}: expected 1 on transformers .*, got 2. Remedy: "):
            case.model.generate(**case.inputs(MIXED), **options)


@pytest.mark.parametrize("name", SOME)
def test_a_seed_draws_what_it_draws_of_the_stock_model(name):
    case = zoo.case(name)
    options = dict(do_sample=True, temperature=0.7, num_return_sequences=2)
    torch.manual_seed(5)
    found = continued(case, ONE_EACH, **options)
    torch.manual_seed(5)
    assert torch.equal(found, continued_by_stock(case, ONE_EACH, **options))
    torch.manual_seed(6)
    assert not torch.equal(found, continued(case, ONE_EACH, **options))


@pytest.mark.parametrize("name", SOME)
def test_a_static_cache(name):
    case = zoo.case(name)
    assert torch.equal(continued(case, cache_implementation="static"), continued(case))


@pytest.mark.parametrize("name", MROPE)
def test_positions_go_on_after_the_last_one_of_the_whole_prompt(name):
    """As the stock model's do, whose prompt has all tokens: on M-RoPE's three axes; the fourth counts what is left."""
    case = zoo.case(name)
    with language_model_positions(case) as stock:
        case.model.generate(**case.inputs(MIXED), max_new_tokens=NEW, do_sample=False)
    with language_model_positions(case) as found:
        continued(case)
    assert found[0].shape[-1] == max(row_lengths(case, MIXED, KEEP)) < stock[0].shape[-1]
    for step, (here, there) in enumerate(zip(found[1:], stock[1:], strict=True)):
        assert torch.equal(here[-3:], there[-3:])
        expected = torch.tensor(row_lengths(case, MIXED, KEEP)) + step
        assert torch.equal(here[0, :, 0], expected) and len(here) == 4


def test_forward_goes_on_from_its_own_cache():
    """By rope_deltas, which is all that the model then has: in the whole prompt the next token has the same place."""
    case = zoo.case("qwen2_5_vl")
    batch = case.inputs(((0,),))
    with apply_condense(case.model, KEEP, method=pick), language_model_positions(case) as seen:
        expected = case.model.generate(**batch, max_new_tokens=2, do_sample=False, suppress_tokens=None)[0, -2:]
        first = case.model(**batch, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        second = case.model(input_ids=token, **{CACHE: first[CACHE]})
    assert torch.equal(torch.cat([token, second.logits.argmax(-1)], 1)[0], expected)
    assert int(seen[-1].max()) == int(oracles.mrope(case, batch).max()) + 1


# What callers count


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_lengths_count_the_prompt_as_it_was_given(name, where):
    case = zoo.case(name)
    model = copy.deepcopy(case.model)
    batch = case.inputs(MIXED)
    lengths = dict(max_length=batch["input_ids"].shape[1] + NEW, min_length=batch["input_ids"].shape[1] + 2)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, **lengths)
    given = {"argument": {"do_sample": False, **lengths}, "config": {"generation_config": config}, "model": {}}[where]
    if where == "model":
        model.generation_config = config
    with apply_condense(model, KEEP, method=pick):
        whole = model.generate(**batch, **given)
    assert whole.shape[1] == lengths["max_length"]
    assert torch.equal(whole[:, -NEW:], continued(case))
    assert config.max_length == lengths["max_length"]


def test_min_length_holds_the_end_back():
    case = zoo.case("llava")
    batch = case.inputs(((0,),))
    end = int(continued(case, ((0,),))[0, 1])
    length = batch["input_ids"].shape[1]
    with apply_condense(case.model, KEEP, method=pick):
        short = case.model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
        long = case.model.generate(
            **batch, max_length=length + NEW, min_length=length + 4, do_sample=False, eos_token_id=end
        )
    assert short.shape[1] == length + 2 and long.shape[1] >= length + 4


@pytest.mark.parametrize("name", SOME)
def test_without_any_length_as_many_tokens_as_of_the_stock_model(name):
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    expected = case.model.generate(**batch, do_sample=False).shape
    with apply_condense(case.model, KEEP, method=pick):
        assert case.model.generate(**batch, do_sample=False).shape == expected


@pytest.mark.parametrize("beams", [1, 2])
def test_a_result_with_scores_has_the_prompt_too(beams):
    case = zoo.case("llava")
    batch = case.inputs(MIXED)
    options = dict(max_new_tokens=NEW, do_sample=False, num_beams=beams)
    with apply_condense(case.model, KEEP, method=pick):
        whole = case.model.generate(**batch, **options)
        result = case.model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(result.sequences, whole) and len(result.scores) == NEW


@pytest.mark.parametrize("name", SOME)
def test_prompts_go_by_place_and_without_a_mask(name):
    """The stock model takes padding for masked where no mask is given."""
    case = zoo.case(name)
    expected = continued(case)
    batch = case.inputs(MIXED)
    prompt = batch.pop("input_ids")
    with apply_condense(case.model, KEEP, method=pick):
        by_place = case.model.generate(prompt, **batch, max_new_tokens=NEW, do_sample=False)
        del batch["attention_mask"]
        unmasked = case.model.generate(input_ids=prompt, **batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(by_place[:, -NEW:], expected) and torch.equal(unmasked[:, -NEW:], expected)


def test_a_streamer_gets_the_new_tokens():
    case = zoo.case("llava")
    got = []

    class Streamer(BaseStreamer):
        def put(self, value):
            got.append(value)

        def end(self):
            got.append(None)

    tokens = continued(case, ((0,),), streamer=Streamer())
    assert torch.equal(torch.cat([value.flatten() for value in got[1:-1]]), tokens[0]) and got[-1] is None


def test_text_alone_goes_to_the_stock_model():
    case = zoo.case("llava")
    batch = case.inputs(((), ()))
    expected = case.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    with apply_condense(case.model, KEEP):
        assert torch.equal(case.model.generate(**batch, max_new_tokens=NEW, do_sample=False), expected)
