"""The methods that rank by attention: what each promises beyond test_methods.py."""

import numpy as np
import pytest
import torch
from restated.globalcom2 import globalcom2
from restated.hired import hired
from restated.sparsevlm import sparsevlm

from condense_kernels import methods


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def compare(found, restated, b: int = 0) -> None:
    merged, indices, assignment, mass = restated
    assert found.indices[b].tolist() == indices.tolist()
    assert found.assignment[b].tolist() == assignment.tolist()
    torch.testing.assert_close(found.merged[b], torch.from_numpy(merged))
    torch.testing.assert_close(found.mass[b], torch.from_numpy(mass))


# FastV


def test_reverse_fastv_keeps_what_fastv_drops():
    x, a = some(2, 24, 5), some(2, 24)
    for b in range(2):
        kept = [call(x, a, k).indices[b].tolist() for call, k in ((methods.fastv, 7), (methods.reverse_fastv, 17))]
        assert sorted(kept[0] + kept[1]) == list(range(24))


EVEN = [((8, 12), (4, 4)), ((12, 8), (3, 2)), ((2, 6, 8), (3, 4)), ((96, 1), (16, 5))]


@pytest.mark.parametrize(("grid", "window"), EVEN)
def test_window_fastv_keeps_as_many_in_every_window(grid, window):
    x, a = torch.zeros(2, 96, 3), some(2, 96)
    y, x_ = np.arange(96) // grid[-1], np.arange(96) % grid[-1]
    where = y // grid[-2] * 1000 + y % grid[-2] // window[0] * 100 + x_ // window[1]
    blocks = [np.flatnonzero(where == block) for block in np.unique(where)]
    for k in (1, 2, 5, 6, 23, 48, 95, 96):
        kept = methods.window_fastv(x, a, k, grid=grid, window=window).indices
        least = k // len(blocks)
        for b in range(2):
            ranked = [block[np.argsort(-a[b, block].numpy(), kind="stable")] for block in blocks]
            counts = [np.isin(block, kept[b]).sum() for block in blocks]
            assert sum(counts) == k and set(counts) <= {least, least + 1}
            assert {i for r, c in zip(ranked, counts, strict=True) for i in r[:c]} == set(kept[b].tolist())
            taken, left = (
                [a[b, r[least]] for r, c in zip(ranked, counts, strict=True) if c == n and len(r) > least]
                for n in (least + 1, least)
            )
            assert min(taken, default=2) >= max(left, default=-1)


def test_window_fastv_of_small_windows_is_in_proportion():
    """5 columns, windows of 4: one of 16 tokens and one of 4."""
    for k, of_small in ((1, 0), (2, 0), (3, 1), (7, 1), (8, 2), (10, 2), (20, 4)):
        kept = methods.window_fastv(torch.zeros(1, 20, 3), some(1, 20), k, grid=(4, 5)).indices
        assert (kept % 5 == 4).sum() == of_small


def test_window_fastv_says_what_it_cannot_do():
    x, a = torch.zeros(1, 24, 3), torch.ones(1, 24)
    with pytest.raises(ValueError, match="grid: expected rows and columns, or frames before them, got"):
        methods.window_fastv(x, a, 6, grid=(24,))
    for window in ((0, 2), (2,), (1.5, 2)):
        with pytest.raises(ValueError, match=r"window: expected \(rows, columns\)"):
            methods.window_fastv(x, a, 6, grid=(4, 6), window=window)


# Importance against redundancy


def test_the_ends_of_the_sweep():
    x, a = torch.randn(2, 24, 5), some(2, 24)
    assert torch.equal(methods.importance_redundancy(x, a, 6, alpha=1).indices, methods.fastv(x, a, 6).indices)
    unlike = 1 - torch.cosine_similarity(x, x[:, -1:], dim=-1)
    assert torch.equal(methods.importance_redundancy(x, a, 6, alpha=0).indices, methods.fastv(x, unlike, 6).indices)
    last = methods.importance_redundancy(x, 100 * a + 5, 6, query=x[:, -1])  # of any scale
    assert torch.equal(methods.importance_redundancy(x, a, 6).indices, last.indices)


