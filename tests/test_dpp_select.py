import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from condense_kernels import dpp_select, similarity
from condense_kernels._dispatch import backends

CPU = torch.device("cpu")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]
EVERY = (*FAST, "reference")
FAST_BACKENDS = pytest.mark.parametrize("backend", FAST)


def examples(backend: str, most: int) -> settings:
    """So many, fewer in Triton's interpreter, which is slow."""
    return settings(max_examples=most // 5 if backend == "triton" else most, deadline=None)


F32 = np.float32


def sequential_picks(s, quality, k, eps=1e-5, damping=0.0):
    """The definition a second time, a token at a time in numpy's fp32 scalars, for finite input without tiers."""
    n = len(s)
    q = None if quality is None else [F32(value) for value in quality]
    kernel = lambda i, j: F32(s[i][j]) if q is None else q[i] * F32(s[i][j]) * q[j]  # noqa: E731
    diagonal = [kernel(i, i) for i in range(n)]
    gain, factor, order = list(diagonal), [[] for _ in range(n)], []
    while len(order) < k:
        left = [i for i in range(n) if i not in order and gain[i] > max(F32(eps) * diagonal[i], F32(0))]
        if not left:
            break
        pick = max(left, key=lambda i: (gain[i], -i))
        root = np.sqrt(gain[pick] + F32(damping))
        column = list(factor[pick])
        for i in range(n):
            x = kernel(pick, i)
            for at_pick, at_i in zip(column, factor[i], strict=True):
                x = x - at_pick * at_i
            x = x / root
            gain[i] = gain[i] - x * x
            factor[i].append(x)
        order.append(pick)
    worth = diagonal if q is None else q
    rest = sorted((i for i in range(n) if i not in order), key=lambda i: (-worth[i], i))
    return (order + rest)[:k]


# Few distinct values make ties; the rest are ordinary.
values = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1, width=32)
qualities = st.sampled_from([0.0, 0.5, 1.0, 1.0]) | st.floats(-2, 2, width=32)
thresholds = st.sampled_from([0.0, 1e-5, 1e-3, 0.5, 2.0])
dampings = st.sampled_from([0.0, 0.0, 1e-6, 0.25])


@st.composite
def problems(draw, most=24):
    n = draw(st.integers(1, most))
    if draw(st.booleans()):  # any matrix
        s = torch.from_numpy(draw(hnp.arrays("float32", (n, n), elements=values)))
        s = s + draw(st.sampled_from([0.0, 4.0])) * torch.eye(n)
    else:  # of few channels: the rank is exhausted
        x = torch.from_numpy(draw(hnp.arrays("float32", (n, draw(st.integers(1, 6))), elements=values)))
        s = x @ x.T
    quality = draw(st.none() | hnp.arrays("float32", n, elements=qualities))
    quality = None if quality is None else torch.from_numpy(quality)
    return s, quality, draw(st.integers(0, n)), {"eps": draw(thresholds), "damping": draw(dampings)}


def one(s, quality, k, backend, **options):
    options = {name: v[None] if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return dpp_select(s[None], None if quality is None else quality[None], k, **options, backend=backend)[0]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_reference_is_the_definition_a_token_at_a_time(problem):
    s, quality, k, options = problem
    with np.errstate(all="ignore"):
        expected = sequential_picks(s.numpy(), None if quality is None else quality.numpy(), k, **options)
    assert one(s, quality, k, "reference", **options).tolist() == expected


@FAST_BACKENDS
def test_picks_are_exactly_the_reference(backend):
    @examples(backend, 250)
    @given(problem=problems())
    def holds(problem):
        s, quality, k, options = problem
        expected = one(s, quality, k, "reference", **options)
        assert torch.equal(one(s, quality, k, backend, **options), expected)

    holds()


wild = values | st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-38, 1e-45])


