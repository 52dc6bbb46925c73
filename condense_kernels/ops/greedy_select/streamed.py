"""How a loop begins: utilities, the first pick, what is due. Without s the picks then come in turns (turns.py).

greedy_select from keys is here, too: stored up to MAX_STORED tokens an image, where it is similarity and greedy_select
in a row, and in turns beyond and in packed batches, whose memory is then O(B N).
"""

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    first_block_of,
    has_block,
    image_of_block,
    image_rows,
    image_tokens,
    inside,
    tokens_before,
)
from ..._triton.launcher import VARYING, Packed, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import FusedConfig, StreamConfig
from ..._triton.workspace import Pieces, carve
from ..similarity.kernel import blocks_of_image, global_similarity, launch_tiles, mean_similarity, num_blocks_of
from ..similarity.kernel import similarity_varlen as packed_similarities
from ..similarity.measure import check_is_cosine, cosines_of, dense_similarities, launch_measure, tile_options
from .kernel import candidates_of, fill_order
from .kernel import greedy_select as on_s
from .kernel import greedy_select_varlen as on_packed_s
from .loop import (
    counted_fixed,
    counted_magnitude,
    dead,
    is_counted,
    negated,
    prior_factor,
    prior_of,
    prior_scale,
    tier_of,
)
from .turns import BLOCK, NOBODY, launch_turns, live_key, place_of


@triton.jit
def load_priors(
    prior_ptr, tier_ptr, g_ptr, candidates, start, stride_prior, N, CHUNK: tl.constexpr, BACKGROUND: tl.constexpr
):
    """Priors and tiers of a chunk of one image, and where they are."""
    offs_n = start + tl.arange(0, CHUNK)
    mask_n = offs_n < N
    tier = tier_of(tier_ptr, 1, offs_n, N, True, candidates)
    if not BACKGROUND:
        prior = prior_of(prior_ptr, stride_prior, offs_n, N)
    elif g_ptr.dtype.element_ty == tl.int64:
        prior = global_similarity(g_ptr, offs_n, mask_n, N, 1)
    else:
        prior = prior_of(g_ptr, 1, offs_n, N)
    return prior, tier, offs_n, mask_n


@triton.jit
def opening_key(first_ptr, nu, offs_n, pid_b, at_b, stride_first_b, stride_first_n, N):
    """What the first pick of a loop goes by, as an integer that orders like it: nu, unless something else is given."""
    if first_ptr is None:
        return live_key(nu, nu)
    elif first_ptr.dtype.element_ty == tl.int64:
        return live_key(tl.where(offs_n == tl.load(first_ptr + pid_b * stride_first_b), float("-inf"), nu), nu)
    else:
        return live_key(negated(prior_of(first_ptr + at_b * stride_first_b, stride_first_n, offs_n, N)), nu)


