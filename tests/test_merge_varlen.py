"""merge_varlen: the bits of merge on each segment alone, and nothing out of bounds whatever it is given."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import condense_kernels as ck
from condense_kernels._dispatch import backends
from condense_kernels.testing import assert_same_bits

CPU = torch.device("cpu")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]
MODES = ("mean", "sum", "lerp")


def sums(counts) -> torch.Tensor:
    return torch.nn.functional.pad(torch.as_tensor(counts).cumsum(0), (1, 0)).int()


def make(lengths, kept, channels=7, dtype=torch.float32, scored=True, seed=0):
    """features, scores, indices, assignment and the offsets of a batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths, kept = torch.as_tensor(lengths), torch.as_tensor(kept)
    t = int(lengths.sum())
    features = torch.randn(t, channels, generator=generator).to(dtype)
    scores = torch.rand(t, generator=generator).to(dtype) if scored else None
    pairs = list(zip(lengths.tolist(), kept.tolist(), strict=True))
    indices = torch.cat([torch.randperm(n, generator=generator)[:k] for n, k in pairs] or [torch.empty(0).long()])
    rows = [torch.randint(-1, max(k, 1), (n,), generator=generator) if k else torch.full((n,), -1) for n, k in pairs]
    assignment = torch.cat(rows or [torch.empty(0).long()])
    return features, scores, indices, assignment, sums(lengths), sums(kept), int(lengths.max()) if pairs else 0


def alone(features, scores, indices, assignment, cu_seqlens, cu_kept, max_seqlen, backend, **options):
    """Each segment by the dense operator."""
    found = []
    for s in range(len(cu_seqlens) - 1):
        tokens, rows = slice(*cu_seqlens[s : s + 2].tolist()), slice(*cu_kept[s : s + 2].tolist())
        a = None if scores is None else scores[tokens][None]
        args = features[tokens][None], a, indices[rows][None], assignment[tokens][None]
        found.append([t[0] for t in ck.merge(*args, backend=backend, **options)])
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_each_segment_alone(mode, scored, dtype, backend):
    """Empty segments, those that keep nothing, one token or all of them among them."""
    call = make([9, 0, 4, 40, 1, 5], [3, 0, 4, 5, 1, 0], dtype=dtype, scored=scored)
    options = {"mode": mode, "centre_weight": 0.3, "backend": backend}
    assert_same_bits(ck.merge_varlen(*call, **options), alone(*call, **options))


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 20), max_size=5))
    kept = [draw(st.integers(0, n)) for n in lengths]
    return make(lengths, kept, channels=3, scored=draw(st.booleans()), seed=draw(st.integers(0, 99)))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40)
