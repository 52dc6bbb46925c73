"""Ways in which a condensed model is used: wrapped, pickled, by several threads, under gradient checkpointing, with
what else a caller hands to forward and generate."""

import contextlib
import copy
import functools
import inspect
import pickle
import threading

import oracles
import pytest
import torch
import transformers
import zoo
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo import MIXED

from condense_kernels.models import apply_condense

KEEP = 5
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # renamed in transformers 5.24


def model_of(name: str) -> transformers.PreTrainedModel:
    """One of a test's own."""
    return copy.deepcopy(zoo.case(name).model)


class Adapted(torch.nn.Module):
    """As PEFT has it: the model within is called by its methods, past the hooks of torch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)

    def generate(self, **kwargs):
        return self.inner.generate(**kwargs)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_model_within_another(name):
    model, batch = model_of(name), zoo.case(name).inputs(MIXED)
    outer = Adapted(model)
    with torch.no_grad():
        stock = model(**batch).logits
        with apply_condense(model, KEEP) as handle:
            expected = model(**batch).logits
            assert torch.equal(outer(**batch).logits, expected) and expected.shape[1] < stock.shape[1]
            handle.counts = []
            outer.generate(**batch, max_new_tokens=1)
            assert [kept for _, kept in handle.report().images] == [KEEP] * 3
        assert torch.equal(outer(**batch).logits, stock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_others_have_put_around(when):
    """As accelerate does for its hooks and for mixed precision: before, it is called; after, it stays, and what has
    been removed lets through."""
    model, batch, calls = model_of("llava"), zoo.case("llava").inputs(MIXED), []

    def put_around():
        inner = model.forward

        @functools.wraps(inner)
        def forward(*args, **kwargs):
            calls.append(kwargs.keys())
            return inner(*args, **kwargs)

        model.forward = forward

    with torch.no_grad():
        stock = model(**batch).logits
        if when == "before":
            put_around()
        handle = apply_condense(model, KEEP)
        if when == "after":
            put_around()
        around = model.forward
        assert model(**batch).logits.shape[1] < stock.shape[1] and len(calls) == 1
        handle.remove()
        assert torch.equal(model(**batch).logits, stock) and len(calls) == 2
        assert when == "after" or model.forward is not around
        assert apply_condense(model, KEEP).applied


def test_methods_look_like_those_of_the_model():
    """transformers goes by their signatures."""
    model = model_of("llava")
    stock = {name: inspect.signature(getattr(model, name)) for name in ("forward", "generate")}
    with apply_condense(model, KEEP):
        assert {name: inspect.signature(getattr(model, name)) for name in stock} == stock
        with pytest.raises(ValueError, match="not used by the model: \\['colour'\\]"):
            model.generate(**zoo.case("llava").inputs(MIXED), colour=3)


@pytest.mark.parametrize("name", ["llava", "gemma4"])
def test_a_pickled_model_is_condensed_too(name):
    case = zoo.case.__wrapped__(name)  # a new one: transformers' own hooks, from the first call on, cannot be pickled
    batch = case.inputs(MIXED)
    apply_condense(case.model, KEEP)
    twin = pickle.loads(pickle.dumps(case.model))
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, case.model(**batch).logits)
        twin.condense_handle.counts = []
        options = dict(max_new_tokens=2, do_sample=False)
        assert torch.equal(twin.generate(**batch, **options), case.model.generate(**batch, **options))
        assert [kept for _, kept in twin.condense_handle.counts] == [KEEP] * 3
        twin.condense_handle.remove()
        assert twin(**batch).logits.shape[1] > case.model(**batch).logits.shape[1]


def test_what_is_removed_of_a_copy_stays_on_the_model():
    model, batch = model_of("llava"), zoo.case("llava").inputs(MIXED)
    apply_condense(model, KEEP)
    twin = copy.deepcopy(model)
    twin.condense_handle.remove()
    assert twin(**batch).logits.shape[1] > model(**batch).logits.shape[1]


def test_what_is_saved_is_the_stock_model(tmp_path):
    model, batch = model_of("llava"), zoo.case("llava").inputs(MIXED)
    stock = model(**batch).logits
    with apply_condense(model, KEEP):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, stock)


@pytest.mark.parametrize("name", ["llava", "gemma4", "internvl", "mistral3"])
def test_gradient_checkpointing_changes_no_gradient(name):
    batch, grads = zoo.case(name).inputs(MIXED, labels=True), []
    for checkpointing in (False, True):
        model = model_of(name).requires_grad_().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with apply_condense(model, KEEP):
            model(**batch, use_cache=False).loss.backward()
        grads.append({path: weight.grad for path, weight in model.named_parameters() if weight.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for path, grad in grads[0].items():
        torch.testing.assert_close(grads[1][path], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_generate_keeps_no_graph_of_the_encoder(name):
    case, model, seen = zoo.case(name), model_of(name).requires_grad_(), []
    tower = model.model.get_encoder(modality="image")
    tower.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state.requires_grad))
    with apply_condense(model, KEEP):
        model.generate(**case.inputs(MIXED), max_new_tokens=1)
        model(**case.inputs(MIXED))
    assert seen == [False, True]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_what_a_trainer_hands_on(name):
    case, batch = zoo.case(name), zoo.case(name).inputs(MIXED, labels=True)
    with apply_condense(case.model, KEEP):
        expected = case.model(**batch).loss
        count = int((batch["labels"] != -100).sum())
        found = case.model(**batch, num_items_in_batch=torch.tensor(2 * count)).loss
    torch.testing.assert_close(found, expected / 2)


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "gemma4", "internvl"])
def test_several_threads_get_what_one_gets(name):
    model, batch = model_of(name), zoo.case(name).inputs(MIXED)
    found, errors = [], []

    def calls():
        try:
            with torch.no_grad():
                found.extend(model(**batch).logits for _ in range(4))
        except Exception as error:
            errors.append(error)

    with apply_condense(model, KEEP):
        expected = model(**batch).logits
        threads = [threading.Thread(target=calls, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not errors and len(found) == 16
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_the_encoder_gets_what_forward_does_not_name(name):
    case = zoo.case(name)
    tower, batch, seen = case.base.get_encoder(modality="image"), case.inputs(MIXED), []
    hook = tower.register_forward_hook(lambda _, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    with apply_condense(case.model, KEEP), contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        found = case.model(**batch, output_hidden_states=True)
    ((kwargs, output),) = seen
    assert kwargs["output_hidden_states"] and len(output.hidden_states) == 4
    assert len(found.hidden_states) > 0 and found.hidden_states[0].shape[1] == found.logits.shape[1]


def test_images_larger_than_the_encoder_was_made_for():
    """LLaVA's encoder interpolates its position embeddings, if it is told to."""
    case = zoo.case("llava")
    pixels = zoo.draw(0, 1, 3, 32, 32)
    prompt = torch.tensor([[7, *[zoo.IMAGE] * 64, 8]])
    features = case.base.get_image_features(pixels, interpolate_pos_encoding=True, return_dict=True)
    expected = case.model(input_ids=prompt, mm_encoder_outputs={"image": features}).logits
    with apply_condense(case.model, 1.0, method="topk") as handle:
        found = case.model(input_ids=prompt, pixel_values=pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(found, expected)
    assert handle.report().images == ((64, 64),)


@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("llava_next", "image_sizes"),
        ("mistral3", "image_sizes"),
        ("gemma4", "image_position_ids"),
        ("qwen2_vl", "image_grid_thw"),
        ("qwen3_vl", "mm_token_type_ids"),
        ("glm4v", "mm_token_type_ids"),
    ],
)
def test_inputs_that_the_processor_returns_are_missed(name, missing, call):
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    del batch[missing]
    words = f"^{missing}: expected .* got None. Remedy: "
    with apply_condense(case.model, KEEP), pytest.raises(ValueError, match=words):
        getattr(case.model, call)(**batch)


