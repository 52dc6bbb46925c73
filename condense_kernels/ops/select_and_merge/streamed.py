"""Selection and assignment without s: a cosine is computed again where it is needed, memory is O(B N).

Both loops begin with a launch of their own, and go on in turns (turns.py). A cosine has the same bits as in s.
"""

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    INTERPRETED,
    NOWHERE,
    first_block_of,
    has_block,
    image_of_block,
    image_rows,
    image_tokens,
    inside,
    tokens_before,
)
from ..._triton.launcher import VARYING, as_fp32, launch, strides_of
from ..._triton.tables import SimilarityConfig, StreamConfig
from ..._triton.workspace import Pieces
from ..assign.kernel import MASKED, NO_DISTANCE, compare_rows, distance_frame, rows_of
from ..greedy_select.loop import (
    count_dead,
    counted_fixed,
    counted_magnitude,
    dead,
    negated,
    prior_factor,
    prior_scale,
    write_kept,
)
from ..similarity.kernel import (
    blocks_of_image,
    can_overflow,
    global_similarity,
    mean_similarity,
    num_blocks_of,
)
from .turns import BLOCK, NOBODY, cosines_of, launch_turns, live_key, place_of


@triton.jit
def load_priors(
    scores_ptr, tier_ptr, row_sums_ptr, start, stride_score, N, CHUNK: tl.constexpr, BACKGROUND: tl.constexpr
):
    """Priors and tiers of a chunk of one image, and where they are."""
    offs_n = start + tl.arange(0, CHUNK)
    mask_n = offs_n < N
    tier = tl.load(tier_ptr + offs_n, mask=mask_n, other=MASKED)
    if BACKGROUND:
        prior = global_similarity(row_sums_ptr, offs_n, mask_n, N, 1)
    else:
        prior = tl.load(scores_ptr + offs_n * stride_score, mask=mask_n, other=0.0).to(tl.float32)
    return prior, tier, offs_n, mask_n


@triton.jit(do_not_specialize=VARYING)
def begin_kernel(
    scores_ptr,  # [B, N], packed: [T]; likewise the rest
    tier_ptr,  # [B, N]
    row_sums_ptr,  # [B, N] int64
    abs_sums_ptr,  # [B, blocks] int64
    nu_ptr,  # [B, N] negated utilities, dead tokens NaN
    m_ptr,  # [B, N] the largest cosine to a pick
    batch_ptr,  # [B, BATCH] the last picks
    fresh_ptr,  # [B] how many they are
    due_ptr,  # [B] how many are still to come
    suppression, scaled,
    stride_score_b, stride_score_n,
    N, K, num_anchors, num_blocks, packed,
    CHUNK: tl.constexpr, BATCH: tl.constexpr, BACKGROUND: tl.constexpr,
):  # fmt: skip
    """The utilities of a loop (Eq. 2, or Eq. 3 and 4), and its first pick. One program per image."""
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    _first_k, K, num_anchors = image_rows(packed, pid_b, N, K, num_anchors)
    abs_sums_ptr += first_block_of(packed, pid_b, num_blocks, BATCH)
    num_blocks = blocks_of_image(packed, N, num_blocks, BATCH)
    first = tokens_before(packed, at_b, N)
    scores_ptr += at_b * stride_score_b
    tier_ptr += first
    row_sums_ptr += first
    nu_ptr += first
    m_ptr += first
    counts = tl.zeros([CHUNK], tl.int32)
    tops = tl.zeros([CHUNK], tl.int32)
    start = tl.zeros([], tl.int64)
    while start < N:
        prior, tier, _, _ = load_priors(scores_ptr, tier_ptr, row_sums_ptr, start, stride_score_n, N, CHUNK, BACKGROUND)
        counts += (tier == 0).to(tl.int32)
        tops = tl.maximum(tops, counted_magnitude(prior, tier == 0))
        start += CHUNK
    num_valid = tl.sum(counts, axis=0)
    plain = (suppression == 0) | (scaled == 0)
    shrink, shrink_again = prior_scale(tops, plain)

    fixed = tl.zeros([CHUNK], tl.int64)
    start = tl.zeros([], tl.int64)
    while start < N:
        prior, tier, _, _ = load_priors(scores_ptr, tier_ptr, row_sums_ptr, start, stride_score_n, N, CHUNK, BACKGROUND)
        fixed += counted_fixed(prior * shrink * shrink_again, tier == 0, plain)
        start += CHUNK
    sbar = mean_similarity(abs_sums_ptr, num_valid, num_blocks, CHUNK)
    factor, positive = prior_factor(sbar, tl.sum(fixed, axis=0), num_valid, plain)

    best = tl.full([CHUNK], NOBODY, tl.int64)
    start = tl.zeros([], tl.int64)
    while start < N:
        prior, tier, offs_n, mask_n = load_priors(
            scores_ptr, tier_ptr, row_sums_ptr, start, stride_score_n, N, CHUNK, BACKGROUND
        )
        nu = negated(tl.where(positive, factor * (prior * shrink * shrink_again), 0.0))
        if BACKGROUND:  # the anchors are dead, but counted in the mean
            before = tl.load(nu_ptr + offs_n, mask=mask_n, other=float("nan"))
            nu = tl.where(before == before, nu, before)
        else:
            nu = tl.where(tier == 0, nu, dead(tier))
        best = tl.minimum(best, tl.where(mask_n, place_of(live_key(nu, nu), offs_n), NOBODY))
        tl.store(nu_ptr + offs_n, nu, mask=mask_n)
        tl.store(m_ptr + offs_n, tl.full([CHUNK], float("-inf"), tl.float32), mask=mask_n)
        start += CHUNK

    anchors = tl.minimum(num_anchors, num_valid)
    count = anchors
    if BACKGROUND:
        count = tl.minimum(K - num_anchors, num_valid - anchors)
    first_pick = inside(packed, tl.min(best, axis=0).to(tl.int32), N)
    fresh = tl.minimum(count, 1)
    if fresh > 0:
        tl.debug_barrier()  # its utility was stored by another thread
        tl.store(nu_ptr + first_pick, dead(tl.zeros([], tl.int32)))
        tl.store(batch_ptr + pid_b * BATCH, first_pick)
    tl.store(fresh_ptr + pid_b, fresh)
    tl.store(due_ptr + pid_b, count - fresh)


