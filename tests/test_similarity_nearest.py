"""similarity(nearest=True) and metric="neg_l2", against brute force in plain Python."""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from condense_kernels import assign, greedy_select, similarity
from condense_kernels.testing import KINDS, assert_same_bits, make_inputs, similarity_bound

METRICS = ["cosine", "neg_l2"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOWEST = torch.finfo(torch.float32).min
any_metric = pytest.mark.parametrize("metric", METRICS)


def distances(keys: torch.Tensor) -> torch.Tensor:  # [N, Dk] -> [N, N] fp64
    """Of Python's own numbers."""
    rows = keys.double().tolist()
    return torch.tensor([[math.dist(x, y) for y in rows] for x in rows], dtype=torch.float64)


def largest_of_others(s: torch.Tensor, tier: torch.Tensor) -> list[float]:  # [N, N], [N]
    """By a loop over the pairs."""
    rows, valid = s.tolist(), [t == 0 for t in tier.tolist()]
    lowest = torch.finfo(s.dtype).min
    found = []
    for i, row in enumerate(rows):
        others = [x for j, x in enumerate(row) if j != i and valid[i] and valid[j]]
        found.append(max(others, default=lowest))
    return found


def check_distances(keys: torch.Tensor, backend: str) -> None:  # [B, N, Dk]
    """s, sbar and g, each within its bound, which is relative."""
    s, sbar, g, _ = similarity(keys, metric="neg_l2", backend=backend)
    bound = similarity_bound(keys.shape[2], torch.float32, "neg_l2")
    roundoff = 2.0**-23
    for b, image in enumerate(keys):
        exact = distances(image)
        assert ((s[b] + exact).abs() <= bound * exact).all()
        assert ((g[b] + exact.sum(dim=1)).abs() <= (bound + roundoff) * exact.sum(dim=1)).all()
        assert (sbar[b] - exact.mean()).abs() <= (bound + roundoff) * exact.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "channels"), [(1, 3), (2, 1), (31, 9), (70, 33)])
def test_distances(n, channels, dtype, backend):
    check_distances(make_inputs("clustered", num_tokens=n, channels=channels, dtype=dtype).features, backend)


def test_distances_over_many_channels(backend):
    """Of more than are summed at once, and a difference that is the same in all of them: roundings that add up."""
    keys = torch.randn(1, 1, 700) + 0.1 * torch.arange(3)[None, :, None]
    check_distances(keys, backend)


def test_what_is_close_far_from_0(backend):
    """|x|^2 + |y|^2 - 2 x y is 5e7 +- 4 here, and the squared distance 0.005."""
    keys = 1000 + 0.01 * torch.randn(1, 50, 50)
    keys[0, 1] = keys[0, 0]
    keys[0, 2, 3] = keys[0, 0, 3].nextafter(torch.tensor(math.inf))
    check_distances(keys, backend)
    s, *_, nearest = similarity(keys, metric="neg_l2", nearest=True, backend=backend)
    assert s[0, 0, 1] == 0 and nearest[0, :2].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_equal_tokens_are_exactly_together(dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton takes no fp64")
    keys = make_inputs("random", batch=1, num_tokens=75, channels=21, dtype=dtype).features
    places = [0, 31, 32, 47, 48, 63, 64, 74]
    keys[0, places] = keys[0, 5].clone()
    s, *_ = similarity(keys, metric="neg_l2", backend=backend)
    assert torch.equal(s, s.transpose(1, 2))
    assert (s[0][places][:, places] == 0).all() and (s.diagonal(dim1=1, dim2=2) == 0).all()
    assert not (s.signbit() & (s == 0)).any()  # no -0
    assert all(torch.equal(s[0, i], s[0, 5]) for i in places)


@pytest.mark.parametrize("exponent", [-149, -140, -100, 0, 100, 126])
def test_keys_of_any_finite_magnitude(exponent, backend):
    keys = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]]) / 4
    unit = torch.tensor(exponent + 2) if exponent < 0 else torch.tensor(exponent)
    s, sbar, g, _ = similarity(keys.ldexp(unit), metric="neg_l2", backend=backend)
    expected = -torch.tensor([[0.0, 5.0, 3.0], [5.0, 0.0, 4.0], [3.0, 4.0, 0.0]]).double() / 4
    assert torch.equal(s[0], expected.ldexp(unit).float())
    sums = expected.sum(dim=1).ldexp(unit).clamp(min=LOWEST)
    assert torch.allclose(g[0].double(), sums, rtol=1e-6, atol=2.0**-149)
    assert torch.allclose(sbar.double(), expected.abs().mean().ldexp(unit), rtol=1e-6, atol=2.0**-149)


