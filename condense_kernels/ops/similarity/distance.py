"""Negated Euclidean distances of all token pairs (metric "neg_l2"), and what is asked of them.

From differences, not from products, which cancel: so without tensor cores, and eight channels of a tile at a time, each
in an accumulator of its own, which are added in a fixed order at the end.
"""

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    FLOAT32_MAX,
    INFINITY_BITS,
    has_block,
    image_of_block,
    image_tokens,
    magnitude_bits,
    power_of_two,
    sum_in_pairs,
    tokens_before,
)
from ..._triton.launcher import VARYING, launch, new, strides_of
from ..._triton.tables import DistanceConfig
from .cosine import load_rows, token_tier
from .kernel import blocks_of_image, tile_of, tiles_of_image


@triton.jit(do_not_specialize=VARYING)
def magnitudes_kernel(
    keys_ptr,  # [B, N, Dk], packed: [T, Dk]; likewise the rest
    scores_ptr,  # [B, N]
    mask_ptr,  # [B, N]
    tier_ptr,  # [B, N] contiguous
    tops_ptr,  # [B, N] int32: the bits of the largest magnitude in a key, 0 where it is not in tier 0
    stride_key_b, stride_key_n, stride_key_d,
    stride_score_b, stride_score_n,
    stride_mask_b, stride_mask_n,
    N, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK) == 0:
        return
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    keys_ptr += at_b * stride_key_b
    tops = tl.zeros([BLOCK, BLOCK_D], tl.int32)
    d = tl.zeros([], tl.int32)
    while d < num_channels:
        x = load_rows(keys_ptr, rows, d, stride_key_n, stride_key_d, DK, BLOCK_D).to(tl.float32)
        tops = tl.maximum(tops, magnitude_bits(x))
        d += BLOCK_D
    top = tl.max(tops, axis=1)
    tier = token_tier(
        scores_ptr + at_b * stride_score_b, mask_ptr + at_b * stride_mask_b, offs_n, top < INFINITY_BITS,
        stride_score_n, stride_mask_n, N, HAS_SCORES, HAS_MASK,
    )  # fmt: skip
    first = tokens_before(packed, at_b, N)
    tl.store(tier_ptr + first + offs_n, tier.to(tier_ptr.dtype.element_ty), mask=offs_n < N)
    tl.store(tops_ptr + first + offs_n, tl.where(tier == 0, top, 0), mask=offs_n < N)


@triton.jit
def image_exponent(tops_ptr, N, BLOCK: tl.constexpr):
    """e, such that 2**e brings the largest key of the image into [2**48, 2**49): squares of differences of up to 2**25
    channels do not overflow, and the smallest distances keep theirs. At most 126, so that it can be undone."""
    most = tl.zeros([BLOCK], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(tops_ptr + offs, mask=offs < N, other=0))
        start += BLOCK
    exponent = (tl.max(most, axis=0) >> 23) - 127
    return tl.where(tl.max(most, axis=0) > 0, tl.minimum(48 - exponent, 126), 0)


