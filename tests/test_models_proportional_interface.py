"""How proportional=True reaches a language model: by the attention function that it has, and nothing of it stays."""

import copy
import pickle
import threading
from types import SimpleNamespace

import oracles
import pytest
import torch
import transformers
import zoo
from languages import llava_on
from oracles import pick
from test_models_handle import left_as_it_was, model_of
from test_models_proportional import KEEP, NEW, SOME
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from zoo import MIXED

from condense_kernels.models import apply_condense
from condense_kernels.models.proportional import KeyBias, folded


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# Attention functions


def attends_without_masks(module, query, key, value, attention_mask, scaling=None, **_):
    """As flash attention: of a mask it takes the padding [B, N], heads are a multiple of 8, and of one width."""
    assert attention_mask is None or attention_mask.dim() == 2
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] == module.head_dim + WIDER["by"]
    m, n = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    seen = torch.ones(m, n, dtype=torch.bool).tril(n - m)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :n].bool()
    weights = (query @ key.mT * scaling).masked_fill(~seen, torch.finfo(query.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def flash_kernel(query, key, value, attention_mask, *, softmax_scale, attn_implementation, **_):
    """What transformers' flash attention calls in the end; there is none for CPU."""
    assert attn_implementation == "flash_attention_2"
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return attends_without_masks(SimpleNamespace(head_dim=16), *heads, attention_mask, softmax_scale)[0]


WIDER = {"by": 0}  # channels, where there is a bias
transformers.AttentionInterface.register("without_masks", attends_without_masks)
transformers.AttentionMaskInterface.register("without_masks", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def test_a_mask_is_made_once_for_layers_of_one_kind():
    """With the same mask, or none, a layer of another window has other keys."""
    bias, query = KeyBias(torch.arange(6.0)[None], total=0), torch.zeros(1, 1, 1, 4)
    one, other = (bias.of_keys(1, count) for count in (8, 3))
    assert bias.mask(None, one, query, True) is bias.mask(None, one, query, True)
    assert bias.mask(None, other, query, True).flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "lighton_ocr"])
@pytest.mark.parametrize("function", ["without_masks", "flash_attention_2"])
def test_functions_that_take_no_mask(name, function, monkeypatch):
    """The bias is in the product then. An implementation may be chosen after, too."""
    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", flash_kernel)
    case, model = zoo.case(name), model_of(name)
    batch, options = case.inputs(MIXED), dict(max_new_tokens=NEW, do_sample=False)
    with apply_condense(model, KEEP, proportional=True):
        logits, tokens = model(**batch).logits, model.generate(**batch, **options)
        model.base_model.get_decoder().config._attn_implementation = function
        monkeypatch.setitem(WIDER, "by", 8)
        torch.testing.assert_close(real(case, model(**batch).logits), real(case, logits), rtol=1e-4, atol=2e-4)
        assert torch.equal(model.generate(**batch, **options), tokens)
        monkeypatch.setitem(WIDER, "by", 0)
        model(**case.inputs(((), ())))


@pytest.mark.slow
def test_flex_attention():
    """The prompt; of a step of decoding torch's kernel for CPU does not compile, with or without this."""
    case, model = zoo.case("llava"), model_of("llava")
    with apply_condense(model, KEEP, proportional=True):
        expected = model(**case.inputs(MIXED)).logits
        model.base_model.get_decoder().set_attn_implementation("flex_attention")
        found = model(**case.inputs(MIXED)).logits
    torch.testing.assert_close(real(case, found), real(case, expected), rtol=1e-4, atol=2e-4)


def real(case, logits):
    return torch.cat(oracles.of_rows(logits, oracles.row_lengths(case, MIXED, KEEP), "left"))


def test_a_bias_in_the_product_is_exact_in_any_precision():
    """Three numbers of bfloat16 are one of float32."""
    logs = torch.arange(1, 577, dtype=torch.float32).log()[None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query, key = torch.zeros(1, 2, 3, 16, dtype=dtype), torch.zeros(1, 1, 576, 16, dtype=dtype)
        query, key = folded(logs, query, key, 0.25)
        assert query.dtype == key.dtype == dtype and query.shape == (1, 2, 3, 24) and key.shape == (1, 1, 576, 24)
        product = query.double() @ key.double().mT * 0.25
        torch.testing.assert_close(product, logs.double().expand_as(product), rtol=1e-6, atol=0)


# Nothing to weigh, and nothing left behind


@pytest.mark.parametrize(("keep", "method"), [(1.0, "condensevlm"), (1.0, "topk"), (KEEP, "topk"), (KEEP, pick)])
@pytest.mark.parametrize("name", SOME)
def test_where_nothing_is_merged_nothing_changes(name, keep, method):
    """Bit for bit."""
    case = zoo.case(name)
    for batch in (case.inputs(MIXED), case.inputs(((0,),))):
        found = []
        for proportional in (False, True):
            with apply_condense(case.model, keep, method=method, proportional=proportional):
                tokens = case.model.generate(**batch, max_new_tokens=2, do_sample=False)
                found.append((case.model(**batch).logits, tokens))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", SOME)
def test_remove_gives_the_model_back_as_it_was(name):
    case, model = zoo.case(name), model_of(name)
    batch = case.inputs(MIXED)
    expected = model(**batch).logits
    with left_as_it_was(model):
        handle = apply_condense(model, KEEP, proportional=True)
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        handle.remove()
        handle.remove()
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_weighs_by_itself(how):
    case = zoo.case.__wrapped__("llava")  # a new one: transformers' own hooks, from the first call on, are not pickled
    batch = case.inputs(MIXED)
    handle = apply_condense(case.model, KEEP, proportional=True)
    twin = copy.deepcopy(case.model) if how == "copied" else pickle.loads(pickle.dumps(case.model))
    expected = case.model(**batch).logits
    handle.remove()
    case.model.set_attn_implementation("eager")
    assert torch.equal(twin(**batch).logits, expected)
    twin.condense_handle.remove()
    assert twin(**batch).logits.shape[1] > expected.shape[1]
    assert all(
        not hasattr(getattr(m, "config", None), "condense_own") for m in [*twin.modules(), *case.model.modules()]
    )


def test_several_threads_have_each_their_sizes():
    case, found = zoo.case("llava"), {}
    model, prompts = model_of("llava"), [((image,), (image + 1,)) for image in range(4)]

    def calls(rows):
        with torch.no_grad():
            options = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
            return torch.stack(model.generate(**case.inputs(rows), **options).logits)

    with apply_condense(model, KEEP, proportional=True):
        expected = [calls(rows) for rows in prompts]
        threads = [
            threading.Thread(
                target=lambda rows=rows: found.update({rows: [calls(rows) for _ in range(3)]}), daemon=True
            )
            for rows in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for rows, logits in zip(prompts, expected, strict=True):
        for again in found[rows]:
            torch.testing.assert_close(again, logits, rtol=1e-4, atol=2e-4)


def test_gradient_checkpointing_changes_no_gradient():
    batch, grads = zoo.case("llava").inputs(MIXED, labels=True), []
    for options in ({}, {"checkpointing": True}, {"proportional": False}):
        model = model_of("llava").requires_grad_().train()
        if options.pop("checkpointing", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.enable_grad(), apply_condense(model, KEEP, **{"proportional": True, **options}):
            model(**batch, use_cache=False).loss.backward()
        grads.append({path: weight.grad for path, weight in model.named_parameters() if weight.grad is not None})
    for path, grad in grads[0].items():
        torch.testing.assert_close(grads[1][path], grad, rtol=1e-4, atol=1e-6)
    path = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(grads[2][path], grads[0][path], atol=1e-4)


# What is refused


def deaf():
    """Its layers keep to themselves what they do not name."""
    model = model_of("llava")
    for layer in model.model.language_model.layers:
        layer.forward = lambda hidden, *, inner=layer.forward, condense_bias=None, **kwargs: inner(hidden, **kwargs)
    return model


def test_a_layer_that_keeps_the_bias_to_itself_is_noticed():
    case, model = zoo.case("llava"), deaf()
    with apply_condense(model, KEEP, proportional=True):
        with pytest.raises(ValueError, match="proportional: .*attention was not given it.*Remedy: proportional=False"):
            model(**case.inputs(MIXED))
        model(**case.inputs(((), ())))


@pytest.mark.parametrize(
    ("model", "given", "error", "words"),
    [
        (lambda: model_of("llava"), "yes", TypeError, "proportional: expected True or False, got str: 'yes'"),
        (
            lambda: llava_on("falcon").model,
            True,
            ValueError,
            "proportional: .*FalconModel, whose FalconAttention does n",
        ),
        (lambda: llava_on("mamba").model, True, ValueError, "proportional: .*MambaModel, which has no such.*Remedy: "),
        (lambda: llava_on("xglm").model, True, ValueError, "proportional: .*XGLMAttention does not.*Remedy: prop"),
    ],
)
def test_refused_at_once(model, given, error, words):
    model = model()
    with left_as_it_was(model), pytest.raises(error, match=words):
        apply_condense(model, KEEP, proportional=given)


@pytest.mark.parametrize(
    ("text", "config", "words"),
    [
        (
            "gemma2",
            dict(head_dim=16),
            "proportional: expected no softcap of flash_attention_2.*got 50.*Remedy: .*'eager'",
        ),
        ("llama", dict(head_dim=256), "proportional: expected heads of at most 248 .*, got 256.*Remedy: "),
    ],
)
def test_what_flash_attention_cannot_do_is_refused(text, config, words):
    case = llava_on(text, **config)
    with apply_condense(case.model, KEEP, proportional=True):
        case.base.get_decoder().config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match=words):
            case.model(**case.inputs(MIXED))
