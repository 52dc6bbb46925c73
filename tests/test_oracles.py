"""What the oracles of models with condensed images say, against transformers' own eager attention and projectors, and
against each other."""

import contextlib
import copy
import sys

import oracles
import pytest
import torch
import zoo
from zoo import MIXED

# What gets the patches and makes tokens of several of them.
POOLING = {
    "internvl": "vision_tower.layernorm",
    "gemma4": "vision_tower.pooler",
    "smolvlm": "connector",
    "idefics3": "connector",
    "glm4v": "visual.post_layernorm",
    **dict.fromkeys(("gemma3", "mistral3", "aya_vision"), "multi_modal_projector"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "visual.merger"),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", zoo.NAMES)
def test_attention_maps_are_those_of_eager_attention(name, monkeypatch):
    """Of transformers' function: Qwen's encoders do not return the maps, under that name they return the outputs."""
    case = zoo.case(name)
    model, batch = copy.deepcopy(case.model), case.inputs(MIXED)
    model.set_attn_implementation("eager")
    module, eager = model.model.get_submodule(oracles.ATTENTION[name]), []
    source = sys.modules[type(module).__module__]
    stock = source.eager_attention_forward

    def recorded(attention, *args, **kwargs):
        output, weights = stock(attention, *args, **kwargs)
        eager.extend(weights if attention is module else [])
        return output, weights

    monkeypatch.setattr(source, "eager_attention_forward", recorded)
    model.model.get_image_features(**oracles.encoder_inputs(case, batch), return_dict=True)
    for found, expected in zip(oracles.attention_maps(case, batch), eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@contextlib.contextmanager
def changed(case, sequence: int, patch: int, before: int):
    """One patch of what is pooled: of a sequence in a batch, or after others in one row."""

    def change(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        at = (sequence, patch) if hidden.ndim == 3 else (before + patch,)
        hidden[at] += 10 * torch.randn(hidden.shape[-1])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    hook = case.base.get_submodule(POOLING[case.name]).register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", POOLING)
def test_scores_are_pooled_as_the_projector_pools_patches(name, monkeypatch):
    """A change of one patch changes the token whose score that patch is in, and no other."""
    case = zoo.case(name)
    batch = case.inputs(MIXED)
    maps = oracles.attention_maps(case, batch)
    plain = oracles.encode(case, MIXED, batch).features
    sequence = len(maps) - 1
    before = sum(image.shape[-1] for image in maps[:-1])
    for patch in (1, 6, 17, 30, 31):
        hot = [torch.zeros_like(image) for image in maps]
        hot[sequence][..., patch] = 1
        monkeypatch.setattr(oracles, "attention_maps", lambda *_, hot=hot: hot)
        scores = oracles.scores(case, MIXED, batch)
        with changed(case, sequence, patch, before):
            other = oracles.encode(case, MIXED, batch).features
        assert sum(int((score > 0).sum()) for score in scores) == 1
        for image, score, now in zip(plain, scores, other, strict=True):
            assert torch.equal((image - now).abs().amax(1) > 1e-4, score > 0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [family.name for family in zoo.FAMILIES if not family.recurrent])
def test_hidden_placeholders_are_as_placeholders_that_were_never_there(name, side):
    case = zoo.case(name)
    selection = oracles.best(oracles.scores(case, MIXED, case.inputs(MIXED)), 5)
    hidden = oracles.masked(case, MIXED, side, selection)
    rows = zip(case.model(**hidden).logits, hidden["attention_mask"], strict=True)
    for (logits, mask), alone in zip(rows, oracles.removed(case, MIXED, selection), strict=True):
        expected = case.model(**alone).logits[0]
        torch.testing.assert_close(logits[mask == 1], expected, rtol=1e-4, atol=1e-4)
        other = oracles.best([-score for score in oracles.scores(case, MIXED, case.inputs(MIXED))], 5)
    changed = [case.model(**alone).logits[0, -3:] for alone in oracles.removed(case, MIXED, other)]
    assert (changed[-1] - expected[-3:]).abs().max() > 0.1  # else any selection would do
