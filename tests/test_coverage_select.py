import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from condense_kernels import coverage_select, coverage_select_varlen, debug, similarity
from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import MAX_STORED, CoverageConfig, trying
from condense_kernels.ops.coverage_select import kernel, reference
from condense_kernels.testing import assert_same_bits

CPU = torch.device("cpu")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]


def gain_in_lanes(column, covered):
    """The sum as the page defines it, a second time: in plain Python, one fp32 rounding an operation."""
    lanes = [np.float32(0)] * 128
    for i, (x, m) in enumerate(zip(column, covered, strict=True)):
        lanes[i % 128] = np.float32(lanes[i % 128] + np.maximum(np.float32(x - m), np.float32(0)))
    while len(lanes) > 1:
        lanes = [np.float32(a + b) for a, b in zip(lanes[0::2], lanes[1::2], strict=True)]
    return lanes[0]


def every_gain_anew(c, k, weight, combine, candidates):
    """Every gain at every step, for finite numbers."""
    covered, order, left = np.zeros(len(c), np.float32), [], [j for j in range(c.shape[1]) if candidates[j]]
    for _ in range(min(k, len(left))):
        score = {}
        for j in left:
            gain = gain_in_lanes(c[:, j], covered)
            w = np.maximum(weight[j], np.float32(0))
            score[j] = np.float32(gain * w) if combine == "mul" else np.float32(gain + weight[j])
        order.append(max(left, key=lambda j: (score[j], -j)))
        left.remove(order[-1])
        covered = np.maximum(covered, c[:, order[-1]])
    return order + [-1] * (k - len(order))


values = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1, width=32)


@st.composite
def problems(draw, elements=values):
    m, n = draw(st.integers(0, 30) | st.integers(120, 140)), draw(st.integers(1, 12))
    c = draw(hnp.arrays("float32", (m, n), elements=elements))
    weight = draw(hnp.arrays("float32", n, elements=elements))
    candidates = draw(hnp.arrays("bool", n))
    return c, draw(st.integers(0, n)), weight, draw(st.sampled_from(["mul", "add"])), candidates


def tensors(problem):
    c, k, weight, combine, candidates = problem
    options = {"weight": torch.from_numpy(weight)[None], "candidates": torch.from_numpy(candidates)[None]}
    return (torch.from_numpy(c)[None], k), options | {"combine": combine}


@settings(max_examples=60)
@given(problems())
def test_reference_is_the_greedy(problem):
    args, options = tensors(problem)
    assert reference.coverage_select(*args, **options)[0].tolist() == every_gain_anew(*problem)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=60)
@given(problem=problems() | problems(values | st.floats(width=32)))
def test_lazy_picks_are_the_reference(backend, problem):
    """NaN, infinities and numbers whose sums overflow are among them."""
    args, options = tensors(problem)
    expected = reference.coverage_select(*args, **options)
    assert torch.equal(coverage_select(*args, **options, backend=backend), expected)


def cosines(b, n, d=24):
    keys = torch.randn(b, 1, d) + torch.randn(b, n, d)
    return similarity(keys)[0]


