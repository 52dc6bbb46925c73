"""The other forms of dpp_select, from keys and packed, and what two libraries pick by it."""

import math

import numpy as np
import pytest
import torch
from test_dpp_select import clustered, one

import condense_kernels as ck
from condense_kernels import dpp_select, dpp_select_varlen, similarity

# From keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 30, 200])
def test_from_keys_is_similarity_and_then_the_picks(n, dtype, backend):
    if backend == "triton" and (dtype == torch.float64 or n > 30):
        pytest.skip("refused, or slow in the interpreter")
    keys, quality = torch.randn(2, n, 18).to(dtype), torch.rand(2, n)
    keys[0, n // 2] = 0
    keys[1, n // 3, 0] = math.nan
    k = (2 * n + 2) // 3
    options = {"candidates": torch.rand(2, n) < 0.9, "tier": (torch.rand(2, n) < 0.1).to(torch.int8)}
    s = similarity(keys, backend=backend)[0]
    for q in (quality, None):
        expected = dpp_select(s, q, k, **options, backend=backend)
        assert torch.equal(dpp_select(None, q, k, keys=keys, **options, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "equal tokens", "hostile"])
def test_rows_as_they_are_needed_have_the_bits_of_similarity(kind, dtype, cpp):
    """Above 1024 tokens s is not stored."""
    torch.manual_seed(1)
    keys = clustered(2, 1100, 20, 200) if kind == "equal tokens" else torch.randn(2, 1100, 70)
    keys, quality = keys.to(dtype), torch.rand(2, 1100) ** 2
    options = {}
    if kind == "hostile":
        keys[0, ::7] = 0
        keys[1, ::5, 0] = math.nan
        quality[1, ::3] = math.inf
        options = {"candidates": torch.rand(2, 1100) < 0.5, "tier": torch.randint(0, 4, (2, 1100)).to(torch.int8)}
    s = similarity(keys)[0]
    for q in (quality, None):
        expected = dpp_select(s, q, 230, **options)
        assert torch.equal(dpp_select(None, q, 230, keys=keys, **options), expected)


def test_keys_or_s(backend):
    s, keys = torch.eye(3)[None], torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"^s, keys: expected one of the two, got both"):
        dpp_select(s, None, 2, keys=keys, backend=backend)
    with pytest.raises(ValueError, match=r"^s, keys: expected one of the two, got neither"):
        dpp_select(k=2, backend=backend)
    with pytest.raises(TypeError, match=r"^k: expected an int, got NoneType"):
        dpp_select(s, backend=backend)


# Packed batches


LENGTHS, KEPT = [5, 0, 70, 1, 12, 9], [3, 0, 40, 1, 12, 0]


def packed_problem(generator_seed=0):
    generator = torch.Generator().manual_seed(generator_seed)
    t, width = sum(LENGTHS), max(LENGTHS) + 2
    s = torch.full((t, width), math.nan)  # behind the segment anything may stand
    first = 0
    for n in LENGTHS:
        x = torch.randn(n, 8, generator=generator)
        s[first : first + n, :n] = x @ x.T
        first += n
    quality = torch.rand(t, generator=generator)
    options = {
        "tier": (torch.rand(t, generator=generator) < 0.1).to(torch.int8),
        "candidates": torch.rand(t, generator=generator) < 0.8,
    }
    cu_seqlens, cu_kept = (torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in (LENGTHS, KEPT))
    return s, quality, (cu_seqlens, cu_kept, sum(KEPT), width), options


@pytest.mark.parametrize("with_options", [False, True])
def test_packed_segments_are_the_dense_operator_alone(with_options, backend):
    s, quality, offsets, options = packed_problem()
    options = options if with_options else {}
    q = quality if with_options else None
    order = dpp_select_varlen(s, q, *offsets, **options, backend=backend)
    first = row = 0
    for n, k in zip(LENGTHS, KEPT, strict=True):
        of = slice(first, first + n)
        alone = {name: value[of] for name, value in options.items()}
        if n > 0:
            expected = one(s[of, :n], None if q is None else q[of], k, backend, **alone)
            assert torch.equal(order[row : row + k], expected)
        first, row = first + n, row + k


WRONG = {
    "decreasing": ([0, 5, 3, 75, 76, 88, 97], [0, 3, 3, 43, 44, 56, 56]),
    "negative": ([-4, 5, 5, 75, 76, 88, 97], [-1, 3, 3, 43, 44, 56, 56]),
    "behind the end": ([0, 5, 5, 75, 76, 88, 1000], [0, 3, 3, 43, 44, 56, 900]),
    "more than there are": ([0, 5, 5, 75, 76, 88, 97], [0, 30, 30, 43, 44, 56, 56]),
    "longer than the rows": ([0, 90, 90, 90, 90, 90, 97], [0, 40, 40, 40, 40, 56, 56]),
    "huge": ([0, 2**31 - 1, 5, 75, 76, 88, 97], [0, 2**31 - 1, 3, 43, 44, 56, 56]),
}


@pytest.mark.parametrize(("cu_seqlens", "cu_kept"), WRONG.values(), ids=WRONG.keys())
def test_wrong_offsets_are_harmless(cu_seqlens, cu_kept, backend, request):
    if backend == "triton":
        request.getfixturevalue("bounded")
    s, quality, (_, _, total_keep, width), options = packed_problem()
    cu_seqlens, cu_kept = (torch.tensor(x, dtype=torch.int32) for x in (cu_seqlens, cu_kept))
    order = dpp_select_varlen(s, quality, cu_seqlens, cu_kept, total_keep, width, **options, backend=backend)
    assert bool(((order >= -1) & (order < width)).all())


def test_packed_errors():
    s, quality, (cu_seqlens, cu_kept, total_keep, width), _ = packed_problem()
    with pytest.raises(ValueError, match=rf"^s: expected rows of max_seqlen = {width + 1} columns, got {width}"):
        dpp_select_varlen(s, quality, cu_seqlens, cu_kept, total_keep, width + 1)
    with pytest.raises(RuntimeError, match=rf"^s: expected rows of max_seqlen = {width + 1} columns, got {width}"):
        torch.ops.condense.dpp_select_varlen(s, quality, cu_seqlens, cu_kept, total_keep, width + 1)
    with ck.debug(), pytest.raises(ValueError, match=r"^cu_kept: expected running sums from 0 up to total_keep"):
        dpp_select_varlen(s, quality, cu_seqlens, cu_kept, total_keep - 1, width)


def test_the_debug_switch_looks_at_quality_and_tiers():
    s, quality = torch.eye(4)[None], torch.rand(1, 4)
    quality[0, 2] = math.nan
    with ck.debug():
        with pytest.raises(ValueError, match="^quality: expected finite numbers, got nan at image 0, token 2"):
            dpp_select(s, quality, 2)
        with pytest.raises(ValueError, match=r"^tier: expected values in \[0, 4\), got 7 at image 0, token 0"):
            dpp_select(s, None, 2, tier=torch.full((1, 4), 7, dtype=torch.int8))
        with pytest.raises(ValueError, match="^keys: expected finite numbers, got nan at image 0, token 3, channel 0"):
            dpp_select(keys=torch.tensor([[[1.0], [1.0], [1.0], [math.nan]]]), k=2)
        dpp_select(s, quality, 2, tier=(quality != quality).to(torch.int8))  # as a NaN is said to be


# The loops of two libraries, restated in fp64


def cdpruner(keys, relevance, k):
    """The kernel r_i s_ij r_j of CDPruner, r scaled to [0, 1]; no threshold anywhere."""
    z = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    span = relevance.max() - relevance.min()
    r = (relevance - relevance.min() + 1e-6) / span
    return plain_loop(r[:, None] * (z @ z.T) * r, k)


def openvino(keys, relevance, k, weight, mixed):
    """The kernel (1 - w) S + w r S r of OpenVINO's FastGreedyDPP, or with exponents, and its 1e-6 under the root."""
    z = keys / np.sqrt((keys**2).sum(axis=1, keepdims=True) + 1e-6)
    r = (relevance - relevance.min()) / (relevance.max() - relevance.min() + 1e-6)
    s, grown = z @ z.T, np.exp(weight / (2 * (1 - weight)) * r)
    kernel = (1 - weight) * s + weight * r[:, None] * s * r if mixed else grown[:, None] * s * grown
    return plain_loop(kernel, k, damping=1e-6)


def plain_loop(kernel, k, damping=0.0):
    gain, rows, order = kernel.diagonal().copy(), np.zeros((k, len(kernel))), []
    for i in range(k):
        pick = int(gain.argmax())
        rows[i] = (kernel[pick] - rows[:i, pick] @ rows[:i]) / np.sqrt(gain[pick] + damping)
        gain -= rows[i] ** 2
        gain[pick] = -np.inf
        order.append(pick)
    return order


@pytest.mark.parametrize("k", [8, 24])
def test_recipes_pick_what_the_libraries_pick(k, backend):
    generator = np.random.default_rng(k)
    features, relevance = generator.normal(size=(60, 48)), generator.normal(size=60)
    keys, text = torch.from_numpy(features).float()[None], torch.from_numpy(relevance).float()[None]
    low, high = text.aminmax(dim=1, keepdim=True)

    r = (text - low + 1e-6) / (high - low)
    assert dpp_select(keys=keys, quality=r, k=k, backend=backend)[0].tolist() == cdpruner(features, relevance, k)

    r = (text - low) / (high - low + 1e-6)
    s = similarity(keys, backend=backend)[0].float()
    weight = 0.4
    kernel = (1 - weight) * s + weight * r[:, :, None] * s * r[:, None]
    order = dpp_select(kernel, None, k, damping=1e-6, backend=backend)[0].tolist()
    assert order == openvino(features, relevance, k, weight, mixed=True)
    grown = (weight / (2 * (1 - weight)) * r).exp()
    order = dpp_select(s, grown, k, damping=1e-6, backend=backend)[0].tolist()
    assert order == openvino(features, relevance, k, weight, mixed=False)
