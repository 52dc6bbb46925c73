import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from condense_kernels import greedy_select, select_and_merge_varlen
from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import SelectConfig, trying
from condense_kernels.ops.greedy_select import reference
from condense_kernels.testing import assert_same_bits, make_inputs

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(backends.unavailable("triton", CPU) is not None, reason="no Triton on CPU tensors")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]


def sequential_greedy(s, utility, k, suppression):
    """Eq. 2 written a second time, in plain Python over one image, for finite input: one fp32 rounding an operation."""
    f32 = lambda x: torch.tensor(x, dtype=torch.float32).item()  # noqa: E731
    s, u, n = s.tolist(), utility.tolist(), len(utility)
    order = []
    for _ in range(k):
        score = {
            i: f32(u[i] - f32(f32(suppression) * max(s[j][i] for j in order))) if order else u[i]
            for i in range(n)
            if i not in order
        }
        order.append(max(score, key=lambda i: (score[i], -i)))
    return order


# Few distinct values make ties; the rest are ordinary, tiny and huge numbers.
values = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1, width=32)
utilities = values | st.floats(width=32, allow_nan=False, allow_infinity=False)
suppressions = st.sampled_from([0.0, 0.5, 1.0, 3.0]) | st.floats(0, 2.0**100, width=32)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 40))
    s = torch.from_numpy(draw(hnp.arrays("float32", (n, n), elements=values)))
    s = torch.maximum(s, s.T)
    prior = torch.from_numpy(draw(hnp.arrays("float32", n, elements=utilities)))
    return s, prior, draw(st.integers(0, n)), draw(suppressions)


@settings(max_examples=300)
@given(problems())
def test_reference_is_the_sequential_greedy(problem):
    s, prior, k, suppression = problem
    order = reference.greedy_select(s[None], prior[None], k, suppression=suppression)
    assert order[0].tolist() == sequential_greedy(s, prior, k, suppression)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=400)
@given(problem=problems())
def test_selection_is_exactly_the_sequential_greedy(backend, problem):
    s, prior, k, suppression = problem
    expected = reference.greedy_select(s[None], prior[None], k, suppression=suppression)
    assert torch.equal(greedy_select(s[None], prior[None], k, suppression=suppression, backend=backend), expected)


anything = utilities | st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def hostile_problems(draw):
    n = draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    width = 32 if dtype == "float32" else 64
    wild = st.floats(width=width)
    s = torch.from_numpy(draw(hnp.arrays(dtype, (n, n), elements=values | wild)))
    prior = torch.from_numpy(draw(hnp.arrays(dtype, n, elements=values | wild)))
    tier = torch.from_numpy(draw(hnp.arrays("int8", n, elements=st.integers(0, 3))))
    sbar = draw(st.none() | st.floats(0, 1, width=32))
    return s, prior, tier if draw(st.booleans()) else None, sbar, draw(st.integers(0, n)), draw(suppressions)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=400)
@given(problem=hostile_problems())
def test_anything_goes_as_the_reference_goes(backend, problem):
    """NaN, infinities, tiers, scaled priors: the same picks to the last."""
    s, prior, tier, sbar, k, suppression = problem
    if backend == "triton":
        s, prior = s.float(), prior.float()
    options = {
        "tier": None if tier is None else tier[None],
        "sbar": None if sbar is None else torch.tensor([sbar]),
        "suppression": suppression,
    }
    expected = reference.greedy_select(s[None], prior[None], k, **options)
    assert torch.equal(greedy_select(s[None], prior[None], k, **options, backend=backend), expected)


@needs_triton
@settings(max_examples=100)
@given(problem=problems())
def test_a_row_loaded_ahead_takes_no_part_in_the_picks(problem):
    """Whether the guess of the next pick is right or not."""
    s, prior, k, suppression = problem
    expected = reference.greedy_select(s[None], prior[None], k, suppression=suppression)
    with trying(SelectConfig, ahead=True):
        order = greedy_select(s[None], prior[None], k, suppression=suppression, backend="triton")
    assert torch.equal(order, expected)