@pytest.mark.parametrize("beams", [1, 2])
def test_criteria_and_processors_see_the_prompt_as_it_was_given(beams):
    case = zoo.case("llava")
    batch = case.inputs(MIXED)
    prompt, seen = batch["input_ids"], []

    def two_new_tokens(ids, scores, **_):
        seen.append(ids)
        return torch.full((len(ids),), ids.shape[1] >= prompt.shape[1] + 2)

    def see(ids, scores):
        seen.append(ids)
        return scores

    def allowed(row, ids):
        assert torch.equal(ids[: prompt.shape[1]], prompt[row])
        return list(zoo.TEXT)

    with apply_condense(case.model, KEEP):
        options = dict(max_new_tokens=5, do_sample=False, num_beams=beams)
        free = case.model.generate(**batch, **options)
        whole = case.model.generate(
            **batch, **options, stopping_criteria=[two_new_tokens], logits_processor=[see],
            prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip
    assert whole.shape[1] == prompt.shape[1] + 2 and len(seen) == 4 and free.shape[1] == prompt.shape[1] + 5
    for ids in seen:
        assert torch.equal(ids[:, : prompt.shape[1]], prompt.repeat_interleave(len(ids) // len(prompt), 0))


def test_criteria_of_transformers_keep_what_they_say():
    """An EosTokenCriteria of the caller's is found by its attribute: what ends is padded."""
    case = zoo.case("llava")
    batch = case.inputs(((0,), (1,)))
    options = dict(max_new_tokens=6, do_sample=False)
    with apply_condense(case.model, KEEP, method=oracles.pick):
        end = int(case.model.generate(**batch, **options)[0, batch["input_ids"].shape[1]])
        expected = case.model.generate(**batch, **options, eos_token_id=end)
        criteria = [transformers.generation.EosTokenCriteria(end)]
        assert torch.equal(case.model.generate(**batch, **options, stopping_criteria=criteria), expected)


def test_a_config_of_lengths_is_not_taken_apart(caplog):
    """transformers warns of a config beside arguments, and will refuse both."""
    case = zoo.case("llava")
    batch = case.inputs(MIXED)
    config = copy.deepcopy(case.model.generation_config)
    config.update(max_length=batch["input_ids"].shape[1] + 3, do_sample=False)
    handler, logger = caplog.handler, transformers.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        with apply_condense(case.model, KEEP):
            assert case.model.generate(**batch, generation_config=config).shape[1] == config.max_length
    finally:
        logger.removeHandler(handler)
    assert "deprecated" not in caplog.text and config.max_length == batch["input_ids"].shape[1] + 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"positions": "original", "proportional": True}], ids=str)
def test_a_compiled_model_is_condensed_too(options):
    """In pieces, as the prompt is rewritten by its values; a step of decoding is one graph."""
    model, batch = model_of("llava"), zoo.case("llava").inputs(MIXED)
    with torch.no_grad(), apply_condense(model, KEEP, **options):
        expected = model(**batch, use_cache=True)
        token = expected.logits[:, -1:].argmax(-1)
        uncompiled = model(input_ids=token, **{CACHE: copy.deepcopy(expected[CACHE])}).logits
        decode = torch.compile(model.__call__, backend="eager", fullgraph=True)
        torch.testing.assert_close(decode(input_ids=token, **{CACHE: expected[CACHE]}).logits, uncompiled)
        torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).logits, expected.logits)