@st.composite
def hostile_problems(draw):
    n = draw(st.integers(1, 24))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    s = torch.from_numpy(draw(hnp.arrays(dtype, (n, n), elements=wild | st.just(1.0))))
    quality = draw(
        st.none() | hnp.arrays(draw(st.sampled_from(["float16", "float32"])), n, elements=st.floats(width=16))
    )
    tier = draw(st.none() | hnp.arrays("int8", n, elements=st.integers(0, 3)))
    candidates = draw(st.none() | hnp.arrays("bool", n))
    options = {
        name: torch.from_numpy(value)
        for name, value in {"tier": tier, "candidates": candidates}.items()
        if value is not None
    }
    options |= {"eps": draw(thresholds), "damping": draw(dampings)}
    return s, None if quality is None else torch.from_numpy(quality), draw(st.integers(0, n)), options


@FAST_BACKENDS
def test_anything_goes_as_the_reference_goes(backend):
    """NaN, infinities, overflows, no candidates, kernels that are not positive: the same picks to the last."""

    @examples(backend, 250)
    @given(problem=hostile_problems())
    def holds(problem):
        s, quality, k, options = problem
        if backend == "triton":
            s = s.float()
        expected = one(s, quality, k, "reference", **options)
        assert torch.equal(one(s, quality, k, backend, **options), expected)
        due = expected[expected >= 0].tolist()
        assert len(set(due)) == len(due)
        may = options.get("candidates", torch.ones(len(s), dtype=torch.bool))
        may = may & (options["tier"] != 3) if "tier" in options else may
        assert len(due) == min(k, int(may.sum())) and bool(may[due].all())

    holds()


# The yardstick: each pick maximises the determinant


@st.composite
def kernels(draw):
    """Positive definite, condition numbers up to some thousands."""
    n, d = draw(st.integers(2, 12)), draw(st.integers(2, 16))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = generator.normal(size=(n, d)) * np.logspace(0, -draw(st.sampled_from([0, 1])), d)
    quality = draw(st.none() | st.just(generator.uniform(0.1, 1, n)))
    return x @ x.T / d + 1e-2 * np.eye(n), quality


def log_det(kernel, picks):
    sign, value = np.linalg.slogdet(kernel[np.ix_(picks, picks)])
    return value if sign > 0 else -np.inf


@pytest.mark.parametrize("backend", EVERY)
def test_each_pick_has_the_largest_determinant(backend):
    """By numpy's LU factorisation in fp64, of every choice from scratch: nothing is carried from pick to pick."""

    @examples(backend, 60)
    @given(problem=kernels())
    def holds(problem):
        s, quality = problem
        kernel = s if quality is None else quality[:, None] * s * quality
        n = len(s)
        q = None if quality is None else torch.from_numpy(quality).float()
        order = one(torch.from_numpy(s).float(), q, n, backend).tolist()
        assert sorted(order) == list(range(n))
        for i, pick in enumerate(order):
            left = [j for j in range(n) if j not in order[:i]]
            best = max(log_det(kernel, [*order[:i], j]) for j in left)
            assert log_det(kernel, [*order[:i], pick]) >= best - 1e-3  # fp32's rounding, times the condition

    holds()


def test_in_fp64_each_pick_has_the_largest_determinant_of_many():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 30))
    kernel = x @ x.T
    order = one(torch.from_numpy(kernel), None, 20, "auto").tolist()
    for i, pick in enumerate(order):
        left = [j for j in range(60) if j not in order[:i]]
        assert max(left, key=lambda j: log_det(kernel, [*order[:i], j])) == pick


# Roundings, ties, degenerate inputs


def separately_rounded_tie(pick_fused_instead):
    """c such that d - c * c, rounded twice, is some g, and larger than g if it is rounded once."""
    for i in range(1, 4000):
        c, d = F32(i / 4001), F32(0.75)
        g = d - c * c
        once = F32(np.float64(d) - np.float64(c) * np.float64(c))
        if g > 0.1 and (once > g) == pick_fused_instead and once != g:
            return float(c), float(d), float(g)
    raise RuntimeError("no such number")


