"""Density peaks against the definition in plain Python, and every backend against the reference, bit for bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import condense_kernels as ck
from condense_kernels import dpc_knn, dpc_knn_varlen
from condense_kernels._dispatch import backends
from condense_kernels.ops.dpc_knn import reference
from condense_kernels.testing import assert_same_bits

CPU = torch.device("cpu")
EXAMPLES = {"cpp": 150, "triton": 30}  # interpreted
FAST = [(b, count) for b, count in EXAMPLES.items() if backends.unavailable(b, CPU) is None]


def peaks(s, k_nn, scale=1.0):
    """The definition over one image, in Python's floats: density, distance to the next denser token, and score."""
    n = len(s)
    d = [[0.0 if i == j else scale * max(-s[i][j], 0.0) for j in range(n)] for i in range(n)]
    density = [-math.fsum(x * x for x in sorted(row)[:k_nn]) / min(k_nn, n) for row in d]
    return d, density


def next_denser(d, density, i):
    denser = [j for j in range(len(d)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
    return min(d[i][j] for j in denser) if denser else max(d[i])


few = st.sampled_from([-2.0, -1.0, -0.5, -0.25, 0.0])
distances = few | st.floats(-4, 0, width=32)


@st.composite
def problems(draw, elements=distances):
    n = draw(st.integers(1, 24))
    s = torch.from_numpy(draw(hnp.arrays("float32", (n, n), elements=elements)))
    if draw(st.booleans()):
        s = torch.maximum(s, s.T)
    return s, draw(st.integers(0, n)), draw(st.integers(1, n + 3))


@settings(max_examples=200)
@given(problems())
def test_reference_is_the_definition(problem):
    s, k, k_nn = problem
    order, density, peak_distance = (x[0].tolist() for x in reference.dpc_knn(s[None], k, k_nn))
    d, exact = peaks(s.tolist(), k_nn)
    assert density == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert peak_distance == [next_denser(d, density, i) for i in range(len(d))]
    score = [math.log(p) + q if p > 0 else -math.inf for p, q in zip(peak_distance, density, strict=True)]
    assert len(set(order)) == k
    for earlier, later in itertools.pairwise(order):
        assert score[earlier] >= score[later] - 1e-12 or score[later] == -math.inf
        if score[earlier] == score[later]:
            assert earlier < later
    left_out = set(range(len(d))) - set(order)
    assert all(score[order[-1]] >= score[i] - 1e-12 for i in left_out if order)


@pytest.mark.parametrize(("backend", "examples"), FAST)
def test_bits_are_those_of_the_reference(backend, examples):
    settings(max_examples=examples)(given(problems())(lambda problem: check_bits(backend, *problem)))()


def check_bits(backend, s, k, k_nn):
    expected = reference.dpc_knn(s[None], k, k_nn)
    assert_same_bits(tuple(dpc_knn(s[None], k, k_nn, backend=backend)), expected)


@st.composite
def hostile_problems(draw):
    n = draw(st.integers(1, 20))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    wild = distances | st.floats(width=32 if dtype == "float32" else 64)
    s = torch.from_numpy(draw(hnp.arrays(dtype, (n, n), elements=wild)))
    tier = torch.from_numpy(draw(hnp.arrays("int8", n, elements=st.sampled_from([0, 0, 0, 1, 2, 3, 7, -1]))))
    scale = draw(st.sampled_from([0.0, 0.5, 1.0, 1e30]) | st.floats(0, 10))
    return s, draw(st.integers(0, n)), draw(st.integers(1, n + 3)), tier if draw(st.booleans()) else None, scale


@pytest.mark.parametrize(("backend", "examples"), FAST)
def test_anything_goes_as_the_reference_goes(backend, examples):
    """NaN, infinities, huge and subnormal distances, positive similarities, tiers."""
    settings(max_examples=examples)(given(hostile_problems())(lambda problem: check_anything(backend, *problem)))()


def check_anything(backend, s, k, k_nn, tier, scale):
    s = s.float() if backend == "triton" else s
    options = {"tier": None if tier is None else tier[None], "scale": scale}
    expected = reference.dpc_knn(s[None], k, k_nn, **options)
    assert_same_bits(tuple(dpc_knn(s[None], k, k_nn, **options, backend=backend)), expected)
    given = (torch.zeros(len(s)) if tier is None else tier).tolist()
    picked = [i for i in expected[0][0].tolist() if i >= 0]
    assert len(set(picked)) == len(picked) == min(k, sum(t in (0, 1, 2) for t in given))


def clusters(n, channels=16, dtype=torch.float64):
    centres = 3 * torch.randn(7, channels, dtype=dtype)
    return centres[torch.randint(7, (n,))] + torch.randn(n, channels, dtype=dtype)


@pytest.mark.parametrize("k_nn", [5, 40])
def test_picks_what_the_published_formula_picks(k_nn, backend):
    """Written in torch as published, less the noise that it adds."""
    x = torch.stack([clusters(90), clusters(90)])
    s = 0 - torch.cdist(x, x).float()
    d = -s.double() / 4
    near = d.topk(k_nn, dim=-1, largest=False).values
    density = (-near.square().mean(dim=-1)).exp()
    denser = density[:, None, :] > density[:, :, None]
    farthest = d.amax(dim=(1, 2), keepdim=True)  # of all, where ours takes the token's own: it comes first either way
    peak = torch.where(denser, d, farthest).amin(dim=-1)
    order, log_density, peak_distance = dpc_knn(s, 20, k_nn, scale=1 / 4, backend=backend)
    assert torch.equal(order, (peak * density).topk(20, dim=-1).indices)
    torch.testing.assert_close(log_density.double().exp(), density, rtol=1e-5, atol=0)
    inner = torch.ones_like(peak, dtype=torch.bool).scatter(1, order[:, :1], False)
    torch.testing.assert_close(peak_distance.double()[inner], peak[inner], rtol=1e-6, atol=0)


def row_by_row(s, k_nn):
    """Densities to fp64, of many tokens at once."""
    d = -s.double()
    d.diagonal(dim1=-2, dim2=-1).zero_()
    return -d.sort(dim=-1).values[..., :k_nn].square().mean(dim=-1)


@pytest.mark.parametrize("k_nn", [1, 2, 5, 33, 34, 100, 700])
@pytest.mark.parametrize("n", [63, 128, 200, 512, 700])
def test_neighbours_of_long_rows(n, k_nn, cpp):
    """By the largest of parts of a row, by a sample, or by neither: what is collected is exact."""
    x = clusters(n)
    s = 0 - torch.cdist(x, x).float()[None]
    order, density, peak_distance = dpc_knn(s, n, k_nn, backend=cpp)
    torch.testing.assert_close(density.double(), row_by_row(s, k_nn), rtol=1e-6, atol=1e-9)
    assert order.sort().values.tolist() == [list(range(n))]
    if n <= 200:
        assert_same_bits((order, density, peak_distance), reference.dpc_knn(s, n, k_nn))


@pytest.mark.parametrize("what", ["all alike", "sample near", "sample far", "ascending", "mostly far"])
def test_rows_that_deceive_a_sample(what, cpp):
    n = 600
    sampled = torch.zeros(n, dtype=torch.bool)
    for part in range(8):
        sampled[part * n // 8 :][:16] = True
    row = {
        "all alike": torch.ones(n),
        "sample near": torch.where(sampled, 0.5, 1 + torch.rand(n)),
        "sample far": torch.where(sampled, 9.0, 1 + torch.rand(n)),
        "ascending": torch.arange(n) / n,
        "mostly far": torch.where(torch.arange(n) % 50 == 7, torch.rand(n), 100.0),
    }[what]
    s = 0 - row.repeat(1, n, 1)
    for k_nn in (3, 33, 60, 129, 300):
        density = dpc_knn(s, 0, k_nn, backend=cpp).density
        torch.testing.assert_close(density.double(), row_by_row(s, k_nn), rtol=1e-6, atol=1e-9)


def test_a_token_is_its_own_first_neighbour(backend):
    """Whatever the diagonal says, and one neighbour is none but itself."""
    s = torch.tensor([[[-9.0, -1.0, -2.0], [-1.0, 5.0, -3.0], [-2.0, -3.0, math.nan]]])
    assert dpc_knn(s, 3, 1, backend=backend).density.tolist() == [[0.0, 0.0, 0.0]]
    assert dpc_knn(s, 3, 2, backend=backend).density.tolist() == [[-0.5, -0.5, -2.0]]
    assert dpc_knn(s, 3, 9, backend=backend).density.tolist() == [pytest.approx([-5 / 3, -10 / 3, -13 / 3])]


def test_equal_densities_go_by_index(backend):
    """Token 0 counts as the densest, and the others are as far as the nearest before them."""
    s = torch.tensor([[[0.0, -1.0, -4.0], [-1.0, 0.0, -2.0], [-4.0, -2.0, 0.0]]])
    order, _, peak_distance = dpc_knn(s, 3, 1, backend=backend)
    assert peak_distance.tolist() == [[4.0, 1.0, 2.0]]
    assert order.tolist() == [[0, 2, 1]]
    assert dpc_knn(0 - torch.ones(1, 5, 5), 5, 3, backend=backend).order.tolist() == [[0, 1, 2, 3, 4]]
    assert dpc_knn(torch.zeros(1, 5, 5), 5, 3, backend=backend).order.tolist() == [[0, 1, 2, 3, 4]]


def test_densities_whose_exp_is_zero_are_told_apart(backend):
    """exp(-200**2) is 0 in fp32 and in fp64: as published, all scores would be 0."""
    x = torch.tensor([0.0, 200.0, 300.0, 301.0, 900.0])
    s = 0 - (x[:, None] - x).abs()[None]
    order, density, _ = dpc_knn(s, 5, 3, backend=backend)
    assert order.tolist() == [[2, 3, 1, 0, 4]]
    assert density.exp().tolist() == [[0.0] * 5]


def test_copies_of_a_token_come_last(backend):
    x = torch.tensor([0.0, 0.0, 5.0, 5.0, 9.0])
    s = 0 - (x[:, None] - x).abs()[None]
    order, _, peak_distance = dpc_knn(s, 5, 2, backend=backend)
    assert peak_distance.tolist() == [[9.0, 0.0, 5.0, 0.0, 4.0]]
    assert order.tolist() == [[0, 2, 4, 1, 3]]


def test_scores_order_like_products(cpp):
    """log(distance) + density, over all magnitudes of a distance."""
    distance = torch.cat(
        [2.0 ** torch.linspace(-140, 100, 4000), torch.tensor([0.5, 1.0, 1.5, 2.0, 2**0.5, 0.70703125])]
    )
    ours = reference.log(distance.double())
    torch.testing.assert_close(
        ours, torch.tensor([math.log(x) for x in distance.tolist()], dtype=torch.float64), rtol=4e-16, atol=4e-16
    )


def test_scale_is_that_of_the_distances(backend):
    """By a power of two bit for bit; order is that of scaled distances."""
    x = clusters(40)
    s = 0 - torch.cdist(x, x).float()[None]
    scaled = dpc_knn(s, 9, 4, scale=0.25, backend=backend)
    assert_same_bits(tuple(scaled), tuple(dpc_knn(s * 0.25, 9, 4, backend=backend)))
    assert not torch.equal(scaled.order, dpc_knn(s, 9, 4, backend=backend).order)


def test_tiers(backend):
    tier = torch.tensor([[2, 1, 3, 0, 1, 0, 2, 0]], dtype=torch.int8)
    x = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 4.0, 0.0, 5.0])
    s = 0 - (x[:, None] - x).abs()[None]
    order, density, peak_distance = dpc_knn(s, 8, 2, tier=tier, backend=backend)
    assert order.tolist() == [[5, 7, 3, 1, 4, 0, 6, -1]]
    inf = math.inf
    assert density.tolist() == [[-inf, -inf, -inf, -4.5, -inf, -0.5, -inf, -0.5]]
    assert peak_distance.tolist() == [[0.0, 0.0, 0.0, 3.0, 0.0, 3.0, 0.0, 1.0]]
    nothing = dpc_knn(s, 4, 2, tier=torch.full_like(tier, 3), backend=backend)
    assert nothing.order.tolist() == [[-1] * 4]
    for k in range(8):  # a call with fewer picks is the beginning of one with more
        assert torch.equal(dpc_knn(s, k, 2, tier=tier, backend=backend).order, order[:, :k])


def test_images_and_layouts_are_independent(fast):
    s = 0 - torch.rand(3, 21, 21)
    tier = (torch.rand(3, 21) < 0.2).to(torch.int8)
    batch = dpc_knn(s, 8, 4, tier=tier, backend=fast)
    for b in range(3):
        alone = dpc_knn(s[b : b + 1], 8, 4, tier=tier[b : b + 1], backend=fast)
        assert_same_bits(tuple(alone), tuple(result[b : b + 1] for result in batch))
    padded = torch.nn.functional.pad(s, (0, 5, 0, 3))[:, :21, :21]
    for view in (padded, s.mT.contiguous().mT, s.repeat_interleave(2, dim=2)[:, :, ::2]):
        assert_same_bits(tuple(dpc_knn(view, 8, 4, tier=tier.mT.contiguous().mT, backend=fast)), tuple(batch))
    assert dpc_knn(s[:0], 8, 4, backend=fast).density.shape == (0, 21)
    assert [list(r.shape) for r in dpc_knn(s[:, :0, :0], 0, backend=fast)] == [[3, 0], [3, 0], [3, 0]]


def test_threads_share_the_rows(cpp):
    x = clusters(700)
    s = 0 - torch.cdist(x, x).float()[None]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(tuple(dpc_knn(s, 100, 6, backend=cpp)))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_from_keys(backend):
    """The result on the s and tier of similarity, whose distances do not cancel: 0.01 at 1000 from the origin."""
    x = clusters(24, dtype=torch.float32).repeat(2, 1, 1)
    x[0, 3, 5] = math.nan
    x[1] = 1000 + 0.01 * x[1]
    mask = torch.rand(2, 24) > 0.1
    s, _, _, tier = ck.similarity(x, mask=mask, metric="neg_l2", backend=backend)
    expected = dpc_knn(s, 9, 4, tier=tier, scale=0.25, backend=backend)
    found = dpc_knn(keys=x, k=9, k_nn=4, mask=mask, scale=0.25, backend=backend)
    assert_same_bits(tuple(found), tuple(expected))
    d, density = peaks([[-math.dist(a, b) for b in x[1].tolist()] for a in x[1].tolist()], 4, 0.25)
    whole = dpc_knn(keys=x[1:], k=9, k_nn=4, scale=0.25, backend=backend)
    assert whole.density[0].tolist() == pytest.approx(density, rel=1e-3)
    score = [math.log(next_denser(d, density, i)) + density[i] for i in range(24)]
    assert whole.order[0].tolist() == sorted(range(24), key=lambda i: -score[i])[:9]


def test_s_or_keys():
    x = torch.rand(1, 6, 3)
    s = -torch.cdist(x, x)
    for options, match in (
        ({}, "s, keys: expected one of the two, got neither"),
        ({"s": s, "keys": x}, "s, keys: expected one of the two, got both"),
        ({"s": s, "mask": torch.ones(1, 6).bool()}, "mask: expected None beside s"),
        ({"keys": x, "tier": torch.zeros(1, 6).char()}, "tier: expected None beside keys"),
        ({"keys": x[0]}, "keys: expected 3 axes"),
        ({"keys": x, "k": 7}, "k: expected 0 <= k <= 6"),
    ):
        with pytest.raises(ValueError, match=match):
            dpc_knn(**{"k": 2, **options})


def offsets(*counts):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


@pytest.mark.parametrize("with_tiers", [False, True])
def test_packed_segments_are_images(with_tiers, fast):
    lengths, keep = (13, 0, 1, 70, 5), (4, 0, 1, 20, 5)
    t, m = sum(lengths), 70
    s = 0 - torch.rand(t, m)
    tier = torch.randint(0, 4, (t,)).to(torch.int8) if with_tiers else None
    cu_seqlens, cu_kept = offsets(*lengths), offsets(*keep)
    first = 0
    for length in lengths:  # what lies behind a segment's tokens is not used
        s[first : first + length, length:] = math.nan
        first += length
    packed = dpc_knn_varlen(s, cu_seqlens, cu_kept, sum(keep), m, 4, tier=tier, scale=0.5, backend=fast)
    assert_same_bits(
        tuple(packed), reference.dpc_knn_varlen(s, cu_seqlens, cu_kept, sum(keep), m, 4, tier=tier, scale=0.5)
    )
    tokens, rows = (list(itertools.pairwise(cu.tolist())) for cu in (cu_seqlens, cu_kept))
    for (a, b), (c, e) in zip(tokens, rows, strict=True):
        own = None if tier is None else tier[None, a:b]
        alone = dpc_knn(s[None, a:b, : b - a], e - c, 4, tier=own, scale=0.5, backend=fast)
        assert_same_bits(
            (packed.order[c:e], packed.density[a:b], packed.peak_distance[a:b]), tuple(r[0] for r in alone)
        )


WRONG_OFFSETS = [
    ([0, 5, 3, 9], [0, 2, 4, 6]),
    ([-4, 4, 40, 9], [0, 2, 4, 6]),
    ([0, 3, 6, 9], [0, 9, -2, 6]),
    ([2, 5, 5, 8], [3, 4, 5, 5]),
    ([0, 9, 9, 9], [0, 6, 6, 6]),  # longer than max_seqlen
]


@pytest.mark.parametrize(("cu_seqlens", "cu_kept"), WRONG_OFFSETS)
def test_wrong_offsets_are_harmless(cu_seqlens, cu_kept, fast, bounded):
    s = 0 - torch.rand(9, 5)
    cu_seqlens, cu_kept = (torch.tensor(cu, dtype=torch.int32) for cu in (cu_seqlens, cu_kept))
    order, density, peak_distance = dpc_knn_varlen(s, cu_seqlens, cu_kept, 6, 5, 2, backend=fast)
    assert order.shape == (6,)
    assert bool(((order >= -1) & (order < 5)).all())
    if fast == "cpp":
        assert not density.isnan().any()
        assert not peak_distance.isnan().any()


def test_offsets_that_leave_something_out(fast):
    """Tokens of no segment have zeros; rows of no segment -1."""
    s = 0 - torch.rand(9, 5)
    cu_seqlens, cu_kept = torch.tensor([2, 5, 7]).int(), torch.tensor([1, 3, 4]).int()
    results = dpc_knn_varlen(s, cu_seqlens, cu_kept, 6, 5, 2, backend=fast)
    assert_same_bits(tuple(results), reference.dpc_knn_varlen(s, cu_seqlens, cu_kept, 6, 5, 2))
    assert results.order[[0, 4, 5]].tolist() == [-1, -1, -1]
    assert results.density[[0, 1, 7, 8]].tolist() == [0.0] * 4
    assert [len(r) for r in dpc_knn_varlen(s[:, :0], offsets(0), offsets(0), 0, 0, backend=fast)] == [0, 9, 9]
    assert [len(r) for r in dpc_knn_varlen(s[:0], offsets(), offsets(), 0, 5, backend=fast)] == [0, 0, 0]


def test_centres_and_clusters():
    """What is done with them: each token to its nearest centre, and the mean of each cluster."""
    x = clusters(60, dtype=torch.float32)[None]
    s = 0 - torch.cdist(x, x)
    order = dpc_knn(s, 7, 5, scale=1 / 4).order
    assignment = ck.assign(s, order, spatial_weight=0)
    assert torch.equal(assignment.gather(1, order), torch.arange(7)[None])
    assert torch.equal(s[0, order[0]].argmax(dim=0), assignment[0])
    merged, mass = ck.merge(x, torch.ones(1, 60), order, assignment)
    assert merged.shape == (1, 7, 16)
    assert mass.sum() == 60


def test_debug_sees_what_is_no_distance():
    s = 0 - torch.rand(2, 6, 6)
    s[:, range(6), range(6)] = 1.0  # the diagonal may be anything
    with ck.debug():
        dpc_knn(s, 2)
        s[1, 2, 3] = 0.5
        with pytest.raises(ValueError, match="^s: expected negated distances.*image 1, token 2, token 3"):
            dpc_knn(s, 2)
        with pytest.raises(ValueError, match="^cu_kept: expected"):
            dpc_knn_varlen(0 - torch.rand(6, 3), offsets(3, 3), offsets(1, 1), 3, 3)
        with pytest.raises(ValueError, match="^tier: expected values in"):
            dpc_knn(0 - torch.rand(1, 3, 3), 2, tier=torch.full((1, 3), 7, dtype=torch.int8))