def test_a_distance_beyond_the_range_is_the_largest_number(backend):
    keys = torch.full((1, 3, 4), 3e38) * torch.tensor([1.0, -1.0, 0.0])[None, :, None]
    s, sbar, g, _, nearest = similarity(keys, metric="neg_l2", nearest=True, backend=backend)
    assert s[0].tolist() == [[0, LOWEST, LOWEST], [LOWEST, 0, LOWEST], [LOWEST, LOWEST, 0]]
    assert sbar.isfinite().all() and g.isfinite().all()
    assert nearest[0].tolist() == [LOWEST] * 3


def test_small_keys_beside_a_large_one(backend):
    """One power of two for all: distances down to 2**-100 of the largest key are right."""
    keys = torch.zeros(1, 4, 3)
    keys[0, 0] = 1.0
    keys[0, 1, 0], keys[0, 2, 0], keys[0, 3, 1] = 2.0**-100, 3 * 2.0**-100, 2.0**-99
    check_distances(keys, backend)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@any_metric
def test_who_has_no_similarity_is_nobodys_nearest(metric, value, backend):
    """The token that is not finite and the masked one lie on top of others, and in a distance's place is a 0."""
    keys = make_inputs("random", batch=1, num_tokens=9, channels=5).features
    scores = torch.rand(1, 9)
    keys[0, 1], keys[0, 6] = keys[0, 0].clone(), keys[0, 5].clone()
    scores[0, 1] = value
    keys[0, 3, 2] = value
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 6] = False
    s, sbar, g, tier, nearest = similarity(keys, scores, mask, metric=metric, nearest=True, backend=backend)
    assert tier[0].tolist() == [0, 1, 0, 1, 0, 0, 2, 0, 0]
    out, rest = [1, 3, 6], [0, 2, 4, 5, 7, 8]
    assert (s[0, out] == 0).all() and (s[0, :, out] == 0).all() and (g[0, out] == 0).all()
    assert nearest[0].tolist() == largest_of_others(s[0], tier[0])
    assert (nearest[0, out] == LOWEST).all()
    alone = similarity(keys[:, rest], metric=metric, nearest=True, backend=backend)
    assert torch.equal(s[0][rest][:, rest], alone[0][0]) and torch.equal(sbar, alone[1])
    assert torch.equal(g[:, rest], alone[2]) and torch.equal(nearest[:, rest], alone[4])


@any_metric
def test_who_has_no_other(metric, backend):
    one = similarity(torch.ones(2, 1, 3), metric=metric, nearest=True, backend=backend)
    assert one[4].tolist() == [[LOWEST]] * 2
    mask = torch.tensor([[False, True, False], [False, False, False]])
    masked = similarity(torch.ones(2, 3, 3), mask=mask, metric=metric, nearest=True, backend=backend)
    assert (masked[4] == LOWEST).all() and (masked[2] >= 0).all()
    empty = similarity(torch.ones(0, 3, 3), metric=metric, nearest=True, backend=backend)
    assert empty[4].shape == (0, 3)


def test_a_zero_key_is_near_to_who_has_only_opposites(backend):
    keys = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    *_, nearest = similarity(keys, nearest=True, backend=backend)
    assert nearest[0].tolist() == [0, 0, 0] and not nearest.signbit().any()


@any_metric
def test_a_twin_in_every_tile(metric, backend):
    """Of 48, of 64 and of 32 tokens: where the one is looked for among the rows, the other is among the columns."""
    keys = torch.randn(1, 131, 6)
    for first, second in ((0, 130), (1, 2), (40, 70), (47, 48), (63, 64), (96, 128)):
        keys[0, second] = keys[0, first]
    s, *_, tier, nearest = similarity(keys, metric=metric, nearest=True, backend=backend)
    assert nearest[0].tolist() == largest_of_others(s[0], tier[0])


@st.composite
def images(draw):
    n, channels = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-(2.0**100), 2.0**100, width=32))
    values = draw(st.lists(numbers, min_size=n * channels, max_size=n * channels))
    scores = draw(st.lists(st.sampled_from([1.0, 0.5, math.nan, math.inf]), min_size=n, max_size=n))
    mask = draw(st.lists(st.sampled_from([True, True, False]), min_size=n, max_size=n))
    keys = torch.tensor(values, dtype=torch.float32).reshape(1, n, channels)
    return keys, torch.tensor([scores]), torch.tensor([mask])