@needs_triton
@pytest.mark.parametrize("n", [20, 130])
@pytest.mark.parametrize("kind", ["random", "masked", "nan", "duplicates"])
def test_a_row_loaded_ahead_by_the_flagship(kind, n):
    """In several chunks, with tokens that are dead from the start."""
    inputs = make_inputs(kind, batch=2, num_tokens=n, channels=8, num_anchors=n // 2, num_background=n // 3)
    expected = inputs.run("triton")
    with trying(SelectConfig, ahead=True):
        assert_same_bits(inputs.run("triton"), expected)


@needs_triton
def test_a_row_loaded_ahead_in_a_packed_batch(bounded):
    """The last live token has no other behind it, and what is loaded then lies in the segment as well."""
    features, scores = torch.randn(23, 6), torch.rand(23)
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in ([0, 1, 12, 12, 23], [0, 1, 8, 8, 12], [0, 0, 4, 4, 11])]
    call = lambda: select_and_merge_varlen(  # noqa: E731
        features, scores, *offsets, 23, 12, spatial_weight=0.0, backend="triton"
    )
    expected = call()
    with trying(SelectConfig, ahead=True):
        assert_same_bits(call(), expected)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 64, 100, 576])
def test_all_equal_goes_by_index(n, backend):
    if backend == "triton" and n > 100:
        pytest.skip("the interpreter takes minutes")
    order = greedy_select(torch.ones(1, n, n), torch.ones(1, n), n, backend=backend)
    assert order[0].tolist() == list(range(n))


def test_first_pick_has_no_suppression_and_negative_cosines_attract(backend):
    """m is not 0 at first: token 2 gains from its cosine of -1 to the first pick."""
    s = torch.tensor([[[1.0, 0.5, -1.0], [0.5, 1.0, 0.0], [-1.0, 0.0, 1.0]]])
    prior = torch.tensor([[2.0, 1.9, 0.6]])
    assert greedy_select(s, prior, 3, backend=backend).tolist() == [[0, 2, 1]]
    assert greedy_select(s, prior, 3, suppression=0.0, backend=backend).tolist() == [[0, 1, 2]]


def test_two_roundings_decide(backend):
    """u - suppression * m with the product rounded: a fused multiply-add would pick token 2."""
    third = torch.tensor(1 / 3, dtype=torch.float32)
    product = (third * third).item()
    s = torch.tensor([[[1.0, third.item(), third.item()]] * 3])
    s[0, :, 1] = s[0, 1, :] = 0.0
    prior = torch.tensor([[9.0, 0.0, product]])  # token 2 scores exactly 0 after rounding: a tie, so token 1 wins
    assert greedy_select(s, prior, 2, suppression=third.item(), backend=backend).tolist() == [[0, 1]]


def test_minus_zero_is_zero(backend):
    prior = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert greedy_select(torch.zeros(1, 4, 4), prior, 4, backend=backend).tolist() == [[0, 1, 2, 3]]
    assert greedy_select(-torch.zeros(1, 4, 4), -prior, 4, backend=backend).tolist() == [[0, 1, 2, 3]]


def test_tiers(backend):
    tier = torch.tensor([[2, 1, 3, 0, 1, 0, 2]], dtype=torch.int8)
    prior = torch.tensor([[9.0, 8.0, 7.0, 1.0, 6.0, 2.0, 5.0]])
    s = torch.eye(7)[None]
    order = greedy_select(s, prior, 7, tier=tier, backend=backend)
    assert order.tolist() == [[5, 3, 1, 4, 0, 6, -1]]
    for k in range(7):
        assert torch.equal(greedy_select(s, prior, k, tier=tier, backend=backend), order[:, :k])


def test_nan_utility_is_the_lowest_of_its_tier(backend):
    prior = torch.tensor([[math.nan, -math.inf, -1.0, math.inf]])
    tier = torch.tensor([[0, 0, 0, 0]], dtype=torch.int8)
    assert greedy_select(torch.eye(4)[None], prior, 4, tier=tier, backend=backend).tolist() == [[3, 2, 0, 1]]


def test_suppression_that_overflows_still_picks_everyone_once(backend):
    s = torch.full((1, 5, 5), 2.0)
    order = greedy_select(s, torch.arange(5.0)[None], 5, suppression=3e38, backend=backend)
    assert order.tolist() == [[4, 0, 1, 2, 3]]


