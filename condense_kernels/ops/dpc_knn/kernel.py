"""Density peaks in three launches, as each needs all of the one before: densities, the nearest denser token and the
score that it makes, and each token's rank among the scores, which is its place in the order.

A program has some whole rows of an image's s, in registers. A distance is the bits of the float, which order like it;
how far the k_nn nearest of a row reach is found bit by bit, with a count of the nearer ones for each, so that every
k_nn costs the same. What decides between tokens is in fp64, a number a token.
"""

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    FLOAT32_MAX,
    INFINITY_BITS,
    bits_of,
    downscale,
    has_block,
    image_of_block,
    image_rows,
    image_tokens,
    is_finite,
    tokens_before,
)
from ..._triton.launcher import VARYING, Packed, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MAX_STORED, DpcConfig

FIXED_POINT = tl.constexpr(1099511627776.0)  # 2**40: squares are summed as integers, so that the order is free
LN_2_BITS = tl.constexpr(0x3FE62E42FEFA39EF)  # of fp64; as a number, Triton would round it to fp32
LOG_TERMS = tl.constexpr(10)
NO_KEY = tl.constexpr(
    -0x7FFFFFFFFFFFFFFF - 1
)  # below those of all scores, -infinity's too, and there is room for tiers
TAKEN = tl.constexpr(3)  # the tier that is never picked


@triton.jit
def tier_of(tier_ptr, stride_tier, tokens, N, HAS_TIER: tl.constexpr):
    """TAKEN behind the last token."""
    if HAS_TIER:
        return tl.load(tier_ptr + tokens.to(tl.int64) * stride_tier, mask=tokens < N, other=TAKEN).to(tl.int32)
    else:
        return tl.where(tokens < N, 0, TAKEN)


@triton.jit
def distance_bits(s_ptr, tier_ptr, rows, columns, stride_s_i, stride_s_j, stride_tier, N, HAS_TIER: tl.constexpr):
    """The bits of the distances [BLOCK_M, BLOCK_N], infinity's where there is no other valid token."""
    valid = tier_of(tier_ptr, stride_tier, columns, N, HAS_TIER) == 0
    i, j = tl.minimum(rows, N - 1).to(tl.int64), tl.minimum(columns, N - 1).to(tl.int64)
    s = tl.load(s_ptr + i[:, None] * stride_s_i + j[None, :] * stride_s_j)
    bits = bits_of(tl.where(is_finite(s) & (s < 0), 0.0 - s, 0.0))
    return tl.where(valid[None, :] & (rows[:, None] != columns[None, :]), bits, INFINITY_BITS)


@triton.jit
def count_below(bits, bar):
    return tl.sum((bits < bar[:, None]).to(tl.int32), axis=1)


