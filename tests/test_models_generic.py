"""Models whose type has no row: by the name of a family, or by the generic row, which refuses what it cannot fit."""

import functools

import pytest
import torch
import zoo
from test_models_handle import left_as_it_was, model_of, unheard_of
from zoo import MIXED

from condense_kernels.models import apply_condense

KEEP = 5


def test_an_unknown_family_is_taken_as_generic_with_a_warning():
    model, case = unheard_of(), zoo.case("gemma3")
    batch = case.inputs(MIXED)
    with pytest.warns(UserWarning, match="'unheard_of'.*Assumed: .*encoder.layers.2.self_attn"):
        handle = apply_condense(model, KEEP, family="generic")
    with handle:
        found = model(**batch).logits
    with apply_condense(case.model, KEEP):
        assert torch.equal(case.model(**batch).logits, found)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ("qwen2_vl", "image_grid_thw: expected None with family='generic'.*Remedy: family="),
        ("mistral3", "image_sizes: .*Remedy: family="),
        ("gemma4", "image_position_ids: .*Remedy: family="),
    ],
)
def test_what_the_generic_row_cannot_fit_is_refused(like, words):
    model, batch = unheard_of(like), zoo.case(like).inputs(((0, 1), ()))
    with pytest.warns(UserWarning, match="'unheard_of'"):
        handle = apply_condense(model, KEEP, family="generic")
    with handle, left_as_it_was(model), pytest.raises(ValueError, match=words):
        model(**batch)


def deepstack(output):
    output.deepstack_features = [output.pooler_output]


def unpooled(output):
    output.pooler_output = None


def by_row(output):
    output.pooler_output = [output.pooler_output[0], output.pooler_output[0][:0]]


def flattened(output):
    output.pooler_output = output.pooler_output.flatten(0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (deepstack, "model: .*no deepstack_features.*Remedy: family=.*'qwen3_vl'"),
        (by_row, "model: .*pooler_output .* of each image, got list.*Remedy: "),
        (unpooled, "model: .*pooler_output.* got NoneType.*Remedy: "),
        (flattened, "model: .*pooler_output.* got \\[48, 64\\].*Remedy: "),
    ],
)
def test_an_encoder_that_returns_something_else_is_refused(change, words):
    model, batch = model_of("gemma3"), zoo.case("gemma3").inputs(MIXED)
    stock = model.model.get_image_features

    @functools.wraps(stock)
    def changed(*args, **kwargs):
        output = stock(*args, **kwargs)
        change(output)
        return output

    model.model.get_image_features = changed
    with apply_condense(model, KEEP), pytest.raises(ValueError, match=words):
        model(**batch)


def test_an_attention_past_the_interface_is_refused():
    """An encoder of transformers that computes it by itself."""
    model, batch = unheard_of(), zoo.case("gemma3").inputs(MIXED)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn = OwnAttention(layer.self_attn)
    with apply_condense(model, KEEP, family="gemma3"), pytest.raises(ValueError, match="model: .*interface.*Remedy: "):
        model(**batch)


class OwnAttention(torch.nn.Module):
    """An attention of another class, that has a config and does not look at it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, hidden_states, **_):
        return hidden_states, None


def test_an_unknown_family_by_the_name_of_one_that_it_is_built_like():
    model, case = unheard_of(), zoo.case("gemma3")
    batch = case.inputs(MIXED)
    with apply_condense(model, KEEP, family="gemma3"):
        found = model(**batch).logits
    with apply_condense(case.model, KEEP):
        assert torch.equal(case.model(**batch).logits, found)
