"""Cosine similarity of all token pairs on tensor cores, one program per tile of the upper triangle."""

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    FLOAT32_MAX,
    INTERPRETED,
    first_block_of,
    first_of_group,
    has_block,
    image_of_block,
    image_tokens,
    stored_at,
    tokens_before,
)
from ..._triton.launcher import VARYING, Packed, launch, new, on_device_of, reject_float64, strides_of, zero
from ..._triton.tables import SimilarityConfig
from .cosine import can_overflow, cosine_tile, key_factors, token_tier
from .unit_sum import launch_global_similarity

FIXED_POINT = tl.constexpr(16777216.0)  # 2**24: cosines are summed as integers, so that the order is free
TOGETHER = tl.constexpr(8)  # blocks of columns whose sums are loaded at once


@triton.jit
def tile_of(pid, num_blocks):
    """(i, j) with i <= j: rows i and num_blocks - 1 - i of the triangle fill one row of a rectangle together."""
    row = pid // (num_blocks + 1)
    column = pid % (num_blocks + 1)
    folded = column >= num_blocks - row
    return tl.where(folded, num_blocks - 1 - row, row), tl.where(folded, column - 1, row + column)


@triton.jit
def blocks_of_image(packed, N, num_blocks, BLOCK: tl.constexpr):
    """How many blocks of tokens an image has. Packed: num_blocks are those of the longest."""
    return num_blocks if packed is None else tl.cdiv(N, BLOCK)


@triton.jit
def tiles_of_image(packed, blocks, num_tiles):
    """How many tiles of the upper triangle an image of so many blocks has."""
    return num_tiles if packed is None else blocks * (blocks + 1) // 2