@triton.jit
def farthest_of(bits, due, BLOCK_M: tl.constexpr):
    """Of each row, the largest bits that fewer than `due` are below: those of its neighbour number `due`."""
    bar = tl.zeros([BLOCK_M], tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    while bit > 0:
        bar = tl.where(count_below(bits, bar | bit) < due, bar | bit, bar)
        bit = bit >> 1
    return bar


@triton.jit
def fixed_square(bits, first, second):
    """The square of a distance below 1 when scaled, as an integer."""
    unit = bits.to(tl.float32, bitcast=True) * first * second
    return (unit * unit * FIXED_POINT).to(tl.int64)


@triton.jit
def times_power_of_two(x, first, second):
    """x / first / second, exactly: fp64 by powers of two."""
    return x / first.to(tl.float64) / second.to(tl.float64)


@triton.jit(do_not_specialize=VARYING)
def density_kernel(
    s_ptr,  # [B, N, N]
    tier_ptr,  # [B, N]
    density_ptr,  # [B, N] contiguous
    scale,
    stride_s_b, stride_s_i, stride_s_j,
    stride_tier_b, stride_tier_n,
    N, K_NN, num_parts, packed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    pid_b, part = image_of_block(packed, tl.program_id(0), num_parts, BLOCK_M)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, part, BLOCK_M) == 0:
        return
    s_ptr += at_b * stride_s_b
    tier_ptr += at_b * stride_tier_b
    rows, columns = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    bits = distance_bits(s_ptr, tier_ptr, rows, columns, stride_s_i, stride_s_j, stride_tier_n, N, HAS_TIER)
    others = tl.sum((bits < INFINITY_BITS).to(tl.int32), axis=1)
    due = tl.minimum(others, K_NN - 1)  # the token itself, at distance 0, is the first of its neighbours
    bar = farthest_of(bits, due, BLOCK_M)
    first, second = downscale(bar.to(tl.float32, bitcast=True))
    near = tl.where(bits < bar[:, None], bits, 0)
    total = tl.sum(fixed_square(near, first[:, None], second[:, None]), axis=1)
    total += (due - count_below(bits, bar)).to(tl.int64) * fixed_square(bar, first, second)  # as far as the farthest
    mean = total.to(tl.float64) / (due + 1).to(tl.float64) * (1.0 / FIXED_POINT)
    wide = (tl.zeros([BLOCK_M], tl.float32) + scale).to(tl.float64)
    mean = times_power_of_two(times_power_of_two(mean * (wide * wide), first, second), first, second)
    limit = tl.full([BLOCK_M], FLOAT32_MAX, tl.float32).to(tl.float64)
    density = 0.0 - tl.where(mean < limit, mean, limit).to(tl.float32)
    valid = tier_of(tier_ptr, stride_tier_n, rows, N, HAS_TIER) == 0
    density_ptr += tokens_before(packed, at_b, N)
    tl.store(density_ptr + rows, tl.where(valid, density, float("-inf")), mask=rows < N)


@triton.jit
def comes_before(value, token, own_value, own_token):
    """[BLOCK_M, BLOCK_N]: is larger, or the same of a lower index."""
    earlier = token[None, :] < own_token[:, None]
    return (value[None, :] > own_value[:, None]) | ((value[None, :] == own_value[:, None]) & earlier)


@triton.jit
def log(x):
    """ln x of x >= 0 fp32, as fp64: reference.log, an operation for an operation."""
    bits = x.to(tl.float64).to(tl.int64, bitcast=True)  # a subnormal fp32 is a normal fp64
    exponent = (bits >> 52) - 1022
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    small = m < 0.70703125
    m = tl.where(small, m * 2, m)
    exponent = tl.where(small, exponent - 1, exponent)
    one = m * 0 + 1
    z = (m - 1) / (m + 1)
    w = z * z
    series = one / (2 * LOG_TERMS + 1)
    for i in tl.static_range(LOG_TERMS):
        series = series * w + one / (2 * (LOG_TERMS - 1 - i) + 1)
    ln_2 = tl.full([], LN_2_BITS, tl.int64).to(tl.float64, bitcast=True)
    return tl.where(x > 0, exponent.to(tl.float64) * ln_2 + 2 * z * series, float("-inf"))


@triton.jit
def rank_key(score, tier):
    """An int64 that orders like the fp64 score; below those of tier 0, that of tier 1, tier 2 and tier 3."""
    bits = score.to(tl.int64, bitcast=True)
    ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    leftover = tl.where(tier == 1, NO_KEY + 2, tl.where(tier == 2, NO_KEY + 1, NO_KEY))
    return tl.where(tier == 0, ordered, leftover)


@triton.jit(do_not_specialize=VARYING)
def peak_kernel(
    s_ptr,  # [B, N, N]
    tier_ptr,  # [B, N]
    density_ptr,  # [B, N] contiguous
    peak_distance_ptr,  # [B, N] contiguous
    key_ptr,  # [B, N] contiguous, int64
    scale,
    stride_s_b, stride_s_i, stride_s_j,
    stride_tier_b, stride_tier_n,
    N, num_parts, packed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    pid_b, part = image_of_block(packed, tl.program_id(0), num_parts, BLOCK_M)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, part, BLOCK_M) == 0:
        return
    s_ptr += at_b * stride_s_b
    tier_ptr += at_b * stride_tier_b
    at_token = tokens_before(packed, at_b, N)
    density_ptr += at_token
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.load(density_ptr + rows, mask=rows < N, other=0.0)
    columns = tl.arange(0, BLOCK_N)
    bits = distance_bits(s_ptr, tier_ptr, rows, columns, stride_s_i, stride_s_j, stride_tier_n, N, HAS_TIER)
    density = tl.load(density_ptr + columns, mask=columns < N, other=float("-inf"))
    before = comes_before(density, columns, own, rows)
    nearest = tl.min(tl.where(before, bits, INFINITY_BITS), axis=1)
    farthest = tl.max(tl.where(bits < INFINITY_BITS, bits, 0), axis=1)
    peak = tl.where(nearest < INFINITY_BITS, nearest, farthest).to(tl.float32, bitcast=True)  # else the densest of all
    tier = tier_of(tier_ptr, stride_tier_n, rows, N, HAS_TIER)
    key = rank_key(log(peak) + own.to(tl.float64), tier)
    tl.store(key_ptr + at_token + rows, key, mask=rows < N)
    tl.store(peak_distance_ptr + at_token + rows, tl.where(tier == 0, peak * scale, 0.0), mask=rows < N)


@triton.jit(do_not_specialize=VARYING)
def rank_kernel(
    key_ptr,  # [B, N] contiguous, int64
    order_ptr,  # [B, K] contiguous, -1
    N, K, num_parts, packed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A token's place in the order is how many come before it. -1 stays where nothing but tier 3 is left."""
    pid_b, part = image_of_block(packed, tl.program_id(0), num_parts, BLOCK_M)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, part, BLOCK_M) == 0:
        return
    row, K, _anchors = image_rows(packed, pid_b, N, K, 0)
    key_ptr += tokens_before(packed, at_b, N)
    tokens = part * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.load(key_ptr + tokens, mask=tokens < N, other=NO_KEY)
    columns = tl.arange(0, BLOCK_N)
    key = tl.load(key_ptr + columns, mask=columns < N, other=NO_KEY)
    rank = tl.sum(comes_before(key, columns, own, tokens).to(tl.int32), axis=1)
    tl.store(order_ptr + row + rank, tokens.to(tl.int64), mask=(tokens < N) & (own > NO_KEY) & (rank < K))


def check_is_stored(name: str, n: int) -> None:
    if n > MAX_STORED:
        raise ValueError(
            f"{name}: expected at most {MAX_STORED} tokens an image in the Triton dpc_knn, got {n}. "
            "Remedy: windows or frames apart, or CPU tensors."
        )


def launch_dpc_knn(s, tier, k_nn, scale, order, density, peak_distance, packed=None):
    """The kernels on s [B, N, N], into order [B, K] and [B, N]; packed: s [T, max_seqlen], [total_keep], [T]."""
    n = s.shape[1]
    k = order.shape[1] if packed is None else packed.max_keep
    key = new(s, density.shape, torch.int64)
    if density.numel() == 0:
        return
    config = DpcConfig.for_shape(n)
    block_m, block_n, num_warps = config.block_m, config.block_n, config.num_warps
    parts = triton.cdiv(n, block_m)
    programs = s.shape[0] * parts if packed is None else packed.num_slots(block_m)
    tiers = s if tier is None else tier
    strides = (*strides_of(s, 3), *strides_of(tier, 2))
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "enable_fp_fusion": False}
    factor, options = as_fp32(scale), {"HAS_TIER": tier is not None, **blocks}
    with on_device_of(s):
        launch(
            density_kernel, (programs,), s, tiers, density, factor, *strides, n, min(k_nn, n), parts, packed, **options
        )
        launch(
            peak_kernel, (programs,), s, tiers, density, peak_distance, key, factor, *strides, n, parts, packed,
            **options,
        )  # fmt: skip
        if order.numel() > 0:
            launch(rank_kernel, (programs,), key, order, n, k, parts, packed, **blocks)


