"""Greedy MAP inference of a determinantal point process, one program an image: a pick needs the pick before it.

Negated gains nu live in registers, in chunks, as in the loop of greedy_select; a token is dead where nu is NaN, and the
payload says why. The Cholesky factor [K, N] lies in memory, a row a pick: each pick reads all rows before it, so a call
reads 2 K^2 N bytes of it an image, in the order in which they were written.
"""

# ruff: noqa: RUF005  (*chunks, x) is not in Triton's language

import torch
import triton
import triton.language as tl

from ..._triton.device import NOWHERE, image_rows, image_tokens, is_finite, tokens_before
from ..._triton.launcher import VARYING, Packed, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MAX_STORED, DppConfig
from ..greedy_select.kernel import candidates_of, fill_by_index
from ..greedy_select.loop import (
    best_keys,
    chunk_starts,
    count_tiers,
    dead,
    died_of,
    first_lowest,
    negated,
    tier_of,
    token_chunks,
)
from ..similarity.kernel import launch_tiles, num_blocks_of

EXHAUSTED = tl.constexpr(5)  # why a token is dead: it adds nothing to the volume, but may be due. Tiers are below it


@triton.jit
def quality_of(quality_ptr, stride_quality, tokens, there):
    q = tl.load(quality_ptr + tokens.to(tl.int64) * stride_quality, mask=there, other=0.0).to(tl.float32)
    return tl.where(is_finite(q), q, 0.0)


@triton.jit
def kernel_at(s_ptrs, quality_ptr, stride_quality, q, tokens, there):
    """L = q * s * quality at some tokens, s alone without a quality."""
    s = tl.load(s_ptrs, mask=there, other=0.0)
    s = tl.where(is_finite(s), s, 0.0)
    if quality_ptr is not None:
        s = q * s * quality_of(quality_ptr, stride_quality, tokens, there)
    return s


