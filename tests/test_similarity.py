import math

import pytest
import torch

from condense_kernels import similarity
from condense_kernels._dispatch import backends
from condense_kernels.testing import exact_similarity, make_inputs, similarity_bound, unit_roundoff


def test_symmetric_to_the_bit(backend):
    s, *_ = similarity(make_inputs("clustered", num_tokens=70, channels=33).features, backend=backend)
    assert torch.equal(s, s.transpose(1, 2))


def test_equal_tokens_have_equal_rows_to_the_bit(backend):
    """Else ties between equal tokens break at random; the places fall into different tiles and blocks."""
    keys = make_inputs("random", batch=1, num_tokens=131, channels=21).features
    places = [0, 1, 47, 48, 63, 64, 127, 128, 130]
    keys[0, places] = keys[0, 5].clone()
    s, _, g, _ = similarity(keys, backend=backend)
    for i in places:
        assert torch.equal(s[0, i], s[0, 5])
        assert torch.equal(g[0, i], g[0, 5])


def test_a_cosine_does_not_depend_on_its_place(backend):
    """In its tile, or in another: else two places that are computed apart would not agree."""
    keys = make_inputs("clustered", batch=1, num_tokens=131, channels=37).features
    order = torch.randperm(131)
    s, *_ = similarity(keys, backend=backend)
    moved, *_ = similarity(keys[:, order], backend=backend)
    assert torch.equal(moved[0], s[0][order][:, order])


@pytest.mark.parametrize("n", [1, 30, 70])
def test_means_are_those_of_s(n, backend):
    """g and sbar are sums of 2**-24ths, so each cosine is off by one of them at most."""
    s, sbar, g, _ = similarity(make_inputs("clustered", num_tokens=n, channels=9).features, backend=backend)
    assert (g.double() - s.double().sum(dim=2)).abs().max() <= (n + g.abs().max()) * 2.0**-24
    assert (sbar.double() - s.double().abs().mean(dim=(1, 2))).abs().max() <= 2 * 2.0**-24


@pytest.mark.skipif(not backends.triton_interprets(), reason="one process runs Triton's interpreter or its compiler")
@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 17])
def test_every_block_of_columns_counts(blocks):
    """They are loaded eight at a time: of an image of 64 tokens for each, which the interpreter takes minutes for."""
    from condense_kernels._triton.launcher import launch
    from condense_kernels.ops.similarity.kernel import similarity_means_kernel

    n, tiles = 5, 3
    row_sums = torch.randint(-(2**30), 2**30, (2, blocks, n), dtype=torch.int32)
    abs_sums, tier = torch.randint(2**40, (2, tiles)), torch.zeros(2, n, dtype=torch.int8)
    g, sbar, parts, nearest = torch.empty(2, n), torch.empty(2), torch.randn(2, blocks, n), torch.empty(2, n)
    launch(
        similarity_means_kernel, (2,), tier, row_sums, abs_sums, g, sbar, parts, nearest, n, blocks, tiles, 1, None,
        BLOCK=16, TILE=64, NEAREST=True, enable_fp_fusion=False,
    )  # fmt: skip
    assert torch.equal(nearest, parts.amax(dim=1))
    assert torch.equal(g, row_sums.sum(dim=1).float() * 2.0**-24)
    assert torch.equal(sbar, (abs_sums.sum(dim=1).double() * 2.0**-24 / n**2).float())


def test_power_of_two_lengths_do_not_matter(backend):
    keys = make_inputs("random", batch=1, num_tokens=20, channels=9).features
    lengths = 2.0 ** torch.arange(-60, 60, 6)[None, :, None]
    for a, b in zip(similarity(keys, backend=backend), similarity(keys * lengths, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("exponent", [-149, -140, -126, 100, 127])
def test_keys_of_any_finite_magnitude(exponent, backend):
    keys = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, -1.0]]]).ldexp(torch.tensor(exponent))
    s, *_ = similarity(keys, backend=backend)
    expected = torch.tensor([[1, math.sqrt(0.5), 0], [math.sqrt(0.5), 1, 0], [0, 0, 1]])
    assert torch.allclose(s[0], expected, rtol=0, atol=3e-7)


def test_zero_norm_key_has_no_similarity_not_even_to_itself(backend):
    keys = make_inputs("random", batch=1, num_tokens=6).features
    keys[0, 2] = 0
    s, sbar, g, tier = similarity(keys, backend=backend)
    assert (s[0, 2] == 0).all() and (s[0, :, 2] == 0).all() and g[0, 2] == 0
    assert tier[0].tolist() == [0] * 6  # it still counts in the means
    assert torch.allclose(sbar[0], s[0].abs().mean(), rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["key", "score"])