# Rows on both sides of 128, the partial sums, and of what a Triton program loads at once; tokens, and so gains computed
# anew, only as many as the interpreter does in a second.
@pytest.mark.parametrize(("m", "n", "k", "rows"), [(127, 9, 4, 8), (130, 9, 4, 1), (300, 8, 3, 2), (1030, 3, 2, 8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_rows_than_lanes(backend, m, n, k, rows, weighted):
    c = cosines(2, m)[:, :, :n]
    weight = torch.rand(2, n) if weighted else None
    expected = reference.coverage_select(c, k, weight=weight)
    with trying(CoverageConfig, rows=rows):
        order = coverage_select(c, k, weight=weight, backend=backend)
        first = coverage_select(c, k // 2, weight=weight, backend=backend)
    assert torch.equal(order, expected) and torch.equal(first, expected[:, : k // 2])  # a prefix


@pytest.mark.parametrize("kind", ["cosines", "independent", "few values"])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_many_picks_of_many_tokens(cpp, kind, combine):
    """What a heap has to keep in order: gains that fall together, gains that fall alone, ties by the dozen."""
    n, k = 200, 120
    c = {
        "cosines": cosines(2, n),
        "independent": torch.rand(2, n, n),
        "few values": torch.randint(0, 3, (2, n, n)).float(),
    }[kind]
    weight = torch.randint(1, 4, (2, n)).float()
    expected = reference.coverage_select(c, k, weight=weight, combine=combine)
    assert torch.equal(coverage_select(c, k, weight=weight, combine=combine, backend=cpp), expected)


def test_picks_cover_as_much_as_the_best_in_fp64(backend):
    """Rectangular: what is covered are other things than tokens."""
    c = torch.rand(2, 30, 14) - 0.2
    order = coverage_select(c, 5, backend=backend)
    for b in range(2):
        exact, covered = c[b].double(), torch.zeros(30, dtype=torch.float64)
        left = torch.ones(14, dtype=torch.bool)
        for pick in order[b].tolist():
            gain = (exact - covered[:, None]).clamp(min=0).sum(dim=0)
            assert gain[left].amax() - gain[pick] <= 1e-5
            left[pick] = False
            covered = torch.maximum(covered, exact[:, pick])


@pytest.mark.parametrize("c", [torch.ones(1, 4, 9), torch.zeros(1, 4, 9), torch.full((1, 4, 9), torch.nan)])
def test_ties_go_to_the_lowest_index(backend, c):
    assert coverage_select(c, 9, backend=backend)[0].tolist() == list(range(9))


def test_column_not_row_is_what_a_token_covers(backend):
    c = torch.tensor([[[0.0, 1.0, 0.4], [0.0, 1.0, 0.4], [0.9, 0.0, 0.4]]])
    assert coverage_select(c, 3, backend=backend)[0].tolist() == [1, 0, 2]
    assert coverage_select(c.mT, 3, backend=backend)[0].tolist() == [0, 2, 1]


def test_layout_batch_and_dtype_do_not_matter(backend):
    c, weight = cosines(2, 12), torch.rand(2, 12)
    expected = coverage_select(c, 4, weight=weight, backend=backend)
    strided = torch.empty(2, 12, 24)[..., ::2].copy_(c)
    for other in (c.mT.contiguous().mT, strided, c[:, :, None].expand(-1, -1, 1, -1)[:, :, 0]):
        assert torch.equal(coverage_select(other, 4, weight=weight, backend=backend), expected)
    for b in range(2):
        alone = coverage_select(c[b : b + 1], 4, weight=weight[b : b + 1], backend=backend)
        assert_same_bits(alone[0], expected[b])
    half = weight.bfloat16()
    narrow, wide = (coverage_select(c, 4, weight=w, backend=backend) for w in (half, half.float()))
    assert torch.equal(narrow, wide)


def test_threads_do_not_matter():
    c = cosines(1, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(coverage_select(c, 60))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_fp64():
    c = cosines(2, 50).double() + 1e-12 * torch.rand(2, 50, 50, dtype=torch.float64)
    assert torch.equal(coverage_select(c, 30), reference.coverage_select(c, 30))


@pytest.mark.parametrize("lengths", [[7, 0, 130, 3], [1], [8, 8]])
def test_segments_are_images(backend, lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    kept = [min((n + 1) // 2, 3) for n in lengths]
    cu_kept = torch.tensor([0, *kept]).cumsum(0).int()
    t, longest = sum(lengths), max(lengths) + 2
    c, weight = torch.full((t, longest), torch.nan), torch.rand(t)
    expected = []
    for start, n, k in zip(cu_seqlens.tolist(), lengths, kept, strict=False):
        if n:
            c[start : start + n, :n] = cosines(1, n)[0]
            of_segment = weight[None, start : start + n]
            expected += coverage_select(c[None, start : start + n, :n], k, weight=of_segment, backend=backend)[
                0
            ].tolist()
    order = coverage_select_varlen(c, cu_seqlens, cu_kept, sum(kept), longest, weight=weight, backend=backend)
    assert order.tolist() == expected


@pytest.mark.parametrize("offsets", [[0, 9, 4, 30], [-5, 6, 99, 100], [30, 0, 0, 0], [2**31 - 1, -(2**31), 0, 5]])
def test_wrong_offsets_are_harmless(backend, offsets):
    c, wrong = torch.rand(20, 12), torch.tensor(offsets, dtype=torch.int32)
    right = torch.tensor([0, 5, 12, 20], dtype=torch.int32)
    for cu_seqlens, cu_kept in ((wrong, right), (right, wrong), (wrong, wrong)):
        order = coverage_select_varlen(c, cu_seqlens, cu_kept, 15, 12, backend=backend)
        assert order.min() >= -1 and order.max() < 12


def test_the_kernel_refuses_what_does_not_fit_registers():
    c = torch.zeros(1, 1, MAX_STORED + 1)
    with pytest.raises(ValueError, match="N: expected at most 16384 tokens an image in the Triton coverage_select"):
        kernel.coverage_select(c, 1)
    assert kernel.coverage_select(c, 0).shape == (1, 0)


def test_debug_names_what_is_wrong():
    c, weight = torch.rand(1, 4, 5), torch.tensor([[1.0, 1.0, -1.0, 1.0, 1.0]])
    with debug():
        with pytest.raises(ValueError, match="weight: expected numbers >= 0.*image 0, token 2"):
            coverage_select(c, 2, weight=weight)
        coverage_select(c, 2, weight=weight, combine="add")
        c[0, 3, 1] = -torch.inf
        with pytest.raises(ValueError, match="c: .*image 0, row 3, token 1"):
            coverage_select(c, 2)
