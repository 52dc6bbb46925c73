import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condense_kernels import assign, assign_varlen, debug
from condense_kernels._dispatch import backends
from condense_kernels.ops.assign import reference

FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, torch.device("cpu")) is None]


def symmetric(n, seed=0, batch=1):
    s = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (s + s.transpose(1, 2)) / 2


@st.composite
def problems(draw):
    """Similarities and coordinates on coarse grids: many exact ties, and sums that fp32 and fp64 both hold exactly."""
    n = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    s = torch.randint(-4, 5, (1, n, n), generator=generator) / 4.0
    s = torch.maximum(s, s.transpose(1, 2))
    kept = torch.randperm(n, generator=generator)[: draw(st.integers(0, n))].sort().values
    tier = torch.randint(0, 4, (1, n), generator=generator).to(torch.int8) if draw(st.booleans()) else None
    return s, kept[None], tier


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=200)
@given(problem=problems())
def test_similarity_alone_with_ties(backend, problem):
    s, kept, tier = problem
    expected = reference.assign(s, kept, tier=tier, spatial_weight=0.0)
    assert torch.equal(assign(s, kept, tier=tier, spatial_weight=0.0, backend=backend), expected)


def by_hand(s, kept, tier, sources):
    """One image without distances, a token after the other: from the definition alone."""
    n, assignment = len(s), []
    takes = [j >= 0 and (tier is None or tier[j] != 2) for j in kept]
    for i in range(n):
        own = [row for row, j in enumerate(kept) if j == i and takes[row]]
        if tier is not None and tier[i] == 2:
            assignment.append(-1)
        elif own:
            assignment.append(own[0])
        elif sources is not None and not sources[i]:
            assignment.append(-1)
        else:
            scores = [s[j, i] if takes[row] else -np.inf for row, j in enumerate(kept)]
            assignment.append(int(np.argmax(scores)) if any(takes) else -1)  # the first of equal ones
    return assignment


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@settings(max_examples=60)
@given(problem=problems(), seed=st.integers(0, 2**31), with_sources=st.booleans())
def test_by_the_definition(backend, problem, seed, with_sources):
    """Any order of the kept tokens, rows of none among them, an s that is not symmetric, and who may be merged."""
    s, kept, tier = problem
    n, generator = s.shape[1], torch.Generator().manual_seed(seed)
    s = torch.randint(-4, 5, (1, n, n), generator=generator) / 4.0
    kept = kept[:, torch.randperm(kept.shape[1], generator=generator)]
    kept = torch.where(torch.rand(kept.shape, generator=generator) < 0.1, -1, kept)
    sources = torch.rand(1, n, generator=generator) < 0.5 if with_sources else None
    arrays = (None if t is None else t[0].numpy() for t in (s, kept, tier, sources))
    got = assign(s, kept, tier=tier, sources=sources, spatial_weight=0.0, backend=backend)
    assert got[0].tolist() == by_hand(*arrays)


def test_sources(backend):
    """A token that is none stays out unless it is kept, whose row goes on taking others."""
    s, kept = torch.ones(1, 6, 6), torch.tensor([[5, 0]])
    sources = torch.tensor([[False, True, False, True, False, False]])
    options = {"grid": (1, 6), "backend": backend}
    assert assign(s, kept, sources=sources, **options).tolist() == [[1, 1, -1, 0, -1, 0]]
    assert assign(s, kept, sources=~sources, **options).tolist() == [[1, -1, 1, -1, 0, 0]]
    tier = torch.tensor([[2, 0, 0, 0, 0, 0]], dtype=torch.int8)  # nor does a masked token become a source, or kept
    assert assign(s, kept, sources=sources, tier=tier, **options).tolist() == [[-1, 0, -1, 0, -1, 0]]
    with_all = assign(s, kept, sources=torch.ones(1, 6, dtype=torch.bool), **options)
    assert torch.equal(with_all, assign(s, kept, **options))