def test_a_gain_is_rounded_twice(backend):
    """Tokens 1 and 2 tie after rounding, so the first of them wins; fused, token 2 would lead."""
    c, d, g = separately_rounded_tie(True)
    s = torch.tensor([[1.0, 0.0, c], [0.0, g, 0.0], [c, 0.0, d]])
    assert one(s, None, 2, backend).tolist() == [0, 1]
    c, d, g = separately_rounded_tie(False)
    s = torch.tensor([[1.0, c, 0.0], [c, d, 0.0], [0.0, 0.0, g]])  # fused, token 1 would lag behind
    assert one(s, None, 2, backend).tolist() == [0, 1]


def third_gain(a, b, c, fused):
    """Of token 2, once tokens 0 and 1 are picked, with a product that is rounded before it is subtracted or not."""
    a, b = a / F32(2), b / F32(2)  # the root of 4
    x = F32(np.float64(c) - np.float64(a) * np.float64(b)) if fused else c - a * b
    x = x / np.sqrt(F32(3) - a * a)
    return F32(2) - b * b - x * x


def test_a_product_of_two_rows_is_rounded_before_it_is_subtracted(backend):
    """The third pick: tokens 2 and 3 tie, so the first of them wins; fused, token 2 would lag behind."""
    generator = np.random.default_rng(0)
    found = 0
    while found < 5:
        a, b, c = (F32(value) for value in generator.uniform(0.5, 1, 3))
        g = third_gain(a, b, c, False)
        if third_gain(a, b, c, True) < g:
            found += 1
            s = torch.tensor([[4, a, b, 0], [a, 3, c, 0], [b, c, 2, 0], [0, 0, 0, g]], dtype=torch.float32)
            assert one(s, None, 4, backend).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130])
def test_equal_tokens_go_by_index(n, backend):
    """One direction is one pick; the others add nothing, and come by index, or by quality."""
    ones = torch.ones(1, n, n)
    assert dpp_select(ones, None, n, backend=backend)[0].tolist() == list(range(n))
    quality = torch.linspace(0.5, 1, n)[None]
    assert dpp_select(ones, quality, n, backend=backend)[0].tolist() == list(range(n))[::-1]


def test_equal_tokens_at_their_own_length_add_nothing(backend):
    """Cosines of parallel keys are 1 up to rounding, which eps covers."""
    torch.manual_seed(0)
    directions = torch.randn(1, 5, 40)
    keys = directions[:, torch.arange(60) % 5] * torch.linspace(0.5, 2, 60)[:, None]
    s = similarity(keys)[0]
    order = dpp_select(s, None, 60, backend=backend)[0].tolist()
    assert sorted(order) == list(range(60)) and {i % 5 for i in order[:5]} == set(range(5))
    worth = s[0].diagonal()
    assert order[5:] == sorted(order[5:], key=lambda i: (-worth[i].item(), i))


def test_eps_is_what_is_left_of_the_diagonal(backend):
    """Token 1 keeps a hundredth of L_11 after the first pick, token 2 a thousandth of that, but all of its own."""
    s = torch.tensor([[[1.0, 0.99**0.5, 0.0], [0.99**0.5, 1.0, 0.0], [0.0, 0.0, 1e-5]]])
    picks = {eps: dpp_select(s, None, 3, eps=eps, backend=backend)[0].tolist() for eps in (0.005, 0.02)}
    assert picks == {0.005: [0, 1, 2], 0.02: [0, 2, 1]}


def test_the_rest_goes_by_quality(backend):
    """Two directions in eight tokens; -0 is 0, NaN and infinities count as 0."""
    source = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    s = torch.eye(2)[source][:, source][None]
    quality = torch.tensor([[1.0, 2.0, -0.0, math.nan, 0.0, math.inf, 0.5, -3.0]])
    assert dpp_select(s, quality, 8, backend=backend)[0].tolist() == [7, 0, 1, 6, 2, 3, 4, 5]