@triton.jit
def open_gains(
    s_ptr, quality_ptr, stride_diagonal, stride_quality, tier_ptr, stride_tier, candidates, floor_ptr, starts, eps, N,
    HAS_TIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunks of -L_ii, NaN where a token is dead; what a gain has to exceed goes to memory."""
    offs = token_chunks(starts, BLOCK)
    nu = ()
    for c in tl.static_range(len(offs)):
        there = offs[c] < N
        q = 0.0
        if quality_ptr is not None:
            q = quality_of(quality_ptr, stride_quality, offs[c], there)
        s_ptrs = s_ptr + offs[c].to(tl.int64) * stride_diagonal
        diagonal = kernel_at(s_ptrs, quality_ptr, stride_quality, q, offs[c], there)
        floor = tl.where(eps * diagonal > 0, eps * diagonal, 0.0)
        tl.store(floor_ptr + offs[c], floor, mask=there)
        tier = tier_of(tier_ptr, stride_tier, offs[c], N, HAS_TIER, candidates)
        chunk = tl.where(diagonal > floor, 0.0 - diagonal, dead(tl.full([], EXHAUSTED, tl.int32)))
        nu = nu + (tl.where(tier == 0, chunk, dead(tier)),)
    return nu


@triton.jit
def next_row(
    s_ptr, quality_ptr, factor_ptr, pick, done, root, starts, stride_s_i, stride_s_j, stride_quality, N,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Chunks of row `done` of the factor, that of `pick`: products with the rows before it go one after the other."""
    offs = token_chunks(starts, BLOCK)
    q = 0.0
    if quality_ptr is not None:
        q = quality_of(quality_ptr, stride_quality, pick, pick < N)
    row_ptr = s_ptr + pick.to(tl.int64) * stride_s_i
    x = ()
    for c in tl.static_range(len(offs)):
        s_ptrs = row_ptr + offs[c].to(tl.int64) * stride_s_j
        x = x + (kernel_at(s_ptrs, quality_ptr, stride_quality, q, offs[c], offs[c] < N),)
    u = tl.zeros([], tl.int32)
    earlier_ptr = factor_ptr
    while u < done:
        for _ in tl.static_range(UNROLL):
            there = u < done  # behind the last row there is 0 * 0, which takes nothing away
            picked = tl.load(earlier_ptr + pick, mask=there, other=0.0)
            less = ()
            for c in tl.static_range(len(offs)):
                earlier = tl.load(earlier_ptr + offs[c], mask=tl.where(there, offs[c] < N, False), other=0.0)
                less = less + (x[c] - picked * earlier,)
            x = less
            earlier_ptr += N
            u += 1
    row = ()
    for c in tl.static_range(len(offs)):
        row = row + (tl.div_rn(x[c], tl.full([BLOCK], 1.0, tl.float32) * root),)
        tl.store(factor_ptr + done * N + offs[c], row[c], mask=offs[c] < N)
    return row


@triton.jit
def pick_by_gain(
    s_ptr, quality_ptr, factor_ptr, floor_ptr, order_ptr, nu, starts, count, damping,
    stride_s_i, stride_s_j, stride_quality, N, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Pick up to count tokens while one adds to the volume. Return how many there are, and the chunks."""
    offs = token_chunks(starts, BLOCK)
    i = tl.zeros([], tl.int32)
    key, token = best_keys(nu, offs, None)
    best = tl.min(key, axis=0)
    while (i < count) & (best < 0):  # below 0 are the keys of gains, above it those of NaN
        pick = tl.min(tl.where(key == best, token, NOWHERE), axis=0)
        tl.store(order_ptr + i, pick.to(tl.int64))
        gain = 0.0 - (best ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
        row = next_row(
            s_ptr, quality_ptr, factor_ptr, pick, i, tl.sqrt_rn(gain + damping), starts, stride_s_i, stride_s_j,
            stride_quality, N, BLOCK, UNROLL,
        )  # fmt: skip
        after = ()
        for c in tl.static_range(len(offs)):
            floor = tl.load(floor_ptr + offs[c], mask=offs[c] < N, other=0.0)
            risen = nu[c] + row[c] * row[c]
            left = tl.where(0.0 - risen > floor, risen, dead(tl.full([], EXHAUSTED, tl.int32)))
            left = tl.where(nu[c] == nu[c], left, nu[c])
            after = after + (tl.where(offs[c] == pick, float("nan"), left),)
        nu = after
        tl.debug_barrier()  # what a thread writes of the factor, others read
        key, token = best_keys(nu, offs, None)
        best = tl.min(key, axis=0)
        i += 1
    return i, nu


@triton.jit
def pick_by_worth(
    s_ptr, quality_ptr, order_ptr, nu, starts, place, count, stride_diagonal, stride_quality, N, BLOCK: tl.constexpr
):
    """The rest of the tokens of tier 0 up to count: by quality, by the diagonal without one."""
    offs = token_chunks(starts, BLOCK)
    rest = ()
    for c in tl.static_range(len(offs)):
        there = offs[c] < N
        if quality_ptr is not None:
            worth = quality_of(quality_ptr, stride_quality, offs[c], there)
        else:
            worth = kernel_at(s_ptr + offs[c].to(tl.int64) * stride_diagonal, None, 0, 0.0, offs[c], there)
        rest = rest + (tl.where(died_of(nu[c], EXHAUSTED), negated(worth), float("nan")),)
    while place < count:
        key, token = best_keys(rest, offs, None)
        pick = first_lowest(key, token)
        tl.store(order_ptr + place, pick.to(tl.int64))
        after = ()
        for c in tl.static_range(len(offs)):
            after = after + (tl.where(offs[c] == pick, float("nan"), rest[c]),)
        rest = after
        place += 1


@triton.jit(do_not_specialize=VARYING)
def dpp_select_kernel(
    s_ptr,  # [B, N, N], packed: [T, max_seqlen]; likewise the rest
    quality_ptr,  # [B, N]
    tier_ptr,  # [B, N]
    candidates_ptr,  # [B, N]
    factor_ptr,  # [B, K, N], packed: as many numbers for each token as a segment keeps at most; memory of this program
    floor_ptr,  # [B, N] likewise
    order_ptr,  # [B, K]
    eps, damping,
    stride_s_b, stride_s_i, stride_s_j,
    stride_quality_b, stride_quality_n,
    stride_tier_b, stride_tier_n,
    stride_candidate_b, stride_candidate_n,
    N, K, LOW, packed,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_FILL: tl.constexpr,
    HAS_TIER: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    first = tokens_before(packed, at_b, N)
    factor_ptr += first * K
    floor_ptr += first
    first_k, K, _ = image_rows(packed, pid_b, N, K, 0)
    if packed is not None:
        elsewhere = (N <= LOW) | (BLOCK * CHUNKS < N)  # of another size, so of another launch
        if elsewhere | (K == 0):
            return
    s_ptr += at_b * stride_s_b
    if quality_ptr is not None:
        quality_ptr += at_b * stride_quality_b
    tier_ptr += at_b * stride_tier_b
    order_ptr += first_k
    candidates = candidates_of(candidates_ptr, stride_candidate_b, stride_candidate_n, at_b)
    stride_s_i = tl.cast(stride_s_i, tl.int64)
    live, _counted = count_tiers(tier_ptr, stride_tier_n, N, HAS_TIER, BLOCK, candidates)
    count = tl.minimum(live, K)
    starts = chunk_starts(N, BLOCK, CHUNKS, CHUNKS)
    nu = open_gains(
        s_ptr, quality_ptr, stride_s_i + stride_s_j, stride_quality_n, tier_ptr, stride_tier_n, candidates, floor_ptr,
        starts, eps, N, HAS_TIER, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    place, nu = pick_by_gain(
        s_ptr, quality_ptr, factor_ptr, floor_ptr, order_ptr, nu, starts, count, damping,
        stride_s_i, stride_s_j, stride_quality_n, N, BLOCK, UNROLL,
    )  # fmt: skip
    if place < count:
        pick_by_worth(
            s_ptr, quality_ptr, order_ptr, nu, starts, place, count, stride_s_i + stride_s_j, stride_quality_n, N, BLOCK
        )
    place = count
    if HAS_TIER:  # K distinct tokens are due even where fewer are valid
        place = fill_by_index(order_ptr, tier_ptr, candidates, place, N, K, stride_tier_n, 1, BLOCK_FILL)
        place = fill_by_index(order_ptr, tier_ptr, candidates, place, N, K, stride_tier_n, 2, BLOCK_FILL)
    if HAS_TIER or candidates_ptr is not None:
        while place < K:  # nothing is left that may be picked
            late = place + tl.arange(0, BLOCK_FILL)
            tl.store(order_ptr + late, tl.full([BLOCK_FILL], -1, tl.int64), mask=late < K)
            place += BLOCK_FILL


def check_is_stored(n: int) -> None:
    if n > MAX_STORED:
        raise ValueError(
            f"N: expected at most {MAX_STORED} tokens an image in the Triton dpp_select, got {n}. Remedy: CPU tensors."
        )


def launch_picks(s, quality, order, k, configs, *, tier, candidates, eps, damping, packed=None):
    """One launch, or one for each class of segments: `configs` are (more than so many tokens, config)."""
    images, n = s.shape[:2] if packed is None else (packed.num_segments, packed.max_seqlen)
    factor = new(s, (*s.shape[:-1], k), torch.float32)
    floor = new(s, s.shape[:-1], torch.float32)
    for low, config in configs:
        launch(
            dpp_select_kernel, (images,),
            s, quality, s if tier is None else tier, candidates, factor, floor, order, as_fp32(eps), as_fp32(damping),
            *strides_of(s, 3), *strides_of(quality, 2), *strides_of(tier, 2), *strides_of(candidates, 2),
            n, k, low, packed,
            **config.chunks, BLOCK_FILL=256, HAS_TIER=tier is not None,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def dpp_select(
    s: torch.Tensor,  # [B, N, N]
    quality: torch.Tensor | None,  # [B, N]
    k: int,
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    candidates: torch.Tensor | None = None,  # [B, N] bool
    eps: float = 1e-5,
    damping: float = 0.0,
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    reject_float64(s=s, quality=quality)
    b, n = s.shape[:2]
    check_is_stored(n)
    order = new(s, (b, k), torch.int64)
    if b > 0 and k > 0:
        with on_device_of(s):
            launch_picks(
                s, quality, order, k, [(0, DppConfig.for_shape(n))], tier=tier, candidates=candidates, eps=eps,
                damping=damping,
            )  # fmt: skip
    return order


def dpp_select_from_keys(
    keys: torch.Tensor,  # [B, N, Dk]
    quality: torch.Tensor | None,  # [B, N]
    k: int,
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    candidates: torch.Tensor | None = None,  # [B, N] bool
    eps: float = 1e-5,
    damping: float = 0.0,
) -> torch.Tensor:
    """Likewise, given keys: their cosines are stored, as the picks need the rows of any token."""
    reject_float64(keys=keys, quality=quality)
    b, n, _ = keys.shape
    check_is_stored(n)
    order = new(keys, (b, k), torch.int64)
    if b > 0 and k > 0:
        with on_device_of(keys):
            blocks, tiles = num_blocks_of(n)
            s = new(keys, (b, n, n), torch.float32)
            tiers = new(keys, (b, n), torch.int8)
            row_sums, abs_sums = new(keys, (b, blocks, n), torch.int32), new(keys, (b, tiles), torch.int64)
            launch_tiles(keys, None, None, tiers, row_sums, abs_sums, s)
            launch_picks(
                s, quality, order, k, [(0, DppConfig.for_shape(n))], tier=tier, candidates=candidates, eps=eps,
                damping=damping,
            )  # fmt: skip
    return order


def dpp_select_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    quality: torch.Tensor | None,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    tier: torch.Tensor | None = None,  # [T] int8
    candidates: torch.Tensor | None = None,  # [T] bool
    eps: float = 1e-5,
    damping: float = 0.0,
) -> torch.Tensor:
    """Return order [total_keep] int64 within the segment."""
    reject_float64(s=s, quality=quality)
    num_tokens = s.shape[0]
    max_seqlen = min(max_seqlen, num_tokens)
    check_is_stored(max_seqlen)
    order = new(s, (total_keep,), torch.int64, fill=-1)  # and -1 it stays where there is no token
    if cu_seqlens.shape[0] == 1 or total_keep == 0 or max_seqlen == 0:
        return order
    with on_device_of(s):
        packed = Packed.kept(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen)
        launch_picks(
            s, quality, order, packed.max_keep, DppConfig.for_packed(max_seqlen), tier=tier, candidates=candidates,
            eps=eps, damping=damping, packed=packed,
        )  # fmt: skip
    return order
