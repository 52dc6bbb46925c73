"""The greedy loop of Eq. 2 and 4 on one image, in one program: a pick needs the result of the pick before it.

The image's tokens live in registers, as a tuple of chunks: tensors of BLOCK tokens, compared with each other within a
thread. There are as many as the largest image of a span needs (SelectConfig), of which every image of the span has the
first WHOLE; in the others, what is past the end is dead.

Only the pick loop is written out for each chunk. What comes before and after goes through memory, in loops: the
compiler's pass that chooses layouts looks, for every load, at all pairs of operations that depend on each other.

A token is dead, no candidate, where its negated utility nu is NaN: no live score can become NaN. The payload of that
NaN says why, so that nothing else has to be kept in registers: 0 is picked, else the token's tier, or PADDING.
"""

# ruff: noqa: RUF005  (*chunks, x) is not in Triton's language

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

NAN_BITS = tl.constexpr(0x7FC00000)  # positive: its order key is above infinity's
TAKEN = tl.constexpr(3)  # the tier that is never picked
PADDING = tl.constexpr(4)  # behind the last token; the tiers are 0 to 3
FIXED_POINT = tl.constexpr(1099511627776.0)  # 2**40: priors are summed as integers, so that the order is free


@triton.jit
def chunk_starts(columns, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FIXED: tl.constexpr):
    """The first token of each chunk. Of those that are not fixed, none ends behind a row of so many columns."""
    starts = ()
    for c in tl.static_range(CHUNKS):
        start = tl.full([], c * BLOCK, tl.int32)
        if c >= FIXED:
            start = tl.minimum(start, columns - BLOCK)
        starts = starts + (start,)
    return starts


@triton.jit
def token_chunks(starts, BLOCK: tl.constexpr):
    offs = ()
    for c in tl.static_range(len(starts)):
        offs = offs + (starts[c] + tl.arange(0, BLOCK),)
    return offs


@triton.jit
def counted_magnitude(prior, counted):
    """The bits of |prior|, 0 where it is not counted in the mean."""
    return tl.where(counted & is_finite(prior), magnitude_bits(prior), 0)


@triton.jit
def prior_scale(tops, plain):
    """Two factors that bring priors below 1 in magnitude; 1 where a prior is plain: u itself."""
    first, second = downscale(tl.max(tops, axis=0).to(tl.float32, bitcast=True))
    return tl.where(plain, 1.0, first), tl.where(plain, 1.0, second)


@triton.jit
def counted_fixed(unit, counted, plain):
    """|unit|, which is below 1, as an integer; 0 where it is not counted in the mean, or where no mean is needed."""
    factor = tl.where(plain, 0.0, FIXED_POINT)
    return (tl.where(counted & is_finite(unit), tl.abs(unit), 0.0) * factor).to(tl.int64)


@triton.jit
def prior_factor(sbar, total, count, plain):
    """sbar / mean|prior| of Eq. 2 and 4 and whether the mean is above 0, given the fixed-point sum of scaled priors."""
    mean = total.to(tl.float64) / tl.maximum(count, 1).to(tl.float64) * (1.0 / FIXED_POINT)
    factor = (sbar.to(tl.float64) / tl.where(mean > 0, mean, 1.0)).to(tl.float32)
    return tl.where(plain, 1.0, factor), (mean > 0) | plain


@triton.jit
def is_counted(tier):
    """In the means of Eq. 2 and 4: also where it has been picked."""
    return (tier == 0) | (tier == TAKEN)


@triton.jit
def tier_of(tier_ptr, stride_tier, tokens, N, HAS_TIER: tl.constexpr, candidates=None):
    """What candidates, a pointer and a stride, exclude is in tier 3 if it counts in a mean, else like padding."""
    if HAS_TIER:
        tier = tl.load(tier_ptr + tokens.to(tl.int64) * stride_tier, mask=tokens < N, other=PADDING).to(tl.int32)
    else:
        tier = tl.where(tokens < N, 0, PADDING)
    if candidates is not None:
        candidates_ptr, stride = candidates
        chosen = tl.load(candidates_ptr + tokens.to(tl.int64) * stride, mask=tokens < N, other=0) != 0
        tier = tl.where(chosen, tier, tl.where(is_counted(tier), TAKEN, PADDING))
    return tier


@triton.jit
def prior_of(prior_ptr, stride_prior, tokens, N):
    if prior_ptr is None:
        return tl.zeros(tokens.shape, tl.float32)
    else:
        return tl.load(prior_ptr + tokens.to(tl.int64) * stride_prior, mask=tokens < N, other=0.0).to(tl.float32)