@triton.jit(do_not_specialize=VARYING)
def distance_tile_kernel(
    keys_ptr,  # [B, N, Dk], packed: [T, Dk]; likewise the rest
    tier_ptr,  # [B, N] contiguous
    tops_ptr,  # [B, N] contiguous
    s_ptr,  # [B, N, ROW] contiguous
    stride_key_b, stride_key_n, stride_key_d,
    N, ROW, num_blocks, num_tiles, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOPS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if packed is None:
        pid_b = (pid // num_tiles).to(tl.int64)
        pid_tile = pid % num_tiles
    else:
        pid_b, block = image_of_block(packed, pid, num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    blocks = blocks_of_image(packed, N, num_blocks, BLOCK)
    if packed is not None:  # a program of each block takes every blocks-th tile, from that of its number on
        pid_tile = tl.program_id(1) * blocks + block
        exists = (pid_tile < tiles_of_image(packed, blocks, num_tiles)) & has_block(packed, N, block, BLOCK)
        if exists == 0:
            return
    pid_i, pid_j = tile_of(pid_tile, blocks)
    first = tokens_before(packed, at_b, N)
    keys_ptr += at_b * stride_key_b
    exponent = image_exponent(tops_ptr + first, N, BLOCK_TOPS)
    scale = power_of_two(exponent)
    offs_i = pid_i * BLOCK + tl.arange(0, BLOCK)
    offs_j = pid_j * BLOCK + tl.arange(0, BLOCK)
    rows_i = tl.minimum(offs_i, N - 1).to(tl.int64)
    rows_j = tl.minimum(offs_j, N - 1).to(tl.int64)
    lanes = tl.zeros([BLOCK, BLOCK, BLOCK_D], tl.float32)
    d = tl.zeros([], tl.int32)
    while d < num_channels:
        x = load_rows(keys_ptr, rows_i, d, stride_key_n, stride_key_d, DK, BLOCK_D).to(tl.float32) * scale
        y = load_rows(keys_ptr, rows_j, d, stride_key_n, stride_key_d, DK, BLOCK_D).to(tl.float32) * scale
        apart = x[:, None, :] - y[None, :, :]
        lanes = tl.fma(apart, apart, lanes)
        d += BLOCK_D
    square = tl.reshape(sum_in_pairs(tl.reshape(lanes, [BLOCK * BLOCK, BLOCK_D])), [BLOCK, BLOCK])
    s = 0.0 - tl.minimum(tl.sqrt_rn(square) * power_of_two(-exponent), FLOAT32_MAX)
    tier_i = tl.load(tier_ptr + first + offs_i, mask=offs_i < N, other=2)
    tier_j = tl.load(tier_ptr + first + offs_j, mask=offs_j < N, other=2)
    s = tl.where((tier_i == 0)[:, None] & (tier_j == 0)[None, :], s, 0.0)
    s_ptr += first * ROW
    offs_i64 = offs_i.to(tl.int64)
    offs_j64 = offs_j.to(tl.int64)
    mask = (offs_i < N)[:, None] & (offs_j < N)[None, :]
    tl.store(s_ptr + offs_i64[:, None] * ROW + offs_j64[None, :], s, mask=mask)
    if pid_i != pid_j:
        tl.store(s_ptr + offs_j64[:, None] * ROW + offs_i64[None, :], tl.trans(s), mask=tl.trans(mask))


@triton.jit(do_not_specialize=VARYING)
def distance_rows_kernel(
    s_ptr,  # [B, N, ROW] contiguous, packed: [T, ROW]; likewise the rest
    tier_ptr,  # [B, N] contiguous
    g_ptr,  # [B, N] contiguous
    sums_ptr,  # [B, N] fp64: what g is rounded from
    nearest_ptr,  # [B, N] contiguous
    N, ROW, num_blocks, packed,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK) == 0:
        return
    first = tokens_before(packed, at_b, N)
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    rows = s_ptr + (first + tl.minimum(offs_n, N - 1)).to(tl.int64) * ROW
    sums = tl.zeros([BLOCK, BLOCK_J], tl.float64)
    most = tl.full([BLOCK, BLOCK_J], -FLOAT32_MAX, tl.float32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs_j = start + tl.arange(0, BLOCK_J)
        s = tl.load(rows[:, None] + offs_j[None, :], mask=(offs_j < N)[None, :], other=0.0)
        tier_j = tl.load(tier_ptr + first + offs_j, mask=offs_j < N, other=2)
        others = (tier_j == 0)[None, :] & (offs_n[:, None] != offs_j[None, :])
        sums += s.to(tl.float64)
        most = tl.maximum(most, tl.where(others, s, -FLOAT32_MAX))
        start += BLOCK_J
    total = sum_in_pairs(sums)
    tier = tl.load(tier_ptr + first + offs_n, mask=offs_n < N, other=2)
    nearest = tl.where(tier == 0, tl.max(most, axis=1), -FLOAT32_MAX)
    tl.store(sums_ptr + first + offs_n, total, mask=offs_n < N)
    tl.store(g_ptr + first + offs_n, tl.maximum(total, -FLOAT32_MAX).to(tl.float32), mask=offs_n < N)
    tl.store(nearest_ptr + first + offs_n, nearest, mask=offs_n < N)


@triton.jit(do_not_specialize=VARYING)
def distance_mean_kernel(
    tier_ptr,  # [B, N] contiguous, packed: [T]; likewise the rest
    sums_ptr,  # [B, N] contiguous
    sbar_ptr,  # [B]
    N, packed,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first = tokens_before(packed, at_b, N)
    total = tl.zeros([1, BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs = start + tl.arange(0, BLOCK)
        total -= tl.load(sums_ptr + first + offs, mask=offs < N, other=0.0)[None, :]
        count += (tl.load(tier_ptr + first + offs, mask=offs < N, other=2) == 0).to(tl.int32)
        start += BLOCK
    pairs = tl.maximum(tl.sum(count, axis=0), 1).to(tl.float64)
    mean = tl.sum(sum_in_pairs(total), axis=0) / (pairs * pairs)
    tl.store(sbar_ptr + pid_b, tl.minimum(mean, FLOAT32_MAX).to(tl.float32))


def launch_distances(keys, scores, mask, s, sbar, g, tier, nearest, packed=None) -> None:
    """All of it, into s [B, N, N], sbar [B], g, tier and nearest [B, N]; packed: s [T, max_seqlen], and [T]."""
    b, n, dk = keys.shape if packed is None else (packed.num_segments, packed.max_seqlen, keys.shape[1])
    if b == 0:
        return
    config = DistanceConfig.for_shape()
    tops, sums = new(s, g.shape, torch.int32), new(s, g.shape, torch.float64)

    def programs(block: int) -> int:
        return b * triton.cdiv(n, block) if packed is None else packed.num_slots(block)

    blocks = triton.cdiv(n, config.block)
    tiles = blocks * (blocks + 1) // 2
    launch(
        magnitudes_kernel, (programs(config.block),),
        keys, keys if scores is None else scores, keys if mask is None else mask, tier, tops,
        *strides_of(keys, 3), *strides_of(scores, 2), *strides_of(mask, 2), n, blocks, dk, packed,
        DK=dk, BLOCK=config.block, BLOCK_D=32, HAS_SCORES=scores is not None, HAS_MASK=mask is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    launch(
        distance_tile_kernel, (b * tiles,) if packed is None else (programs(config.block), blocks // 2 + 1),
        keys, tier, tops, s, *strides_of(keys, 3), n, s.shape[-1], blocks, tiles, dk, packed,
        DK=dk, BLOCK=config.block, BLOCK_D=config.block_d, BLOCK_TOPS=256,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    launch(
        distance_rows_kernel, (programs(config.block_rows),), s, tier, g, sums, nearest, n, s.shape[-1],
        triton.cdiv(n, config.block_rows), packed,
        BLOCK=config.block_rows, BLOCK_J=config.block_columns, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    launch(distance_mean_kernel, (b,), tier, sums, sbar, n, packed, BLOCK=256, num_warps=4, enable_fp_fusion=False)
