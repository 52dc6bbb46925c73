"""Greedy facility location in two launches: all first gains, on all of the GPU; then the picks, one program an image.

Lazy, and exact, as csrc/coverage_select_cpu.cpp says. The first launch leaves a transposed copy of c behind, in which
the column that a gain is computed from lies in one piece.
"""

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    FLOAT32_MAX,
    NOWHERE,
    has_block,
    image_of_block,
    image_rows,
    image_tokens,
    is_finite,
    sum_in_pairs,
)
from ..._triton.launcher import VARYING, Packed, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MAX_STORED, CoverageConfig

LANES = tl.constexpr(128)  # partial sums of a gain, as in the reference


@triton.jit
def score_of(gain, weight_ptr, offset, mask, HAS_WEIGHT: tl.constexpr, MULTIPLIED: tl.constexpr):
    score = tl.minimum(gain, FLOAT32_MAX)  # 0 times infinity would be no score
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        w = tl.where(w != w, -FLOAT32_MAX, tl.minimum(tl.maximum(w, -FLOAT32_MAX), FLOAT32_MAX))
        score = score * tl.maximum(w, 0.0) if MULTIPLIED else score + w
    return score


@triton.jit(do_not_specialize=VARYING)
def first_gains_kernel(
    c_ptr,  # [B, M, N], packed: [T, max_seqlen]
    weight_ptr,  # [B, N]
    columns_ptr,  # [B, N, WIDTH], packed: [T, WIDTH]; contiguous
    scores_ptr,  # [B, N] contiguous
    stride_c_b, stride_c_m, stride_c_n, stride_weight_b, stride_weight_n,
    M, N, WIDTH, num_blocks, packed,
    BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr, MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N tokens: their columns of c, and what each alone would cover."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK_N)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK_N) == 0:
        return
    first = at_b * N
    if packed is not None:
        M = N
        first = at_b
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lanes = tl.arange(0, LANES)
    c_ptr += at_b * stride_c_b
    columns = columns_ptr + (first + offs_n) * WIDTH
    gains = tl.zeros([LANES, BLOCK_N], tl.float32)
    start = tl.zeros([], tl.int64)
    while start < M:
        offs_m = start + lanes
        at = offs_m[:, None] * stride_c_m + offs_n[None, :].to(tl.int64) * stride_c_n
        x = tl.load(c_ptr + at, mask=(offs_m < M)[:, None] & mask_n[None, :], other=0.0)
        x = tl.where(is_finite(x), x, 0.0)
        tl.store(columns[None, :] + offs_m[:, None], x, mask=mask_n[None, :])
        gains += tl.maximum(x, 0.0)
        start += LANES
    score = score_of(
        sum_in_pairs(tl.trans(gains)), weight_ptr + at_b * stride_weight_b, offs_n.to(tl.int64) * stride_weight_n,
        mask_n, HAS_WEIGHT, MULTIPLIED,
    )  # fmt: skip
    tl.store(scores_ptr + first + offs_n, score, mask=mask_n)


@triton.jit
def gain_of(column, covered, M, ROWS: tl.constexpr):
    """The sum over M rows of max(0, column - covered), each lane in the order of its rows. ROWS loads are in flight."""
    lanes = tl.arange(0, LANES)
    gain = tl.zeros([LANES], tl.float32)
    start = tl.zeros([], tl.int32)
    while start < M:
        for row in tl.static_range(ROWS):
            offs = start + row * LANES + lanes
            more = tl.load(column + offs, mask=offs < M, other=0.0) - tl.load(covered + offs, mask=offs < M, other=0.0)
            gain += tl.maximum(more, 0.0)
        start += ROWS * LANES
    return tl.sum(sum_in_pairs(tl.reshape(gain, [1, LANES])), axis=0)


@triton.jit
def cover(column, covered, M, BLOCK: tl.constexpr):
    start = tl.zeros([], tl.int32)
    while start < M:
        offs = start + tl.arange(0, BLOCK)
        mask = offs < M
        most = tl.maximum(tl.load(column + offs, mask=mask), tl.load(covered + offs, mask=mask))
        tl.store(covered + offs, most, mask=mask)
        start += BLOCK
    tl.debug_barrier()  # before other threads read it


@triton.jit(do_not_specialize=VARYING)
def coverage_select_kernel(
    columns_ptr,  # [B, N, WIDTH], packed: [T, WIDTH]; contiguous
    scores_ptr,  # [B, N] contiguous
    weight_ptr,  # [B, N]
    candidates_ptr,  # [B, N]
    covered_ptr,  # [B, WIDTH] contiguous, zeros
    order_ptr,  # [B, K], packed: [total_keep]; contiguous
    stride_weight_b, stride_weight_n, stride_candidate_b, stride_candidate_n,
    M, N, K, WIDTH, packed,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, MULTIPLIED: tl.constexpr, HAS_CANDIDATES: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first = at_b * N
    if packed is not None:
        M = N
        first = at_b
    row, due, _anchors = image_rows(packed, pid_b, N, K, 0)
    order_ptr += row
    covered = covered_ptr + pid_b * WIDTH
    offs = tl.arange(0, BLOCK_N)
    score = tl.load(scores_ptr + first + offs, mask=offs < N, other=float("-inf"))
    if HAS_CANDIDATES:
        candidates_ptr += at_b * stride_candidate_b
        allowed = tl.load(candidates_ptr + offs.to(tl.int64) * stride_candidate_n, mask=offs < N, other=0)
        score = tl.where(allowed != 0, score, float("-inf"))
    due = tl.minimum(due, tl.sum((score > float("-inf")).to(tl.int32), axis=0))
    weight_ptr += at_b * stride_weight_b
    computed = tl.zeros([BLOCK_N], tl.int32)  # after how many picks
    picks = tl.zeros([], tl.int32)
    while picks < due:
        best = tl.max(score, axis=0)
        token = tl.min(tl.where(score == best, offs, NOWHERE), axis=0)
        is_best = offs == token
        column = columns_ptr + (first + token) * WIDTH
        if tl.sum(tl.where(is_best, computed, 0), axis=0) == picks:
            tl.store(order_ptr + picks, token.to(tl.int64))
            cover(column, covered, M, LANES)
            score = tl.where(is_best, float("-inf"), score)
            picks += 1
        else:
            fresh = score_of(
                gain_of(column, covered, M, ROWS), weight_ptr, token.to(tl.int64) * stride_weight_n,
                token < N, HAS_WEIGHT, MULTIPLIED,
            )  # fmt: skip
            score = tl.where(is_best, fresh, score)
            computed = tl.where(is_best, picks, computed)


def launch_picks(c, weight, combine, candidates, order, rows, strides, packed) -> None:
    """Both launches, into order, which is -1 everywhere. rows and strides are those of c [B, M, N]."""
    images, n = (order.shape[0], c.shape[2]) if packed is None else (packed.num_segments, packed.max_seqlen)
    if n > MAX_STORED:
        raise ValueError(
            f"N: expected at most {MAX_STORED} tokens an image in the Triton coverage_select, got {n}. "
            "Remedy: CPU tensors, or windows of the image."
        )
    num_tokens = images * n if packed is None else packed.num_tokens
    config = CoverageConfig.for_shape(n)
    width = -(-rows // LANES.value) * LANES.value
    columns = new(c, (num_tokens, width), torch.float32)
    scores = new(c, (num_tokens,), torch.float32)
    covered = new(c, (images, width), torch.float32, fill=0)
    blocks = triton.cdiv(n, config.block_gains)
    flags = {"HAS_WEIGHT": weight is not None, "MULTIPLIED": combine == "mul"}
    with on_device_of(c):
        launch(
            first_gains_kernel, (images * blocks if packed is None else packed.num_slots(config.block_gains),),
            c, c if weight is None else weight, columns, scores, *strides, *strides_of(weight, 2),
            rows, n, width, blocks, packed,
            BLOCK_N=config.block_gains, **flags, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        launch(
            coverage_select_kernel, (images,),
            columns, scores, c if weight is None else weight, c if candidates is None else candidates, covered, order,
            *strides_of(weight, 2), *strides_of(candidates, 2), rows, n, order.shape[-1], width, packed,
            BLOCK_N=config.block_n, ROWS=config.rows, **flags, HAS_CANDIDATES=candidates is not None,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def coverage_select(
    c: torch.Tensor,  # [B, M, N]
    k: int,
    *,
    weight: torch.Tensor | None = None,  # [B, N]
    combine: str = "mul",
    candidates: torch.Tensor | None = None,  # [B, N]
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    reject_float64(c=c, weight=weight)
    order = new(c, (c.shape[0], k), torch.int64, fill=-1)
    if order.numel() > 0:
        launch_picks(c, weight, combine, candidates, order, c.shape[1], c.stride(), None)
    return order


def coverage_select_varlen(
    c: torch.Tensor,  # [T, max_seqlen]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    weight: torch.Tensor | None = None,  # [T]
    combine: str = "mul",
    candidates: torch.Tensor | None = None,  # [T]
) -> torch.Tensor:
    """Return order [total_keep] int64, within each segment."""
    reject_float64(c=c, weight=weight)
    num_tokens = c.shape[0]
    max_seqlen = min(max_seqlen, num_tokens)
    order = new(c, (total_keep,), torch.int64, fill=-1)
    if cu_seqlens.shape[0] > 1 and total_keep > 0 and max_seqlen > 0:
        packed = Packed.kept(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen)
        launch_picks(c, weight, combine, candidates, order, max_seqlen, (c.stride(0), *c.stride()), packed)
    return order
