"""Adapters that index a prompt, or its placeholders: keep lists, LightCompress, UniPruneBench."""

import types

import pytest
import torch
import torch.nn.functional as F
from hosts import TokenReductionModule, Vlm, divprune_loop, random

from condense_kernels import methods
from condense_kernels.adapters import keep_list, lightcompress, uniprunebench
from condense_kernels.methods import condensevlm, divprune, fastervlm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Sorted keep lists, LightCompress


def test_keep_list_keeps_what_the_loop_keeps():
    embeds = random(2, 60, 32)
    positions, mask = torch.arange(60).repeat(3, 2, 1), torch.rand(2, 60) > 0.2
    kept = keep_list.keep_list(divprune, embeds, 7, 40, 11, position_ids=positions, attention_mask=mask)
    for image in range(2):
        middle = [7 + i for i in divprune_loop(embeds[image, 7:47], 11)]
        expected = [*range(7), *middle, *range(47, 60)]
        assert kept.indices[image].tolist() == expected
        assert torch.equal(kept.inputs_embeds[image], embeds[image, expected])
        assert torch.equal(kept.attention_mask[image], mask[image, expected])
        assert torch.equal(kept.position_ids[:, image], positions[:, image, expected])


@DTYPES
def test_keep_list_has_merged_rows(dtype):
    embeds, scores = random(2, 40, 8, dtype=dtype), torch.rand(2, 36)
    kept = keep_list.keep_list(condensevlm, embeds, 1, 36, 9, scores=scores, grid=(6, 6))
    assert kept.position_ids is None and kept.attention_mask is None and kept.inputs_embeds.dtype == dtype
    expected = condensevlm(embeds[:, 1:37], scores, 9, grid=(6, 6))
    assert torch.equal(kept.inputs_embeds[:, 1:10], expected.merged)
    plane = keep_list.keep_list(divprune, embeds, 0, 40, 3, position_ids=torch.arange(40).repeat(2, 1))
    assert torch.equal(plane.position_ids, plane.indices)


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (0, 0), (8, 3), (0, 11)])
def test_keep_list_errors(start, length):
    with pytest.raises(ValueError, match=r"^start, length: expected tokens within a prompt of 10"):
        keep_list.keep_list(divprune, random(1, 10, 4), start, length, 1)


def reduced(method, n: int = 36, keep: int = 9, dtype: torch.dtype = torch.float32, **options) -> Vlm:
    registry, vlm = {}, Vlm(random(n, 16, dtype=dtype))
    registry["Ours"] = lightcompress.token_reduction(TokenReductionModule, method, **options)
    model = types.SimpleNamespace(vlm_model=vlm, pruning_config={"image_token_length": n})
    registry["Ours"]({"special": {"keep": keep}}, model, None)
    return vlm


@DTYPES
@pytest.mark.parametrize("padded", [None, 2])
def test_lightcompress_keeps_what_the_loop_keeps(padded, dtype):
    vlm, ids, mask = reduced(divprune, dtype=dtype), torch.tensor([[1, 5, -200, 6, 7]]), None
    if padded:  # on the left
        ids = F.pad(ids, (padded, 0))
        mask = F.pad(torch.ones(1, 5), (padded, 0))
    none, positions, attention, _, embeds, labels = vlm.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, None, "images"
    )
    expected = [0, 1, *(divprune(vlm.image[None], None, 9).indices[0] + 2).tolist(), 38, 39]
    if dtype == torch.float32:
        assert expected[2:-2] == [2 + i for i in divprune_loop(vlm.image, 9)]
    assert none is None and positions[0].tolist() == labels[0].tolist() == expected
    assert (attention is None) == (mask is None) and embeds.dtype == dtype
    assert embeds[0, [0, 1, -2, -1], 0].tolist() == [1, 5, 6, 7]
    assert torch.equal(embeds[0, 2:-2], vlm.image[[i - 2 for i in expected[2:-2]]])


def test_lightcompress_steps_and_errors():
    vlm = reduced(methods.random_merge)
    call = vlm.prepare_inputs_labels_for_multimodal
    assert call(torch.tensor([[3]]), None, None, "cache", None, None)[3:5] == ("cache", None)
    assert call(torch.tensor([[-200]]), None, None, "cache", None, None)[3:5] == ("cache", None)
    assert call(torch.tensor([[3, 4]]), None, None, None, None, None)[4].shape == (1, 2, 16)
    for ids in ([[-200, 1, -200]], [[-200, 1], [-200, 1]]):
        with pytest.raises(ValueError, match=r"^input_ids: expected one prompt with one image, got 2 images"):
            call(torch.tensor(ids), None, None, None, None, "images")
    with pytest.raises(KeyError, match="keep"):
        lightcompress.token_reduction(TokenReductionModule, divprune)({"special": {}}, None, None)


# UniPruneBench


@pytest.mark.parametrize(("tiles", "ratio"), [(1, 0.3), (4, 0.3), (2, 0.01), (3, 1.0)])
def test_uniprunebench_keeps_what_the_loop_keeps(tiles, ratio):
    registry = {"ours_pre_llm": uniprunebench.pre_llm(divprune, lambda: ratio)}
    embeds, selected = random(tiles, 16, 24), torch.zeros(8 + 16 * tiles, dtype=torch.bool)
    selected[5 : 5 + 16 * tiles] = True
    before = selected.clone()
    after, rows = registry["ours_pre_llm"](selected, embeds)
    sets = [embeds[0], embeds[1:].reshape(-1, 24)] if tiles > 1 else [embeds[0]]
    expected = torch.cat([x[divprune_loop(x, max(1, round(ratio * len(x))))] for x in sets])
    assert torch.equal(rows, expected) and torch.equal(selected, before)
    assert after.nonzero()[:, 0].tolist() == list(range(5, 5 + len(rows)))


@DTYPES
def test_uniprunebench_distinct_tokens(dtype):
    """Where all are zero, which in the loop there are NaN."""
    prune = uniprunebench.pre_llm(methods.random_merge, 0.5)
    selected, rows = prune(torch.ones(32, dtype=torch.bool), random(2, 16, 8, dtype=dtype))
    assert selected.sum() == len(rows) == 16 and rows.dtype == dtype
    _, rows = uniprunebench.pre_llm(divprune, 0.5)(torch.ones(16, dtype=torch.bool), torch.zeros(1, 16, 8))
    assert rows.shape == (8, 8)


def test_uniprunebench_errors():
    prune = uniprunebench.pre_llm(divprune, 0.5)
    with pytest.raises(ValueError, match=r"^vit_embeds: expected \[tiles, tokens, D\]"):
        prune(torch.ones(4, dtype=torch.bool), random(4, 8))
    with pytest.raises(ValueError, match=r"^vit_embeds: expected .* some of both, got \[0, 4, 8\]"):
        prune(torch.ones(0, dtype=torch.bool), random(0, 4, 8))
    with pytest.raises(ValueError, match=r"^selected: expected bool \[L\] with 4 True"):
        prune(torch.ones(3, dtype=torch.bool), random(1, 4, 8))
    with pytest.raises(ValueError, match=r"^keep_ratio: expected a number in \[0, 1\], got 2"):
        uniprunebench.pre_llm(divprune, 2)(torch.ones(4, dtype=torch.bool), random(1, 4, 8))
    with pytest.raises(TypeError, match=r"^scores: fastervlm reads"):
        uniprunebench.pre_llm(fastervlm, 0.5)(torch.ones(4, dtype=torch.bool), random(1, 4, 8))
