import math

import pytest
import torch

import condense_kernels as ck
from condense_kernels import merge

KEPT = torch.tensor([[1, 3, 4]])
ROWS = torch.tensor([[0, 0, 0, 1, 2, 2]])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens(dtype=torch.float32, channels=37, batch=1, n=6):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(batch, n, channels, generator=generator).to(dtype)
    return features, torch.rand(batch, n, generator=generator).to(dtype)


def test_weighted_mean(backend):
    features = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]])
    scores = torch.tensor([[1.0, 2.0, 1.0]])
    merged, mass = merge(features, scores, torch.tensor([[1]]), torch.tensor([[0, 0, 0]]), backend=backend)
    assert merged.tolist() == [[[2.25, 22.5]]]
    assert mass.tolist() == [[4.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_its_own_token_is_that_token(dtype, backend):
    features, scores = tokens(dtype)
    features[0, 3, 0], features[0, 3, 1] = -0.0, math.inf
    merged, _ = merge(features, scores, KEPT, ROWS, backend=backend)
    assert torch.equal(merged[0, 1].view(torch.uint8), features[0, 3].view(torch.uint8))


INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def odd_nans(dtype):
    """Of either sign: signalling and quiet, with the smallest, the largest and other payloads."""
    infinity = torch.tensor(math.inf, dtype=dtype).view(INTEGERS[dtype])
    largest = (~infinity & torch.iinfo(infinity.dtype).max).item()
    quiet = largest // 2 + 1
    payloads = torch.tensor([1, 3, quiet, quiet + 5, largest], dtype=infinity.dtype)
    return torch.cat([infinity + payloads, (infinity + payloads) | torch.iinfo(infinity.dtype).min]).view(dtype)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_copied_rows_keep_the_bits_of_every_nan(dtype, backend):
    """Rows of their own token, and rows of zero mass, alone, in the flagship, in place and packed."""
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("fp64 is served on CPU by the C++ kernels alone, as the contract says")
    nans = odd_nans(dtype)
    assert nans.isnan().all() and len(nans.view(INTEGERS[dtype]).unique()) == len(nans)
    features = torch.stack([nans, nans.roll(1), nans.roll(2), nans.roll(3)])[None]

    def assert_bits(merged, kept):
        expected = features[0, kept].view(INTEGERS[dtype])
        assert torch.equal(merged.reshape(expected.shape).view(INTEGERS[dtype]), expected)

    scores, keys = torch.tensor([[0.5, 1.0, 0.0, 0.0]]), torch.eye(4)[None]
    merged, _ = merge(features, scores, torch.tensor([[0, 1, 3]]), torch.tensor([[0, 1, 2, 2]]), backend=backend)
    assert_bits(merged, [0, 1, 3])
    options = {"spatial_weight": 0.0, "backend": backend}
    out = ck.select_and_merge(features, scores, 4, 0, keys=keys, **options)
    assert_bits(out.merged, [0, 1, 2, 3])
    again = ck.select_and_merge(
        features, scores, 4, 0, keys=keys, **options, out=ck.Condensed(*map(torch.empty_like, out))
    )
    assert_bits(again.merged, [0, 1, 2, 3])
    without_mass = ck.select_and_merge(features, torch.zeros(1, 4), 2, 0, keys=keys, **options)
    assert_bits(without_mass.merged, without_mass.indices[0])
    offsets = ([0, 3, 4], [0, 3, 4], [0, 0, 0])
    offsets = (torch.tensor(offset, dtype=torch.int32) for offset in offsets)
    packed = ck.select_and_merge_varlen(features[0], scores[0], *offsets, 4, 3, keys=keys[0], **options)
    assert_bits(packed.merged, [0, 1, 2, 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zero_mass_is_its_kept_token(dtype, backend):
    features, scores = tokens(dtype)
    scores[0, [0, 1, 2]] = 0
    features[0, 0] = math.nan  # a member of that row, without influence
    merged, mass = merge(features, scores, KEPT, ROWS, backend=backend)
    assert torch.equal(merged[0, 0], features[0, 1])
    assert mass[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_once_ties_to_even(dtype, backend):
    """The mean of neighbours in 16 bits lies halfway between them, exactly so in fp32."""
    low = torch.arange(0x3C00, 0x3C00 + 101, dtype=torch.int16).view(dtype)
    high = torch.arange(0x3C01, 0x3C01 + 101, dtype=torch.int16).view(dtype)
    features = torch.stack([low, high])[None]
    ones, rows = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64)
    merged, _ = merge(features, ones, torch.tensor([[0]]), rows, backend=backend)
    assert torch.equal(merged[0, 0], ((low.float() + high.float()) / 2).to(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["feature", "score"])
def test_nan_stays_in_its_row(value, where, backend):
    features, scores = tokens()
    clean, clean_mass = merge(features, scores, KEPT, ROWS, backend=backend)
    if where == "feature":
        features[0, 2, 5] = value
    else:
        scores[0, 2] = value
    merged, mass = merge(features, scores, KEPT, ROWS, backend=backend)
    assert torch.equal(merged[0, 1:], clean[0, 1:]) and torch.equal(mass[0, 1:], clean_mass[0, 1:])
    if where == "feature":
        assert not merged[0, 0, 5].isfinite() and torch.equal(merged[0, 0, 6:], clean[0, 0, 6:])
    else:
        assert merged[0, 0].isnan().all() or not mass[0, 0].isfinite()


def test_nan_feature_of_a_token_without_weight(backend):
    """0 * NaN is NaN: the token is a member, so its row says so."""
    features, scores = tokens()
    scores[0, 2], features[0, 2, 1] = 0, math.nan
    assert merge(features, scores, KEPT, ROWS, backend=backend)[0][0, 0].isnan().tolist() == [c == 1 for c in range(37)]


def test_tokens_of_no_row(backend):
    features, scores = tokens()
    features[0, 0] = math.nan
    rows = torch.tensor([[-1, 0, 0, -1, 2, 2]])
    merged, mass = merge(features, scores, KEPT, rows, backend=backend)
    assert merged.isfinite().all()
    assert mass[0, 1] == 0 and torch.equal(merged[0, 1], features[0, 3])  # nobody is left: its own token


def test_a_row_of_one_other_token_is_that_token(backend):
    """Its only member is not the token that it is named after."""
    features, scores = tokens()
    merged, mass = merge(features, scores, KEPT, torch.tensor([[-1, -1, 0, 1, 2, 2]]), backend=backend)
    assert torch.allclose(merged[0, 0], features[0, 2], rtol=2**-22, atol=0)
    assert torch.allclose(mass[0, 0], scores[0, 2])


def test_no_such_row(backend):
    features, scores = tokens()
    merged, mass = merge(features, scores, torch.tensor([[1, -1]]), torch.tensor([[0, 0, 1, 1, 1, 0]]), backend=backend)
    assert (merged[0, 1] == 0).all() and mass[0, 1] == 0


@pytest.mark.parametrize("n", [33, 64, 300])
def test_long_clusters_lose_little(n, fast):
    """All tokens in one row; error against fp64 at most that of n roundings, as derived, at a mean far from 0."""
    features, scores = tokens(channels=5, n=n)
    features = features + 100
    rows = torch.zeros(1, n, dtype=torch.int64)
    merged, mass = merge(features, scores, torch.tensor([[0]]), rows, backend=fast)
    exact = (scores.double()[..., None] * features.double()).sum(dim=1) / scores.double().sum()
    assert (merged[0] - exact).abs().max() <= (n + 2) * 2.0**-24 * exact.abs().max()
    assert abs(mass.item() - scores.double().sum()) <= n * 2.0**-24 * scores.double().sum()


def test_partial_sums_of_long_clusters_are_folded(fast):
    """Every 32 members: of equal tokens each addition is off to the same side, in one sum by 2000 times a rounding."""
    n, fold = 2048, 32
    features, scores = torch.full((1, n, 3), 0.1), torch.full((1, n), 0.3)
    rows = torch.zeros(1, n, dtype=torch.int64)
    merged, mass = merge(features, scores, torch.tensor([[0]]), rows, backend=fast)
    exact = n * scores[0, 0].double()
    assert abs(mass.item() - exact) <= (fold + n / fold) * 2.0**-24 * exact
    assert (merged.double() - features[0, 0].double()).abs().max() <= 2 * (fold + n / fold) * 2.0**-24 * 0.1


def test_another_plane_merges_with_the_same_assignment(backend):
    features, scores = tokens()
    wide, _ = tokens(channels=80)
    for plane in (features, wide, features[..., :3]):
        merged, mass = merge(plane, scores, KEPT, ROWS, backend=backend)
        expected = (scores[0, :3, None] * plane[0, :3]).sum(dim=0) / scores[0, :3].sum()
        assert torch.allclose(merged[0, 0], expected, atol=1e-6)
        assert torch.allclose(mass[0, 0], scores[0, :3].sum())


@pytest.mark.parametrize(
    ("indices", "rows", "name"),
    [([[9, 3, 4]], [[0] * 6], "indices"), ([[1, 3, -2]], [[0] * 6], "indices"), ([[1, 3, 4]], [[3] * 6], "assignment")],
)
@pytest.mark.parametrize("cpu", ["cpp", "reference"])
def test_values_out_of_range(indices, rows, name, cpu, request):
    request.getfixturevalue("cpp")
    with pytest.raises(RuntimeError, match=rf"^{name}: expected values in "):
        merge(*tokens(), torch.tensor(indices), torch.tensor(rows), backend=cpu)


@pytest.mark.parametrize("side", [1, -1], ids=["above the tie", "below the tie"])
@pytest.mark.parametrize("cpu", ["cpp", "reference"])
def test_fp64_to_16_bits_is_rounded_once(cpu, side, cpp):
    """The means lie beside a tie of the 16 bits, by less than fp32 can tell: by way of it both would end on the tie."""
    weight = 0.5 + side * 2.0**-30
    scores = torch.tensor([[1 - weight, weight]], dtype=torch.float64)
    for dtype, step in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        features = torch.tensor([[[1.0], [1 + step]]]).to(dtype)
        merged, _ = merge(features, scores, torch.tensor([[0]]), torch.zeros(1, 2, dtype=torch.int64), backend=cpu)
        assert merged.item() == (1 + step if side > 0 else 1.0)
