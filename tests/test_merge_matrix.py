"""merge_matrix: W @ features is what merge returns, whatever the clusters; its own rules, gradients and errors."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condense_kernels import merge, merge_matrix
from condense_kernels.ops.merge import reference

MODES = ("mean", "sum", "lerp")


@st.composite
def clusters(draw):
    """Assignment and indices of one image, in any order: rows without a token, without a kept one, tokens of no row."""
    n = draw(st.integers(1, 12))
    k = draw(st.integers(0, n))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    indices = generator.permutation(n)[:k]
    assignment = generator.integers(-1, k, n) if k else np.full(n, -1)
    if draw(st.booleans()):
        assignment[indices] = np.arange(k)
    indices[generator.random(k) < 0.15] = -1
    scores = generator.random(n) * (generator.random(n) < 0.7)
    return assignment, indices, scores


def by_hand(assignment, indices, scores, mode, centre_weight):
    """W of one image, entry by entry, from the definitions."""
    w = np.zeros((len(indices), len(assignment)))
    for k, own in enumerate(indices):
        members = [i for i, row in enumerate(assignment) if row == k]
        mass = sum(scores[i] for i in members)
        if own < 0:
            continue
        if mode != "sum" and (mass == 0 or members == [own]):
            w[k, own] = 1
            continue
        for i in members:
            w[k, i] = scores[i] if mode == "sum" else scores[i] / mass
        if mode == "lerp":
            w[k] *= 1 - centre_weight
            w[k, own] += centre_weight
    return w


@settings(max_examples=200)
@given(case=clusters(), mode=st.sampled_from(MODES), centre_weight=st.sampled_from([0.0, 0.3, 1.0]), ones=st.booleans())
def test_by_the_definition_and_as_merge(case, mode, centre_weight, ones):
    assignment, indices, scores = case
    expected = by_hand(assignment, indices, np.ones_like(scores) if ones else scores, mode, centre_weight)
    rows, kept, a = (torch.from_numpy(t)[None] for t in case)
    a = None if ones else a
    w = merge_matrix(rows, kept, a, mode=mode, centre_weight=centre_weight, dtype=torch.float64)
    np.testing.assert_allclose(w[0].numpy(), expected, rtol=1e-14, atol=0)
    x = torch.randn(1, len(assignment), 5, dtype=torch.float64)
    merged, _ = reference.merge(x, a, kept, rows, mode, centre_weight)
    torch.testing.assert_close(w @ x, merged, rtol=1e-12, atol=1e-12)
    assert ((w != 0).sum(dim=1) <= (2 if mode == "lerp" else 1 + (mode == "mean"))).all()


@pytest.mark.parametrize("mode", MODES)
def test_in_fp32_beside_the_kernels(mode, fast):
    """Of two images; every entry rounded, so each product off by a few roundings of the sum of magnitudes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 16, generator=generator)
    scores = torch.rand(2, 40, generator=generator)
    indices = torch.stack([torch.randperm(40, generator=generator)[:7] for _ in range(2)])
    assignment = torch.randint(-1, 7, (2, 40), generator=generator).scatter(1, indices, torch.arange(7).expand(2, 7))
    scores[0, assignment[0] == 3] = 0
    w = merge_matrix(assignment, indices, scores, mode=mode, centre_weight=0.3)
    merged, _ = merge(x, scores, indices, assignment, mode=mode, centre_weight=0.3, backend=fast)
    assert w.dtype == torch.float32 and w.shape == (2, 7, 40)
    assert ((w @ x - merged).abs() <= 44 * 2.0**-24 * (w @ x.abs())).all()
    assert torch.equal(w[1:], merge_matrix(assignment[1:], indices[1:], scores[1:], mode=mode, centre_weight=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    """Computed in fp32 or fp64, rounded once; sizes of clusters weigh like the same numbers."""
    assignment, indices = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[1, 3]])
    w = merge_matrix(assignment, indices, torch.tensor([[1, 2, 4, 3]]), dtype=dtype)
    expected = torch.tensor([[[1 / 7, 2 / 7, 4 / 7, 0], [0, 0, 0, 1]]], dtype=torch.float64)
    exact = expected if dtype == torch.float64 else expected.float()
    assert w.dtype == dtype and torch.equal(w, exact.to(dtype))
    column = torch.tensor([[[1.0], [2.0], [4.0], [3.0]]])
    assert torch.equal(merge_matrix(assignment, indices, column, dtype=dtype), w)
    counts = merge_matrix(assignment, indices, assignment == 0, mode="sum", dtype=dtype)
    assert counts.tolist() == [[[1, 1, 1, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize("mode", ["mean", "lerp"])
@pytest.mark.parametrize("score", [0.0, math.nan, math.inf, 5e-324])
def test_a_row_of_its_own_token_alone_is_one_hot(mode, score):
    assignment, indices = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 2]])
    scores = torch.tensor([[score, 1.0, 1.0]], dtype=torch.float64)
    w = merge_matrix(assignment, indices, scores, mode=mode)
    assert w[0, 0].tolist() == [1.0, 0.0, 0.0] and w[0, 1].isfinite().all()


