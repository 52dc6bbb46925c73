"""Launches of the greedy loop, see loop.py: one program an image. The first pick may need a launch before it."""

import torch
import triton
import triton.language as tl

from ..._triton.device import has_block, image_of_block, image_rows, image_tokens, is_finite, tokens_before
from ..._triton.launcher import VARYING, Packed, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MAX_STORED, NearestConfig, SelectConfig
from .loop import (
    chunk_starts,
    count_tiers,
    first_utilities,
    negated_utilities,
    pick_greedily,
    prior_scaling,
    tier_of,
)


@triton.jit
def fill_by_index(order_ptr, tier_ptr, candidates, place, N, K, stride_tier, TIER: tl.constexpr, BLOCK: tl.constexpr):
    """Write the tokens of a tier, lowest index first, from `place` on; return the next free place."""
    start = tl.zeros([], tl.int32)
    while (start < N) & (place < K):
        offs = start + tl.arange(0, BLOCK)
        chosen = (tier_of(tier_ptr, stride_tier, offs, N, True, candidates) == TIER).to(tl.int32)
        target = place + tl.cumsum(chosen, axis=0) - chosen
        tl.store(order_ptr + target, offs.to(tl.int64), mask=(chosen != 0) & (target < K))
        place += tl.sum(chosen, axis=0)
        start += BLOCK
    return place


@triton.jit
def fill_order(order_ptr, tier_ptr, candidates, place, N, K, stride_tier, HAS_TIER: tl.constexpr, BLOCK: tl.constexpr):
    """What is due beyond the candidates: tier 1 by index, then tier 2, then -1, as nothing is left to pick."""
    if HAS_TIER:  # K distinct tokens are due even where fewer are valid
        place = fill_by_index(order_ptr, tier_ptr, candidates, place, N, K, stride_tier, 1, BLOCK)
        place = fill_by_index(order_ptr, tier_ptr, candidates, place, N, K, stride_tier, 2, BLOCK)
    if HAS_TIER or candidates is not None:
        while place < K:
            late = place + tl.arange(0, BLOCK)
            tl.store(order_ptr + late, tl.full([BLOCK], -1, tl.int64), mask=late < K)
            place += BLOCK


@triton.jit
def candidates_of(candidates_ptr, stride_b, stride_n, at_b):
    """Of an image, a pointer and a stride; None where all tokens are candidates."""
    if candidates_ptr is None:
        return None
    else:
        return candidates_ptr + at_b * stride_b, stride_n


