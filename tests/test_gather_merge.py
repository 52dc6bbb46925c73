"""gather_merge and its gradient: against the definition, and against numpy from the formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from condense_kernels import debug, gather_merge
from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import GatherMergeBackwardConfig, trying
from condense_kernels.testing import assert_same_bits, unit_roundoff

CPU = torch.device("cpu")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_merge_backward(*args, backend):
    return backends.kernel_of("gather_merge_backward", backend, CPU)(*args)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lists(b, n, k, m, seed=0, none=0.2):
    """Tokens at random, some named twice in a row, some places empty."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(n, (b, k, m), generator=generator)
    return torch.where(torch.rand(b, k, m, generator=generator) < none, -1, tokens)


def by_hand(x, neighbours, weights):
    """The formula in numpy and fp64; and the sum of magnitudes, what roundings are relative to."""
    x, neighbours = x.double().numpy(), neighbours.numpy()
    weights = np.ones(neighbours.shape) if weights is None else weights.double().numpy()
    there = (neighbours >= 0)[..., None]
    images = np.arange(len(x))[:, None, None]
    terms = np.where(there, weights[..., None] * x[images, np.maximum(neighbours, 0)], 0)
    return torch.from_numpy(terms.sum(axis=2)), torch.from_numpy(np.abs(terms).sum(axis=2))


def gradients_by_hand(grad, x, neighbours, weights):
    """As by_hand, of both."""
    grad, x, neighbours = grad.double().numpy(), x.double().numpy(), neighbours.numpy()
    weights = np.ones(neighbours.shape) if weights is None else weights.double().numpy()
    of_x, size, of_weights, size_w = (
        np.zeros_like(x),
        np.zeros_like(x),
        np.zeros(weights.shape),
        np.zeros(weights.shape),
    )
    for b, k, j in zip(*np.nonzero(neighbours >= 0), strict=True):
        token = neighbours[b, k, j]
        of_x[b, token] += weights[b, k, j] * grad[b, k]
        size[b, token] += np.abs(weights[b, k, j] * grad[b, k])
        of_weights[b, k, j] = grad[b, k] @ x[b, token]
        size_w[b, k, j] = np.abs(grad[b, k]) @ np.abs(x[b, token])
    return [torch.from_numpy(t) for t in (of_x, size, of_weights, size_w)]