@triton.jit(do_not_specialize=VARYING)
def begin_kernel(
    prior_ptr,  # [B, N], packed: [T]; likewise the rest
    tier_ptr,  # [B, N]
    g_ptr,  # [B, N], of BACKGROUND: g, or the int64 sums that it is made of
    abs_sums_ptr,  # [B, blocks] int64; None where nothing is scaled, or sbar is given
    sbar_ptr,  # [B] or None
    first_ptr,  # [B] int64, [B, N] or None
    candidates_ptr,  # [B, N] or None
    nu_ptr,  # [B, N] negated utilities, dead tokens NaN
    m_ptr,  # [B, N] the largest cosine to a pick
    batch_ptr,  # [B, BATCH] the last picks
    fresh_ptr,  # [B] how many they are
    due_ptr,  # [B] how many are still to come
    order_ptr,  # [B, K] or None
    count_ptr,  # [B] how many picks there will be; None without order
    suppression,
    stride_prior_b, stride_prior_n,
    stride_first_b, stride_first_n,
    stride_candidate_b, stride_candidate_n, stride_sbar_b,
    N, K, num_anchors, num_blocks, packed,
    CHUNK: tl.constexpr, BATCH: tl.constexpr, BACKGROUND: tl.constexpr, MUL: tl.constexpr,
):  # fmt: skip
    """The utilities of a loop (Eq. 2, or Eq. 3 and 4), and its first pick. One program per image."""
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first_k, K, num_anchors = image_rows(packed, pid_b, N, K, num_anchors)
    first = tokens_before(packed, at_b, N)
    candidates = candidates_of(candidates_ptr, stride_candidate_b, stride_candidate_n, at_b)
    if prior_ptr is not None:
        prior_ptr += at_b * stride_prior_b
    tier_ptr += first
    g_ptr += first
    nu_ptr += first
    m_ptr += first
    counts = tl.zeros([CHUNK], tl.int32)
    lives = tl.zeros([CHUNK], tl.int32)
    tops = tl.zeros([CHUNK], tl.int32)
    start = tl.zeros([], tl.int64)
    while start < N:
        prior, tier, _, _ = load_priors(
            prior_ptr, tier_ptr, g_ptr, candidates, start, stride_prior_n, N, CHUNK, BACKGROUND
        )
        lives += (tier == 0).to(tl.int32)
        counts += is_counted(tier).to(tl.int32)
        tops = tl.maximum(tops, counted_magnitude(prior, is_counted(tier)))
        start += CHUNK
    live = tl.sum(lives, axis=0)
    num_valid = tl.sum(counts, axis=0)
    unscaled: tl.constexpr = abs_sums_ptr is None and sbar_ptr is None
    plain = tl.full([], True, tl.int1) if unscaled else suppression == 0
    shrink, shrink_again = prior_scale(tops, plain)

    fixed = tl.zeros([CHUNK], tl.int64)
    start = tl.zeros([], tl.int64)
    while start < N:
        prior, tier, _, _ = load_priors(
            prior_ptr, tier_ptr, g_ptr, candidates, start, stride_prior_n, N, CHUNK, BACKGROUND
        )
        fixed += counted_fixed(prior * shrink * shrink_again, is_counted(tier), plain)
        start += CHUNK
    sbar = tl.zeros([], tl.float32)
    if abs_sums_ptr is not None:
        sums_ptr = abs_sums_ptr + first_block_of(packed, pid_b, num_blocks, BATCH)
        sbar = mean_similarity(sums_ptr, num_valid, blocks_of_image(packed, N, num_blocks, BATCH), CHUNK)
    if sbar_ptr is not None:
        sbar = tl.load(sbar_ptr + pid_b * stride_sbar_b).to(tl.float32)
    factor, positive = prior_factor(sbar, tl.sum(fixed, axis=0), num_valid, plain)

    best = tl.full([CHUNK], NOBODY, tl.int64)
    start = tl.zeros([], tl.int64)
    while start < N:
        prior, tier, offs_n, mask_n = load_priors(
            prior_ptr, tier_ptr, g_ptr, candidates, start, stride_prior_n, N, CHUNK, BACKGROUND
        )
        u = tl.where(positive, factor * (prior * shrink * shrink_again), 0.0)
        if MUL:
            u = tl.where(u > 0, u, 0.0)
        nu = negated(u)
        if BACKGROUND:  # the anchors are dead, but counted in the mean
            before = tl.load(nu_ptr + offs_n, mask=mask_n, other=float("nan"))
            nu = tl.where(before == before, nu, before)
        else:
            nu = tl.where(tier == 0, nu, dead(tier))
        key = opening_key(first_ptr, nu, offs_n, pid_b, at_b, stride_first_b, stride_first_n, N)
        best = tl.minimum(best, tl.where(mask_n, place_of(key, offs_n), NOBODY))
        tl.store(nu_ptr + offs_n, nu, mask=mask_n)
        tl.store(m_ptr + offs_n, tl.full([CHUNK], float("-inf"), tl.float32), mask=mask_n)
        start += CHUNK

    anchors = tl.minimum(num_anchors, live)
    count = anchors
    if BACKGROUND:
        count = tl.minimum(K - num_anchors, live - anchors)
    first_pick = inside(packed, tl.min(best, axis=0).to(tl.int32), N)
    fresh = tl.minimum(count, 1)
    if fresh > 0:
        tl.debug_barrier()  # its utility was stored by another thread
        tl.store(nu_ptr + first_pick, dead(tl.zeros([], tl.int32)))
        tl.store(batch_ptr + pid_b * BATCH, first_pick)
        if order_ptr is not None:
            tl.store(order_ptr + first_k, first_pick.to(tl.int64))
    tl.store(fresh_ptr + pid_b, fresh)
    tl.store(due_ptr + pid_b, count - fresh)
    if order_ptr is not None:
        tl.store(count_ptr + pid_b, count)


