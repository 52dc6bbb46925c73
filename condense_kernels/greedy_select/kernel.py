"""The greedy loop of Eq. 2 and 4, one program per image: a pick needs the result of the pick before it.

The image's N tokens live in registers as two segments of exact powers of two: the first N0 tokens and the last N1,
N0 + N1 >= N. Tokens in the overlap are dead in the second segment. So no load of a row of s needs a mask.

A token is dead, no candidate, where its negated utility nu is NaN: no live score can become NaN. The payload of that
NaN says why, so that nothing else has to be kept in registers: 0 is picked, else the token's tier, or DUPLICATE.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._triton import (
    FLOAT32_MAX,
    NOWHERE,
    bits_of,
    downscale,
    is_finite,
    magnitude_bits,
    on_device_of,
    order_key,
    reject_float64,
    strides_of,
)

MAX_TOKENS = 16384  # a register file of 65,536 numbers then holds four a token; the loop needs three at a time
NAN_BITS = tl.constexpr(0x7FC00000)  # positive: its order key is above infinity's
TAKEN = tl.constexpr(3)  # the tier that is never picked
DUPLICATE = tl.constexpr(4)  # in the overlap of the segments, or padding; the tiers are 0 to 3
FIXED_POINT = tl.constexpr(1099511627776.0)  # 2**40: priors are summed as integers, so that the order is free


def check_num_tokens(n: int) -> None:
    if n > MAX_TOKENS:
        raise ValueError(
            f"N: expected at most {MAX_TOKENS} tokens an image in the Triton greedy selection, got {n}. "
            "Remedy: condense windows or frames separately, or use CPU tensors."
        )


@dataclass(frozen=True)
class SelectConfig:
    n0: int  # tokens in the first segment
    n1: int  # tokens in the second
    num_warps: int

    @classmethod
    def for_shape(cls, n: int) -> "SelectConfig":
        n0 = 1 << max(n - 1, 1).bit_length() - 1  # the largest power of two below n: both segments exist
        if n > 1024:  # equal segments: a reduction across warps costs more than the lanes that are doubled
            return cls(n0, n0, num_warps=8 if n <= 4096 else 16)
        return cls(n0, triton.next_power_of_2(max(n - n0, 1)), num_warps=1)


@triton.jit
def segments(N, N0: tl.constexpr, N1: tl.constexpr):
    """The token numbers of both segments, and which of the second are not in the first."""
    offs0 = tl.arange(0, N0)
    offs1 = N - N1 + tl.arange(0, N1)
    return offs0, offs1, offs1 >= N0


@triton.jit
def count_tokens(chosen0, chosen1):
    return tl.sum(chosen0.to(tl.int32), axis=0) + tl.sum(chosen1.to(tl.int32), axis=0)


@triton.jit
def ranks(chosen0, chosen1):
    """How many chosen tokens come before each token."""
    chosen0 = chosen0.to(tl.int32)
    chosen1 = chosen1.to(tl.int32)
    before1 = tl.sum(chosen0, axis=0) + tl.cumsum(chosen1, axis=0) - chosen1
    return tl.cumsum(chosen0, axis=0) - chosen0, before1


@triton.jit
def scaled_prior(prior0, prior1, counted0, counted1, sbar):
    """u = sbar / mean|prior| * prior (Eq. 2, 4), the mean over the counted tokens; 0 where the mean is 0."""
    summed0 = counted0 & is_finite(prior0)
    summed1 = counted1 & is_finite(prior1)
    top0 = tl.max(tl.where(summed0, magnitude_bits(prior0), 0), axis=0)
    top1 = tl.max(tl.where(summed1, magnitude_bits(prior1), 0), axis=0)
    first, second = downscale(tl.maximum(top0, top1).to(tl.float32, bitcast=True))
    unit0 = prior0 * first * second  # |unit| < 1
    unit1 = prior1 * first * second
    fixed0 = (tl.where(summed0, tl.abs(unit0), 0.0) * FIXED_POINT).to(tl.int64)
    fixed1 = (tl.where(summed1, tl.abs(unit1), 0.0) * FIXED_POINT).to(tl.int64)
    total = (tl.sum(fixed0, axis=0) + tl.sum(fixed1, axis=0)).to(tl.float64)
    mean = total / tl.maximum(count_tokens(counted0, counted1), 1).to(tl.float64) * (1.0 / FIXED_POINT)
    factor = (sbar.to(tl.float64) / tl.where(mean > 0, mean, 1.0)).to(tl.float32)
    return tl.where(mean > 0, factor * unit0, 0.0), tl.where(mean > 0, factor * unit1, 0.0)


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
def lowest(t0, t1, offs0, offs1):
    """The token with the lowest negated score, the first of them on a tie."""
    key0 = order_key(t0)
    key1 = order_key(t1)
    if offs0.shape[0] == offs1.shape[0]:  # half the reductions, and so half the barriers
        best = tl.min(tl.minimum(key0, key1), axis=0)
        first0 = tl.where(key0 == best, offs0, NOWHERE)
        first1 = tl.where(key1 == best, offs1, NOWHERE)
        return tl.min(tl.minimum(first0, first1), axis=0)
    else:
        best = tl.minimum(tl.min(key0, axis=0), tl.min(key1, axis=0))
        first0 = tl.min(tl.where(key0 == best, offs0, NOWHERE), axis=0)
        first1 = tl.min(tl.where(key1 == best, offs1, NOWHERE), axis=0)
        return tl.minimum(first0, first1)


@triton.jit
def load_cosines(pointers, SANITISE: tl.constexpr):
    s = tl.load(pointers)
    return tl.where(is_finite(s), s, 0.0) if SANITISE else s


@triton.jit
def pick_greedily(
    s_ptr, order_ptr, nu0, nu1, offs0, offs1, count, suppression, stride_s_i, stride_s_j,
    SANITISE: tl.constexpr, WRITE_ORDER: tl.constexpr,
):  # fmt: skip
    """Pick count tokens, at most as many as are live, and return nu with the picked ones dead.

    t = fl(fl(suppression * m) + nu) is the score of the contract with the opposite sign, two roundings; never -0, as
    nu is not. m is the largest cosine to a pick so far.
    """
    t0 = nu0  # the first pick has no suppression term
    t1 = nu1
    m0 = tl.full(offs0.shape, float("-inf"), tl.float32)
    m1 = tl.full(offs1.shape, float("-inf"), tl.float32)
    i = tl.zeros([], tl.int32)
    while i < count:
        pick = lowest(t0, t1, offs0, offs1)
        if WRITE_ORDER:
            tl.store(order_ptr + i, pick.to(tl.int64))
        row_ptr = s_ptr + pick.to(tl.int64) * stride_s_i
        m0 = tl.maximum(m0, load_cosines(row_ptr + offs0.to(tl.int64) * stride_s_j, SANITISE))
        m1 = tl.maximum(m1, load_cosines(row_ptr + offs1.to(tl.int64) * stride_s_j, SANITISE))
        nu0 = tl.where(offs0 == pick, float("nan"), nu0)
        nu1 = tl.where(offs1 == pick, float("nan"), nu1)
        t0 = suppression * m0 + nu0
        t1 = suppression * m1 + nu1
        i += 1
    return nu0, nu1


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


@triton.jit
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
    N0: tl.constexpr, N1: tl.constexpr, BLOCK: tl.constexpr, HAS_SBAR: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    offs0, offs1, new1 = segments(N, N0, N1)
    prior_ptr += pid_b * stride_prior_b
    tier_ptr += pid_b * stride_tier_b
    order_ptr += pid_b * K
    u0 = tl.load(prior_ptr + offs0.to(tl.int64) * stride_prior_n).to(tl.float32)
    u1 = tl.load(prior_ptr + offs1.to(tl.int64) * stride_prior_n).to(tl.float32)
    tier0 = tl.zeros([N0], tl.int32)
    tier1 = tl.zeros([N1], tl.int32)
    if HAS_TIER:
        tier0 = tl.load(tier_ptr + offs0.to(tl.int64) * stride_tier_n).to(tl.int32)
        tier1 = tl.load(tier_ptr + offs1.to(tl.int64) * stride_tier_n).to(tl.int32)
    tier1 = tl.where(new1, tier1, DUPLICATE)
    if HAS_SBAR:
        sbar = tl.load(sbar_ptr + pid_b * stride_sbar_b)
        u0, u1 = scaled_prior(u0, u1, (tier0 == 0) | (tier0 == TAKEN), (tier1 == 0) | (tier1 == TAKEN), sbar)
    nu0 = tl.where(tier0 == 0, negated(u0), dead(tier0))
    nu1 = tl.where(tier1 == 0, negated(u1), dead(tier1))
    place = tl.minimum(count_tokens(tier0 == 0, tier1 == 0), K)
    pick_greedily(
        s_ptr + pid_b * stride_s_b, order_ptr, nu0, nu1, offs0, offs1, place, suppression, stride_s_i, stride_s_j,
        True, True,
    )  # fmt: skip
    if HAS_TIER:  # K distinct tokens are due even where fewer are valid
        place = fill_by_index(order_ptr, tier_ptr, place, N, K, stride_tier_n, 1, BLOCK)
        place = fill_by_index(order_ptr, tier_ptr, place, N, K, stride_tier_n, 2, BLOCK)
        while place < K:  # only TAKEN ones are left
            offs = place + tl.arange(0, BLOCK)
            tl.store(order_ptr + offs, tl.full([BLOCK], -1, tl.int64), mask=offs < K)
            place += BLOCK


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
    check_num_tokens(n)
    order = s.new_empty((b, k), dtype=torch.int64)
    if b == 0 or k == 0:
        return order
    config = SelectConfig.for_shape(n)
    with on_device_of(s):
        greedy_select_kernel[(b,)](
            s, prior, s if sbar is None else sbar, s if tier is None else tier, order, float(suppression),
            *s.stride(), *prior.stride(), *strides_of(sbar, 1), *strides_of(tier, 2), n, k,
            N0=config.n0, N1=config.n1, BLOCK=256, HAS_SBAR=sbar is not None, HAS_TIER=tier is not None,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return order