def test_prior_is_scaled_by_the_means(backend):
    """u = sbar / mean|prior| * prior over tiers 0 and 3: here 0.5 / 2 * prior."""
    s = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    prior = torch.tensor([[4.0, 3.0, -1.0]])  # mean of magnitudes 8/3
    sbar = torch.tensor([0.6])  # u = 0.9, 0.675, -0.225: after token 0, token 1 has -0.225 and ties with token 2
    fine = greedy_select(s, prior, 2, sbar=torch.tensor([0.61]), backend=backend)
    rough = greedy_select(s, prior, 2, sbar=torch.tensor([0.59]), backend=backend)
    assert (fine.tolist(), rough.tolist()) == ([[0, 1]], [[0, 2]])
    assert greedy_select(s, prior, 1, sbar=sbar, backend=backend).tolist() == [[0]]


def top_k(prior, tier, k):
    """Plain top-k as torch sorts it: stable, so ties go by index; then tier 1 and tier 2 by index."""
    limit = torch.finfo(prior.dtype).max
    prior = prior.nan_to_num(nan=-limit, posinf=limit, neginf=-limit) + 0.0  # no -0
    order = prior.sort(descending=True, stable=True).indices.tolist()
    by_index = [i for leftover in (1, 2) for i in range(len(prior)) if tier[i] == leftover]
    order = [i for i in order if tier[i] == 0] + by_index
    return (order + [-1] * len(prior))[:k]


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@settings(max_examples=200, deadline=None)
@given(problem=hostile_problems())
def test_without_suppression_it_is_plain_top_k(backend, problem):
    """Of the prior itself, whatever sbar is: scaled, distinct priors could round to a tie, or all to 0."""
    s, prior, tier, sbar, k, _ = problem
    if backend == "triton":
        s, prior = s.float(), prior.float()
    tier = torch.zeros(len(prior), dtype=torch.int8) if tier is None else tier
    expected = top_k(prior.to(torch.promote_types(s.dtype, prior.dtype)), tier, k)
    for scale in (sbar, 0.0, 1e-45, math.nan):
        options = {"sbar": None if scale is None else torch.tensor([scale]), "tier": tier[None], "suppression": 0.0}
        assert greedy_select(s[None], prior[None], k, **options, backend=backend).tolist() == [expected]


def test_neighbours_are_told_apart_without_suppression(backend):
    """Scaled, they round to the same number. Nor is anything suppressed by what fp32 takes for 0."""
    prior = torch.tensor([[1.0, 1 + 2.0**-23, 1.5, 3e38, 1e-45]])
    for suppression in (0.0, 1e-60):
        options = {"sbar": torch.tensor([1e-38]), "suppression": suppression}
        order = greedy_select(torch.eye(5)[None], prior, 5, **options, backend=backend)
        assert order.tolist() == [[3, 2, 1, 0, 4]]


def test_taken_tokens_count_in_the_mean(backend):
    """Tier 3 is no candidate, but the anchors are part of mean|g| in Eq. 4; masked tokens are in no mean."""
    s = torch.eye(4)[None]
    s[0, 0, 1] = s[0, 1, 0] = 0.9
    prior = torch.tensor([[4.0, 3.0, -1.0, 100.0]])
    order = {
        tier: greedy_select(
            s,
            prior,
            2,
            sbar=torch.tensor([0.61]),
            tier=torch.tensor([[0, 0, 0, tier]], dtype=torch.int8),
            backend=backend,
        ).tolist()
        for tier in (1, 2, 3)
    }
    assert order == {1: [[0, 1]], 2: [[0, 1]], 3: [[0, 2]]}


def test_strided_s(fast):
    s = torch.rand(2, 12, 12)
    s = s + s.transpose(1, 2)
    prior = torch.rand(2, 12)
    expected = greedy_select(s, prior, 7, backend=fast)
    padded = torch.nn.functional.pad(s, (0, 5, 0, 3))[:, :12, :12]
    for view in (padded, s.transpose(1, 2), s.repeat_interleave(2, dim=2)[:, :, ::2]):
        assert torch.equal(greedy_select(view, prior, 7, backend=fast), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_prior_of_other_dtypes(dtype, cpp):
    s = torch.rand(1, 20, 20)
    prior = torch.rand(1, 20).to(dtype)
    expected = reference.greedy_select(s, prior, 9)
    assert torch.equal(greedy_select(s, prior, 9, backend=cpp), expected)