def test_sources_of_any_layout_and_of_each_image(fast):
    s, kept = symmetric(40, batch=3), torch.tensor([[3, 17, 30]] * 3)
    sources = torch.rand(3, 40) < 0.5
    expected = assign(s, kept, sources=sources, spatial_weight=0.0, backend=fast)
    assert torch.equal(expected, reference.assign(s, kept, sources=sources, spatial_weight=0.0))
    for view in (sources.T.contiguous().T, torch.stack([sources, ~sources], dim=-1)[..., 0]):
        assert torch.equal(assign(s, kept, sources=view, spatial_weight=0.0, backend=fast), expected)
    for b in range(3):
        one = slice(b, b + 1)
        alone = assign(s[one], kept[one], sources=sources[one], spatial_weight=0.0, backend=fast)
        assert torch.equal(alone, expected[one])


def test_the_row_of_the_kept_token_is_read(backend):
    """s[kept, token]: an s that is not symmetric is legal, and what debug() would ask about."""
    s = torch.zeros(1, 3, 3)
    s[0, 2, 1], s[0, 1, 0] = 0.5, 1.0  # of token 1, as kept token 2 has it; and as s[token, kept] would
    kept = torch.tensor([[0, 2]])
    assert assign(s, kept, spatial_weight=0.0, backend=backend).tolist() == [[0, 1, 1]]
    assert assign(s.mT, kept, spatial_weight=0.0, backend=backend).tolist() == [[0, 0, 1]]
    message = r"^s: expected rows of kept tokens that are as their columns, got 0\.0 at image 0, row 0, token 1 and 1 m"
    with debug(), pytest.raises(ValueError, match=message):
        assign(s, kept, spatial_weight=0.0, backend=backend)
    s[0, 0, 1] = s[0, 1, 0]
    s[0, 1, 2] = s[0, 2, 1]
    s[0, 1, 1] = 7.0
    with debug():  # what is not of a kept token does not matter
        assign(s * 1e6, kept, spatial_weight=0.0, backend=backend)


def test_debug_refuses_repeated_indices(backend):
    with debug(), pytest.raises(ValueError, match=r"^indices: expected distinct tokens, got token 2 again .* row 1"):
        assign(symmetric(4), torch.tensor([[2, 2]]), spatial_weight=0.0, backend=backend)