@given(call=batches())
def test_batches(mode, call):
    for backend in {*FAST, "reference"} - {"triton"}:
        result = ck.merge_varlen(*call, mode=mode, backend=backend)
        if len(call[4]) == 1:
            assert [list(t.shape) for t in result] == [[0, 3], [0]]
            continue
        assert_same_bits(result, alone(*call, mode=mode, backend=backend))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_threads_do_not_matter(count, cpp):
    call = make([900, 30, 2000, 1][:count] + [500] * (count - 4), [90, 3, 200, 1][:count] + [40] * (count - 4), 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ck.merge_varlen(*call)
        torch.set_num_threads(3)
        assert_same_bits(ck.merge_varlen(*call), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_segment_that_is_too_long_is_empty(backend):
    *call, longest = make([9, 4], [3, 2])
    merged, mass = ck.merge_varlen(*call, 8, backend=backend)
    assert merged[:3].eq(0).all() and mass[:3].eq(0).all()
    expected = ck.merge_varlen(*call, longest + 5, backend=backend)
    assert_same_bits((merged[3:], mass[3:]), tuple(t[3:] for t in expected))


def test_what_a_segment_does_not_have_counts_as_none(backend):
    """A token of the next segment is no centre, a row of it takes no token. No error: offsets decide, unread."""
    features, scores, _, _, *offsets = make([3, 4], [2, 1])
    clean = torch.tensor([0, -1, 3]), torch.tensor([0, 0, -1, 0, -1, -1, 0])
    expected = ck.merge_varlen(features, scores, *clean, *offsets, backend=backend)
    wild = torch.tensor([0, 3, 3]), torch.tensor([0, 0, 2, 0, 1, -7, 0])
    wilder = torch.tensor([0, 2**40, 3]), torch.tensor([0, 0, 2**40, 0, 2**31, -(2**63), 0])
    for indices, assignment in (wild, wilder):
        result = ck.merge_varlen(features, scores, indices, assignment, *offsets, backend=backend)
        assert_same_bits(result, expected)
    assert expected[0][1].eq(0).all() and expected[1][1] == 0


WRONG_OFFSETS = [
    pytest.param([-7, 4, 9, 99], [0, 2, 4, 6], id="tokens that are not"),
    pytest.param([3, 6, 9, 12], [2, 3, 4, 6], id="not from 0"),
    pytest.param([0, 1, 9, 24], [0, 4, 5, 6], id="more rows than tokens"),
    pytest.param([9, 4, 20, 2], [6, 0, 9, 1], id="decreasing"),
    pytest.param([-(2**31), 2**31 - 1, 0, 5], [2**31 - 1, -(2**31), 3, 2**31 - 1], id="huge"),
]


@pytest.mark.parametrize(("cu_seqlens", "cu_kept"), WRONG_OFFSETS)
def test_wrong_offsets_are_harmless(cu_seqlens, cu_kept, backend, bounded):
    features, scores, indices, assignment, *_ = make([8, 8, 8], [2, 2, 2])
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in (cu_seqlens, cu_kept)]
    for mode in MODES:
        merged, mass = ck.merge_varlen(features, scores, indices, assignment, *offsets, 24, mode=mode, backend=backend)
        assert merged.isfinite().all() and mass.isfinite().all()
        rising = all(a <= b for cu in (cu_seqlens, cu_kept) for a, b in itertools.pairwise(cu))
        if rising:  # else which tokens the segments get is not specified
            exact = ck.merge_varlen(features, scores, indices, assignment, *offsets, 24, mode=mode, backend="reference")
            torch.testing.assert_close((merged, mass), exact)


def test_rows_of_no_segment_are_zeros(backend):
    features, _, indices, assignment, cu_seqlens, _, longest = make([9, 4], [3, 2])
    for mode in MODES:
        merged, mass = ck.merge_varlen(
            features, None, indices.clamp(max=3), assignment.clamp(max=0), cu_seqlens, sums([1, 1]) + 1, longest,
            mode=mode, backend=backend,
        )  # fmt: skip
        assert merged[[0, 3, 4]].eq(0).all() and mass[[0, 3, 4]].eq(0).all()
        assert merged[1:3].ne(0).any(dim=1).all()


def test_no_segment_and_no_row(backend):
    features, scores, indices, assignment, cu_seqlens, cu_kept, longest = make([9, 4], [3, 2])
    nothing = torch.zeros(1, dtype=torch.int32)
    merged, mass = ck.merge_varlen(features, scores, indices, assignment, nothing, nothing, longest, backend=backend)
    assert merged.shape == (5, 7) and merged.eq(0).all() and mass.eq(0).all()
    none = torch.zeros(0, dtype=torch.int64)
    merged, mass = ck.merge_varlen(
        features, scores, none, assignment, cu_seqlens, 0 * cu_kept, longest, backend=backend
    )
    assert merged.shape == (0, 7) and mass.shape == (0,)
    merged, mass = ck.merge_varlen(features, scores, indices, assignment, cu_seqlens, cu_kept, 0, backend=backend)
    assert merged.eq(0).all() and mass.eq(0).all()


def test_the_flagship_is_merged_by_it(backend):
    """Another plane of the tokens, with the clusters of select_and_merge_varlen."""
    torch.manual_seed(0)
    features, scores, positions = torch.randn(30, 6), torch.rand(30), torch.rand(30, 2)
    budget = ck.varlen_budget([12, 5, 13], keep=0.3)
    out = ck.select_and_merge_varlen(features, scores, *budget, positions=positions, backend=backend)
    cu_kept = budget.cu_anchors + budget.cu_background
    again = ck.merge_varlen(
        features, scores, out.indices, out.assignment, budget.cu_seqlens, cu_kept, budget.max_seqlen, backend=backend
    )
    assert_same_bits(again, (out.merged, out.mass))


def test_a_cache_is_merged_by_its_channels(backend):
    """Heads behind the tokens, [T, H, d], are channels like others."""
    features, *rest = make([9, 4], [3, 2], channels=8)
    heads = features.unflatten(1, (2, 4))
    merged, _ = ck.merge_varlen(heads.flatten(1), *rest, backend=backend)
    one, _ = ck.merge_varlen(heads[:, 1], *rest, backend=backend)
    assert_same_bits(merged.unflatten(1, (2, 4))[:, 1], one)


def test_debug_finds_what_is_wrong():
    features, scores, _, _, *offsets = make([3, 4], [2, 1])
    indices, assignment = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0, 0, -1, 0, 0])
    with ck.debug():
        ck.merge_varlen(features, scores, indices, assignment, *offsets)
        for wrong, message in (
            (
                {"indices": torch.tensor([0, 3, 3])},
                "indices: expected tokens of the row's image, or -1, got 3 at row 1",
            ),
            ({"indices": torch.tensor([2, 2, 3])}, "indices: expected distinct tokens, got 2 at row 1"),
            ({"assignment": assignment + 1}, "assignment: expected rows of the token's image, or -1, got 2 at token 1"),
            ({"scores": -scores}, "scores: expected numbers >= 0, got -.* at token 0"),
            ({"cu_seqlens": offsets[0] + 1}, "cu_seqlens: expected running sums from 0 up to T = 7, got 1 ... 8"),
            ({"cu_kept": offsets[1] - 1}, "cu_kept: expected running sums from 0 up to total_keep = 3, got -1 ... 2"),
            ({"max_seqlen": 3}, "cu_seqlens: expected at most max_seqlen = 3, got 4 at image 1"),
        ):
            names = ("indices", "assignment", "cu_seqlens", "cu_kept", "max_seqlen")
            given = dict(zip(names, (indices, assignment, *offsets), strict=True))
            with pytest.raises(ValueError, match=message):
                ck.merge_varlen(features, **{"scores": scores, **given, **wrong})