@triton.jit(do_not_specialize=VARYING)
def keep_kernel(
    nu_ptr,  # [B, N]
    indices_ptr,  # [B, K]
    N, K, packed,
    CHUNK: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
    nu_ptr += tokens_before(packed, at_b, N)
    indices_ptr += first_k
    write_kept(nu_ptr, indices_ptr, count_dead(nu_ptr, 0, N, CHUNK), K, N, CHUNK)


@triton.jit(do_not_specialize=VARYING)
def assign_streamed_kernel(
    keys_ptr,  # [B, N, Dk]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    indices_ptr,  # [B, K]
    tier_ptr,  # [B, N]
    where_ptr,  # [N, P] or [B, N, P]
    assignment_ptr,  # [B, N]
    tile_ptr,  # [B, blocks, BLOCK, BLOCK] where a program keeps its tile of s
    spatial_weight,
    stride_key_b, stride_key_n, stride_key_d,
    stride_where_b, stride_where_n, stride_where_p,
    N, K, num_blocks, num_channels, HEIGHT, GRID_WIDTH, packed,
    P: tl.constexpr, AXES: tl.constexpr, DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_BOX: tl.constexpr, MODE: tl.constexpr, CAN_OVERFLOW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Every token to the kept token that is most similar and near, a block of tokens per program."""
    pid = tl.program_id(0)
    pid_b, pid_n = image_of_block(packed, pid, num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, pid_n, BLOCK) == 0:
        return
    first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
    first = tokens_before(packed, at_b, N)
    keys_ptr += at_b * stride_key_b
    scale_ptr += first
    inverse_ptr += first
    indices_ptr += first_k
    tier_ptr += first
    where_ptr += at_b * stride_where_b
    offs_n = pid_n * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.minimum(offs_n, N - 1).to(tl.int64)
    tier = tl.load(tier_ptr + tokens)
    origin, shrink_first, shrink, factor = tl.zeros([AXES], tl.float64), 1.0, 1.0, 0.0
    if MODE != NO_DISTANCE:
        origin, shrink_first, shrink, factor = distance_frame(
            where_ptr, tier_ptr, spatial_weight, stride_where_n, stride_where_p, 1, N, HEIGHT, GRID_WIDTH,
            P, AXES, BLOCK_BOX, MODE, True,
        )  # fmt: skip
    best = tl.full([BLOCK], float("nan"), tl.float32)
    row = tl.full([BLOCK], NOWHERE, tl.int32)
    own = tl.full([BLOCK], NOWHERE, tl.int32)
    tile_ptr += pid.to(tl.int64) * BLOCK * BLOCK
    start = tl.zeros([], tl.int32)
    while start < K:
        _, tile_kept, _ = rows_of(indices_ptr, tier_ptr, start, 1, 1, N, K, BLOCK, True)
        tile = cosines_of(
            keys_ptr, scale_ptr, inverse_ptr, tokens, tile_kept, stride_key_n, stride_key_d, num_channels,
            DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
        )  # fmt: skip
        tile = tl.where((tier == 0)[:, None] & (tl.load(tier_ptr + tile_kept) == 0)[None, :], tile, 0.0)
        tl.store(tile_ptr + tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :] * BLOCK, tile)
        tl.debug_barrier()
        part = tl.zeros([], tl.int32)
        while part < BLOCK:  # from memory and few rows at a time: the whole tile would spill
            offs_k, kept, takes = rows_of(indices_ptr, tier_ptr, start + part, 1, 1, N, K, BLOCK_K, True)
            s = tl.load(tile_ptr + (part + tl.arange(0, BLOCK_K))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
            best, row, own = compare_rows(
                best, row, own, s, offs_k, kept, takes, tokens, where_ptr, origin, shrink_first, shrink, factor,
                stride_where_n, stride_where_p, HEIGHT, GRID_WIDTH, P, AXES, BLOCK, BLOCK_K, MODE,
            )  # fmt: skip
            part += BLOCK_K
        tl.debug_barrier()
        start += BLOCK
    row = tl.where(own != NOWHERE, own, row)
    assigned = (row != NOWHERE) & (tier != MASKED)
    tl.store(assignment_ptr + first + offs_n, tl.where(assigned, row, -1).to(tl.int64), mask=offs_n < N)


def pieces_of(images: int, tokens: int, blocks: int) -> Pieces:
    """Tokens and blocks of all images together."""
    fp32, int32, int64 = torch.float32, torch.int32, torch.int64
    return {
        "tier": ((tokens,), int32),
        "row_sums": ((tokens,), int64),
        "abs_sums": ((blocks,), int64),
        "scale": ((tokens,), fp32),
        "inverse": ((tokens,), fp32),
        "nu": ((tokens,), fp32),
        "m": ((tokens,), fp32),
        "key": ((tokens,), int32),
        "best": ((blocks,), int64),
        "batch": ((images, BLOCK), int32),
        "fresh": ((images,), int32),
        "due": ((images,), int32),
        "tile": ((blocks, BLOCK, BLOCK), fp32),
        "members": ((tokens,), int32),
    }


def launch_select(w, keys, scores, indices, num_anchors, suppressions, scale_prior, packed=None):
    """The kept tokens into indices [B, K], packed: [total_keep], from what the similarity tiles left in w."""
    images, k, n = w.due.numel(), indices.shape[-1], keys.shape[-2]
    counts = (num_anchors, k - num_anchors)
    if packed is not None:
        n, counts = packed.max_seqlen, (packed.max_keep,) * 2
    blocks, _ = num_blocks_of(n)
    config = StreamConfig.for_shape()
    for background, count, factor in zip((False, True), counts, map(as_fp32, suppressions), strict=True):
        launch(
            begin_kernel, (images,), scores, w.tier, w.row_sums, w.abs_sums, w.nu, w.m, w.batch, w.fresh, w.due,
            factor, int(scale_prior), *strides_of(scores, 2), n, k, num_anchors, blocks, packed,
            CHUNK=config.chunk, BATCH=BLOCK, BACKGROUND=background,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        launch_turns(w, keys, count, factor, packed)
    launch(
        keep_kernel, (images,), w.nu, indices, n, k, packed,
        CHUNK=config.chunk, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def launch_assign(w, keys, indices, space, spatial_weight, assignment, packed=None):
    n, dk = keys.shape[-2:]
    if packed is not None:
        n = packed.max_seqlen
    blocks, _ = num_blocks_of(n)
    similarity = SimilarityConfig.for_shape(keys.dtype)
    axes = triton.next_power_of_2(space.axes)
    launch(
        assign_streamed_kernel, (w.best.numel(),),
        keys, w.scale, w.inverse, indices, w.tier, w.tier if space.tensor is None else space.tensor, assignment,
        w.tile, float(spatial_weight), *strides_of(keys, 3), *space.strides,
        n, indices.shape[-1], blocks, dk, space.height, space.width, packed,
        P=space.axes, AXES=axes, DK=dk, BLOCK=BLOCK, BLOCK_D=similarity.block_d,
        BLOCK_K=StreamConfig.for_shape().block_k, BLOCK_BOX=max(1024 // axes, 1),
        MODE=space.mode, CAN_OVERFLOW=can_overflow(keys), INTERPRETED=INTERPRETED,
        num_warps=similarity.num_warps, num_stages=similarity.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