@triton.jit
def count_tiers(tier_ptr, stride_tier, N, HAS_TIER: tl.constexpr, WIDE: tl.constexpr, candidates=None):
    """How many tokens are live, and how many count in a mean."""
    live = tl.zeros([WIDE], tl.int32)
    counted = tl.zeros([WIDE], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        tier = tier_of(tier_ptr, stride_tier, start + tl.arange(0, WIDE), N, HAS_TIER, candidates)
        live += (tier == 0).to(tl.int32)
        counted += is_counted(tier).to(tl.int32)
        start += WIDE
    return tl.sum(live, axis=0), tl.sum(counted, axis=0)


@triton.jit
def prior_scaling(
    prior_ptr, stride_prior, tier_ptr, stride_tier, count, sbar, plain, N,
    HAS_TIER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Factors that bring a prior to u = sbar / mean|prior| * prior (Eq. 2, 4), and whether the mean is above 0.

    plain: u is the prior itself, as where nothing is suppressed.
    """
    tops = tl.zeros([WIDE], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        tokens = start + tl.arange(0, WIDE)
        counted = is_counted(tier_of(tier_ptr, stride_tier, tokens, N, HAS_TIER))
        tops = tl.maximum(tops, counted_magnitude(prior_of(prior_ptr, stride_prior, tokens, N), counted))
        start += WIDE
    first, second = prior_scale(tops, plain)
    total = tl.zeros([WIDE], tl.int64)
    start = tl.zeros([], tl.int32)
    while start < N:
        tokens = start + tl.arange(0, WIDE)
        counted = is_counted(tier_of(tier_ptr, stride_tier, tokens, N, HAS_TIER))
        total += counted_fixed(prior_of(prior_ptr, stride_prior, tokens, N) * first * second, counted, plain)
        start += WIDE
    factor, positive = prior_factor(sbar, tl.sum(total, axis=0), count, plain)
    return first, second, factor, positive


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
def negated_utilities(
    prior_ptr, stride_prior, tier_ptr, stride_tier, starts, scaling, N, HAS_TIER: tl.constexpr, BLOCK: tl.constexpr,
    MUL: tl.constexpr = False, candidates=None,
):  # fmt: skip
    """Chunks of -u, NaN where a token is dead. u is 0 where the mean is 0, the prior itself where scaling is None.

    MUL: at least 0, as a negative utility would rise with what suppresses it.
    """
    offs = token_chunks(starts, BLOCK)
    nu = ()
    for c in tl.static_range(len(offs)):
        tier = tier_of(tier_ptr, stride_tier, offs[c], N, HAS_TIER, candidates)
        u = prior_of(prior_ptr, stride_prior, offs[c], N)
        if scaling is not None:
            first, second, factor, positive = scaling
            u = tl.where(positive, factor * (u * first * second), 0.0)
        if MUL:
            u = tl.where(u > 0, u, 0.0)
        nu = nu + (tl.where(tier == 0, negated(u), dead(tier)),)
    return nu


@triton.jit
def first_utilities(first_ptr, stride_b, stride_n, pid_b, at_b, nu, starts, N, BLOCK: tl.constexpr):
    """What the first pick goes by instead of the chunks nu, likewise negated and NaN where dead.

    A given token comes before all others; where it is dead, or there is none, it is nu that decides.
    """
    offs = token_chunks(starts, BLOCK)
    chunks = ()
    if first_ptr.dtype.element_ty == tl.int64:
        token = tl.load(first_ptr + pid_b * stride_b)
        token = tl.where((token >= 0) & (token < N), token, -1).to(tl.int32)
        for c in tl.static_range(len(offs)):
            chunks = chunks + (tl.where((offs[c] == token) & (nu[c] == nu[c]), float("-inf"), nu[c]),)
    else:
        for c in tl.static_range(len(offs)):
            u = prior_of(first_ptr + at_b * stride_b, stride_n, offs[c], N)
            chunks = chunks + (tl.where(nu[c] == nu[c], negated(u), nu[c]),)
    return chunks


@triton.jit
def count_dead(nu_ptr, reason: tl.constexpr, N, WIDE: tl.constexpr):
    count = tl.zeros([WIDE], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        tokens = start + tl.arange(0, WIDE)
        count += died_of(tl.load(nu_ptr + tokens, mask=tokens < N, other=0.0), reason).to(tl.int32)
        start += WIDE
    return tl.sum(count, axis=0)


@triton.jit
def write_kept(nu_ptr, indices_ptr, picked, K, N, WIDE: tl.constexpr):
    """The kept tokens, ascending. K are due even where fewer are valid: then tier 1 by index, then tier 2.

    No more than K, though another program may have picked here, too: where wrong offsets make segments overlap.
    """
    broken_due = K - picked
    masked_due = K - picked
    if broken_due > 0:
        masked_due -= count_dead(nu_ptr, 1, N, WIDE)
    short = broken_due > 0
    place = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        tokens = start + tl.arange(0, WIDE)
        nu = tl.load(nu_ptr + tokens, mask=tokens < N, other=0.0)
        kept = died_of(nu, 0).to(tl.int32)
        if short:
            broken = died_of(nu, 1).to(tl.int32)
            masked = died_of(nu, 2).to(tl.int32)
            kept |= broken & (tl.cumsum(broken, axis=0) <= broken_due).to(tl.int32)
            kept |= masked & (tl.cumsum(masked, axis=0) <= masked_due).to(tl.int32)
            broken_due -= tl.sum(broken, axis=0)
            masked_due -= tl.sum(masked, axis=0)
        rank = place + tl.cumsum(kept, axis=0) - kept
        tl.store(indices_ptr + rank, tokens.to(tl.int64), mask=(kept != 0) & (rank < K))
        place += tl.sum(kept, axis=0)
        start += WIDE


@triton.jit
def best_keys(t, offs, packed):
    """Of each place of the chunks the lowest negated score, as an integer that orders like it, and its token.

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
    return key, token


@triton.jit
def first_lowest(key, token):
    """The token with the lowest key, the first of them on a tie."""
    return tl.min(tl.where(key == tl.min(key, axis=0), token, NOWHERE), axis=0)


@triton.jit
def row_of(
    first_ptrs, token, starts, offs, stride_s_i, stride_s_j, columns,
    BLOCK: tl.constexpr, SURE: tl.constexpr, SANITISE: tl.constexpr,
):  # fmt: skip
    """A token's row of s, in chunks, from where row 0 begins. It has so many columns, the first SURE chunks surely."""
    ptrs = first_ptrs + token * stride_s_i
    row = ()
    for c in tl.static_range(len(starts)):
        at = ptrs + starts[c].to(tl.int64) * stride_s_j
        s = tl.load(at) if c < SURE else tl.load(at, mask=offs[c] < columns, other=0.0)
        if SANITISE:
            s = tl.where(tl.abs(s) < float("inf"), s, 0.0)
        row = row + (s,)
    return row


@triton.jit
def negated_product(nu, similar, suppression):
    """nu * (1 - suppression * m): the factor is finite, as 0 times infinity would be no score."""
    factor = tl.minimum(tl.maximum(1.0 - suppression * similar, -FLOAT32_MAX), FLOAT32_MAX)
    return nu * factor + 0.0  # not -0, which a key tells from 0


@triton.jit
def pick_greedily(
    s_ptr, order_ptr, nu, starts, count, suppression, stride_s_i, stride_s_j, columns, packed, num_tokens,
    BLOCK: tl.constexpr, SURE: tl.constexpr, AHEAD: tl.constexpr, SANITISE: tl.constexpr, WRITE_ORDER: tl.constexpr,
    MUL: tl.constexpr = False, first=None,
):  # fmt: skip
    """Pick count tokens, at most as many as are live, and return nu with the picked ones dead.

    t is the score of the contract with the opposite sign, every operation rounded; never -0, as nu is not. m is the
    largest similarity to a pick so far: the first pick has none, and goes by the chunks `first` where there are some.

    AHEAD: while a pick is worked on, the row of the best token of another place is on its way, as that is mostly the
    next pick. Where it is not, its row is loaded when it is known, so the guess takes no part in the picks.
    """
    CHUNKS: tl.constexpr = len(nu)
    offs = token_chunks(starts, BLOCK)
    m = ()
    for _ in tl.static_range(CHUNKS):
        m = m + (tl.full([BLOCK], float("-inf"), tl.float32),)
    key, token = best_keys(nu if first is None else first, offs, None)
    pick = first_lowest(key, token)
    first_ptrs = s_ptr + tl.arange(0, BLOCK).to(tl.int64) * stride_s_j
    row = m
    guess = tl.full([], -1, tl.int32)
    i = tl.zeros([], tl.int32)
    while i < count:
        if WRITE_ORDER:
            tl.store(order_ptr + i, pick.to(tl.int64))
        if packed is not None:  # where offsets are wrong, s may hold anything
            pick = tl.minimum(pick, num_tokens - 1)
        if AHEAD == 0:
            row = row_of(first_ptrs, pick, starts, offs, stride_s_i, stride_s_j, columns, BLOCK, SURE, SANITISE)
        else:
            if pick != guess:
                row = row_of(first_ptrs, pick, starts, offs, stride_s_i, stride_s_j, columns, BLOCK, SURE, SANITISE)
            guess = first_lowest(tl.where(token == pick, NOWHERE, key), token)
            guess = tl.minimum(guess, num_tokens - 1)  # a dead token, or none, if there is no other place
            ahead = row_of(first_ptrs, guess, starts, offs, stride_s_i, stride_s_j, columns, BLOCK, SURE, SANITISE)
        remaining = ()
        similar = ()
        t = ()
        for c in tl.static_range(CHUNKS):
            similar = similar + (tl.maximum(m[c], row[c]),)
            remaining = remaining + (tl.where(offs[c] == pick, float("nan"), nu[c]),)
            if MUL:
                t = t + (negated_product(remaining[c], similar[c], suppression),)
            else:
                t = t + (suppression * similar[c] + remaining[c],)
        nu, m = remaining, similar
        key, token = best_keys(t, offs, packed)
        pick = first_lowest(key, token)
        if AHEAD:
            row = ahead
        i += 1
    return nu