def test_errors_name_the_argument():
    call = make([9, 4], [3, 2])
    names = ("features", "scores", "indices", "assignment", "cu_seqlens", "cu_kept", "max_seqlen")
    for name, wrong, message in (
        ("features", call[0][None], r"features: expected 2 axes \[T D\], got 3"),
        ("features", call[0][:, :0], r"features: expected at least one channel"),
        ("scores", call[1][:-1], r"scores: expected shape \[T\] = \[13\]"),
        ("indices", call[2][None], r"indices: expected 1 axes \[total_keep\], got 2"),
        ("indices", call[2].int(), "indices: expected dtype int64, got int32"),
        ("assignment", call[3][:-1], r"assignment: expected shape \[T\] = \[13\]"),
        ("cu_kept", call[5][:-1], r"cu_kept: expected shape \[S\+1\] = \[3\]"),
        ("cu_seqlens", call[4].long(), "cu_seqlens: expected dtype int32, got int64"),
        ("max_seqlen", -1, "max_seqlen: expected 0 <= max_seqlen"),
    ):
        arguments = {**dict(zip(names, call, strict=True)), name: wrong}
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            ck.merge_varlen(**arguments)
        with pytest.raises(RuntimeError, match=f"^{message}"):
            torch.ops.condense.merge_varlen(**arguments)
