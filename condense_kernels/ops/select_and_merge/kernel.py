"""The flagship: similarity tiles, selection, assignment, merge. Four launches up to MAX_STORED tokens an image.

Device functions and rounding are those of the stages, so the result is their composition, bit for bit. Beyond
MAX_STORED tokens s is never stored: streamed.py.
"""

# ruff: noqa: RUF005  (*chunks, x) is not in Triton's language

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..._triton.device import image_rows, image_tokens, stored_at, tokens_before
from ..._triton.launcher import VARYING, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import FusedConfig, SelectConfig, SimilarityConfig
from ..._triton.workspace import Pieces, bytes_of, carve
from ..assign.kernel import MASKED, NO_DISTANCE, Space, distance_frame, launch_assign, nearest_rows
from ..assign.streamed import launch_assign as assign_streamed
from ..greedy_select.loop import (
    chunk_starts,
    count_tiers,
    negated_utilities,
    pick_greedily,
    prior_scaling,
    token_chunks,
    write_kept,
)
from ..merge.kernel import launch_merge
from ..similarity.kernel import (
    blocks_of_image,
    first_tile_of,
    global_similarity,
    launch_tiles,
    mean_similarity,
    num_blocks_of,
    tiles_of_image,
)
from . import streamed
from .pipeline import suppressions_of

BLOCK_S = tl.constexpr(SimilarityConfig.block)  # tokens of a tile of s


@triton.jit
def write_priors(priors_ptr, scores_ptr, g_ptr, stride_score_n, N, num_blocks, WIDE: tl.constexpr):
    """What one image's tokens are picked by: the scores, for anchors, and behind them g (Eq. 3), for the background."""
    start = tl.zeros([], tl.int32)
    while start < N:
        tokens = start + tl.arange(0, WIDE)
        present = tokens < N
        score = tl.load(scores_ptr + tokens.to(tl.int64) * stride_score_n, mask=present, other=0.0)
        tl.store(priors_ptr + tokens, score.to(tl.float32), mask=present)
        if g_ptr.dtype.element_ty == tl.int32:
            g = global_similarity(g_ptr, tokens, present, N, num_blocks)
        else:
            g = tl.load(g_ptr + tokens, mask=present, other=0.0)
        tl.store(priors_ptr + N + tokens, g, mask=present)
        start += WIDE
    tl.debug_barrier()  # what a thread writes, others read