@triton.jit(do_not_specialize=VARYING)
def farthest_kernel(
    keys_ptr,  # [B, N, Dk]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    tier_ptr,  # [B, N]
    candidates_ptr,  # [B, N] or None
    utilities_ptr,  # [B, N]
    stride_key_b, stride_key_n, stride_key_d,
    stride_candidate_b, stride_candidate_n,
    N, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of a block of tokens, the negated largest cosine to another candidate: how far the nearest one is."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK) == 0:
        return
    first = tokens_before(packed, at_b, N)
    candidates = candidates_of(candidates_ptr, stride_candidate_b, stride_candidate_n, at_b)
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.minimum(offs_n, N - 1).to(tl.int64)
    nearest = tl.full([BLOCK], float("-inf"), tl.float32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs_j = start + tl.arange(0, BLOCK)
        s = cosines_of(
            keys_ptr + at_b * stride_key_b, scale_ptr + first, inverse_ptr + first,
            tokens, tl.minimum(offs_j, N - 1).to(tl.int64),
            stride_key_n, stride_key_d, num_channels, DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
        )  # fmt: skip
        is_candidate = tier_of(tier_ptr + first, 1, offs_j, N, True, candidates) == 0
        others = is_candidate[None, :] & (offs_n[:, None] != offs_j[None, :])
        nearest = tl.maximum(nearest, tl.max(tl.where(others, s, float("-inf")), axis=1))
        start += BLOCK
    tl.store(utilities_ptr + first + offs_n, -nearest, mask=offs_n < N)


@triton.jit(do_not_specialize=VARYING)
def fill_kernel(
    order_ptr,  # [B, K]
    tier_ptr,  # [B, N]
    candidates_ptr,  # [B, N] or None
    count_ptr,  # [B]
    stride_candidate_b, stride_candidate_n,
    N, K, packed,
    BLOCK_FILL: tl.constexpr,
):  # fmt: skip
    """What is due beyond the picks by score."""
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
    candidates = candidates_of(candidates_ptr, stride_candidate_b, stride_candidate_n, at_b)
    tier_ptr += tokens_before(packed, at_b, N)
    fill_order(order_ptr + first_k, tier_ptr, candidates, tl.load(count_ptr + pid_b), N, K, 1, True, BLOCK_FILL)


def pieces_of(images: int, tokens: int, blocks: int) -> Pieces:
    """What a loop in turns works in. Tokens and blocks of all images together."""
    fp32, int32, int64 = torch.float32, torch.int32, torch.int64
    return {
        "tier": ((tokens,), int32),
        "scale": ((tokens,), fp32),
        "inverse": ((tokens,), fp32),
        "nu": ((tokens,), fp32),
        "m": ((tokens,), fp32),
        "key": ((tokens,), int32),
        "best": ((blocks,), int64),
        "batch": ((images, BLOCK), int32),
        "fresh": ((images,), int32),
        "due": ((images,), int32),
    }


def sums_of(tokens: int, blocks: int) -> Pieces:
    """What the means of s are made of."""
    return {"row_sums": ((tokens,), torch.int64), "abs_sums": ((blocks,), torch.int64)}


def launch_loop(
    w, keys, prior, k, num_anchors, count, suppression, *, scaled, background=False, g=None, sbar=None, first=None,
    candidates=None, mul=False, order=None, packed=None,
):  # fmt: skip
    """A loop of at most count picks, from what w has of the keys; k and num_anchors as in the flagship. Of background,
    g [B, N] or what it is made of; sbar [B] where it is not among what w has."""
    n = keys.shape[-2] if packed is None else packed.max_seqlen
    blocks, _ = num_blocks_of(n)
    config = StreamConfig.for_shape()
    factor = as_fp32(suppression)
    out = (None, None) if order is None else (order, w.count)
    abs_sums = w.abs_sums if scaled and sbar is None else None
    sbar = sbar if scaled else None
    launch(
        begin_kernel, (w.due.numel(),),
        prior, w.tier, g if background else w.tier, abs_sums, sbar, first, candidates,
        w.nu, w.m, w.batch, w.fresh, w.due, *out, factor,
        *strides_of(prior, 2), *strides_of(first, 2), *strides_of(candidates, 2), *strides_of(sbar, 1),
        n, k, num_anchors, blocks, packed,
        CHUNK=config.chunk, BATCH=BLOCK, BACKGROUND=background, MUL=mul,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    launch_turns(w, keys, count, factor, packed, order, mul)


def launch_farthest(w, keys, candidates, packed=None) -> torch.Tensor:
    """[B, N], packed: [T]; as a utility of the first pick."""
    n, dk = keys.shape[-2:]
    if packed is not None:
        n = packed.max_seqlen
    blocks, _ = num_blocks_of(n)
    utilities = new(keys, keys.shape[:-1], torch.float32)
    launch(
        farthest_kernel, (w.best.numel(),),
        keys, w.scale, w.inverse, w.tier, candidates, utilities, *strides_of(keys, 3), *strides_of(candidates, 2),
        n, blocks, dk, packed, **tile_options(keys),
    )  # fmt: skip
    return utilities


def select_in_turns(
    keys, prior, order, mask, suppression, scale_prior, first, candidates, combine, max_min, packed=None
) -> None:
    """Into order [B, K], packed: [total_keep]."""
    n, k = keys.shape[-2], order.shape[-1]
    images, tokens = keys.shape[0], keys.shape[0] * n
    blocks = images * num_blocks_of(n)[0]
    if packed is not None:
        images, tokens, k, blocks = packed.num_segments, n, packed.max_keep, packed.num_slots(BLOCK)
    scaled = scale_prior and prior is not None and suppression != 0
    count = {"count": ((images,), torch.int32)}
    pieces = pieces_of(images, tokens, blocks) | (sums_of(tokens, blocks) if scaled else {}) | count
    w = carve(pieces, None, keys.device)
    if scaled:
        launch_tiles(keys, prior, mask, w.tier, w.row_sums, w.abs_sums, scale=w.scale, inverse=w.inverse, packed=packed)
    else:
        launch_measure(keys, prior, mask, w.tier, w.scale, w.inverse, packed)
    if max_min:
        first = launch_farthest(w, keys, candidates, packed)
    launch_loop(
        w, keys, prior, k, k, k, suppression, scaled=scaled, first=first, candidates=candidates, mul=combine == "mul",
        order=order, packed=packed,
    )  # fmt: skip
    launch(
        fill_kernel, (images,), order, w.tier, candidates, w.count, *strides_of(candidates, 2),
        n if packed is None else packed.max_seqlen, k, packed, BLOCK_FILL=256,
    )  # fmt: skip


def greedy_select_from_keys(
    keys: torch.Tensor,  # [B, N, Dk]
    prior: torch.Tensor | None,  # [B, N]
    k: int,
    *,
    mask: torch.Tensor | None = None,  # [B, N] bool
    suppression: float = 1.0,
    scale_prior: bool = True,
    first: torch.Tensor | None = None,  # [B] int64, or [B, N]
    candidates: torch.Tensor | None = None,  # [B, N] bool
    combine: str = "sub",
    max_min: bool = False,
    metric: str = "cosine",
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    reject_float64(keys=keys, prior=prior)
    b, n, _ = keys.shape
    rules = {"first": first, "candidates": candidates, "combine": combine, "max_min": max_min}
    if b == 0 or k == 0:
        return new(keys, (b, k), torch.int64)
    if FusedConfig.for_shape(n).store_s:
        s, sbar, _, tier, *_ = dense_similarities(keys, prior, mask, metric)
        return on_s(s, prior, k, sbar=sbar if scale_prior else None, tier=tier, suppression=suppression, **rules)
    check_is_cosine(metric)
    order = new(keys, (b, k), torch.int64)
    with on_device_of(keys):
        select_in_turns(keys, prior, order, mask, suppression, scale_prior, **rules)
    return order


def greedy_select_from_keys_varlen(
    keys: torch.Tensor,  # [T, Dk]
    prior: torch.Tensor | None,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    mask: torch.Tensor | None = None,  # [T] bool
    suppression: float = 1.0,
    scale_prior: bool = True,
    first: torch.Tensor | None = None,  # [S] int64, or [T]
    candidates: torch.Tensor | None = None,  # [T] bool
    combine: str = "sub",
    max_min: bool = False,
    metric: str = "cosine",
) -> torch.Tensor:
    """Return order [total_keep] int64, within the segment."""
    reject_float64(keys=keys, prior=prior)
    num_tokens, segments = keys.shape[0], cu_seqlens.shape[0] - 1
    max_seqlen = min(max_seqlen, num_tokens)
    rules = {"first": first, "candidates": candidates, "combine": combine, "max_min": max_min}
    if segments == 0 or total_keep == 0 or max_seqlen == 0:
        return new(keys, (total_keep,), torch.int64, fill=-1)
    config = FusedConfig.for_packed(num_tokens, segments, max_seqlen)
    if config.store_s and config.grouping is None:
        options = {"scores": prior, "mask": mask, "metric": metric}
        s, sbar, _, tier, _ = packed_similarities(keys, cu_seqlens, max_seqlen, **options)
        rules |= {"sbar": sbar if scale_prior else None, "tier": tier, "suppression": suppression}
        return on_packed_s(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **rules)
    check_is_cosine(metric)
    order = new(keys, (total_keep,), torch.int64, fill=-1)  # and -1 it stays where there is no segment
    with on_device_of(keys):
        packed = Packed.kept(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen)
        select_in_turns(keys, prior, order, mask, suppression, scale_prior, **rules, packed=packed)
    return order