def test_a_token_without_a_direction_is_like_nothing():
    x, a = torch.randn(1, 24, 5), torch.zeros(1, 24)
    x[0] = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])  # whose cosine is 1 exactly
    x[0, :6] *= -1
    x[0, 20], x[0, 22, 2] = 0, torch.nan
    assert methods.importance_redundancy(x, a, 8).indices[0].tolist() == [*range(6), 20, 22]
    assert methods.importance_redundancy(x, a, 6).indices[0].tolist() == list(range(6))


def test_importance_says_what_it_cannot_do():
    x, a = torch.randn(2, 24, 5), some(2, 24)
    for alpha, error in ((-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="alpha: expected a"):
            methods.importance_redundancy(x, a, 6, alpha=alpha)
    with pytest.raises(ValueError, match="query: expected"):
        methods.importance_redundancy(x, a, 6, query=x[:1, 0])


# PyramidDrop


def test_the_budgets_of_pyramid_drop():
    assert methods.pdrop_budgets(576) == (576, 288, 144, 72)
    assert methods.pdrop_budgets(10, 0.1, 3) == (10, 1, 1)
    with pytest.raises(ValueError, match="expected counts >= 1 and a ratio in"):
        methods.pdrop_budgets(576, 1.5)


# Crops


@pytest.mark.parametrize("crops", [(2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize(("method", "restated"), [(methods.hired, hired), (methods.globalcom2, globalcom2)])
def test_crops_of_an_image(method, restated, crops):
    n, grid = (1 + crops[0] * crops[1]) * 24, (1 + crops[0] * crops[1], 4, 6)
    x, a = some(3, n, 2, seed=1).double(), some(3, n, seed=2).double() ** 4
    a[1, : n // 3] *= 50
    for keep in (1, 7, 24, 40, n - 3, n):
        found = method(x, a, keep, grid=grid, crops=crops)
        for b in range(3):
            compare(found, restated(x[b].numpy(), a[b].numpy(), keep, grid=grid, crops=crops), b)


def test_hired_counts_the_rectangle_of_each_crop():
    """Attention of the whole image in its right half alone: all of the crops' budget is the right crops'."""
    a = torch.full((1, 5 * 16), 0.5)
    a[0, :16] = torch.tensor([0.0, 0.0, 1.0, 1.0] * 4)
    kept = methods.hired(torch.zeros(1, 80, 2), a, 20, grid=(5, 4, 4), crops=(2, 2), alpha=0.5).indices[0]
    assert (kept // 16).bincount(minlength=5).tolist() == [10, 0, 5, 0, 5]
    early = a[:, :16].flip(1)
    kept = methods.hired(torch.zeros(1, 80, 2), a, 20, grid=(5, 4, 4), crops=(2, 2), early=early).indices[0]
    assert (kept // 16).bincount(minlength=5).tolist() == [10, 5, 0, 5, 0]


def test_globalcom2_gives_more_to_what_is_looked_at():
    a = torch.full((1, 5 * 16), 0.5)
    a[0, [10, 11, 14, 15]] = 100  # the last quarter of the whole image
    kept = methods.globalcom2(torch.zeros(1, 80, 2), a, 40, grid=(5, 4, 4), crops=(2, 2)).indices[0]
    assert (kept // 16).bincount(minlength=5).tolist() == [8, 6, 6, 6, 14]


@pytest.mark.parametrize("method", [methods.hired, methods.globalcom2])
def test_crops_that_do_not_fit(method):
    x, a = torch.zeros(1, 80, 2), torch.ones(1, 80)
    for grid in ((8, 10), (4, 4, 5), (10, 2, 4)):
        with pytest.raises(ValueError, match=r"grid: expected \(1 \+ crops, height, width\), the whole image and 4"):
            method(x, a, 8, grid=grid, crops=(2, 2))
    with pytest.raises(ValueError, match="grid: expected .* beside crops, got None"):
        method(x, a, 8, crops=(2, 2))
    for crops in ((0, 2), (4,)):
        with pytest.raises(ValueError, match=r"crops: expected \(rows, columns\)"):
            method(x, a, 8, grid=(5, 4, 4), crops=crops)
    name, value = {"hired": ("alpha", 2.0), "globalcom2": ("temperature", 0.0)}[method.__name__]
    with pytest.raises(ValueError, match=f"{name}: expected a number"):
        method(x, a, 8, **{name: value})


def test_hired_gives_the_whole_image_what_the_crops_have_no_room_for():
    x, a = some(1, 48, 2).double(), some(1, 48).double()
    for alpha, keep, whole in ((0.0, 47, 15), (0.1, 40, 8), (0.1, 20, 2), (0.9, 20, 16)):
        found = methods.hired(x, a, keep, grid=(3, 4, 4), crops=(1, 2), alpha=alpha)
        assert (found.indices < 16).sum() == whole
        compare(found, hired(x[0].numpy(), a[0].numpy(), keep, grid=(3, 4, 4), crops=(1, 2), alpha=alpha))


def test_hired_checks_early():
    x, a = torch.zeros(1, 80, 2), torch.ones(1, 80)
    with pytest.raises(ValueError, match="early: expected"):
        methods.hired(x, a, 8, grid=(5, 4, 4), crops=(2, 2), early=a)


# SparseVLM


@pytest.mark.parametrize("keep", [1, 2, 9, 64, 190, 199, 200])
def test_sparsevlm_of_many_tokens(keep):
    x, a = (
        torch.randn(2, 200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(keep)),
        some(2, 200).double(),
    )
    for recycled in (None, 0, min(keep, 20) if keep < 190 else 0):
        found = methods.sparsevlm(x, a, keep, recycled=recycled)
        for b in range(2):
            compare(found, sparsevlm(x[b].numpy(), a[b].numpy(), keep, recycled=recycled), b)


def test_as_many_clusters_as_published():
    """576 tokens, 64 kept, of 512 others 154 in 16 clusters."""
    found = methods.sparsevlm(torch.randn(1, 576, 4), some(1, 576), 64)
    members = found.assignment[0][found.assignment[0] >= 0].bincount()
    top48 = some(1, 576).topk(48).indices[0]
    assert (members[found.assignment[0][top48]] == 1).all()
    assert members.sum() == 48 + int(0.3 * 528) + 1


def test_sparsevlm_says_what_it_cannot_do():
    x, a = torch.randn(1, 24, 5), some(1, 24)
    for recycled in (-1, 7, 1.5):
        with pytest.raises(ValueError, match="recycled: expected an int from 0 to keep, 6"):
            methods.sparsevlm(x, a, 6, recycled=recycled)
    with pytest.raises(ValueError, match="recycled: expected at most as many clusters as tokens to cluster, 2 where"):
        methods.sparsevlm(x, a, 23, recycled=4)
    with pytest.raises(ValueError, match="tokens to cluster, 1 where 21 of 24 are kept, got 2"):
        methods.sparsevlm(x, a, 23, recycled=2)
    with pytest.raises(TypeError, match="SparseVLM drops lambda .* so that the data chooses K. Remedy"):
        methods.sparsevlm(x, a, None)


def test_the_scores_of_sparsevlm():
    attention, x = some(2, 7, 24), torch.randn(2, 24, 5)
    text = torch.cat([x[:, :2] * 3, torch.randn(2, 5, 5) / 10], dim=1)
    found = methods.sparsevlm_scores(attention, x, text)
    for b in range(2):
        like = (x[b] @ text[b].T).softmax(dim=1).mean(dim=0)
        raters = [j for j in range(7) if like[j] > like.mean()]
        assert 1 <= len(raters) < 7
        torch.testing.assert_close(found[b], attention[b, raters].mean(dim=0))
    with pytest.raises(ValueError, match="text: expected"):
        methods.sparsevlm_scores(attention, x, text[:, 1:])
    alike = methods.sparsevlm_scores(attention, x, torch.zeros(2, 7, 5))
    torch.testing.assert_close(alike, attention.mean(dim=1))
