"""What apply_condense does to a model: nothing that remove() does not undo, and nothing at all where it refuses."""

import contextlib
import copy

import oracles
import pytest
import torch
import transformers
import zoo
from oracles import pick
from transformers.modeling_outputs import CausalLMOutputWithPast
from zoo import MIXED

from condense_kernels.models import apply_condense

KEEP = 5


def model_of(name: str) -> transformers.PreTrainedModel:
    """One of a test's own."""
    return copy.deepcopy(zoo.case(name).model)


def state_of(model) -> dict:
    """All that could have been changed: attributes and hooks of each module, configs and what they say, weights."""
    state = {}
    for path, module in model.named_modules():
        attributes = {name: id(value) for name, value in vars(module).items() if not name.endswith("_hooks")}
        attributes.pop("rope_deltas", None)  # the stock model writes them at each call
        hooks = {name: list(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")}
        config = getattr(module, "config", None)
        said = (config.to_json_string(use_diff=False), config._attn_implementation) if config is not None else None
        state[path] = type(module), getattr(module.forward, "__func__", module.forward), attributes, hooks, said
    state["generation_config"] = (
        model.generation_config.to_json_string() if hasattr(model, "generation_config") else None
    )
    return state


def bits_of(model) -> dict:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@contextlib.contextmanager
def left_as_it_was(model):
    state, weights = state_of(model), bits_of(model)
    yield
    assert state_of(model) == state
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_remove_gives_the_model_back_as_it_was(name):
    case, model = zoo.case(name), model_of(name)
    batch = case.inputs(MIXED)
    with torch.no_grad():
        expected = model(**batch).logits
        with left_as_it_was(model):
            handle = apply_condense(model, KEEP)
            model(**batch)
            model.generate(**batch, max_new_tokens=2, do_sample=False)
            handle.remove()
            handle.remove()  # does nothing
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_end_of_a_block_and_an_exception_in_it_remove(name):
    case, model = zoo.case(name), model_of(name)
    model(**case.inputs(MIXED))

    def breaks_off():
        with apply_condense(model, KEEP):
            model(**case.inputs(MIXED))
            raise ZeroDivisionError

    with left_as_it_was(model), pytest.raises(ZeroDivisionError):
        breaks_off()


@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_an_exception_within_a_call_leaves_nothing_behind(name, call):
    case, model = zoo.case(name), model_of(name)
    batch = case.inputs(MIXED)
    model(**batch)
    calls = []

    def fails_once(features, scores, keep, grid):
        calls.append(keep)
        if len(calls) == 1:
            raise ZeroDivisionError
        return pick(features, scores, keep, grid)

    with left_as_it_was(model), apply_condense(model, KEEP, method=fails_once):
        with left_as_it_was(model), pytest.raises(ZeroDivisionError):
            getattr(model, call)(**batch)
        again = model(**batch).logits
    with apply_condense(model, KEEP, method=pick):
        assert torch.equal(model(**batch).logits, again)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "gemma4", "qwen2_5_vl"])