def test_a_mask_is_no_tier():
    """True as int8 would be tier 1, and padding tier 0: the remedy for other dtypes would be none."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"^tier: expected dtype int8, got bool. Remedy: torch.where\(mask, 0, 2\)"):
        assign(symmetric(4), torch.tensor([[0]]), tier=mask, spatial_weight=0.0)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=200)
@given(problem=problems(), weight=st.sampled_from([0.5, 1.0, 4.0]))
def test_on_a_line_with_ties(backend, problem, weight):
    """Positions 0, 1, 2 ... on one axis, scaled so that dmax is a power of two: distances are exact."""
    s, kept, tier = problem
    n = s.shape[1]
    positions = torch.arange(n).float()[:, None]
    positions[-1] = 64.0
    positions[0] = 0.0
    inside = tier is None or bool(tier[0, 0] != 2 and tier[0, -1] != 2)
    if n > 1 and inside:
        expected = reference.assign(s, kept, tier=tier, positions=positions, spatial_weight=weight)
        assert torch.equal(
            assign(s, kept, tier=tier, positions=positions, spatial_weight=weight, backend=backend), expected
        )


def test_distance_decides_where_similarity_does_not(backend):
    s = torch.zeros(1, 6, 6)
    indices = torch.tensor([[0, 5]])
    assert assign(s, indices, grid=(1, 6), backend=backend).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert assign(s, indices, grid=(1, 6), spatial_weight=0.0, backend=backend).tolist() == [[0, 0, 0, 0, 0, 1]]
    assert assign(s, indices, positions=torch.tensor([0, 9, 8, 7, 6, 10])[:, None], backend=backend).tolist() == [
        [0, 1, 1, 1, 1, 1]
    ]


def test_similarity_outweighs_distance_by_its_weight(backend):
    s = torch.zeros(1, 3, 3)
    s[0, 1, 2] = s[0, 2, 1] = 0.3  # token 1 lies 1/4 nearer to token 0, of dmax 4
    positions = torch.tensor([[0.0], [1.5], [4.0]])
    indices = torch.tensor([[0, 2]])
    rows = [
        assign(s, indices, positions=positions, spatial_weight=weight, backend=backend)[0, 1].item()
        for weight in (0.0, 1.0, 1.5)
    ]
    assert rows == [1, 1, 0]


def test_a_kept_token_goes_to_itself(backend):
    """Also where another kept token is nearer to it than it is to itself."""
    s = torch.full((1, 4, 4), 0.9)
    s[0, 2, 2] = -1.0
    assert assign(s, torch.tensor([[0, 2]]), spatial_weight=0.0, backend=backend).tolist() == [[0, 0, 1, 0]]


def test_the_box_is_that_of_valid_tokens(backend):
    """The masked outlier does not stretch dmax; the token that is not finite is valid and does."""
    s = torch.zeros(1, 4, 4)
    s[0, 1, 2] = s[0, 2, 1] = 0.4
    positions = torch.tensor([[0.0], [1.0], [3.0], [300.0]])
    indices = torch.tensor([[0, 2]])  # token 1: 0 - 1/3 against 0.4 - 2/3 within the box of three
    masked = torch.tensor([[0, 0, 0, 2]], dtype=torch.int8)
    odd = torch.tensor([[0, 0, 0, 1]], dtype=torch.int8)
    assert assign(s, indices, tier=masked, positions=positions, spatial_weight=1.5, backend=backend).tolist() == [
        [0, 0, 1, -1]
    ]
    assert assign(s, indices, tier=odd, positions=positions, spatial_weight=1.5, backend=backend).tolist() == [
        [0, 1, 1, 1]
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_position_that_is_not_finite_has_no_distance(value, backend):
    s = symmetric(5)
    positions = torch.rand(5, 2)
    positions[1, 0] = value
    got = assign(s, torch.tensor([[0, 4]]), positions=positions, backend=backend)
    assert got[0, 1] == (0 if s[0, 1, 0] >= s[0, 1, 4] else 1)
    assert torch.equal(got, reference.assign(s, torch.tensor([[0, 4]]), positions=positions))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30, 3e38])
def test_positions_of_any_magnitude(scale, backend):
    s, indices = symmetric(12), torch.tensor([[1, 5, 8]])
    positions = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).float()
    expected = assign(s, indices, positions=positions, backend=backend)
    got = assign(s, indices, positions=(positions * scale).float(), backend=backend)
    assert torch.equal(got, expected)


def line(low, high, dtype=torch.float64):
    """Six tokens in equal steps from low to high, whose difference may be no number of the dtype."""
    share = torch.arange(6, dtype=torch.float64)[:, None] / 5
    return ((1 - share) * low + share * high).to(dtype)


MAX = torch.finfo(torch.float64).max
STEPS = torch.arange(6)[:, None]


@pytest.mark.parametrize(
    "positions",
    [
        line(-1.5e308, 1.5e308),
        line(-MAX, MAX),
        line(0, 2.0**1021),
        line(-(2.0**1022), 2.0**1022),
        torch.cat([line(-1.5e308, 1.5e308), line(1e-300, 0)], dim=1),
        torch.cat([torch.full((6, 1), MAX, dtype=torch.float64), STEPS.double() * 5e-324], dim=1),
        STEPS.double() * 5e-324,
        STEPS.double() * 2.3e-308,
        STEPS + 2**60,
        STEPS * (2**62 // 5 * 2) - 2**62,
        torch.tensor([-(2**63), -(2**62) - 2**61, -(2**61), 2**61, 2**62 + 2**61, 2**63 - 1])[:, None],
        torch.cat([torch.full((6, 1), -(2**63)), STEPS - 2**62], dim=1),
        line(-3.4e38, 3.4e38, torch.float32),
        line(-65504, 65504, torch.float16),
        line(-3.3e38, 3.3e38, torch.bfloat16),
    ],
    ids=[
        *(
            "extent beyond fp64",
            "all of fp64",
            "2**1021",
            "2**1023",
            "one axis huge, one tiny",
            "beside a far constant",
        ),
        *(
            "subnormal",
            "barely normal",
            "int64 beyond 2**53",
            "extent beyond int64's",
            "all of int64",
            "a far constant",
        ),
        *("all of fp32", "all of fp16", "all of bf16"),
    ],
)
def test_extents_of_any_size(positions, backend):
    """The nearer end wins, and half a similarity less moves the border by a token: distances are in scale."""
    s, ends = torch.ones(1, 6, 6), torch.tensor([[0, 5]])
    assert assign(s, ends, positions=positions, backend=backend).tolist() == [[0, 0, 0, 1, 1, 1]]
    s[0, 0, 1:] = s[0, 1:, 0] = 0.5  # 0.5 - d against 1 - (1 - d): token 1 alone is nearer than by a fourth
    assert assign(s, ends, positions=positions, backend=backend).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert assign(s.double(), ends, positions=positions, backend="reference").tolist() == [[0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("far", [-(2**63), 2**63 - 1])
def test_masked_int64_positions_cost_no_precision(far, backend):
    positions = torch.tensor([far, 0, 1, 2, 3, 4])[:, None] + torch.tensor([0, *[2**60] * 5])[:, None]
    tier = torch.tensor([[2, 0, 0, 0, 0, 0]], dtype=torch.int8)
    got = assign(torch.ones(1, 6, 6), torch.tensor([[1, 5]]), tier=tier, positions=positions, backend=backend)
    assert got.tolist() == [[-1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("scale", [2.0**-1044, 1e-300, 1.75e308])  # the first makes multiples of the smallest number
def test_fp64_positions_of_any_magnitude(scale, backend):
    s, indices = symmetric(12), torch.tensor([[1, 5, 8]])
    positions = torch.randint(2**30, (12, 2), generator=torch.Generator().manual_seed(2)).double() / 2**29 - 1
    expected = reference.assign(s, indices, positions=positions)
    assert torch.equal(assign(s, indices, positions=positions * scale, backend=backend), expected)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(6.0)[:, None] + 2**23,
        torch.stack([torch.full((6,), 1e30), torch.arange(6.0)], dim=1),
        torch.arange(6, dtype=torch.float64)[:, None] * 1e39,
        torch.arange(6, dtype=torch.float64)[:, None] * 1e-60,
        1_700_000_000 + torch.arange(6)[:, None],
        (torch.arange(6) - 3).to(torch.int8)[:, None],
    ],
    ids=["offset", "constant axis", "beyond fp32", "below fp32", "seconds since 1970", "int8"],
)
def test_where_the_tokens_are_does_not_matter(positions, backend):
    """Only their distances do: coordinates are moved to the origin and scaled before fp32 sees them."""
    assert assign(torch.ones(1, 6, 6), torch.tensor([[0, 5]]), positions=positions, backend=backend).tolist() == [
        [0, 0, 0, 1, 1, 1]
    ]


@pytest.mark.parametrize(
    "positions", [torch.ones(4, 2), torch.full((4, 2), math.nan), torch.zeros(1, 4, 1)], ids=["point", "nan", "zeros"]
)
def test_without_extent_there_is_no_distance(positions, backend):
    s, indices = symmetric(4), torch.tensor([[0, 3]])
    expected = assign(s, indices, spatial_weight=0.0, backend=backend)
    assert torch.equal(assign(s, indices, positions=positions, backend=backend), expected)


def test_rows_that_take_nobody(backend):
    s = torch.ones(1, 4, 4)
    tier = torch.tensor([[2, 0, 0, 0]], dtype=torch.int8)
    at = {"spatial_weight": 0.0, "backend": backend}
    assert assign(s, torch.tensor([[-1, 1, -1, 3]]), **at).tolist() == [[1, 1, 1, 3]]
    assert assign(s, torch.tensor([[0, 2]]), tier=tier, **at).tolist() == [[-1, 1, 1, 1]]
    assert assign(s, torch.tensor([[0]]), tier=tier, **at).tolist() == [[-1] * 4]
    assert assign(s, torch.tensor([[-1]]), **at).tolist() == [[-1] * 4]
    assert assign(s, torch.empty(1, 0, dtype=torch.int64), **at).tolist() == [[-1] * 4]
    assert assign(s, torch.tensor([[2, 2]]), **at).tolist() == [[0] * 4]  # named twice: the lowest row


def test_not_finite_similarity_counts_as_zero(backend):
    s = torch.tensor([[[1.0, math.nan, 0.1], [math.nan, 1.0, math.inf], [0.1, math.inf, 1.0]]])
    got = assign(s, torch.tensor([[0, 2]]), spatial_weight=0.0, backend=backend)
    assert got.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("index", [-2, 4, 2**40])
def test_index_out_of_range(index, backend):
    indices = torch.tensor([[0, index]])
    if backend == "triton":  # values are not read on a GPU: a row that takes nobody
        assert assign(symmetric(4), indices, spatial_weight=0.0, backend=backend).tolist() == [[0] * 4]
        return
    with pytest.raises(RuntimeError, match=rf"^indices: expected values in \[-1, 4\), got {index}"):
        assign(symmetric(4), indices, spatial_weight=0.0, backend=backend)


# Packed batches


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(lengths, keep, seed=0, width=None):
    """s [T, width], NaN behind each segment's own, indices, the offsets, max_seqlen, and what else is of tokens."""
    generator = torch.Generator().manual_seed(seed)
    t, width = sum(lengths), max(lengths, default=0) if width is None else width
    s = torch.full((t, width), math.nan)
    for start, n in zip(offsets_of(lengths).tolist(), lengths, strict=False):
        s[start : start + n, :n] = torch.randint(-4, 5, (n, n), generator=generator) / 4.0
    indices = [torch.randperm(n, generator=generator)[:k] for n, k in zip(lengths, keep, strict=True)]
    options = {
        "tier": torch.randint(0, 4, (t,), generator=generator).to(torch.int8),
        "positions": torch.randint(0, 9, (t, 2), generator=generator),
        "sources": torch.rand(t, generator=generator) < 0.7,
    }
    rows = torch.cat([*indices, torch.zeros(0, dtype=torch.int64)])
    return s, rows, offsets_of(lengths), offsets_of(keep), max(lengths, default=0), options