@triton.jit(do_not_specialize=VARYING)
def select_kernel(
    s_ptr,  # [B, N, WIDTH], packed: [T, WIDTH]; likewise the rest
    scores_ptr,  # [B, N]
    tier_ptr,  # [B, N]
    g_ptr,  # [B, N], or the int32 sums that it is made of, [B, blocks, N]
    abs_sums_ptr,  # [B, tiles]; None where priors are not scaled, or sbar is given
    sbar_ptr,  # [B] or None
    priors_ptr,  # [B, 2, N]: memory of this program
    where_ptr,  # [N, P] or [B, N, P]
    indices_ptr,  # [B, K]
    assignment_ptr,  # [B, N]
    suppression, background_suppression, spatial_weight,
    stride_score_b, stride_score_n, stride_sbar_b,
    stride_where_b, stride_where_n, stride_where_p,
    N, WIDTH, K, num_anchors, num_blocks, num_tiles, HEIGHT, GRID_WIDTH, LOW, packed,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
    P: tl.constexpr, AXES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_BOX: tl.constexpr,
    MODE: tl.constexpr, ASSIGN: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first_k, K, num_anchors = image_rows(packed, pid_b, N, K, num_anchors)
    stored = stored_at(packed, pid_b, at_b)
    if packed is not None:
        elsewhere = (N <= LOW) | (BLOCK * CHUNKS < N) | (stored < 0)  # of another size or group, so of another launch
        if elsewhere | (K == 0):
            return
    first = tokens_before(packed, at_b, N)
    rows_before = tokens_before(packed, stored, N)
    s_ptr += rows_before * WIDTH
    scores_ptr += at_b * stride_score_b
    tier_ptr += first
    g_ptr += rows_before * num_blocks if g_ptr.dtype.element_ty == tl.int32 else first
    first_tile = first_tile_of(packed, pid_b, num_blocks, num_tiles, BLOCK_S)
    num_blocks = blocks_of_image(packed, N, num_blocks, BLOCK_S)
    num_tiles = tiles_of_image(packed, num_blocks, num_tiles)
    indices_ptr += first_k
    priors_ptr += first * 2
    write_priors(priors_ptr, scores_ptr, g_ptr, stride_score_n, N, num_blocks, WIDE)
    num_valid, _counted = count_tiers(tier_ptr, 1, N, True, WIDE)
    sbar = tl.zeros([], tl.float32)
    if abs_sums_ptr is not None:
        sbar = mean_similarity(abs_sums_ptr + first_tile, num_valid, num_tiles, WIDE)
    if sbar_ptr is not None:
        sbar = tl.load(sbar_ptr + pid_b * stride_sbar_b).to(tl.float32)

    # Anchors (Eq. 2), then background tokens (Eq. 3, 4): the anchors are dead, but count in the mean.
    anchors = tl.minimum(num_anchors, num_valid)
    background = tl.minimum(K - num_anchors, num_valid - anchors)
    unscaled: tl.constexpr = abs_sums_ptr is None and sbar_ptr is None
    starts = chunk_starts(WIDTH, BLOCK, CHUNKS, CHUNKS)
    nu = ()
    for _ in tl.static_range(CHUNKS):
        nu = nu + (tl.zeros([BLOCK], tl.float32),)
    loop = tl.zeros([], tl.int32)
    while loop < 2:
        weight = tl.where(loop == 0, suppression, background_suppression)
        prior_ptr = priors_ptr + loop * N
        plain = tl.full([], True, tl.int1) if unscaled else weight == 0
        scaling = prior_scaling(prior_ptr, 1, tier_ptr, 1, num_valid, sbar, plain, N, True, WIDE)
        utilities = negated_utilities(prior_ptr, 1, tier_ptr, 1, starts, scaling, N, True, BLOCK)
        rest = ()
        for c in tl.static_range(CHUNKS):
            rest = rest + (tl.where(nu[c] == nu[c], utilities[c], nu[c]),)
        nu = pick_greedily(
            s_ptr, indices_ptr, rest, starts, tl.where(loop == 0, anchors, background), weight, WIDTH, 1, WIDTH,
            packed, N, BLOCK, WHOLE, AHEAD, False, False,
        )  # fmt: skip
        loop += 1
    offs = token_chunks(starts, BLOCK)
    tl.debug_barrier()  # other threads still read priors
    for c in tl.static_range(CHUNKS):
        tl.store(priors_ptr + offs[c], nu[c], mask=offs[c] < N)
    tl.debug_barrier()
    write_kept(priors_ptr, indices_ptr, anchors + background, K, N, WIDE)

    if ASSIGN:
        tl.debug_barrier()  # the indices are read back by other threads
        assignment_ptr += first
        where_ptr += at_b * stride_where_b
        origin, shrink_first, shrink, factor = tl.zeros([AXES], tl.float64), 1.0, 1.0, 0.0
        if MODE != NO_DISTANCE:
            origin, shrink_first, shrink, factor = distance_frame(
                where_ptr, tier_ptr, spatial_weight, stride_where_n, stride_where_p, 1, N, HEIGHT, GRID_WIDTH,
                P, AXES, BLOCK_BOX, MODE, True,
            )  # fmt: skip
        start = tl.zeros([], tl.int32)
        while start < N:
            offs_n = start + tl.arange(0, BLOCK_N)
            row = nearest_rows(
                s_ptr, indices_ptr, tier_ptr, where_ptr, offs_n, origin, shrink_first, shrink, factor,
                WIDTH, 1, 1, 1, stride_where_n, stride_where_p, N, K, HEIGHT, GRID_WIDTH,
                P, AXES, BLOCK_N, BLOCK_K, MODE, True, False,
            )  # fmt: skip
            tier_n = tl.load(tier_ptr + offs_n, mask=offs_n < N, other=MASKED)
            tl.store(assignment_ptr + offs_n, tl.where(tier_n != MASKED, row, -1).to(tl.int64), mask=offs_n < N)
            start += BLOCK_N


def pieces_of(b: int, n: int, dk: int | None = None) -> Pieces:
    """What the launches of a call hand to each other; dk: of keys whose mean similarity is given."""
    config = FusedConfig.for_shape(n)
    blocks, tiles = num_blocks_of(n)
    if not config.store_s:
        return streamed.pieces_of(b, b * n, b * blocks, dk)
    pieces = {
        "s": ((b, n, config.width), torch.float32),
        "tier": ((b, n), torch.int32),
        "priors": ((b, 2, n), torch.float32),
        "members": ((b, n), torch.int32),
    }
    if dk is not None:
        return pieces | streamed.given_of(b, b * n, dk)
    return pieces | {"row_sums": ((b, blocks, n), torch.int32), "abs_sums": ((b, tiles), torch.int64)}


def workspace_bytes(b: int, n: int, k: int, dk: int, dtype: torch.dtype, given: bool = False) -> int:
    """Bytes of device memory that select_and_merge needs beside its results: all of what it allocates. given: where the
    mean similarity is.

    They follow from B, N and, where it is given, Dk alone so far; K and the dtype of the keys are asked for so that
    callers need not change when that does.
    """
    return bytes_of(pieces_of(b, n, dk if given else None))


def launch_select(
    w, scores, indices, assignment, num_anchors, space, suppressions, spatial_weight, scale_prior, mean, config,
    packed=None,
):  # fmt: skip
    """Selection, with the assignment or without, from what the similarity tiles left in w; mean: of [B], or None, where
    it is among that.

    Packed: one launch for each class of sizes, as a program for 16384 tokens would take too long for a hundred.
    """
    images, n = scores.shape if packed is None else (packed.num_segments, packed.max_seqlen)
    blocks, tiles = num_blocks_of(n)
    fused = config.assign_in_select
    where = space if fused else Space.of(None, None, 0.0, masked=False)  # else compiled for each kind
    axes = triton.next_power_of_2(where.axes)
    whole = [(0, SelectConfig.for_shape(n))]
    g, abs_sums = (w.row_sums, w.abs_sums) if mean is None else (w.g, None)
    sbar = mean if scale_prior else None
    for low, select in whole if packed is None else SelectConfig.for_packed(n):
        launch(
            select_kernel, (images,),
            w.s, scores, w.tier, g, abs_sums if scale_prior else None, sbar, w.priors,
            w.s if where.tensor is None else where.tensor,
            indices, assignment, *map(as_fp32, suppressions), float(spatial_weight),
            *strides_of(scores, 2), *strides_of(sbar, 1), *where.strides,
            n, config.width, indices.shape[-1], num_anchors, blocks, tiles, where.height, where.width, low, packed,
            **select.chunks, P=where.axes, AXES=axes,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_BOX=max(1024 // axes, 1),
            MODE=where.mode, ASSIGN=fused,
            num_warps=select.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


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
    background_suppression: float | None = None,
    scale_prior: bool = True,
    mean_similarity: torch.Tensor | None = None,  # [B]
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    workspace: torch.Tensor | None = None,  # uint8, workspace_bytes(...) of them
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D], indices [B, K], assignment [B, N], mass [B, K]: new ones, or those of out, contiguous.

    Given out and workspace, nothing is allocated.
    """
    reject_float64(features=features, scores=scores, keys=keys)
    b, n, d = features.shape
    k = num_anchors + num_background
    if keys is None:
        keys = features
    space = Space.of(grid, positions, spatial_weight, masked=mask is not None)
    suppressions = suppressions_of(suppression, background_suppression)
    given = mean_similarity is not None
    w = carve(pieces_of(b, n, keys.shape[2] if given else None), workspace, features.device)
    if out is None:
        out = (
            new(features, (b, k, d)),
            new(features, (b, k), torch.int64),
            new(features, (b, n), torch.int64),
            new(features, (b, k), torch.float32),
        )
    merged, indices, assignment, mass = out
    config = FusedConfig.for_shape(n)
    with on_device_of(features):
        if given:
            streamed.launch_given(w, keys, scores, mask)
        if b > 0 and config.store_s:
            sums = (None, None) if given else (w.row_sums, w.abs_sums)
            launch_tiles(keys, scores, mask, w.tier, *sums, w.s)
            launch_select(
                w, scores, indices, assignment, num_anchors, space, suppressions, spatial_weight, scale_prior,
                mean_similarity, config,
            )  # fmt: skip
            if not config.assign_in_select:
                launch_assign(w.s, indices, w.tier, space, spatial_weight, assignment, sanitise=False)
        elif b > 0:
            if not given:
                launch_tiles(keys, scores, mask, w.tier, w.row_sums, w.abs_sums, scale=w.scale, inverse=w.inverse)
            streamed.launch_select(w, keys, scores, indices, num_anchors, suppressions, scale_prior, mean_similarity)
            assign_streamed(w, keys, indices, space, spatial_weight, assignment)
        launch_merge(features, scores, indices, assignment, w.members, merged, mass)
    return out