def test_wherever_a_call_breaks_off_the_next_one_is_right(name, call, error):
    """In the encoder before the layer that is listened to, in it, after it, in the projector, in the language model."""
    case, model = zoo.case(name), model_of(name)
    batch = case.inputs(MIXED)
    attention = oracles.ATTENTION[name]
    tower, projector = attention.partition(".")[0], {"gemma4": "embed_vision", "qwen2_5_vl": "visual.merger"}
    parts = [tower, attention, projector.get(name, "multi_modal_projector"), "language_model"]

    def breaks_off(*_):
        raise error

    with torch.no_grad(), apply_condense(model, KEEP):
        expected = model(**batch).logits
        for part in parts:
            for register in ("register_forward_pre_hook", "register_forward_hook"):
                with left_as_it_was(model):
                    hook = getattr(model.model.get_submodule(part), register)(breaks_off)
                    with pytest.raises(error):
                        getattr(model, call)(**batch)
                    hook.remove()
                assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_copy_is_condensed_by_itself(name):
    case, model = zoo.case(name), model_of(name)
    batch = case.inputs(MIXED)
    handle = apply_condense(model, KEEP, method=pick)
    expected = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
    twin = copy.deepcopy(model)
    handle.remove()
    for weight in model.parameters():
        weight.data.zero_()
    assert torch.equal(twin(**batch).logits, expected)
    assert torch.equal(twin.generate(**batch, max_new_tokens=3, do_sample=False), tokens)
    with pytest.raises(ValueError, match="model:"):
        apply_condense(twin, KEEP)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_model_without_a_head(name):
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    with torch.no_grad(), apply_condense(case.model, KEEP):
        expected = case.model(**batch, output_hidden_states=True).hidden_states[-1]
    with torch.no_grad(), apply_condense(case.base, KEEP):
        assert torch.equal(case.base(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen3_vl", "gemma4"])
def test_the_encoder_learns_by_the_loss(name):
    case, model = zoo.case(name), model_of(name).requires_grad_()
    with apply_condense(model, KEEP):
        model(**case.inputs(MIXED, labels=True)).loss.backward()
    grads = {path: weight.grad for path, weight in model.model.named_parameters() if weight.grad is not None}
    tower = [grad for path, grad in grads.items() if path.startswith(("vision", "visual"))]
    assert len(tower) > 20 and all(grad.isfinite().all() for grad in grads.values())
    assert sum(float(grad.abs().sum()) for grad in tower) > 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_half_precision_and_inference_mode(name):
    case, model = zoo.case(name), model_of(name).to(torch.bfloat16)
    batch = case.inputs(MIXED)
    with torch.inference_mode(), apply_condense(model, KEEP):
        logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_arguments_by_place():
    case = zoo.case("llava")
    batch = case.inputs(MIXED)
    with torch.no_grad(), apply_condense(case.model, KEEP):
        expected = case.model(**batch).logits
        assert torch.equal(
            case.model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).logits, expected
        )


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_report_says_what_was_hooked_and_what_became_of_each_image(name):
    case = zoo.case(name)
    counts = [len(scores) for scores in oracles.scores(case, MIXED, case.inputs(MIXED))]
    with torch.no_grad(), apply_condense(case.model, KEEP) as handle:
        before = str(handle.report())
        case.model(**case.inputs(MIXED))
        report = handle.report()
    module = oracles.ATTENTION[name].partition(".")[2]
    assert type(case.model).__name__ in before and module in before
    assert report.images == tuple((count, KEEP) for count in counts) and module in report.scores
    assert f"{counts[0]} -> {KEEP}" in str(report)
    assert min(report.encoder_ms, report.scores_ms, report.operator_ms) > 0


# What is refused


def text_only() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def marked(**attributes) -> transformers.PreTrainedModel:
    model = model_of("llava")
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def unheard_of(like: str = "gemma3") -> transformers.PreTrainedModel:
    model = model_of(like)
    model.config.model_type = "unheard_of"
    return model


def without_attention() -> transformers.PreTrainedModel:
    """Of transformers: timm's has no config, for one."""
    model = unheard_of()
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn = torch.nn.MultiheadAttention(32, 4)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "model: .* got Linear.*Remedy: "),
        (text_only, {}, ValueError, "model: .*images.* got LlamaForCausalLM.*Remedy: "),
        (unheard_of, {}, ValueError, "model: .*'unheard_of'.*Remedy: family='generic'"),
        (lambda: marked(hf_quantizer=object()), {}, ValueError, "model: .*quanti.*Remedy: "),
        (lambda: marked(is_quantized=True), {}, ValueError, "model: .*quanti.*Remedy: "),
        (lambda: marked(hf_device_map={"model": 0, "lm_head": "cpu"}), {}, ValueError, "model: .*device.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": 0}, ValueError, "num_tokens: .* got 0.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": -3}, ValueError, "num_tokens: .* got -3.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": 1.5}, ValueError, "num_tokens: .* got 1.5.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": 0.0}, ValueError, "num_tokens: .* got 0.0.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": True}, TypeError, "num_tokens: .* got bool.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": "64"}, TypeError, "num_tokens: .* got str.*Remedy: "),
        (lambda: model_of("llava"), {"num_tokens": None}, TypeError, "num_tokens: .* got NoneType.*Remedy: "),
        (lambda: model_of("llava"), {"method": "fastest"}, ValueError, "method: .*'condensevlm'.*'fastest'.*Remedy: "),
        (lambda: model_of("llava"), {"method": 3}, (TypeError, ValueError), "method: .*3.*Remedy: "),
        (lambda: model_of("llava"), {"background_ratio": 2.0}, ValueError, "background_ratio: .* got 2.0"),
        (lambda: model_of("llava"), {"suppression": -1.0}, ValueError, "suppression: .*-1"),
        (lambda: model_of("llava"), {"background_suppression": -1.0}, ValueError, "background_suppression: .*-1"),
        (
            lambda: model_of("llava"),
            {"background_suppression": 0.5, "method": "topk"},
            ValueError,
            "background_suppression: expected the default, None, as method='topk' has no such option, got 0.5.",
        ),
        (lambda: model_of("llava"), {"spatial_weight": float("nan")}, ValueError, "spatial_weight: .*nan"),
        (lambda: model_of("llava"), {"backend": "cuda"}, ValueError, "backend: .*'cuda'"),
        (lambda: model_of("llava"), {"family": "alpaca"}, ValueError, "family: .*llava.*'alpaca'"),
        (lambda: model_of("llava"), {"family": "generic"}, ValueError, "family: .*'llava'.*'generic'.*Remedy: "),
        (without_attention, {"family": "gemma3"}, ValueError, "model: .*attention.* in SiglipVisionModel.*Remedy: "),
    ],
)
def test_refused_at_once(model, options, error, words):
    model = model()
    before = state_of(model) if isinstance(model, transformers.PreTrainedModel) else None
    with pytest.raises(error, match=words):
        apply_condense(model, **{"num_tokens": KEEP, **options})
    assert before is None or state_of(model) == before


