import functools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from condense_kernels import greedy_select, select_and_merge, select_and_merge_varlen, similarity
from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import SelectConfig, trying
from condense_kernels.ops.greedy_select import reference
from condense_kernels.testing import assert_same_bits, make_inputs

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(backends.unavailable("triton", CPU) is not None, reason="no Triton on CPU tensors")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]


def f32(x):
    return float(numpy.float32(x))


def defined_greedy(s, prior, k, suppression, combine, first=None, candidates=None, max_min=False, tier=None):
    """The page, written a second time: plain Python over one image of lists, one fp32 rounding an operation."""
    limit = float(numpy.finfo("float32").max)
    clamp = lambda x, nan: nan if x != x else min(max(x, -limit), limit)  # noqa: E731
    n, f = len(s), f32(suppression)
    entry = [[x if math.isfinite(x) else 0.0 for x in row] for row in s]
    u = [clamp(x, -limit) for x in prior] if prior is not None else [0.0] * n
    tier = [0] * n if tier is None else tier
    may = [True] * n if candidates is None else candidates
    left = [i for i in range(n) if tier[i] == 0 and may[i]]
    if combine == "mul":
        u = [max(x, 0.0) for x in u]
    opening = dict(enumerate(u))
    if isinstance(first, int) and first in left:
        opening[first] = math.inf
    elif isinstance(first, list):
        opening = {i: clamp(first[i], -limit) for i in range(n)}
    elif max_min:
        opening = {i: -max((entry[j][i] for j in left if j != i), default=-math.inf) for i in left}
    order = []
    while left and len(order) < k:
        scores = {}
        for i in left:
            m = max((entry[j][i] for j in order), default=0.0)
            if not order:
                scores[i] = opening[i]
            elif combine == "sub":
                scores[i] = f32(u[i] - f32(f * m))
            else:
                scores[i] = f32(u[i] * clamp(f32(1.0 - f32(f * m)), None))
        pick = max(left, key=lambda i: (scores[i], -i))
        order.append(pick)
        left.remove(pick)
    order += [i for leftover in (1, 2) for i in range(n) if tier[i] == leftover and may[i]]
    return (order + [-1] * n)[:k]


# Few distinct values make ties; the rest are ordinary, tiny and huge numbers.
values = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1, width=32)
utilities = values | st.floats(width=32, allow_nan=False, allow_infinity=False)
suppressions = st.sampled_from([0.0, 0.5, 1.0, 3.0]) | st.floats(0, 2.0**100, width=32)
anything = values | st.floats(width=32)


@st.composite
def problems(draw, entries=values, priors=utilities):
    """One image: arguments by name, s not symmetric."""
    n = draw(st.integers(1, 24))
    array = lambda elements, *shape, dtype="float32": torch.from_numpy(  # noqa: E731
        draw(hnp.arrays(dtype, shape or n, elements=elements))
    )
    options = {"suppression": draw(suppressions), "combine": draw(st.sampled_from(["sub", "mul"]))}
    if draw(st.booleans()):
        options["candidates"] = array(st.booleans(), dtype="bool")[None]
    if draw(st.booleans()):
        options["tier"] = array(st.integers(0, 3), dtype="int8")[None]
    rule = draw(st.sampled_from(["prior", "max_min", "index", "utilities"]))
    if rule == "max_min":
        options["max_min"] = True
    elif rule == "index":
        options["first"] = torch.tensor([draw(st.integers(-1, n - 1))])
    elif rule == "utilities":
        options["first"] = array(priors)[None]
    prior = array(priors)[None] if draw(st.booleans()) else None
    return array(entries, n, n)[None], prior, draw(st.integers(0, n)), options


