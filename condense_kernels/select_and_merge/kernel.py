"""The flagship in four launches: similarity tiles, selection, assignment, merge; three where the selection assigns.

Device functions and rounding are those of the stages, so the result is their composition, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._triton import on_device_of, reject_float64
from ..assign.kernel import MASKED, NO_DISTANCE, Space, distance_frame, launch_assign, nearest_rows
from ..greedy_select.kernel import (
    DUPLICATE,
    SelectConfig,
    check_num_tokens,
    count_tokens,
    dead,
    died_of,
    negated,
    pick_greedily,
    ranks,
    scaled_prior,
    segments,
)
from ..merge.kernel import merge
from ..similarity.kernel import global_similarity, launch_tiles, mean_similarity


@dataclass(frozen=True)
class FusedConfig:
    select: SelectConfig
    width: int  # row length of s, padded so that every row starts and ends on 64 bytes
    # Assignment in the launch of the selection, or in one of its own? At N = 576, K = 64 the one warp of the selection
    # would issue some 65,000 instructions for it and spill registers (counted in sm_90 code, not timed), where a launch
    # spreads them.
    assign_in_select: bool = False
    block_n: int = 64
    block_k: int = 8

    @classmethod
    def for_shape(cls, n: int) -> "FusedConfig":
        width = triton.cdiv(n, 16) * 16
        return cls(SelectConfig.for_shape(width), width)


@triton.jit
def select_kernel(
    s_ptr,  # [B, N, WIDTH]
    scores_ptr,  # [B, N]
    tier_ptr,  # [B, N]
    row_sums_ptr,  # [B, blocks, N]
    abs_sums_ptr,  # [B, tiles]
    where_ptr,  # [N, P] or [B, N, P]
    indices_ptr,  # [B, K]
    assignment_ptr,  # [B, N]
    suppression, spatial_weight,
    stride_score_b, stride_score_n,
    stride_where_b, stride_where_n, stride_where_p,
    N, WIDTH, K, num_anchors, num_blocks, num_tiles, HEIGHT, GRID_WIDTH,
    P: tl.constexpr, AXES: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_BOX: tl.constexpr,
    MODE: tl.constexpr, ASSIGN: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    s_ptr += pid_b * N * WIDTH
    scores_ptr += pid_b * stride_score_b
    tier_ptr += pid_b * N
    row_sums_ptr += pid_b * num_blocks * N
    indices_ptr += pid_b * K
    offs0, offs1, new1 = segments(WIDTH, N0, N1)
    mask0 = offs0 < N
    mask1 = (offs1 < N) & new1
    tier0 = tl.load(tier_ptr + offs0, mask=mask0, other=DUPLICATE)
    tier1 = tl.load(tier_ptr + offs1, mask=mask1, other=DUPLICATE)
    num_valid = count_tokens(tier0 == 0, tier1 == 0)
    sbar = mean_similarity(abs_sums_ptr + pid_b * num_tiles, num_valid, num_tiles, 256)

    # Anchors (Eq. 2)
    u0 = tl.load(scores_ptr + offs0.to(tl.int64) * stride_score_n, mask=mask0, other=0.0).to(tl.float32)
    u1 = tl.load(scores_ptr + offs1.to(tl.int64) * stride_score_n, mask=mask1, other=0.0).to(tl.float32)
    u0, u1 = scaled_prior(u0, u1, tier0 == 0, tier1 == 0, sbar)
    nu0 = tl.where(tier0 == 0, negated(u0), dead(tier0))
    nu1 = tl.where(tier1 == 0, negated(u1), dead(tier1))
    anchors = tl.minimum(num_anchors, num_valid)
    nu0, nu1 = pick_greedily(s_ptr, indices_ptr, nu0, nu1, offs0, offs1, anchors, suppression, WIDTH, 1, False, False)

    # Background (Eq. 3, 4): the anchors are dead, but count in the mean.
    g0 = global_similarity(row_sums_ptr, offs0, mask0, N, num_blocks)
    g1 = global_similarity(row_sums_ptr, offs1, mask1, N, num_blocks)
    valid0 = (nu0 == nu0) | died_of(nu0, 0)
    valid1 = (nu1 == nu1) | (died_of(nu1, 0) & new1)
    v0, v1 = scaled_prior(g0, g1, valid0, valid1, sbar)
    nu0 = tl.where(nu0 == nu0, negated(v0), nu0)
    nu1 = tl.where(nu1 == nu1, negated(v1), nu1)
    background = tl.minimum(K - num_anchors, num_valid - anchors)
    nu0, nu1 = pick_greedily(
        s_ptr, indices_ptr, nu0, nu1, offs0, offs1, background, suppression, WIDTH, 1, False, False
    )

    # The kept tokens, ascending. K are due even where fewer are valid: then tier 1 by index, then tier 2.
    kept0 = died_of(nu0, 0)
    kept1 = died_of(nu1, 0) & new1  # a pick from the overlap died in both segments
    missing = K - anchors - background
    if missing > 0:
        rank0, rank1 = ranks(died_of(nu0, 1), died_of(nu1, 1))
        kept0 = kept0 | (died_of(nu0, 1) & (rank0 < missing))
        kept1 = kept1 | (died_of(nu1, 1) & (rank1 < missing))
        missing -= count_tokens(died_of(nu0, 1), died_of(nu1, 1))
        rank0, rank1 = ranks(died_of(nu0, 2), died_of(nu1, 2))
        kept0 = kept0 | (died_of(nu0, 2) & (rank0 < missing))
        kept1 = kept1 | (died_of(nu1, 2) & (rank1 < missing))
    row0, row1 = ranks(kept0, kept1)
    tl.store(indices_ptr + row0, offs0.to(tl.int64), mask=kept0)
    tl.store(indices_ptr + row1, offs1.to(tl.int64), mask=kept1)

    if ASSIGN:
        tl.debug_barrier()  # the indices are read back by other threads
        assignment_ptr += pid_b * N
        where_ptr += pid_b * stride_where_b
        origin, shrink, shrink_again, factor = tl.zeros([AXES], tl.float64), 1.0, 1.0, 0.0
        if MODE != NO_DISTANCE:
            origin, shrink, shrink_again, factor = distance_frame(
                where_ptr, tier_ptr, spatial_weight, stride_where_n, stride_where_p, 1, N, HEIGHT, GRID_WIDTH,
                P, AXES, BLOCK_BOX, MODE, True,
            )  # fmt: skip
        start = tl.zeros([], tl.int32)
        while start < N:
            offs_n = start + tl.arange(0, BLOCK_N)
            row = nearest_rows(
                s_ptr, indices_ptr, tier_ptr, where_ptr, offs_n, origin, shrink, shrink_again, factor,
                WIDTH, 1, 1, 1, stride_where_n, stride_where_p, N, K, HEIGHT, GRID_WIDTH,
                P, AXES, BLOCK_N, BLOCK_K, MODE, True, False,
            )  # fmt: skip
            tier = tl.load(tier_ptr + offs_n, mask=offs_n < N, other=MASKED)
            tl.store(assignment_ptr + offs_n, tl.where(tier != MASKED, row, -1).to(tl.int64), mask=offs_n < N)
            start += BLOCK_N


def select_and_merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    num_anchors: int,
    num_background: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    grid: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    mask: torch.Tensor | None = None,  # [B, N] bool
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D], indices [B, K], assignment [B, N], mass [B, K]."""
    reject_float64(features=features, scores=scores, keys=keys)
    b, n, _ = features.shape
    check_num_tokens(n)
    k = num_anchors + num_background
    config = FusedConfig.for_shape(n)
    space = Space.of(grid, positions, spatial_weight)
    axes = triton.next_power_of_2(space.axes)
    with on_device_of(features):
        s, tier, row_sums, abs_sums = launch_tiles(
            features if keys is None else keys, scores, mask, config.width, torch.int32
        )
        indices = features.new_empty((b, k), dtype=torch.int64)
        assignment = features.new_empty((b, n), dtype=torch.int64)
        if b > 0:
            select_kernel[(b,)](
                s, scores, tier, row_sums, abs_sums, s if space.tensor is None else space.tensor, indices, assignment,
                float(suppression), float(spatial_weight), *scores.stride(), *space.strides,
                n, config.width, k, num_anchors, row_sums.shape[1], abs_sums.shape[1], space.height, space.width,
                P=space.axes, AXES=axes, N0=config.select.n0, N1=config.select.n1,
                BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_BOX=max(1024 // axes, 1),
                MODE=space.mode, ASSIGN=config.assign_in_select,
                num_warps=config.select.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
        if not config.assign_in_select:
            assignment = launch_assign(s, indices, tier, space, spatial_weight, False)
        merged, mass = merge(features, scores, indices, assignment)
    return merged, indices, assignment, mass