def test_a_nan_score_is_in_its_row():
    assignment, indices = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 2]])
    w = merge_matrix(assignment, indices, torch.tensor([[math.nan, 1.0, 1.0, 3.0]]))
    assert w[0, 0, :2].isnan().all() and w[0, 1].tolist() == [0, 0, 0.25, 0.75]


def test_values_out_of_range_are_none():
    assignment, indices = torch.tensor([[0, 5, -7, 1, 2**40]]), torch.tensor([[0, 9, -3]])
    for mode in MODES:
        w = merge_matrix(assignment, indices, mode=mode)
        assert w[0].tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0] * 5]


@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 2), (3, 0)])
def test_nothing_to_merge(b, n, k):
    nobody, none = torch.full((b, n), -1), torch.full((b, k), -1)
    for mode in MODES:
        assert torch.equal(merge_matrix(nobody, none, torch.rand(b, n), mode=mode), torch.zeros(b, k, n))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_scores_are_those_of_merge(mode, cpp):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 9, 4, generator=generator, dtype=torch.float64)
    assignment, indices = torch.tensor([[0, 0, 1, 1, 2, 2, 3, -1, 0]]), torch.tensor([[1, 3, 4, -1]])
    a = torch.rand(1, 9, generator=generator, dtype=torch.float64)
    a[0, [4, 5]] = 0  # no mass
    slope = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    grads = []
    for call in (
        lambda a: merge(x, a, indices, assignment, mode=mode, backend=cpp)[0],
        lambda a: merge_matrix(assignment, indices, a, mode=mode, dtype=torch.float64) @ x,
    ):
        leaf = a.clone().requires_grad_()
        grads.append(torch.autograd.grad(call(leaf), leaf, slope)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)
    assert grads[1].isfinite().all() and grads[1].count_nonzero() > 3


def test_transforms_and_no_waiting():
    """vmap is a loop; and it works where there are no values to wait for."""
    assignment, indices = torch.tensor([[[0, 0, 1]], [[1, 0, 1]]]), torch.tensor([[[1, 2]], [[1, 0]]])
    scores = torch.rand(2, 1, 3)
    mapped = torch.func.vmap(merge_matrix)(assignment, indices, scores)
    assert torch.equal(mapped, torch.stack(list(map(merge_matrix, assignment, indices, scores))))
    w = merge_matrix(assignment[0].to("meta"), indices[0].to("meta"), mode="lerp", dtype=torch.bfloat16)
    assert (w.shape, w.dtype, w.device.type) == ((1, 2, 3), torch.bfloat16, "meta")


ROWS, KEPT = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"assignment": ROWS.float()}, TypeError, "assignment: expected dtype int64, got float32"),
        ({"assignment": ROWS[0]}, ValueError, "assignment: expected 2 axes [B N], got 1"),
        ({"indices": KEPT.expand(2, -1)}, ValueError, "indices: expected shape [B K] = [1, K]"),
        ({"indices": KEPT.int()}, TypeError, "indices: expected dtype int64, got int32"),
        ({"scores": torch.rand(1, 2)}, ValueError, "scores: expected shape [B N] = [1, 3]"),
        ({"mode": "max"}, ValueError, "mode: expected"),
        ({"centre_weight": 2.0}, ValueError, "centre_weight: expected a number in [0, 1], got 2.0"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected one of torch.float32, "),
    ],
    ids=str,
)
def test_errors(change, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        merge_matrix(**{"assignment": ROWS, "indices": KEPT} | change)