def dpc_knn(
    s: torch.Tensor,  # [B, N, N]
    k: int,
    k_nn: int = 5,
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return order [B, k] int64, density [B, N], peak_distance [B, N]."""
    reject_float64(s=s)
    check_is_stored("N", s.shape[1])
    order = new(s, (s.shape[0], k), torch.int64, fill=-1)
    density, peak_distance = new(s, s.shape[:2]), new(s, s.shape[:2])
    launch_dpc_knn(s, tier, k_nn, scale, order, density, peak_distance)
    return order, density, peak_distance


def dpc_knn_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    cu_seqlens: torch.Tensor,  # [S + 1] int32
    cu_kept: torch.Tensor,  # [S + 1] int32
    total_keep: int,
    max_seqlen: int,
    k_nn: int = 5,
    *,
    tier: torch.Tensor | None = None,  # [T] int8
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return order [total_keep] int64 within the segment, density [T], peak_distance [T]."""
    reject_float64(s=s)
    check_is_stored("max_seqlen", max_seqlen)
    t = s.shape[0]
    order = new(s, (total_keep,), torch.int64, fill=-1)
    density, peak_distance = new(s, (t,), fill=0), new(s, (t,), fill=0)
    packed = Packed.kept(cu_seqlens, cu_kept, t, total_keep, max_seqlen)
    if packed.num_segments > 0 and max_seqlen > 0:
        launch_dpc_knn(s, tier, k_nn, scale, order, density, peak_distance, packed)
    return order, density, peak_distance