def by_hand(s, prior, k, options):
    listed = {name: value[0].tolist() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return defined_greedy(s[0].tolist(), None if prior is None else prior[0].tolist(), k, **listed)


OVERFLOWS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
EXAMPLES = {"cpp": 300, "reference": 100, "triton": 40}  # as many as a backend has time for


def each_backend(examples: st.SearchStrategy, backends: list[str]):
    """For tests of (backend, problem)."""

    def decorate(test):
        @functools.wraps(test)
        def run(backend):
            settings(max_examples=EXAMPLES[backend])(given(examples)(lambda problem: test(backend, problem)))()

        del run.__wrapped__  # pytest would ask for a fixture `problem`
        return OVERFLOWS(pytest.mark.parametrize("backend", backends)(run))

    return decorate


@each_backend(problems(anything, anything), [*FAST, "reference"])
def test_selection_is_the_definition(backend, problem):
    """Of anything: ties, NaN, infinities, s that is not symmetric, and every option beside every other."""
    s, prior, k, options = problem
    assert greedy_select(s, prior, k, **options, backend=backend)[0].tolist() == by_hand(s, prior, k, options)


@each_backend(problems(), [*FAST, "reference"])
def test_fewer_picks_are_the_first_of_more(backend, problem):
    """The first j of a call with k are the call with j."""
    s, prior, k, options = problem
    k = min(k, 3) if backend == "triton" else k
    longest = greedy_select(s, prior, s.shape[1], **options, backend=backend)
    assert torch.equal(greedy_select(s, prior, k, **options, backend=backend), longest[:, :k])
    picked = longest[longest >= 0]
    assert len(picked.unique()) == len(picked) and (longest[:, len(picked) :] == -1).all()


@st.composite
def scaled_problems(draw):
    """With sbar, and in fp64, which the definition above leaves to the reference."""
    s, prior, k, options = draw(problems(anything, anything))
    sbar = torch.tensor([draw(st.floats(0, 1, width=32))])
    wide = draw(st.booleans())
    return (s.double() / 3 if wide else s), prior, k, {**options, "sbar": sbar}


@each_backend(scaled_problems(), FAST)
def test_scaled_or_in_fp64_it_goes_as_the_reference_goes(backend, problem):
    s, prior, k, options = problem
    if backend == "triton":
        s = s.float()
    expected = reference.greedy_select(s, prior, k, **options)
    assert torch.equal(greedy_select(s, prior, k, **options, backend=backend), expected)


@needs_triton
@settings(max_examples=50)
@given(problem=problems())
def test_a_row_loaded_ahead_takes_no_part_in_the_picks(problem):
    """Whether the guess of the next pick is right or not."""
    s, prior, k, options = problem
    expected = reference.greedy_select(s, prior, k, **options)
    with trying(SelectConfig, ahead=True):
        order = greedy_select(s, prior, k, **options, backend="triton")
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


def test_a_product_that_is_0_ties(backend):
    """0 times a negative factor is -0, which equals 0; so does what a factor of 0 leaves of any utility."""
    s = torch.tensor([[[1.0, 2.0, 1.0, 0.0]] * 4])
    prior = torch.tensor([[3.0, 0.0, 1.0, -1.0]])  # of -1 as of 0
    assert greedy_select(s, prior, 4, combine="mul", backend=backend).tolist() == [[0, 1, 2, 3]]


def test_a_factor_is_finite(backend):
    """0 times infinity would be no score."""
    s = torch.full((1, 3, 3), 3e38)
    prior = torch.tensor([[1.0, 0.5, 0.0]])
    order = greedy_select(s, prior, 3, suppression=3e38, combine="mul", backend=backend)
    assert order.tolist() == [[0, 2, 1]]


def test_three_roundings_decide(backend):
    """u * (1 - suppression * m): rounded once less, token 2 would score 2**-48 and not 0, as token 1 does."""
    third = torch.tensor(1 / 3, dtype=torch.float32).item()
    product = (torch.tensor(third) * third).item()
    assert 1 - third * third != 1 - product
    factor = torch.tensor(1.0) - product
    s = torch.tensor([[[0.0, 0.0, third]] * 3])
    prior = torch.tensor([[9.0, factor.item(), 1.0]])  # both score fl(1 - fl(1/9)): the first of them wins
    assert greedy_select(s, prior, 2, suppression=third, combine="mul", backend=backend).tolist() == [[0, 1]]


def test_the_first_pick(backend):
    """By index, by a utility of its own, by the nearest neighbour; the others go by prior."""
    line = torch.tensor([0.0, 1.0, 2.0, 7.0, 9.0])
    s = -(line[:, None] - line).abs()[None]
    first = lambda rule, **options: greedy_select(  # noqa: E731
        s, torch.tensor([[3.0, 5.0, 1.0, 2.0, 4.0]]), 1, first=rule, **options, backend=backend
    ).item()
    assert (first(None), first("prior"), first("max_min")) == (1, 1, 3)  # 7 and 9 are 2 apart
    assert [first(torch.tensor([i])) for i in range(-1, 5)] == [1, 0, 1, 2, 3, 4]
    assert first(torch.tensor([[0.0, 0.5, 1.0, 1.0, -1.0]]).half()) == 2
    assert first(None, max_min=True) == 3
    without = torch.tensor([[True, True, True, True, False]])  # the other end of the only long gap
    assert first("max_min", candidates=without) == 3 and first(torch.tensor([4]), candidates=without) == 1
    assert first("max_min", tier=torch.tensor([[0, 1, 0, 2, 3]], dtype=torch.int8)) == 0  # 2 apart, both


def test_the_nearest_neighbour_is_the_one_whose_row_says_so(backend):
    """s_ji, a column without its diagonal; the rows of those that are no candidates do not count."""
    s = torch.tensor([[[9.0, 0.4, 0.1], [0.3, 9.0, 0.2], [0.5, 0.1, 9.0]]])
    assert greedy_select(s, None, 1, first="max_min", backend=backend).item() == 2  # 0.5, 0.4, 0.2
    assert greedy_select(s.mT, None, 1, first="max_min", backend=backend).item() == 1  # 0.4, 0.3, 0.5
    two = torch.tensor([[True, True, False]])
    assert greedy_select(s, None, 1, first="max_min", candidates=two, backend=backend).item() == 0  # 0.3, 0.4
    one = torch.tensor([[False, True, False]])
    assert greedy_select(s, None, 3, first="max_min", candidates=one, backend=backend).tolist() == [[1, -1, -1]]


def test_a_neighbour_at_no_distance_counts_as_0(backend):
    """NaN and infinities in a column, as everywhere in s."""
    s = torch.tensor([[[9.0, torch.inf, 0.2], [-torch.inf, 9.0, torch.nan], [0.3, -1.0, 9.0]]])
    assert greedy_select(s, None, 1, first="max_min", backend=backend).item() == 1  # 0.3, 0, 0.2
    for value in (-torch.inf, torch.nan):
        s = torch.tensor([[[9.0, -0.5, -0.2], [value, 9.0, -0.2], [-1.0, -0.5, 9.0]]])
        assert greedy_select(s, None, 1, first="max_min", backend=backend).item() == 1  # 0, -0.5, -0.2


def test_a_row_is_what_a_pick_has_in_common_with_others(backend):
    """s[pick, i], where s is not symmetric."""
    s = torch.zeros(1, 3, 3)
    s[0, 0, 1] = 1.0
    prior = torch.tensor([[3.0, 2.0, 1.5]])
    assert greedy_select(s, prior, 2, backend=backend).tolist() == [[0, 2]]
    assert greedy_select(s.mT, prior, 2, backend=backend).tolist() == [[0, 1]]


def test_candidates_count_in_the_mean(backend):
    """As tier 3: who is no candidate is part of mean|prior| if its own tier is."""
    torch.manual_seed(3)
    s, prior, sbar = torch.rand(1, 12, 12), torch.rand(1, 12), torch.tensor([0.4])
    tier = torch.tensor([[0, 1, 2, 3] * 3], dtype=torch.int8)
    candidates = torch.rand(1, 12) < 0.5
    never = torch.where(candidates, tier, torch.where((tier == 0) | (tier == 3), 3, tier)).to(torch.int8)
    order = greedy_select(s, prior, 12, sbar=sbar, tier=tier, candidates=candidates, backend=backend)
    expected = greedy_select(s, prior, 12, sbar=sbar, tier=never, backend=backend)[0].tolist()
    expected = [i for i in expected if i >= 0 and candidates[0, i]]
    assert order[0].tolist() == expected + [-1] * (12 - len(expected))


def test_a_prior_of_minus_infinity_is_a_candidate(backend):
    prior = torch.tensor([[-torch.inf, 1.0]])
    assert greedy_select(torch.eye(2)[None], prior, 2, backend=backend).tolist() == [[1, 0]]


def test_without_suppression_zero_keys_are_as_good_as_any(backend):
    """sbar is 0 where all keys are zeros: a scaled prior would be 0 everywhere."""
    keys, scores = torch.zeros(1, 6, 4), torch.tensor([[1.0, 4.0, 2.0, 6.0, 3.0, 5.0]])
    s, sbar, _, tier = similarity(keys, scores, backend=backend)
    options = {"sbar": sbar, "tier": tier, "suppression": 0.0}
    assert greedy_select(s, scores, 3, **options, backend=backend).tolist() == [[3, 5, 1]]
    whole = select_and_merge(keys, scores, 3, 0, suppression=0.0, spatial_weight=0.0, backend=backend)
    assert whole.indices.tolist() == [[1, 3, 5]]


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


@each_backend(problems(anything, anything), [*FAST, "reference"])
def test_without_suppression_it_is_plain_top_k(backend, problem):
    """Of the prior itself, whatever sbar is: scaled, distinct priors could round to a tie, or all to 0."""
    s, prior, k, options = problem
    prior = s[:, 0] if prior is None else prior
    tier = options.get("tier", torch.zeros_like(prior, dtype=torch.int8))
    expected = top_k(prior[0], tier[0], k)
    for scale in (None, 0.0) if backend == "triton" else (None, 0.5, 0.0, 1e-45, math.nan):
        options = {"sbar": None if scale is None else torch.tensor([scale]), "tier": tier, "suppression": 0.0}
        assert greedy_select(s, prior, k, **options, backend=backend).tolist() == [expected]


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


@pytest.mark.parametrize("max_min", [False, True])
def test_neither_batch_nor_threads_matter(max_min, fast):
    """Nor the layout: an image alone, on one thread or two, is the image in its batch."""
    b, n = (5, 300) if fast == "cpp" else (2, 40)
    s, prior, candidates = torch.randn(b, n, n), torch.rand(b, n), torch.rand(b, n) < 0.9
    options = {"candidates": candidates, "max_min": max_min, "combine": "mul", "suppression": 0.3}
    expected = greedy_select(s, prior, n // 2, **options, backend=fast)
    strided = torch.nn.functional.pad(s, (0, 5, 0, 3))[:, :n, :n]
    assert torch.equal(greedy_select(strided, prior, n // 2, **options, backend=fast), expected)
    threads = torch.get_num_threads()
    try:
        for i in range(b):
            torch.set_num_threads(1 + i % 2)
            alone = {name: v[i : i + 1] if isinstance(v, torch.Tensor) else v for name, v in options.items()}
            order = greedy_select(s[i : i + 1], prior[i : i + 1], n // 2, **alone, backend=fast)
            assert torch.equal(order, expected[i : i + 1])
    finally:
        torch.set_num_threads(threads)


def test_a_narrow_utility_is_its_values(backend):
    """bf16, in prior and in first, is the fp32 of the same numbers."""
    s, prior, first = torch.rand(1, 20, 20), torch.rand(1, 20).bfloat16(), torch.rand(1, 20).bfloat16()
    expected = greedy_select(s, prior.float(), 9, first=first.float(), backend=backend)
    assert torch.equal(greedy_select(s, prior, 9, first=first, backend=backend), expected)