@triton.jit
def first_tile_of(packed, pid_b, num_blocks, num_tiles, BLOCK: tl.constexpr):
    """The number, among the tiles of all images, of an image's first. In a packed batch, as many are reserved for each
    block as the longest segment has for each of its own."""
    if packed is None:
        return pid_b * num_tiles
    else:
        return (first_block_of(packed, pid_b, num_blocks, BLOCK) - first_of_group(packed)) * (num_blocks // 2 + 1)


@triton.jit(do_not_specialize=VARYING)
def similarity_tile_kernel(
    keys_ptr,  # [B, N, Dk]
    scores_ptr,  # [B, N]
    mask_ptr,  # [B, N]
    tier_ptr,  # [B, N]; packed: [T], and likewise all that is written
    row_sums_ptr,  # [B, blocks, N] int32: sum of 2**24 s over the block's columns; not STORE: [B, N] int64, over all
    abs_sums_ptr,  # [B, tiles] int64: sum of 2**24 |s|, twice off the diagonal; not STORE: [B, blocks]; None: no sums
    s_ptr,  # STORE: [B, N, WIDTH], columns past N are zeros
    nearest_ptr,  # NEAREST: [B, blocks, N], the largest s to another token of the block that is in tier 0
    scale_ptr,  # not STORE: [B, N]
    inverse_ptr,  # not STORE: [B, N]
    stride_key_b, stride_key_n, stride_key_d,
    stride_score_b, stride_score_n,
    stride_mask_b, stride_mask_n,
    N, WIDTH, num_blocks, num_tiles, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_MASK: tl.constexpr, CAN_OVERFLOW: tl.constexpr, STORE: tl.constexpr,
    NEAREST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if packed is None:
        pid_b = (pid // num_tiles).to(tl.int64)
        pid_tile = pid % num_tiles
    else:
        pid_b, block = image_of_block(packed, pid, num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    blocks = blocks_of_image(packed, N, num_blocks, BLOCK)
    stored = stored_at(packed, pid_b, at_b)
    if packed is not None:  # a program of each block takes every blocks-th tile, from that of its number on
        pid_tile = tl.program_id(1) * blocks + block
        exists = (pid_tile < tiles_of_image(packed, blocks, num_tiles)) & has_block(packed, N, block, BLOCK)
        if (exists == 0) | (stored < 0):
            return
    pid_i, pid_j = tile_of(pid_tile, blocks)
    keys_ptr += at_b * stride_key_b
    scores_ptr += at_b * stride_score_b
    mask_ptr += at_b * stride_mask_b

    # Not the constant when compiled: the compiler would unroll every loop over the channels, all the way.
    channels = DK if INTERPRETED else num_channels

    # One piece of code for columns, then rows: a token has the same factor in every tile, to the bit.
    block = pid_j
    tier_i = tl.zeros([BLOCK], tl.int32)
    tier_j = tl.zeros([BLOCK], tl.int32)
    scale_i = tl.zeros([BLOCK], tl.float32)
    scale_j = tl.zeros([BLOCK], tl.float32)
    inverse_i = tl.zeros([BLOCK], tl.float32)
    inverse_j = tl.zeros([BLOCK], tl.float32)
    for _ in range(2):
        tier_j, scale_j, inverse_j = tier_i, scale_i, inverse_i
        offs_n = block * BLOCK + tl.arange(0, BLOCK)
        rows = tl.minimum(offs_n, N - 1).to(tl.int64)  # a row past the end repeats the last one and is dropped below
        finite, scale_i, inverse_i = key_factors(
            keys_ptr, rows, stride_key_n, stride_key_d, channels, DK, BLOCK, BLOCK_D, STAGES, CAN_OVERFLOW
        )
        tier_i = token_tier(
            scores_ptr, mask_ptr, offs_n, finite, stride_score_n, stride_mask_n, N, HAS_SCORES, HAS_MASK
        )
        block = pid_i

    offs_i = pid_i * BLOCK + tl.arange(0, BLOCK)
    offs_j = pid_j * BLOCK + tl.arange(0, BLOCK)
    rows_i = tl.minimum(offs_i, N - 1).to(tl.int64)
    rows_j = tl.minimum(offs_j, N - 1).to(tl.int64)
    s = cosine_tile(
        keys_ptr, rows_i, rows_j, scale_i, scale_j, inverse_i, inverse_j, stride_key_n, stride_key_d, channels,
        DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
    )  # fmt: skip
    s = tl.where((tier_i == 0)[:, None] & (tier_j == 0)[None, :], s, 0.0)

    fixed = (s * FIXED_POINT).to(tl.int32)
    abs_sum = tl.sum(tl.sum(tl.abs(fixed), axis=1).to(tl.int64), axis=0)
    apart = pid_i != pid_j  # off the diagonal: the tile stands for its mirror image, too
    if apart:
        abs_sum *= 2
    offs_i64 = offs_i.to(tl.int64)
    offs_j64 = offs_j.to(tl.int64)
    first = tokens_before(packed, at_b, N)
    if STORE:
        rows_before = tokens_before(packed, stored, N)
        s_ptr += rows_before * WIDTH
        if row_sums_ptr is not None:
            row_sums_ptr += rows_before * num_blocks
        mask = (offs_i < N)[:, None] & (offs_j < WIDTH)[None, :]
        tl.store(s_ptr + offs_i64[:, None] * WIDTH + offs_j64[None, :], s, mask=mask)
        if row_sums_ptr is not None:
            tl.store(row_sums_ptr + pid_j.to(tl.int64) * N + offs_i64, tl.sum(fixed, axis=1), mask=offs_i < N)
        if apart:
            mask = (offs_j < N)[:, None] & (offs_i < WIDTH)[None, :]
            tl.store(s_ptr + offs_j64[:, None] * WIDTH + offs_i64[None, :], tl.trans(s), mask=mask)
            if row_sums_ptr is not None:
                tl.store(row_sums_ptr + pid_i.to(tl.int64) * N + offs_j64, tl.sum(fixed, axis=0), mask=offs_j < N)
        if abs_sums_ptr is not None:
            tl.store(abs_sums_ptr + first_tile_of(packed, pid_b, num_blocks, num_tiles, BLOCK) + pid_tile, abs_sum)
        if NEAREST:
            nearest_ptr += rows_before * num_blocks
            others = (tier_i == 0)[:, None] & (tier_j == 0)[None, :] & (offs_i[:, None] != offs_j[None, :])
            near = tl.where(others, s, float("-inf"))
            tl.store(nearest_ptr + pid_j.to(tl.int64) * N + offs_i64, tl.max(near, axis=1), mask=offs_i < N)
            if apart:
                tl.store(nearest_ptr + pid_i.to(tl.int64) * N + offs_j64, tl.max(near, axis=0), mask=offs_j < N)
    else:  # the sums of all tiles in place: integers, so in any order; [blocks, N] of them would be N * N / 64 again
        row_sums_ptr += first
        tl.atomic_add(row_sums_ptr + offs_i64, tl.sum(fixed, axis=1).to(tl.int64), mask=offs_i < N, sem="relaxed")
        if apart:
            tl.atomic_add(row_sums_ptr + offs_j64, tl.sum(fixed, axis=0).to(tl.int64), mask=offs_j < N, sem="relaxed")
        first_block = first_block_of(packed, pid_b, num_blocks, BLOCK)
        tl.atomic_add(abs_sums_ptr + first_block + pid_i, abs_sum, sem="relaxed")
    if pid_i == pid_j:
        tl.store(tier_ptr + first + offs_i64, tier_i.to(tier_ptr.dtype.element_ty), mask=offs_i < N)
        if not STORE:
            tl.store(scale_ptr + first + offs_i64, scale_i, mask=offs_i < N)
            tl.store(inverse_ptr + first + offs_i64, inverse_i, mask=offs_i < N)


@triton.jit
def global_similarity(row_sums_ptr, offs_n, mask_n, N, num_blocks):
    """g of one image (Eq. 3), rounded once: the sum is an integer and the factor a power of two."""
    total = tl.zeros(offs_n.shape, tl.int64)
    block = tl.zeros([], tl.int64)
    while block < num_blocks:
        for i in tl.static_range(TOGETHER):
            there = tl.where(block + i < num_blocks, mask_n, False)
            total += tl.load(row_sums_ptr + (block + i) * N + offs_n, mask=there, other=0)
        block += TOGETHER
    return total.to(tl.float32) * (1.0 / FIXED_POINT)


@triton.jit
def mean_similarity(abs_sums_ptr, count, num_tiles, BLOCK: tl.constexpr):
    """sbar of one image, E[|S|] of Eq. 2 and 4; count is the number of tokens in tier 0."""
    total = tl.zeros([BLOCK], tl.int64)
    start = tl.zeros([], tl.int32)
    while start < num_tiles:
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(abs_sums_ptr + offs, mask=offs < num_tiles, other=0)
        start += BLOCK
    pairs = tl.maximum(count, 1).to(tl.float64)
    return (tl.sum(total, axis=0).to(tl.float64) * (1.0 / FIXED_POINT) / (pairs * pairs)).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def similarity_means_kernel(
    tier_ptr,  # [B, N], packed: [T]; likewise the rest
    row_sums_ptr,  # [B, blocks, N]
    abs_sums_ptr,  # [B, tiles]
    g_ptr,  # [B, N]
    sbar_ptr,  # [B]
    parts_ptr,  # NEAREST: [B, blocks, N]
    nearest_ptr,  # NEAREST: [B, N]
    N, num_blocks, num_tiles, num_parts, packed,
    BLOCK: tl.constexpr, TILE: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    pid_b, pid_n = image_of_block(packed, tl.program_id(0), num_parts, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, pid_n, BLOCK) == 0:
        return
    first = tokens_before(packed, at_b, N)
    blocks = blocks_of_image(packed, N, num_blocks, TILE)
    offs_n = pid_n * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    g = global_similarity(row_sums_ptr + first * num_blocks, offs_n, mask_n, N, blocks)
    tl.store(g_ptr + first + offs_n, g, mask=mask_n)
    if NEAREST:
        most = tl.full([BLOCK], -FLOAT32_MAX, tl.float32)
        block = tl.zeros([], tl.int64)
        while block < blocks:
            part = tl.load(parts_ptr + first * num_blocks + block * N + offs_n, mask=mask_n, other=float("-inf"))
            most = tl.maximum(most, part)
            block += 1
        tl.store(nearest_ptr + first + offs_n, most + 0.0, mask=mask_n)  # not -0, of which a maximum may take any
    if pid_n == 0:
        count = tl.zeros([BLOCK], tl.int32)
        start = tl.zeros([], tl.int32)
        while start < N:
            offs = start + tl.arange(0, BLOCK)
            count += (tl.load(tier_ptr + first + offs, mask=offs < N, other=2) == 0).to(tl.int32)
            start += BLOCK
        num_valid = tl.sum(count, axis=0)
        tiles = tiles_of_image(packed, blocks, num_tiles)
        abs_sums_ptr += first_tile_of(packed, pid_b, num_blocks, num_tiles, TILE)
        tl.store(sbar_ptr + pid_b, mean_similarity(abs_sums_ptr, num_valid, tiles, BLOCK))


def num_blocks_of(n: int) -> tuple[int, int]:
    """Blocks of tokens, and tiles of the upper triangle."""
    blocks = triton.cdiv(n, SimilarityConfig.block)
    return blocks, blocks * (blocks + 1) // 2


def launch_tiles(
    keys, scores, mask, tier, row_sums, abs_sums, s=None, scale=None, inverse=None, packed=None, nearest=None
):
    """The tile kernel alone. Without s [B, N, >= N] to write to, it writes scale and inverse [B, N], from which any
    cosine can be computed again. Packed: [T, >= max_seqlen] and [T]. With s, the sums may be left out: None."""
    b, n, dk = keys.shape if packed is None else (1, packed.max_seqlen, keys.shape[1])
    config = SimilarityConfig.for_shape(keys.dtype)
    blocks, tiles = num_blocks_of(n)
    grid = (b * tiles,) if packed is None else (packed.num_slots(config.block), blocks // 2 + 1)
    if s is None:
        zero(row_sums)
        zero(abs_sums)
    if b > 0:
        launch(
            similarity_tile_kernel, grid,
            keys, keys if scores is None else scores, keys if mask is None else mask, tier, row_sums, abs_sums,
            tier if s is None else s, tier if nearest is None else nearest,
            tier if scale is None else scale, tier if inverse is None else inverse,
            *strides_of(keys, 3), *strides_of(scores, 2), *strides_of(mask, 2),
            n, n if s is None else s.shape[-1], blocks, tiles, dk, packed,
            DK=dk, BLOCK=config.block, BLOCK_D=config.block_d, STAGES=config.num_stages,
            HAS_SCORES=scores is not None, HAS_MASK=mask is not None,
            CAN_OVERFLOW=can_overflow(keys), STORE=s is not None, NEAREST=nearest is not None, INTERPRETED=INTERPRETED,
            num_warps=config.num_warps, num_stages=config.num_stages,
            enable_fp_fusion=False,  # the dot of fp32 keys and tl.fma are fused all the same
        )  # fmt: skip


def launch_means(tier, row_sums, abs_sums, g, sbar, parts=None, nearest=None, packed=None) -> None:
    """sbar, g and, of its parts, nearest, from what launch_tiles has written."""
    n = tier.shape[-1] if packed is None else packed.max_seqlen
    blocks, tiles = num_blocks_of(n)
    block = 256 if packed is None else 64  # a part of a segment is numbered as its blocks are
    num_parts = triton.cdiv(n, block)
    programs = sbar.shape[0] * num_parts if packed is None else packed.num_slots(block)
    if sbar.shape[0] > 0:
        launch(
            similarity_means_kernel, (programs,),
            tier, row_sums, abs_sums, g, sbar, g if parts is None else parts, g if nearest is None else nearest,
            n, blocks, tiles, num_parts, packed,
            BLOCK=block, TILE=SimilarityConfig.block, NEAREST=nearest is not None, enable_fp_fusion=False,
        )  # fmt: skip


def cosines(keys, scores, mask, with_nearest: bool) -> tuple[torch.Tensor, ...]:
    b, n, _ = keys.shape
    with on_device_of(keys):
        blocks, tiles = num_blocks_of(n)
        s = new(keys, (b, n, n), torch.float32)
        tier = new(keys, (b, n), torch.int8)
        row_sums = new(keys, (b, blocks, n), torch.int32)
        abs_sums = new(keys, (b, tiles), torch.int64)
        parts = new(s, (b, blocks, n)) if with_nearest else None
        launch_tiles(keys, scores, mask, tier, row_sums, abs_sums, s, nearest=parts)
        g, sbar = new(s, (b, n)), new(s, (b,))
        nearest = new(s, (b, n)) if with_nearest else None
        launch_means(tier, row_sums, abs_sums, g, sbar, parts, nearest)
    return (s, sbar, g, tier) if nearest is None else (s, sbar, g, tier, nearest)


def similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N]
) -> tuple[torch.Tensor, ...]:
    """Return s [B, N, N], sbar [B], g [B, N], tier [B, N] int8."""
    reject_float64(keys=keys, scores=scores)
    return cosines(keys, scores, mask, False)


def global_similarity_of(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g [B, N], tier [B, N] int8."""
    reject_float64(keys=keys, scores=scores)
    b, n, dk = keys.shape
    with on_device_of(keys):
        sums = new(keys, (b, dk), torch.int64)
        tier = new(keys, (b, n), torch.int8)
        g = new(keys, (b, n), torch.float32)
        scale, inverse = new(g, (b, n)), new(g, (b, n))
        launch_global_similarity(keys, scores, mask, tier, scale, inverse, sums, g)
    return g, tier


def similarity_and_nearest(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N]
    *,
    metric: str = "cosine",
) -> tuple[torch.Tensor, ...]:
    """Return s [B, N, N], sbar [B], g [B, N], tier [B, N] int8, nearest [B, N]."""
    from .distance import launch_distances

    reject_float64(keys=keys, scores=scores)
    if metric == "cosine":
        return cosines(keys, scores, mask, True)
    b, n, _ = keys.shape
    s = new(keys, (b, n, n), torch.float32)
    sbar, g, nearest = new(s, (b,)), new(s, (b, n)), new(s, (b, n))
    tier = new(keys, (b, n), torch.int8)
    with on_device_of(keys):
        launch_distances(keys, scores, mask, s, sbar, g, tier, nearest)
    return s, sbar, g, tier, nearest


def similarity_varlen(
    keys: torch.Tensor,  # [T, Dk]
    cu_seqlens: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    scores: torch.Tensor | None = None,  # [T]
    mask: torch.Tensor | None = None,  # [T]
    metric: str = "cosine",
) -> tuple[torch.Tensor, ...]:
    """Return s [T, max_seqlen], sbar [S], g [T], tier [T] int8, nearest [T]."""
    from .distance import launch_distances

    reject_float64(keys=keys, scores=scores)
    tokens, segments = keys.shape[0], cu_seqlens.shape[0] - 1
    s = new(keys, (tokens, max_seqlen), torch.float32, fill=0)
    sbar, g = new(s, (segments,), fill=0), new(s, (tokens,), fill=0)
    tier = new(keys, (tokens,), torch.int8, fill=2)
    nearest = new(s, (tokens,), fill=-FLOAT32_MAX.value)
    if segments > 0 and s.numel() > 0:
        packed = Packed.kept(cu_seqlens, None, tokens, 0, min(max_seqlen, tokens))
        with on_device_of(keys):
            if metric == "cosine":
                blocks, _ = num_blocks_of(packed.max_seqlen)
                row_sums = new(s, (tokens, blocks), torch.int32)
                abs_sums = new(s, (packed.num_slots(SimilarityConfig.block), blocks // 2 + 1), torch.int64)
                parts = new(s, (tokens, blocks))
                launch_tiles(keys, scores, mask, tier, row_sums, abs_sums, s, packed=packed, nearest=parts)
                launch_means(tier, row_sums, abs_sums, g, sbar, parts, nearest, packed)
            else:
                launch_distances(keys, scores, mask, s, sbar, g, tier, nearest, packed)
    return s, sbar, g, tier, nearest