def test_a_token_that_is_not_finite_touches_no_other(value, where, backend):
    inputs = make_inputs("random", batch=1, num_tokens=9)
    keys, scores = inputs.features.clone(), inputs.scores.clone()
    if where == "key":
        keys[0, 4, -1] = value
    else:
        scores[0, 4] = value
    s, sbar, g, tier = similarity(keys, scores, backend=backend)
    assert tier[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    alone = similarity(keys[:, rest], scores[:, rest], backend=backend)
    assert (s[0, 4] == 0).all() and (s[0, :, 4] == 0).all() and g[0, 4] == 0
    assert torch.equal(s[0][rest][:, rest], alone[0][0])
    assert torch.equal(sbar, alone[1]) and torch.equal(g[:, rest], alone[2])


def test_masked_comes_before_not_finite(backend):
    keys = torch.ones(1, 4, 3)
    keys[0, 1] = math.nan
    mask = torch.tensor([[True, False, True, False]])
    scores = torch.tensor([[1.0, 1.0, math.inf, math.inf]])
    assert similarity(keys, scores, mask, backend=backend)[3].tolist() == [[0, 2, 1, 2]]
    _, sbar, g, _ = similarity(keys, scores, torch.zeros(1, 4, dtype=torch.bool), backend=backend)
    assert sbar.item() == 0 and (g == 0).all()


@pytest.mark.parametrize("metric", ["cosine", "neg_l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(200, 40), (300, 520), (800, 300)])
def test_threads_that_share_packed_panels_change_no_bit(n, d, dtype, metric, cpp):
    """Few channels are shared by two threads, many by more; 800 tokens are more than one block of tiles."""
    keys = torch.randn(1, n, d, generator=torch.Generator().manual_seed(n)).to(dtype)
    call, threads = torch.ops.condense.similarity_and_nearest, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, part = call(keys, metric=metric), call(keys[:, n - 60 :], metric="cosine")[0]
        for count in (2, 3, 8, 40):
            torch.set_num_threads(count)
            for expected, found in zip(alone, call(keys, metric=metric), strict=True):
                assert torch.equal(expected, found)
    finally:
        torch.set_num_threads(threads)
    if metric == "cosine":
        assert torch.equal(alone[0][:, n - 60 :, n - 60 :], part)
        exact = torch.nn.functional.normalize(keys.double(), dim=2)
        torch.testing.assert_close(alone[0].double(), exact @ exact.mT, rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(alone[0].double(), -torch.cdist(keys.double(), keys.double()), rtol=1e-5, atol=1e-5)


def test_means_are_sums_of_integers(fast):
    """docs/design/numerics.md: exact, so that tiles may add in any order; checked on the kernel's own s."""
    inputs = make_inputs("negative", num_tokens=150, channels=40)
    s, sbar, g, _ = similarity(inputs.features, backend=fast)
    q = (s * 2.0**24).trunc().double()
    assert torch.equal(g, (q.sum(dim=2) * 2.0**-24).float())
    assert torch.equal(sbar, (q.abs().sum(dim=(1, 2)) * 2.0**-24 / 150**2).float())


def test_error_is_within_twice_that_of_torch(fast):
    """The same product in torch, fp32: a bound that moves with the input, not a tuned one."""
    keys = make_inputs("clustered", batch=1, num_tokens=200, channels=1000).features
    exact = torch.nn.functional.normalize(keys.double(), dim=-1)
    exact = exact @ exact.transpose(1, 2)
    z = torch.nn.functional.normalize(keys, dim=-1)
    torch_error = (z @ z.transpose(1, 2) - exact).square().mean().sqrt()
    assert (similarity(keys, backend=fast)[0] - exact).square().mean().sqrt() <= 2 * torch_error


def truncated_dots(x: torch.Tensor, guard_bits: int) -> torch.Tensor:
    """x @ x.T as tensor cores that truncate do it: 8 products and the sum so far, cut below the last bit of the largest
    addend and so many guard bits; the new sum is cut to fp32."""
    total = torch.zeros(len(x), len(x), 1, dtype=torch.float64)
    for start in range(0, x.shape[1], 8):
        part = x[:, start : start + 8].double()
        addends = torch.cat([part[:, None] * part[None], total], dim=2)
        _, exponent = torch.frexp(addends.abs().amax(dim=2, keepdim=True))
        cut = torch.ldexp(torch.ones_like(total), exponent - 24 - guard_bits)
        total = ((addends / cut).trunc() * cut).sum(dim=2, keepdim=True)
        _, exponent = torch.frexp(total)
        total = torch.ldexp(torch.ldexp(total, 24 - exponent).trunc(), exponent - 24)
    return total[..., 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_bound_holds_for_tensor_cores_that_truncate(dtype):
    """docs/design/numerics.md: a drift, linear in the channels, beside the walk of rounding."""
    shares = {}
    for channels in (64, 1024, 4096):
        for kind in ("random", "clustered", "parallel"):
            inputs = make_inputs(kind, batch=1, num_tokens=12, channels=channels, dtype=dtype)
            exact, (keys,) = exact_similarity(inputs)[0][0], inputs.features
            norms = keys.double().norm(dim=1)
            for guard_bits in range(4):
                cosines = truncated_dots(keys, guard_bits) / (norms[:, None] * norms)
                error = (cosines - exact).abs().max().item()
                shares[channels, kind, guard_bits] = error / similarity_bound(channels, torch.float32)
    assert max(shares.values()) <= 1
    walk = unit_roundoff(torch.float32) * (8 * 4096**0.5 + 8)  # the bound if sums were rounded
    assert max(s for (c, *_), s in shares.items() if c == 4096) * similarity_bound(4096, torch.float32) > walk