@any_metric
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=images())
@example(image=(torch.zeros(1, 2, 1), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)))
def test_any_image(metric, backend, image):
    keys, scores, mask = image
    s, sbar, g, tier, nearest = similarity(keys, scores, mask, metric=metric, nearest=True, backend=backend)
    tiers = [2 if not m else 0 if math.isfinite(x) else 1 for x, m in zip(scores[0], mask[0], strict=True)]
    assert tier[0].tolist() == tiers
    assert nearest[0].tolist() == largest_of_others(s[0], tier[0])
    assert torch.equal(s, s.transpose(1, 2)) and s.isfinite().all() and not (nearest.signbit() & (nearest == 0)).any()
    if metric == "neg_l2":
        valid = tier[0] == 0
        exact = distances(keys[0]) * (valid[:, None] & valid)
        bound = similarity_bound(keys.shape[2], torch.float32, "neg_l2")
        lost = keys.abs().max().item() * 2.0**-98 + 2.0**-149
        assert ((s[0] + exact).abs() <= bound * exact + lost).all()
        assert ((g[0] + exact.sum(dim=1)).abs() <= (bound + 2.0**-23) * exact.sum(dim=1) + 7 * lost).all()
        count = max(int(valid.sum()), 1) ** 2
        assert (sbar[0] - exact.sum() / count).abs() <= (bound + 2.0**-23) * exact.sum() / count + lost


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_other_results_are_those_without(kind, backend):
    inputs = make_inputs(kind, num_tokens=20, channels=7)
    keys = inputs.features if inputs.keys is None else inputs.keys
    args = keys, inputs.scores, inputs.mask
    assert_same_bits(similarity(*args, nearest=True, backend=backend)[:4], similarity(*args, backend=backend), kind)


@any_metric
def test_an_image_alone_and_any_layout(metric, backend):
    keys = make_inputs("clustered", batch=3, num_tokens=53, channels=11).features
    options = {"metric": metric, "nearest": True, "backend": backend}
    together = similarity(keys, **options)
    alone = [torch.cat(results) for results in zip(*(similarity(x[None], **options) for x in keys), strict=True)]
    assert_same_bits(together, tuple(alone), "alone")
    permuted = keys.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same_bits(similarity(permuted, **options), together, "permuted")
    assert_same_bits(similarity(keys.repeat(1, 2, 1)[:, ::1][:, :53], **options), together, "sliced")


@any_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_the_same_values_in_32(metric, dtype, backend):
    """Where products are summed in another order, up to the bound."""
    keys = make_inputs("clustered", num_tokens=50, channels=40, dtype=dtype).features
    narrow, wide = (similarity(k, metric=metric, nearest=True, backend=backend) for k in (keys, keys.float()))
    if metric == "neg_l2":
        assert_same_bits(narrow, wide, "bits")
    assert (narrow[4] - wide[4]).abs().max() <= 2 * similarity_bound(40, torch.float32)


@any_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_threads(metric, dtype, cpp):
    keys = make_inputs("duplicates", batch=1, num_tokens=400, channels=70, dtype=dtype).features
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(similarity(keys, metric=metric, nearest=True, backend=cpp))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0], "threads")


def test_fp64(cpp):
    keys = 1000 + 1e-9 * torch.randn(1, 60, 30, dtype=torch.float64)
    s, sbar, g, tier, nearest = similarity(keys, metric="neg_l2", nearest=True, backend=cpp)
    exact = distances(keys[0])
    assert {t.dtype for t in (s, sbar, g, nearest)} == {torch.float64}
    bound = 2 * similarity_bound(30, torch.float64, "neg_l2")
    assert ((s[0] + exact).abs() <= bound * exact).all()
    assert ((g[0] + exact.sum(dim=1)).abs() <= (bound + 60 * 2.0**-53) * exact.sum(dim=1)).all()
    assert nearest[0].tolist() == largest_of_others(s[0], tier[0])


@any_metric
def test_the_token_farthest_from_all_comes_first(metric, backend):
    """What greedy_select's first="max_min" looks for among all pairs again."""
    keys = make_inputs("clustered", num_tokens=40, channels=6).features
    s, _, _, tier, nearest = similarity(keys, metric=metric, nearest=True, backend=backend)
    order = greedy_select(s, None, 12, tier=tier, first=-nearest, backend=backend)
    assert torch.equal(order[:, 0], nearest.argmin(dim=1))
    assert torch.equal(order, greedy_select(s, None, 12, tier=tier, first="max_min", backend=backend))


def test_farthest_points(backend):
    """On a line, the two ends, then the middle; everybody else goes to the nearest of them."""
    keys = torch.arange(9.0)[None, :, None]
    s, *_ = similarity(keys, metric="neg_l2", backend=backend)
    order = greedy_select(s, None, 3, first=torch.tensor([0]), backend=backend)
    assert order.tolist() == [[0, 8, 4]]
    rows = assign(s, order.sort().values, spatial_weight=0.0, backend=backend)
    assert rows.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2]]


def test_wrong_arguments():
    keys = torch.rand(1, 3, 2)
    for metric in ("euclidean", "l2", "", None, 1):
        with pytest.raises(ValueError, match=r"^metric: expected 'cosine' or 'neg_l2', got"):
            similarity(keys, metric=metric)
    with pytest.raises(RuntimeError, match=r"metric: expected 'cosine' or 'neg_l2', got 'l2'"):
        torch.ops.condense.similarity_and_nearest(keys, metric="l2")
    with pytest.raises(TypeError, match=r"^nearest: expected True or False, got int: 1"):
        similarity(keys, nearest=1)