def test_nothing_to_go_by(backend):
    """All zeros, all NaN, a negative diagonal: by index, each once."""
    for s in (torch.zeros(1, 9, 9), torch.full((1, 9, 9), math.nan), -torch.zeros(1, 9, 9)):
        assert dpp_select(s, None, 9, backend=backend)[0].tolist() == list(range(9))
        assert dpp_select(s, torch.full((1, 9), math.nan), 9, backend=backend)[0].tolist() == list(range(9))
    s = torch.diag(torch.tensor([-1.0, -3.0, -2.0, 0.5]))[None]
    assert dpp_select(s, None, 4, backend=backend)[0].tolist() == [3, 0, 2, 1]


def test_a_zero_token_is_last(backend):
    keys = torch.randn(1, 10, 30)
    keys[0, 4] = 0
    order = dpp_select(similarity(keys)[0], torch.rand(1, 10) + 1, 10, backend=backend)[0].tolist()
    assert sorted(order) == list(range(10)) and order[-1] == 4


def test_tiers_and_candidates(backend):
    tier = torch.tensor([[2, 1, 3, 0, 1, 0, 2]], dtype=torch.int8)
    quality = torch.tensor([[9.0, 8.0, 7.0, 1.0, 6.0, 2.0, 5.0]])
    call = lambda k, **options: dpp_select(torch.eye(7)[None], quality, k, **options, backend=backend)[0].tolist()  # noqa: E731
    assert call(7, tier=tier) == [5, 3, 1, 4, 0, 6, -1]
    may = torch.tensor([[True, False, True, True, True, False, True]])
    assert call(7, tier=tier, candidates=may) == [3, 4, 0, 6, -1, -1, -1]
    assert call(7, candidates=may) == [0, 2, 4, 6, 3, -1, -1]


def test_row_of_the_pick_is_what_counts(backend):
    """s may be asymmetric: row s[pick, i] says what the pick takes from token i."""
    s = torch.tensor([[[4.0, 1.9, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.9]]])
    assert dpp_select(s, None, 3, backend=backend)[0].tolist() == [0, 2, 1]
    assert dpp_select(s.mT, None, 3, backend=backend)[0].tolist() == [0, 1, 2]


def test_damping_weakens_what_a_pick_takes(backend):
    s = torch.tensor([[[1.0, 0.8, 0.0], [0.8, 0.9, 0.0], [0.0, 0.0, 0.4]]])
    assert dpp_select(s, None, 3, backend=backend)[0].tolist() == [0, 2, 1]
    assert dpp_select(s, None, 3, damping=3.0, backend=backend)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", EVERY)
def test_the_scale_does_not_matter(backend):
    """eps is relative: a power of two at every quality changes no pick."""

    @examples(backend, 50)
    @given(problem=problems(), power=st.integers(-8, 8))
    def holds(problem, power):
        s, quality, k, options = problem
        quality = torch.ones(len(s)) if quality is None else quality
        options["damping"] = 0.0
        scaled = quality * 2.0**power
        assume(torch.equal(scaled * 2.0**-power, quality))  # a subnormal number may lose bits
        assert torch.equal(one(s, scaled, k, backend, **options), one(s, quality, k, backend, **options))

    holds()


@pytest.mark.parametrize("backend", EVERY)
def test_the_first_picks_are_those_of_a_smaller_k(backend):
    @examples(backend, 50)
    @given(problem=hostile_problems())
    def holds(problem):
        s, quality, k, options = problem
        s = s.float()
        whole = one(s, quality, len(s), backend, **options)
        assert torch.equal(one(s, quality, k, backend, **options), whole[:k])

    holds()


# Pools, blocks and threads


def clustered(b, n, d, directions):
    """Many equal tokens: gains tie wherever a pool ends."""
    generator = torch.Generator().manual_seed(n + directions)
    source = torch.randint(directions, (b, n), generator=generator)
    base = torch.randn(b, directions, d, generator=generator)
    return base.take_along_dim(source[..., None], 1)


