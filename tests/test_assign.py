import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condense_kernels import assign, debug
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
    message = r"^s: expected rows of kept tokens that are as their columns, got 0\.0 at image 0, row 0, token 1 and 1 more"
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