def alone(call, options, spatial_weight, backend):
    """By assign on one segment after the other."""
    s, indices, cu_seqlens, cu_kept, _ = call
    found = []
    for start, stop, first, last in zip(cu_seqlens, cu_seqlens[1:], cu_kept, cu_kept[1:], strict=False):
        of_tokens = {name: value[start:stop][None] for name, value in options.items()}
        square, rows = s[start:stop, : stop - start][None], indices[first:last][None]
        found.append(assign(square, rows, **of_tokens, spatial_weight=spatial_weight, backend=backend)[0])
    return torch.cat(found)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 2**31), weight=st.sampled_from([0.0, 1.0]))
def test_packed_is_each_segment_alone(backend, data, seed, weight):
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    keep = [data.draw(st.integers(0, n)) for n in lengths]
    wider = data.draw(st.integers(0, 3))
    *call, options = packed(lengths, keep, seed, max(lengths) + wider)
    options = {name: value for name, value in options.items() if data.draw(st.booleans()) or name == "positions"}
    got = assign_varlen(*call, **options, spatial_weight=weight, backend=backend)
    assert torch.equal(got, alone(call, options, weight, backend))


def test_packed_by_hand(backend):
    s = torch.tensor([[1.0, 0.2, 9.0], [0.2, 1.0, 9.0], [1.0, 0.0, 0.7], [0.0, 1.0, 0.8], [0.7, 0.8, 1.0]])
    call = s, torch.tensor([1, 0, 1]), offsets_of([2, 3]), offsets_of([1, 2]), 3
    assert assign_varlen(*call, spatial_weight=0.0, backend=backend).tolist() == [0, 0, 0, 1, 1]
    sources = torch.tensor([False, True, True, True, False])
    assert assign_varlen(*call, spatial_weight=0.0, sources=sources, backend=backend).tolist() == [-1, 0, 0, 1, -1]
    places = torch.tensor([[0.0], [1.0], [10.0], [14.0], [11.5]])  # 0.7 - 1.5 / 4 and 0.8 - 2.5 / 4
    assert assign_varlen(*call, positions=places, backend=backend).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("cu_seqlens", "cu_kept"),
    [
        ([0, 7, 60], [0, 2, 8]),  # beyond T
        ([0, 7, 12], [0, 2, 90]),  # beyond total_keep
        ([-5, 7, 12], [-3, 2, 5]),
        ([0, 12, 7], [0, 5, 2]),  # decreasing
        ([0, 2, 12], [0, 5, 8]),  # more rows than tokens; a segment longer than max_seqlen
        ([2**31 - 1, -(2**31), 3], [-(2**31), 2**31 - 1, 0]),
        ([12, 12, 12], [0, 0, 0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_options", [False, True])
def test_wrong_offsets_do_no_harm(cu_seqlens, cu_kept, with_options, backend, bounded):
    """Within the tensors, and any answer is a row of the segment's own, or -1."""
    s, _, _, _, _, options = packed([7, 5], [2, 3])
    s, rows = s.nan_to_num(), torch.zeros(5, dtype=torch.int64)  # index 0 is in every segment
    call = s, rows, torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor(cu_kept, dtype=torch.int32), 7
    options = options | {"spatial_weight": 1.0} if with_options else {"spatial_weight": 0.0}
    got = assign_varlen(*call, **options, backend=backend)
    assert got.shape == (12,) and got.ge(-1).all() and got.lt(5).all()
    if cu_seqlens == sorted(cu_seqlens) and cu_kept == sorted(cu_kept):
        assert torch.equal(got, assign_varlen(*call, **options, backend="reference"))


def test_nothing_to_assign(backend):
    for lengths, keep in (([], []), ([0], [0]), ([0, 0], [0, 0]), ([3], [0]), ([2, 3], [0, 0])):
        *call, options = packed(lengths, keep)
        got = assign_varlen(*call, **options, backend=backend)
        assert got.tolist() == [-1] * sum(lengths)
    *call, options = packed([3, 2], [1, 1])
    assert assign_varlen(*call[:-1], 0, **options, backend=backend).tolist() == [-1] * 5  # all longer than that
    expected = assign_varlen(*call, **options, backend=backend)
    assert assign_varlen(*call[:-1], 2, **options, backend=backend).tolist() == [-1, -1, -1, *expected[3:].tolist()]


def test_packed_in_any_layout_and_by_any_number_of_threads(fast):
    lengths, keep = [90, 1, 0, 61, 17], [30, 1, 0, 9, 17]
    *call, options = packed(lengths, keep)
    expected = assign_varlen(*call, **options, backend=fast)
    wide = torch.cat([call[0], call[0]], dim=1)
    for s in (call[0].T.contiguous().T, wide[:, : call[0].shape[1]], wide, wide.repeat_interleave(2, dim=0)[::2]):
        assert torch.equal(assign_varlen(s, *call[1:], **options, backend=fast), expected)
    pairs = {name: torch.stack([value, value], dim=1)[:, 0] for name, value in options.items()}
    assert torch.equal(assign_varlen(*call, **pairs, backend=fast), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(assign_varlen(*call, **options, backend=fast), expected)
    finally:
        torch.set_num_threads(threads)


def test_an_index_of_another_segment_is_out_of_range(backend):
    *call, _ = packed([7, 2], [1, 2])
    call[1] = torch.tensor([0, 1, 2])
    if backend == "triton":
        got = assign_varlen(*call, spatial_weight=0.0, backend=backend)
        assert got[7:].tolist() == [0, 0]
        return
    with pytest.raises(RuntimeError, match=r"^indices: expected values in \[-1, 2\), got 2"):
        assign_varlen(*call, spatial_weight=0.0, backend=backend)


def test_debug_looks_at_each_segment(backend):
    s, indices, cu_seqlens, cu_kept, longest, _ = packed([3, 2], [1, 2])
    s = torch.full_like(s, math.nan)  # behind a segment's own there may be anything
    s[:3], s[3:, :2] = 1.0, 1.0
    good, places = [s, indices, cu_seqlens, cu_kept, longest], torch.rand(5, 2)

    def refused(at, value, match):
        call = good.copy()
        call[at] = value
        with debug(), pytest.raises(ValueError, match=match):
            assign_varlen(*call, positions=places, backend=backend)

    def offsets(*values):
        return torch.tensor(values, dtype=torch.int32)

    with debug():
        assign_varlen(*good, positions=places, backend=backend)
    bad = s.clone()
    bad[4, 1] = math.inf
    refused(0, bad, "^s: expected finite numbers, got inf at image 1, token 1, token 1")
    bad[4, 1], bad[4, 0] = 1.0, 0.5
    refused(0, bad, "^s: expected rows of kept tokens that are as their columns, got .* at image 1")
    refused(1, torch.tensor([0, 1, 1]), "^indices: expected distinct tokens, got token 1 again at image 1, row 1")
    refused(1, torch.tensor([0, 1, 2]), r"^indices: expected values in \[-1, 2\), got 2 at image 1, row 1")
    refused(2, offsets(0, 4, 5), "^cu_seqlens: expected at most max_seqlen = 3, got 4 at image 0")
    refused(3, offsets(0, 0, 3), "^cu_kept: expected at most the tokens of a segment, got 3")
    places[3, 1] = math.nan
    refused(1, indices, "^positions: expected finite numbers, got nan at image 1, token 0, axis 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s": torch.zeros(9, 6)}, "s: expected rows of at least max_seqlen = 7 similarities, got [9, 6]"),
        ({"indices": torch.zeros(10, dtype=torch.int64)}, "total_keep: expected 0 <= total_keep <= 9 (T = 9 tokens)"),
        ({"cu_kept": torch.zeros(2, dtype=torch.int32)}, "cu_kept: expected shape [S+1] = [3]"),
        ({"positions": None}, "positions: expected a tensor [T, P], as spatial_weight is not 0, got None"),
        ({"sources": torch.ones(8, dtype=torch.bool)}, "sources: expected shape [T] = [9]"),
        ({"sources": torch.ones(9)}, "sources: expected dtype bool, got float32"),
        ({"tier": torch.ones(8, dtype=torch.int8)}, "tier: expected shape [T] = [9]"),
    ],
    ids=str,
)
def test_packed_arguments_are_named(change, message):
    s, indices, cu_seqlens, cu_kept, max_seqlen, options = packed([7, 2], [1, 2])
    given = {"s": s, "indices": indices, "cu_seqlens": cu_seqlens, "cu_kept": cu_kept, "max_seqlen": max_seqlen}
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        assign_varlen(**given | options | change)
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        torch.ops.condense.assign_varlen(**given | options | change)
