"""The greedy loop of Eq. 2 and 4, one program per image: a pick needs the result of the pick before it.

The image's N tokens live in registers, as a tuple of chunks: tensors of BLOCK tokens, the last of which ends at N. So
no load of a row of s needs a mask, and chunks are compared within a thread. Tokens of the last chunk that are in the
one before as well are dead in the last.

A token is dead, no candidate, where its negated utility nu is NaN: no live score can become NaN. The payload of that
NaN says why, so that nothing else has to be kept in registers: 0 is picked, else the token's tier, or DUPLICATE.
"""

# ruff: noqa: RUF005  (*chunks, x) is not in Triton's language

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    FLOAT32_MAX,
    NOWHERE,
    bits_of,
    downscale,
    is_finite,
    lesser,
    magnitude_bits,
    order_key,
)
from ..._triton.launcher import VARYING, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MAX_STORED, SelectConfig

NAN_BITS = tl.constexpr(0x7FC00000)  # positive: its order key is above infinity's
TAKEN = tl.constexpr(3)  # the tier that is never picked
DUPLICATE = tl.constexpr(4)  # in two chunks, or padding; the tiers are 0 to 3
FIXED_POINT = tl.constexpr(1099511627776.0)  # 2**40: priors are summed as integers, so that the order is free


@triton.jit
def start_of(c: tl.constexpr, N, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """The first token of a chunk: a constant but for the last chunk."""
    if c == CHUNKS - 1:
        return tl.full([], N - BLOCK, tl.int32)
    else:
        return tl.full([], c * BLOCK, tl.int32)


@triton.jit
def token_chunks(N, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """The token numbers of all chunks, and whether the chunk is the token's first."""
    offs = ()
    new = ()
    for c in tl.static_range(CHUNKS):
        tokens = start_of(c, N, BLOCK, CHUNKS) + tl.arange(0, BLOCK)
        offs = offs + (tokens,)
        new = new + (tokens >= c * BLOCK,)
    return offs, new


@triton.jit
def count_tokens(chosen):
    count = chosen[0].to(tl.int32)
    for c in tl.static_range(1, len(chosen)):
        count += chosen[c].to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def ranks(chosen):
    """How many chosen tokens come before each token."""
    before = ()
    base = tl.zeros([], tl.int32)
    for c in tl.static_range(len(chosen)):
        one = chosen[c].to(tl.int32)
        before = before + (base + tl.cumsum(one, axis=0) - one,)
        base += tl.sum(one, axis=0)
    return before


@triton.jit
def counted_magnitude(prior, counted):
    """The bits of |prior|, 0 where it is not counted in the mean."""
    return tl.where(counted & is_finite(prior), magnitude_bits(prior), 0)


@triton.jit
def prior_scale(tops, suppression):
    """Two factors that bring priors below 1 in magnitude; 1 where nothing is suppressed: u is then the prior itself."""
    first, second = downscale(tl.max(tops, axis=0).to(tl.float32, bitcast=True))
    return tl.where(suppression == 0, 1.0, first), tl.where(suppression == 0, 1.0, second)


@triton.jit
def counted_fixed(unit, counted, suppression):
    """|unit|, which is below 1, as an integer; 0 where it is not counted in the mean, or where no mean is needed."""
    counted = counted & is_finite(unit) & (suppression != 0)
    return (tl.where(counted, tl.abs(unit), 0.0) * FIXED_POINT).to(tl.int64)


@triton.jit
def prior_factor(sbar, total, count, suppression):
    """sbar / mean|prior| of Eq. 2 and 4 and whether the mean is above 0, given the fixed-point sum of scaled priors."""
    mean = total.to(tl.float64) / tl.maximum(count, 1).to(tl.float64) * (1.0 / FIXED_POINT)
    factor = (sbar.to(tl.float64) / tl.where(mean > 0, mean, 1.0)).to(tl.float32)
    return tl.where(suppression == 0, 1.0, factor), (mean > 0) | (suppression == 0)


@triton.jit
def scaled_priors(prior, counted, sbar, suppression):
    """u = sbar / mean|prior| * prior (Eq. 2, 4), the mean over the counted tokens; 0 where the mean is 0."""
    tops = counted_magnitude(prior[0], counted[0])
    for c in tl.static_range(1, len(prior)):
        tops = tl.maximum(tops, counted_magnitude(prior[c], counted[c]))
    first, second = prior_scale(tops, suppression)
    unit = ()
    fixed = tl.zeros(prior[0].shape, tl.int64)
    for c in tl.static_range(len(prior)):
        unit = unit + (prior[c] * first * second,)
        fixed += counted_fixed(unit[c], counted[c], suppression)
    factor, positive = prior_factor(sbar, tl.sum(fixed, axis=0), count_tokens(counted), suppression)
    u = ()
    for c in tl.static_range(len(prior)):
        u = u + (tl.where(positive, factor * unit[c], 0.0),)
    return u


@triton.jit
def negated(u):
    """-u, never -0, with NaN and infinities clamped to finite values."""
    return 0.0 - tl.where(u != u, -FLOAT32_MAX, tl.minimum(tl.maximum(u, -FLOAT32_MAX), FLOAT32_MAX))


@triton.jit
def dead(reason):
    return (reason + NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit
def died_of(nu, reason: tl.constexpr):
    return bits_of(nu) == NAN_BITS + reason


@triton.jit
def lowest(t, offs, packed):
    """The token with the lowest negated score, the first of them on a tie.

    Chunks are compared as floats within a thread, and NaN loses; only the best of each place becomes an integer key.
    Packed: behind a segment a row of s may hold anything, so a dead token's NaN may have any sign.
    """
    best = t[0]
    token = offs[0]
    for c in tl.static_range(1, len(t)):
        lower = lesser(best, t[c])
        token = tl.where(lower != best, offs[c], token)
        best = lower
    key = order_key(best)
    if packed is not None:
        key = tl.where(best == best, key, NOWHERE)
    return tl.min(tl.where(key == tl.min(key, axis=0), token, NOWHERE), axis=0)


@triton.jit
def pick_greedily(
    s_ptr, order_ptr, nu, offs, count, suppression, stride_s_i, stride_s_j, N, packed, num_tokens,
    BLOCK: tl.constexpr, SANITISE: tl.constexpr, WRITE_ORDER: tl.constexpr,
):  # fmt: skip
    """Pick count tokens, at most as many as are live, and return nu with the picked ones dead.

    t = fl(fl(suppression * m) + nu) is the score of the contract with the opposite sign, two roundings; never -0, as
    nu is not. m is the largest cosine to a pick so far. N is where the last chunk ends, at num_tokens or, where rows of
    s are padded, behind.
    """
    CHUNKS: tl.constexpr = len(nu)
    m = ()
    for _ in tl.static_range(CHUNKS):
        m = m + (tl.full([BLOCK], float("-inf"), tl.float32),)
    first_ptrs = s_ptr + tl.arange(0, BLOCK).to(tl.int64) * stride_s_j
    pick = lowest(nu, offs, None)  # the first pick has no suppression term
    i = tl.zeros([], tl.int32)
    while i < count:
        if WRITE_ORDER:
            tl.store(order_ptr + i, pick.to(tl.int64))
        if packed is not None:  # where offsets are wrong, s may hold anything
            pick = tl.minimum(pick, num_tokens - 1)
        row_ptrs = first_ptrs + pick * stride_s_i
        remaining = ()
        similar = ()
        t = ()
        for c in tl.static_range(CHUNKS):
            s = tl.load(row_ptrs + start_of(c, N, BLOCK, CHUNKS).to(tl.int64) * stride_s_j)
            if SANITISE:
                s = tl.where(tl.abs(s) < float("inf"), s, 0.0)
            similar = similar + (tl.maximum(m[c], s),)
            remaining = remaining + (tl.where(offs[c] == pick, float("nan"), nu[c]),)
            t = t + (suppression * similar[c] + remaining[c],)
        nu, m = remaining, similar
        pick = lowest(t, offs, packed)
        i += 1
    return nu


@triton.jit
def fill_by_index(order_ptr, tier_ptr, place, N, K, stride_tier, TIER: tl.constexpr, BLOCK: tl.constexpr):
    """Write the tokens of a tier, lowest index first, from `place` on; return the next free place."""
    start = tl.zeros([], tl.int32)
    while (start < N) & (place < K):
        offs = start + tl.arange(0, BLOCK)
        tier = tl.load(tier_ptr + offs.to(tl.int64) * stride_tier, mask=offs < N, other=-1)
        chosen = (tier == TIER).to(tl.int32)
        target = place + tl.cumsum(chosen, axis=0) - chosen
        tl.store(order_ptr + target, offs.to(tl.int64), mask=(chosen != 0) & (target < K))
        place += tl.sum(chosen, axis=0)
        start += BLOCK
    return place


@triton.jit(do_not_specialize=VARYING)
def greedy_select_kernel(
    s_ptr,  # [B, N, N]
    prior_ptr,  # [B, N]
    sbar_ptr,  # [B]
    tier_ptr,  # [B, N]
    order_ptr,  # [B, K]
    suppression,
    stride_s_b, stride_s_i, stride_s_j,
    stride_prior_b, stride_prior_n,
    stride_sbar_b,
    stride_tier_b, stride_tier_n,
    N, K,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_FILL: tl.constexpr,
    HAS_SBAR: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    offs, new = token_chunks(N, BLOCK, CHUNKS)
    prior_ptr += pid_b * stride_prior_b
    tier_ptr += pid_b * stride_tier_b
    order_ptr += pid_b * K
    u = ()
    tier = ()
    counted = ()
    for c in tl.static_range(CHUNKS):
        tokens = offs[c].to(tl.int64)
        u = u + (tl.load(prior_ptr + tokens * stride_prior_n).to(tl.float32),)
        of = tl.zeros([BLOCK], tl.int32)
        if HAS_TIER:
            of = tl.load(tier_ptr + tokens * stride_tier_n).to(tl.int32)
        tier = tier + (tl.where(new[c], of, DUPLICATE),)
        counted = counted + ((tier[c] == 0) | (tier[c] == TAKEN),)
    if HAS_SBAR:
        u = scaled_priors(u, counted, tl.load(sbar_ptr + pid_b * stride_sbar_b), suppression)
    nu = ()
    live = ()
    for c in tl.static_range(CHUNKS):
        live = live + (tier[c] == 0,)
        nu = nu + (tl.where(live[c], negated(u[c]), dead(tier[c])),)
    place = tl.minimum(count_tokens(live), K)
    pick_greedily(
        s_ptr + pid_b * stride_s_b, order_ptr, nu, offs, place, suppression, tl.cast(stride_s_i, tl.int64), stride_s_j,
        N, None, N, BLOCK, True, True,
    )  # fmt: skip
    if HAS_TIER:  # K distinct tokens are due even where fewer are valid
        place = fill_by_index(order_ptr, tier_ptr, place, N, K, stride_tier_n, 1, BLOCK_FILL)
        place = fill_by_index(order_ptr, tier_ptr, place, N, K, stride_tier_n, 2, BLOCK_FILL)
        while place < K:  # only TAKEN ones are left
            late = place + tl.arange(0, BLOCK_FILL)
            tl.store(order_ptr + late, tl.full([BLOCK_FILL], -1, tl.int64), mask=late < K)
            place += BLOCK_FILL


def check_is_stored(n: int) -> None:
    if n > MAX_STORED:
        raise ValueError(
            f"N: expected at most {MAX_STORED} tokens an image in the Triton greedy_select, got {n}. "
            "Remedy: select_and_merge, which stores no s beyond that, or CPU tensors."
        )


def greedy_select(
    s: torch.Tensor,  # [B, N, N]
    prior: torch.Tensor,  # [B, N]
    k: int,
    *,
    sbar: torch.Tensor | None = None,  # [B]
    tier: torch.Tensor | None = None,  # [B, N] int8
    suppression: float = 1.0,
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    reject_float64(s=s, prior=prior)
    b, n = prior.shape
    check_is_stored(n)
    order = new(s, (b, k), torch.int64)
    if b == 0 or k == 0:
        return order
    config = SelectConfig.for_shape(n)
    with on_device_of(s):
        launch(
            greedy_select_kernel, (b,),
            s, prior, s if sbar is None else sbar, s if tier is None else tier, order, as_fp32(suppression),
            *s.stride(), *prior.stride(), *strides_of(sbar, 1), *strides_of(tier, 2), n, k,
            BLOCK=config.block, CHUNKS=config.num_chunks(n), BLOCK_FILL=256,
            HAS_SBAR=sbar is not None, HAS_TIER=tier is not None,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return order