def test_a_model_is_condensed_once():
    model = model_of("llava")
    first = apply_condense(model, KEEP)
    with left_as_it_was(model), pytest.raises(ValueError, match="model: .*Remedy: handle.remove()"):
        apply_condense(model, KEEP)
    first.remove()
    second = apply_condense(model, KEEP + 1)
    first.remove()  # not its own any more
    batch = zoo.case("llava").inputs(MIXED)
    model(**batch)
    assert second.report().images == ((36, KEEP + 1),) * 3


def no_placeholder(batch):
    batch["input_ids"][0, (batch["input_ids"][0] == zoo.IMAGE).nonzero()[0]] = 7


def one_more(batch):
    batch["input_ids"][0, -1] = zoo.IMAGE


def embedded(batch):
    batch["inputs_embeds"] = torch.randn(*batch.pop("input_ids").shape, 64)


def shifted(batch):
    batch["shift_labels"] = batch["input_ids"].roll(-1)


def masked_by_query(batch):
    batch["attention_mask"] = batch["attention_mask"][:, None, None]


@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize(
    ("spoil", "keep", "words"),
    [
        (no_placeholder, KEEP, "input_ids: expected 108 .* got 107.*Remedy: "),
        (one_more, KEEP, "input_ids: expected 108 .* got 109.*Remedy: "),
        (embedded, KEEP, "input_ids: .*Remedy: "),
        (masked_by_query, KEEP, "attention_mask: .*Remedy: "),
        (shifted, KEEP, "shift_labels: .*Remedy: labels"),
        (lambda batch: batch.update(mm_encoder_outputs={"image": 1}), KEEP, "mm_encoder_outputs: .*Remedy: "),
        (lambda batch: None, 37, "num_tokens: .* 36 .* got 37.*Remedy: "),
    ],
)
def test_refused_in_a_call(spoil, keep, words, call):
    model, batch = model_of("llava"), zoo.case("llava").inputs(MIXED)
    model(**batch)
    with left_as_it_was(model), apply_condense(model, keep), left_as_it_was(model):
        spoilt = {name: value.clone() for name, value in batch.items()}
        spoil(spoilt)
        with pytest.raises(ValueError, match=words):
            getattr(model, call)(**spoilt)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda result: None, TypeError, "method: .*Condensed.* got NoneType.*Remedy: "),
        (lambda result: result.merged, TypeError, "method: .*Condensed.* got Tensor.*Remedy: "),
        (lambda result: result._replace(merged=result.merged[:, 1:]), ValueError, "method: .*merged.*5.*Remedy: "),
        (lambda result: result._replace(indices=result.indices[:, 1:]), ValueError, "method: .*indices.*5.*Remedy: "),
        (lambda result: result._replace(indices=result.indices * 0), ValueError, "method: .*indices.*Remedy: "),
    ],
)
def test_a_method_that_returns_something_else_is_refused(change, error, words):
    model, batch = model_of("llava"), zoo.case("llava").inputs(MIXED)
    with apply_condense(model, KEEP, method=lambda *given: change(pick(*given))), pytest.raises(error, match=words):
        model(**batch)


@pytest.mark.parametrize("call", ["__call__", "generate"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_new_images_on_a_filled_cache_are_refused(name, call):
    """By its name before transformers 5.24, and by the name since; an empty one is taken."""
    case, model = zoo.case(name), model_of(name)
    batch = case.inputs(((0,),))
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    names = ("past_key_values", "cache") if hasattr(CausalLMOutputWithPast, "cache") else ("past_key_values",)
    with torch.no_grad(), apply_condense(model, KEEP):
        model.generate(**batch, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert cache.get_seq_length() > KEEP
        for name in names:
            with left_as_it_was(model), pytest.raises(ValueError, match=f"{name}: .* tokens.*Remedy: "):
                getattr(model, call)(**batch, **{name: cache})


def test_an_image_of_too_few_tokens_is_named():
    batch = zoo.case("qwen2_vl").inputs(((0, 1),))
    words = "^num_tokens: expected at most the 8 tokens of image 1, got 9. Remedy: a ratio"
    with apply_condense(model_of("qwen2_vl"), 9) as handle, pytest.raises(ValueError, match=words):
        handle.model(**batch)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    for keep, expected in ((numpy.int64(KEEP), KEEP), (numpy.float32(0.25), 9)):
        model, batch = model_of("llava"), zoo.case("llava").inputs(((0,),))
        with apply_condense(model, keep) as handle:
            model(**batch)
            assert handle.report().images == ((36, expected),)