@pytest.mark.parametrize("n", [575, 576, 577, 640, 641, 703, 704, 705, 1000])
@pytest.mark.parametrize("kind", ["random", "quality", "equal tokens", "one-hot"])
def test_images_of_several_pools(n, kind, cpp):
    """On both sides of where all tokens are one pool, and of a block of tokens."""
    torch.manual_seed(n)
    x = clustered(1, n, 24, 300) if kind == "equal tokens" else torch.randn(1, n, 90)
    if kind == "one-hot":
        x = torch.eye(70)[torch.randint(70, (1, n))]
    quality = None if kind == "random" else torch.rand(1, n)
    if kind == "one-hot":
        quality = (quality * 4).ceil() / 4
    s = x @ x.mT
    tier = (torch.rand(1, n) < 0.1).to(torch.int8)
    options = {"tier": tier, "candidates": torch.rand(1, n) < 0.9}
    expected = dpp_select(s, quality, 85, **options, backend="reference")
    assert torch.equal(dpp_select(s, quality, 85, **options, backend=cpp), expected)
    assert torch.equal(
        dpp_select(s.double(), quality, 85, backend=cpp), dpp_select(s.double(), quality, 85, backend="reference")
    )


def test_all_are_picked_of_several_pools(cpp):
    x = torch.randn(1, 700, 40)
    s, quality = x @ x.mT, torch.rand(1, 700)
    order = dpp_select(s, quality, 700, backend=cpp)
    assert sorted(order[0].tolist()) == list(range(700))
    assert torch.equal(order, dpp_select(s, quality, 700, backend="reference"))


@pytest.mark.parametrize("n", [300, 900])
def test_threads_do_not_matter(n, cpp):
    x, quality = torch.randn(3, n, 64), torch.rand(3, n)
    s = similarity(x)[0]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((dpp_select(s, quality, 100), dpp_select(None, quality, 100, keys=x)))
    finally:
        torch.set_num_threads(threads)
    for order, from_keys in results:
        assert torch.equal(order, results[0][0]) and torch.equal(from_keys, results[0][0])
    for b in range(3):
        assert torch.equal(dpp_select(s[b : b + 1], quality[b : b + 1], 100)[0], results[0][0][b])


def test_batch_against_alone_and_any_layout(fast):
    s, quality = torch.rand(3, 20, 20) + 5 * torch.eye(20), torch.rand(3, 20)
    expected = dpp_select(s, quality, 11, backend=fast)
    for b in range(3):
        assert torch.equal(dpp_select(s[b : b + 1], quality[b : b + 1], 11, backend=fast)[0], expected[b])
    padded = torch.nn.functional.pad(s, (0, 5, 0, 3))[:, :20, :20]
    columns = s.mT.contiguous().mT
    apart = s.repeat_interleave(2, dim=2)[:, :, ::2]
    for view in (padded, columns, apart):
        strided = quality.repeat_interleave(3, dim=1)[:, ::3]
        assert torch.equal(dpp_select(view, strided, 11, backend=fast), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quality_of_16_bits_is_that_of_the_same_values(dtype, fast):
    s, quality = torch.rand(1, 20, 20) + 5 * torch.eye(20), torch.rand(1, 20).to(dtype)
    assert torch.equal(dpp_select(s, quality, 9, backend=fast), dpp_select(s, quality.float(), 9, backend=fast))


def test_fp64_decides_where_fp32_ties(cpp):
    s = torch.diag(torch.tensor([1.0, 1 + 2.0**-40], dtype=torch.float64))[None]
    quality = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for backend in (cpp, "reference"):
        assert dpp_select(s, None, 1, backend=backend).item() == 1
        assert dpp_select(torch.eye(2)[None], quality * s[0].diagonal(), 1, backend=backend).item() == 1
        assert dpp_select(s.float(), None, 1, backend=backend).item() == 0


def test_subnormal_gains_count(cpp):
    """Whatever torch.set_flush_denormal says."""
    s = torch.diag(torch.tensor([1e-40, 3e-40, 2e-40]))[None]
    before = torch.set_flush_denormal(True)
    try:
        order = dpp_select(s, None, 3, eps=0.0, backend=cpp)[0].tolist()
    finally:
        torch.set_flush_denormal(False)
    assert before and order == [1, 2, 0]