def hold(actual, exact, magnitude, terms, working=torch.float32):
    """``terms`` roundings in the working type, one to the result's."""
    out = torch.finfo(actual.dtype)
    bound = terms * unit_roundoff(working) * magnitude + out.eps / 2 * exact.abs() + out.smallest_normal * out.eps
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"off by {float((error - bound).max())} more than the bound"


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@settings(max_examples=15)
@given(
    b=st.integers(0, 2),
    n=st.integers(1, 9),
    k=st.integers(0, 4),
    m=st.integers(0, 7),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES[:3]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_formula(backend, b, n, k, m, d, dtype, weighted, seed):
    x, neighbours = numbers(b, n, d, seed=seed, dtype=dtype), lists(b, n, k, m, seed)
    weights = numbers(b, k, m, seed=seed + 1) if weighted else None
    merged = gather_merge(x, neighbours, weights, backend=backend)
    assert merged.shape == (b, k, d) and merged.dtype == dtype and merged.is_contiguous()
    hold(merged, *by_hand(x, neighbours, weights), m)
    grad = numbers(b, k, d, seed=seed + 2, dtype=dtype)
    of_x, of_weights = gather_merge_backward(grad, x, neighbours, weights, [n, d], backend=backend)
    assert of_x.dtype == dtype and of_weights.dtype == torch.float32
    exact = gradients_by_hand(grad, x, neighbours, weights)
    hold(of_x, *exact[:2], k * m)
    hold(of_weights, *exact[2:], d)
    without_x = gather_merge_backward(grad, None, neighbours, weights, [n, d], backend=backend)
    assert_same_bits(without_x, (of_x, torch.zeros_like(of_weights)))


@pytest.mark.parametrize("d", [130, 600, 1030])
def test_many_channels(d, fast):
    """Past a block of channels, and past a vector in the last one."""
    x, neighbours, weights = numbers(1, 7, d), lists(1, 7, 3, 6), numbers(1, 3, 6, seed=1)
    hold(gather_merge(x, neighbours, weights, backend=fast), *by_hand(x, neighbours, weights), 6)
    grad = numbers(1, 3, d, seed=2)
    of_x, of_weights = gather_merge_backward(grad, x, neighbours, weights, [7, d], backend=fast)
    exact = gradients_by_hand(grad, x, neighbours, weights)
    hold(of_x, *exact[:2], 18)
    hold(of_weights, *exact[2:], d)


@pytest.mark.parametrize("block", [16, 1024])
def test_long_lists(fast, block):
    """More places than are looked at together, and one token that every row names, once more than a turn adds."""
    x, neighbours, weights = numbers(1, 5, 3), lists(1, 5, 9, 14), numbers(1, 9, 14, seed=1)
    neighbours[:, :, 7] = 2
    hold(gather_merge(x, neighbours, weights, backend=fast), *by_hand(x, neighbours, weights), 14)
    grad = numbers(1, 9, 3, seed=2)
    with trying(GatherMergeBackwardConfig, block=block):
        of_x, of_weights = gather_merge_backward(grad, x, neighbours, weights, [5, 3], backend=fast)
    exact = gradients_by_hand(grad, x, neighbours, weights)
    hold(of_x, *exact[:2], 9 * 14)
    hold(of_weights, *exact[2:], 3)


def test_in_the_order_of_the_list(backend):
    """2**24 + 1 + 1 and 1 + 1 + 2**24: the one loses both ones in fp32."""
    x = torch.tensor([[[2.0**24], [1.0]]])
    merged = gather_merge(x, torch.tensor([[[0, 1, 1], [1, 1, 0]]]), backend=backend)
    expected = [2.0**24 + 2] * 2 if backend == "reference" else [2.0**24, 2.0**24 + 2]
    assert merged.flatten().tolist() == expected
    neighbours = torch.zeros(1, 3, 1, dtype=torch.int64)
    for slopes, in_fp32 in (([2.0**24, 1, 1], 2.0**24), ([1, 1, 2.0**24], 2.0**24 + 2)):
        grad = torch.tensor(slopes).view(1, 3, 1)
        of_x, _ = gather_merge_backward(grad, None, neighbours, None, [1, 1], backend=backend)
        assert of_x.item() == (2.0**24 + 2 if backend == "reference" else in_fp32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_once_ties_to_even(dtype, backend):
    """Half of the sum of neighbours in 16 bits lies halfway between them, exactly so in fp32."""
    low = torch.arange(0x3C00, 0x3C00 + 101, dtype=torch.int16).view(dtype)
    high = torch.arange(0x3C01, 0x3C01 + 101, dtype=torch.int16).view(dtype)
    halves = torch.full((1, 1, 2), 0.5)
    merged = gather_merge(torch.stack([low, high])[None], torch.tensor([[[0, 1]]]), halves, backend=backend)
    assert torch.equal(merged[0, 0], ((low.float() + high.float()) / 2).to(dtype))


@pytest.mark.parametrize("side", [1, -1], ids=["above the tie", "below the tie"])
@pytest.mark.parametrize("cpu", ["cpp", "reference"])
def test_fp64_weights_on_16_bits_are_rounded_once(cpu, side, cpp):
    weights = torch.tensor([[[0.5 - side * 2.0**-30, 0.5 + side * 2.0**-30]]], dtype=torch.float64)
    for dtype, step in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        x = torch.tensor([[[1.0], [1 + step]]]).to(dtype)
        merged = gather_merge(x, torch.tensor([[[0, 1]]]), weights, backend=cpu)
        assert merged.dtype == dtype and merged.item() == (1 + step if side > 0 else 1.0)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, weights_dtype, fast):
    wide = torch.float64 in (dtype, weights_dtype)
    if fast == "triton" and wide:
        with pytest.raises(ValueError, match="expected fp32, fp16 or bf16 on the Triton kernels, got float64"):
            gather_merge(
                numbers(1, 3, 2, dtype=dtype), lists(1, 3, 2, 2), numbers(1, 2, 2, dtype=weights_dtype), backend=fast
            )
        return
    working = torch.float64 if wide else torch.float32
    x, neighbours, weights = (
        numbers(2, 9, 21, dtype=dtype),
        lists(2, 9, 4, 5),
        numbers(2, 4, 5, seed=1).to(weights_dtype),
    )
    hold(gather_merge(x, neighbours, weights, backend=fast), *by_hand(x, neighbours, weights), 5, working)
    grad = numbers(2, 4, 21, seed=2, dtype=dtype)
    of_x, of_weights = gather_merge_backward(grad, x, neighbours, weights, [9, 21], backend=fast)
    assert (of_x.dtype, of_weights.dtype) == (dtype, weights_dtype)
    exact = gradients_by_hand(grad, x, neighbours, weights)
    hold(of_x, *exact[:2], 20, working)
    hold(of_weights, *exact[2:], 21, working)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_neighbour_is_that_token_bit_for_bit(dtype, backend):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("fp64 is served on CPU by the C++ kernels alone, as the contract says")
    integer = INTEGERS[dtype.itemsize]
    infinity = torch.tensor(math.inf, dtype=dtype).view(integer)
    odd = [infinity + 1, infinity + 5, -infinity - 1, infinity, torch.zeros_like(infinity)]
    bits = torch.stack([*odd, infinity.new_tensor(torch.iinfo(integer).min)])  # NaNs of either sign, and -0
    x = torch.stack([bits.view(dtype), bits.flip(0).view(dtype)])[None]
    neighbours = torch.tensor([[[1, -1, -1], [-1, -1, 0], [-1, 1, -1]]])
    merged = gather_merge(x, neighbours, backend=backend)
    assert torch.equal(merged.view(integer)[0], x.view(integer)[0, [1, 0, 1]])
    merged = gather_merge(x.mT.contiguous().mT, neighbours[..., :1].clamp(min=0), backend=backend)
    assert torch.equal(merged.view(integer)[0], x.view(integer)[0, [1, 0, 0]])


def test_without_neighbours(backend):
    x = torch.full((2, 3, 5), math.nan)
    assert (
        gather_merge(x, torch.zeros(2, 4, 0, dtype=torch.int64), backend=backend).tolist()
        == torch.zeros(2, 4, 5).tolist()
    )
    args = torch.rand(2, 4, 5), x, torch.zeros(2, 4, 0, dtype=torch.int64), None, [3, 5]
    of_x, of_weights = gather_merge_backward(*args, backend=backend)
    assert of_x.tolist() == torch.zeros(2, 3, 5).tolist() and of_weights.shape == (2, 4, 0)
    nobody = torch.full((2, 4, 3), -1)
    nan = torch.full((2, 4, 3), math.nan)
    for weights in (None, nan):
        merged = gather_merge(x, nobody, weights, backend=backend)
        assert merged.tolist() == torch.zeros(2, 4, 5).tolist() and not merged.signbit().any()
        grads = gather_merge_backward(torch.ones(2, 4, 5), x, nobody, weights, [3, 5], backend=backend)
        assert all(grad.eq(0).all() for grad in grads)
    empty = gather_merge(torch.rand(2, 0, 5), nobody, backend=backend)
    assert empty.eq(0).all() and empty.shape == (2, 4, 5)
    for b, k in ((0, 4), (2, 0)):
        none = torch.zeros(b, k, 3, dtype=torch.int64)
        assert gather_merge(torch.rand(b, 3, 5), none, backend=backend).shape == (b, k, 5)
        of_x, of_weights = gather_merge_backward(
            torch.rand(b, k, 5), torch.rand(b, 3, 5), none, None, [3, 5], backend=backend
        )
        assert of_x.shape == (b, 3, 5) and of_x.eq(0).all() and of_weights.shape == (b, k, 3)


def test_nan_stays_in_its_rows(backend):
    x, neighbours, weights = numbers(1, 6, 4), torch.tensor([[[0, 1], [2, 3], [1, -1]]]), numbers(1, 3, 2, seed=1)
    clean = gather_merge(x, neighbours, weights, backend=backend)
    x[0, 3, 2], weights[0, 2, 1] = math.nan, math.nan
    merged = gather_merge(x, neighbours, weights, backend=backend)
    assert merged.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert torch.equal(merged[0, [0, 2]], clean[0, [0, 2]])
    weights[0, 1, 1] = 0.0
    assert gather_merge(x, neighbours, weights, backend=backend)[0, 1, 2].isnan()  # 0 * NaN
    x[0, 3, 2], weights[0, 1, 0] = 1.0, math.inf
    assert not gather_merge(x, neighbours, weights, backend=backend)[0, 1].isfinite().any()


def test_nan_of_a_slope_stays_with_its_tokens(backend):
    x, neighbours, weights = numbers(1, 4, 3), torch.tensor([[[0, 1], [2, -1]]]), numbers(1, 2, 2, seed=1)
    grad = numbers(1, 2, 3, seed=2)
    grad[0, 1, 0] = math.nan
    of_x, of_weights = gather_merge_backward(grad, x, neighbours, weights, [4, 3], backend=backend)
    assert of_x.isnan().nonzero().tolist() == [[0, 2, 0]]
    assert of_weights.isnan().tolist() == [[[False, False], [True, False]]] and of_weights[0, 1, 1] == 0


@pytest.mark.parametrize("token", [-2, 6, 2**40])
def test_neighbour_out_of_range(token, backend, bounded):
    x, neighbours = numbers(1, 6, 4), torch.tensor([[[0, token, 2]]])
    args = torch.ones(1, 1, 4), x, neighbours, torch.ones(1, 1, 3), [6, 4]
    if backend == "triton":  # values are not read on a GPU: it is none
        none = torch.tensor([[[0, -1, 2]]])
        assert torch.equal(gather_merge(x, neighbours, backend=backend), gather_merge(x, none, backend=backend))
        expected = gather_merge_backward(*args[:2], none, *args[3:], backend=backend)
        assert_same_bits(gather_merge_backward(*args, backend=backend), expected)
        return
    for call in (
        lambda: gather_merge(x, neighbours, backend=backend),
        lambda: gather_merge_backward(*args, backend=backend),
    ):
        with pytest.raises(RuntimeError, match=rf"^neighbours: expected values in \[-1, 6\), got {token}"):
            call()


def views(t):
    """The same values behind other strides."""
    yield torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
    yield t.repeat_interleave(2, dim=-1)[..., ::2]
    yield t.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    yield t.repeat_interleave(3, dim=1)[:, ::3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_and_batch_do_not_matter(dtype, fast):
    x, neighbours, weights = numbers(2, 4, 19, dtype=dtype), lists(2, 4, 2, 3), numbers(2, 2, 3, seed=1)
    grad = numbers(2, 2, 19, seed=2, dtype=dtype)
    given = {"grad": grad, "x": x, "neighbours": neighbours, "weights": weights}

    def run(grad, x, neighbours, weights):
        merged = gather_merge(x, neighbours, weights, backend=fast)
        return merged, *gather_merge_backward(grad, x, neighbours, weights, [4, 19], backend=fast)

    expected = run(**given)
    for name, value in given.items():
        for view in views(value):
            assert_same_bits(run(**given | {name: view}), expected, name)
    for b in range(2):
        alone = run(**{name: value[b : b + 1] for name, value in given.items()})
        assert_same_bits(alone, tuple(result[b : b + 1] for result in expected))


def test_packed_is_one_image_of_all_tokens(backend):
    """Neighbours counted over all segments: the bits of each segment alone."""
    lengths, rows = [5, 9, 1], [2, 3, 0]
    x = numbers(1, sum(lengths), 7)
    parts, expected, start = [], [], 0
    for n, k in zip(lengths, rows, strict=True):
        within = lists(1, n, k, 4, seed=n)
        parts.append(torch.where(within >= 0, within + start, -1))
        expected.append(gather_merge(x[:, start : start + n], within, backend=backend))
        start += n
    merged = gather_merge(x, torch.cat(parts, dim=1), backend=backend)
    assert_same_bits((merged,), (torch.cat(expected, dim=1),))


def test_16_bit_tokens_are_taken_as_they_are(fast):
    x, neighbours, weights = numbers(1, 9, 33, dtype=torch.bfloat16), lists(1, 9, 4, 5), numbers(1, 4, 5, seed=1)
    wide = gather_merge(x.float(), neighbours, weights, backend=fast)
    assert torch.equal(gather_merge(x, neighbours, weights, backend=fast), wide.bfloat16())


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_matter(batch, cpp):
    x, neighbours, weights = numbers(batch, 200, 700), lists(batch, 200, 50, 20), numbers(batch, 50, 20, seed=1)
    grad = numbers(batch, 50, 700, seed=2)

    def run():
        merged = gather_merge(x, neighbours, weights, backend=cpp)
        return merged, *gather_merge_backward(grad, x, neighbours, weights, [200, 700], backend=cpp)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(run(), expected, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


def test_debug_finds_what_is_wrong(backend):
    x, neighbours, weights = numbers(2, 6, 4), lists(2, 6, 3, 2, none=0), numbers(2, 3, 2)
    bad = neighbours.clone()
    bad[1, 2, 0] = 6
    with debug():
        gather_merge(x, neighbours, weights, backend=backend)
        message = r"^neighbours: expected values in \[-1, 6\), got 6 at image 1, row 2, neighbour 0"
        with pytest.raises(ValueError, match=message):
            gather_merge(x, bad, weights, backend=backend)
        weights[1, 2, 1], neighbours[1, 2, 1] = math.nan, -1
        gather_merge(x, neighbours, weights, backend=backend)
        weights[0, 0, 1] = math.nan
        with pytest.raises(
            ValueError, match="^weights: expected finite numbers, got nan at image 0, row 0, neighbour 1"
        ):
            gather_merge(x, neighbours, weights, backend=backend)


# Derivatives


@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_of_two_orders(weighted, cpp):
    """Backward, forward mode, both over both, and vmap over them, as finite differences have them."""
    x, neighbours = numbers(2, 5, 3, dtype=torch.float64).requires_grad_(), lists(2, 5, 3, 4)
    weights = (numbers(2, 3, 4, seed=1, dtype=torch.float64).requires_grad_(),) if weighted else ()

    def call(x, *weights):
        return gather_merge(x, neighbours, *weights, backend=cpp)

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(call, (x, *weights), **checks)
    more = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradgradcheck(call, (x, *weights), **more)


@pytest.mark.parametrize("of", ["x", "weights", "both"])
def test_derivatives_on_every_backend(of, backend):
    x, neighbours, weights = numbers(2, 5, 3), lists(2, 5, 3, 4), numbers(2, 3, 4, seed=1)
    x.requires_grad_(of != "weights"), weights.requires_grad_(of != "x")
    there = (neighbours >= 0)[..., None]
    leaves = [t for t in (x, weights) if t.requires_grad]

    def formula(x, weights):
        rows = torch.stack([x[b, neighbours[b].clamp(min=0)] for b in range(2)])
        return (torch.where(there, weights[..., None] * rows, 0)).sum(dim=2)

    slope = numbers(2, 3, 3, seed=2)
    expected = torch.autograd.grad(formula(x, weights), leaves, slope)
    merged = gather_merge(x, neighbours, weights, backend=backend)
    for got, exact in zip(torch.autograd.grad(merged, leaves, slope), expected, strict=True):
        torch.testing.assert_close(got, exact)
    tangents = [numbers(*t.shape, seed=3) if t.requires_grad else torch.zeros_like(t) for t in (x, weights)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), tangent) for t, tangent in zip((x, weights), tangents, strict=True)]
        got = forward_ad.unpack_dual(gather_merge(duals[0], neighbours, duals[1], backend=backend)).tangent
    _, exact = torch.func.jvp(formula, (x.detach(), weights.detach()), tuple(tangents))
    torch.testing.assert_close(got, exact)


def test_transforms_of_functions(backend):
    x, neighbours, weights = numbers(2, 5, 3), lists(2, 5, 3, 4), numbers(2, 3, 4, seed=1)

    def loss(x, weights):
        return gather_merge(x, neighbours, weights, backend=backend).sin().sum()

    per_call = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(torch.stack([x, -x]), weights)
    for i, sign in enumerate((1, -1)):
        for got, exact in zip(per_call, torch.func.grad(loss, argnums=(0, 1))(sign * x, weights), strict=True):
            torch.testing.assert_close(got[i], exact)


def test_the_gradient_is_the_same_every_time(fast):
    """No atomics: bit for bit, whatever names a token."""
    x, neighbours = numbers(1, 3, 40).requires_grad_(), lists(1, 3, 20, 4)
    slope = numbers(1, 20, 40, seed=1) * 10.0 ** numbers(1, 20, 1, seed=2)
    first, second = (torch.autograd.grad(gather_merge(x, neighbours, backend=fast), x, slope) for _ in range(2))
    assert_same_bits(first, second)


def test_what_is_saved_for_backward(backend):
    """Of the gradient of x alone, not x."""
    x, neighbours, weights = numbers(1, 5, 3).requires_grad_(), lists(1, 5, 3, 4), numbers(1, 3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        gather_merge(x, neighbours, weights, backend=backend)
    assert saved == [neighbours.shape, weights.shape]


def test_prumerge_by_hand(backend):
    """The centre and its two nearest, by their attention: the rows of PruMerge."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    neighbours, attention = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[1.0, 0.5, 0.25]]])
    assert gather_merge(x, neighbours, attention, backend=backend).tolist() == [[[1.5, 1.0]]]
    of_x, of_weights = gather_merge_backward(
        torch.tensor([[[1.0, 10.0]]]), x, neighbours, attention, [3, 2], backend=backend
    )
    assert of_x.tolist() == [[[1.0, 10.0], [0.5, 5.0], [0.25, 2.5]]]
    assert of_weights.tolist() == [[[1.0, 10.0, 22.0]]]