@triton.jit(do_not_specialize=VARYING)
def nearest_kernel(
    s_ptr,  # [B, N, N], packed: [T, max_seqlen]; likewise the rest
    tier_ptr,  # [B, N]
    candidates_ptr,  # [B, N]
    utilities_ptr,  # [B, N] contiguous
    stride_s_b, stride_s_i, stride_s_j,
    stride_tier_b, stride_tier_n,
    stride_candidate_b, stride_candidate_n,
    N, num_blocks, packed,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N tokens, the negated largest s_ji over the other candidates j: how far the nearest one is."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK_N)
    at_b, N = image_tokens(packed, pid_b, N)
    if packed is not None:
        exists = has_block(packed, N, block, BLOCK_N)
        if exists == 0:
            return
    tier_ptr += at_b * stride_tier_b
    candidates = candidates_of(candidates_ptr, stride_candidate_b, stride_candidate_n, at_b)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = s_ptr + at_b * stride_s_b + offs_n.to(tl.int64)[None, :] * stride_s_j
    nearest = tl.full([BLOCK_J, BLOCK_N], float("-inf"), tl.float32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs_j = start + tl.arange(0, BLOCK_J)
        is_candidate = tier_of(tier_ptr, stride_tier_n, offs_j, N, HAS_TIER, candidates) == 0
        others = is_candidate[:, None] & (offs_j[:, None] != offs_n[None, :]) & (offs_n < N)[None, :]
        s = tl.load(columns + offs_j.to(tl.int64)[:, None] * stride_s_i, mask=others, other=0.0)
        nearest = tl.maximum(nearest, tl.where(others, tl.where(is_finite(s), s, 0.0), float("-inf")))
        start += BLOCK_J
    utilities_ptr += tokens_before(packed, at_b, N)
    tl.store(utilities_ptr + offs_n, -tl.max(nearest, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=VARYING)
def greedy_select_kernel(
    s_ptr,  # [B, N, N], packed: [T, max_seqlen]; likewise the rest
    prior_ptr,  # [B, N]
    sbar_ptr,  # [B]
    tier_ptr,  # [B, N]
    first_ptr,  # [B] int64 or [B, N]
    candidates_ptr,  # [B, N]
    order_ptr,  # [B, K]
    suppression,
    stride_s_b, stride_s_i, stride_s_j,
    stride_prior_b, stride_prior_n,
    stride_sbar_b,
    stride_tier_b, stride_tier_n,
    stride_first_b, stride_first_n,
    stride_candidate_b, stride_candidate_n,
    N, K, LOW, packed,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_FILL: tl.constexpr, HAS_SBAR: tl.constexpr, HAS_TIER: tl.constexpr, MUL: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    columns = N
    at_b, N = image_tokens(packed, pid_b, N)
    first_k, K, _ = image_rows(packed, pid_b, N, K, 0)
    if packed is not None:
        columns = packed.odd_seqlen >> 1
        if (N <= LOW) | (BLOCK * CHUNKS < N) | (K == 0):  # of another size, so of another launch
            return
    if prior_ptr is not None:
        prior_ptr += at_b * stride_prior_b
    tier_ptr += at_b * stride_tier_b
    order_ptr += first_k
    candidates = candidates_of(candidates_ptr, stride_candidate_b, stride_candidate_n, at_b)
    live, counted = count_tiers(tier_ptr, stride_tier_n, N, HAS_TIER, WIDE, candidates)
    place = tl.minimum(live, K)
    scaling = None
    if HAS_SBAR:
        sbar = tl.load(sbar_ptr + pid_b * stride_sbar_b).to(tl.float32)
        scaling = prior_scaling(
            prior_ptr, stride_prior_n, tier_ptr, stride_tier_n, counted, sbar, suppression == 0, N, HAS_TIER, WIDE
        )
    # Two loads with a mask each, as rows begin anywhere, would take 56 instructions more: instead chunks overlap, and a
    # token of several dies in all of them.
    starts = chunk_starts(columns, BLOCK, CHUNKS, CHUNKS if WHOLE == 0 else WHOLE)
    nu = negated_utilities(
        prior_ptr, stride_prior_n, tier_ptr, stride_tier_n, starts, scaling, N, HAS_TIER, BLOCK, MUL, candidates
    )
    first = None
    if first_ptr is not None:
        first = first_utilities(first_ptr, stride_first_b, stride_first_n, pid_b, at_b, nu, starts, N, BLOCK)
    pick_greedily(
        s_ptr + at_b * stride_s_b, order_ptr, nu, starts, place, suppression, tl.cast(stride_s_i, tl.int64),
        stride_s_j, columns, packed, N, BLOCK, 0 if WHOLE == 0 else CHUNKS, AHEAD, True, True, MUL, first,
    )  # fmt: skip
    fill_order(order_ptr, tier_ptr, candidates, place, N, K, stride_tier_n, HAS_TIER, BLOCK_FILL)


def check_is_stored(n: int) -> None:
    if n > MAX_STORED:
        raise ValueError(
            f"N: expected at most {MAX_STORED} tokens an image in the Triton greedy_select, got {n}. "
            "Remedy: select_and_merge, which stores no s beyond that, or CPU tensors."
        )


def distances(s, tier, candidates, packed=None) -> torch.Tensor:
    """[B, N], packed: [T]; how far each token's nearest other candidate is, as a utility of the first pick."""
    images, n = s.shape[:2] if packed is None else (packed.num_segments, packed.max_seqlen)
    config = NearestConfig.for_shape()
    utilities = new(s, s.shape[:-1], torch.float32)
    num_blocks = -(-n // config.block_n)
    launch(
        nearest_kernel, (images * num_blocks if packed is None else packed.num_slots(config.block_n),),
        s, s if tier is None else tier, candidates, utilities,
        *strides_of(s, 3), *strides_of(tier, 2), *strides_of(candidates, 2), n, num_blocks, packed,
        BLOCK_J=config.block_j, BLOCK_N=config.block_n, HAS_TIER=tier is not None,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return utilities


def launch_select(s, prior, order, configs, *, sbar, tier, suppression, first, candidates, combine, max_min, packed):
    """One launch, or one for each class of segments: `configs` are (more than so many tokens, config)."""
    images, n = s.shape[:2] if packed is None else (packed.num_segments, packed.max_seqlen)
    products = combine == "mul"
    if prior is None:  # nothing to scale; and where it is multiplied, all scores are 0
        sbar, suppression, products = None, 0.0 if products else suppression, False
    if max_min:
        first = distances(s, tier, candidates, packed)
    for low, config in configs:
        launch(
            greedy_select_kernel, (images,),
            s, prior, s if sbar is None else sbar, s if tier is None else tier, first, candidates, order,
            as_fp32(suppression), *strides_of(s, 3), *strides_of(prior, 2), *strides_of(sbar, 1), *strides_of(tier, 2),
            *strides_of(first, 2), *strides_of(candidates, 2), n, order.shape[-1], low, packed,
            **config.chunks, BLOCK_FILL=256, HAS_SBAR=sbar is not None, HAS_TIER=tier is not None,
            MUL=products, num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def greedy_select(
    s: torch.Tensor,  # [B, N, N]
    prior: torch.Tensor | None,  # [B, N]
    k: int,
    *,
    sbar: torch.Tensor | None = None,  # [B]
    tier: torch.Tensor | None = None,  # [B, N] int8
    suppression: float = 1.0,
    first: torch.Tensor | None = None,  # [B] int64, or [B, N]
    candidates: torch.Tensor | None = None,  # [B, N] bool
    combine: str = "sub",
    max_min: bool = False,
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    reject_float64(s=s, prior=prior)
    b, n = s.shape[:2]
    check_is_stored(n)
    order = new(s, (b, k), torch.int64)
    if b == 0 or k == 0:
        return order
    with on_device_of(s):
        launch_select(
            s, prior, order, [(0, SelectConfig.for_shape(n))], sbar=sbar, tier=tier, suppression=suppression,
            first=first, candidates=candidates, combine=combine, max_min=max_min, packed=None,
        )  # fmt: skip
    return order


def greedy_select_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    prior: torch.Tensor | None,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    sbar: torch.Tensor | None = None,  # [S]
    tier: torch.Tensor | None = None,  # [T] int8
    suppression: float = 1.0,
    first: torch.Tensor | None = None,  # [S] int64, or [T]
    candidates: torch.Tensor | None = None,  # [T] bool
    combine: str = "sub",
    max_min: bool = False,
) -> torch.Tensor:
    """Return order [total_keep] int64, within the segment."""
    reject_float64(s=s, prior=prior)
    check_is_stored(max_seqlen)
    order = new(s, (total_keep,), torch.int64, fill=-1)  # and -1 it stays where there is no segment
    if cu_seqlens.shape[0] > 1 and max_seqlen > 0 and total_keep > 0:
        packed = Packed.kept(cu_seqlens, cu_kept, s.shape[0], total_keep, max_seqlen)
        with on_device_of(s):
            launch_select(
                s, prior, order, SelectConfig.for_packed(max_seqlen), sbar=sbar, tier=tier, suppression=suppression,
                first=first, candidates=candidates, combine=combine, max_min=max_min, packed=packed,
            )  # fmt: skip
    return order
