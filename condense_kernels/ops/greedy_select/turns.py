"""Exact lazy batching: the picks of a loop without s, up to 64 at a time.

Once a loop has its first pick scores only fall, so a score that is not up to date is a bound of the one that is. In
turns,

    update  brings every token's score up to date with the picks of the last turn, one program per 64 tokens,
    pick    takes the best tokens as candidates, one program per image, and picks among them alone, by their cosines
            with each other, as long as the best candidate comes before the best token outside.

The picks are those of the plain loop, bit for bit: the candidates' scores are exact, every other token's is at best the
one it had, and (score, index) is compared as a whole, so that ties are exact, too. The first pick of a loop stands
alone: it has no suppression term, and a negative cosine to it raises scores.

The host must not ask how many picks a turn made, and launches a fixed number of turns. So a turn ends after its first
candidates only where the turns that are left can make all other picks, 64 each. Else it takes candidates anew, in
rounds: the best tokens by the scores that are known, which it first brings up to date with its own picks.
"""

import triton
import triton.language as tl

from ..._triton.device import (
    NOWHERE,
    first_block_of,
    has_block,
    image_of_block,
    image_rows,
    image_tokens,
    inside,
    order_key,
    tokens_before,
)
from ..._triton.launcher import VARYING, launch, strides_of
from ..._triton.tables import SimilarityConfig, StreamConfig
from ..similarity.kernel import blocks_of_image, num_blocks_of
from ..similarity.measure import cosines_of, tile_options
from .loop import dead, negated_product

BLOCK = SimilarityConfig.block  # tokens of a tile, so of a turn's picks, and of an update
NOBODY = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # above the place of every token


@triton.jit
def place_of(key, token):
    """One int64 that orders like (key, token): no two tokens are equal."""
    return (key.to(tl.int64) << 32) | token.to(tl.int64)


@triton.jit
def live_key(t, nu):
    """The order key of a negated score; above all of them for a dead token."""
    return tl.where(nu == nu, order_key(t), NOWHERE)


@triton.jit
def score_key(m, nu, suppression, MUL: tl.constexpr):
    """The order key of a token's negated score, given its largest cosine to a pick."""
    if MUL:
        return live_key(negated_product(nu, m, suppression), nu)
    else:
        return live_key(suppression * m + nu, nu)


@triton.jit(do_not_specialize=VARYING)
def update_kernel(
    keys_ptr,  # [B, N, Dk]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    nu_ptr,  # [B, N]
    m_ptr,  # [B, N]
    key_ptr,  # [B, N] int32: the order key of the negated score
    best_ptr,  # [B, blocks] int64: the best place in the block
    batch_ptr,  # [B, BLOCK]
    fresh_ptr,  # [B]
    suppression,
    stride_key_b, stride_key_n, stride_key_d,
    N, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr, MUL: tl.constexpr,
):  # fmt: skip
    """m, scores and the best token of a block, given the last picks."""
    pid = tl.program_id(0)
    pid_b, pid_n = image_of_block(packed, pid, num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, pid_n, BLOCK) == 0:
        return
    first = tokens_before(packed, at_b, N)
    fresh = tl.load(fresh_ptr + pid_b)
    if fresh > 0:
        offs_k = tl.arange(0, BLOCK)
        picks = tl.load(batch_ptr + pid_b * BLOCK + offs_k, mask=offs_k < fresh, other=0)
        picks = inside(packed, picks, N).to(tl.int64)
        offs_n = pid_n * BLOCK + tl.arange(0, BLOCK)
        mask_n = offs_n < N
        tokens = tl.minimum(offs_n, N - 1).to(tl.int64)
        s = cosines_of(
            keys_ptr + at_b * stride_key_b, scale_ptr + first, inverse_ptr + first, tokens, picks,
            stride_key_n, stride_key_d, num_channels, DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
        )  # fmt: skip
        s = tl.where((offs_k < fresh)[None, :], s, float("-inf"))
        at = first + offs_n
        nu = tl.load(nu_ptr + at, mask=mask_n, other=float("nan"))
        m = tl.maximum(tl.load(m_ptr + at, mask=mask_n, other=0.0), tl.max(s, axis=1))
        key = score_key(m, nu, suppression, MUL)
        tl.store(m_ptr + at, m, mask=mask_n)
        tl.store(key_ptr + at, key, mask=mask_n)
        tl.store(best_ptr + pid, tl.min(place_of(key, offs_n), axis=0))


@triton.jit
def best_tokens(packed, key_ptr, best_ptr, N, num_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The BLOCK best tokens of an image, and the place of the best one outside. Beyond N are dead ones to fill up."""
    offs_c = tl.arange(0, BLOCK)
    blocks = tl.arange(0, BLOCKS)
    best = tl.load(best_ptr + blocks, mask=blocks < num_blocks, other=NOBODY)
    candidates = tl.zeros([BLOCK], tl.int32)
    for c in range(BLOCK):
        place = tl.min(best, axis=0)
        token = inside(packed, place.to(tl.int32), num_blocks * BLOCK)
        candidates = tl.where(offs_c == c, token, candidates)
        offs_n = token // BLOCK * BLOCK + offs_c
        key = tl.load(key_ptr + offs_n, mask=offs_n < N, other=NOWHERE)
        places = place_of(key, offs_n)
        successor = tl.min(tl.where(places > place, places, NOBODY), axis=0)
        best = tl.where(blocks == token // BLOCK, successor, best)
    return candidates, tl.min(best, axis=0)


@triton.jit(do_not_specialize=VARYING)
def pick_kernel(
    keys_ptr,  # [B, N, Dk]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    nu_ptr,  # [B, N]
    m_ptr,  # [B, N]
    key_ptr,  # [B, N]
    best_ptr,  # [B, blocks]
    batch_ptr,  # [B, BLOCK]
    fresh_ptr,  # [B]
    due_ptr,  # [B]
    order_ptr,  # [B, K] or None: where the picks are written in their order,
    count_ptr,  # [B] how many they will be; None
    turns_left,
    suppression,
    stride_key_b, stride_key_n, stride_key_d,
    N, K, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr, MUL: tl.constexpr,
):  # fmt: skip
    """The next picks of an image: of one round of candidates, or as many as leave turns_left turns enough.

    The loop ends, whatever is in memory: fresh never falls, and after so many rounds without a pick there is no other.
    Where memory is as it should be there is one before that. A round makes none only if all its candidates were out
    of date: one that was not comes before the best token outside. Then they are up to date, until the next pick.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    at_b, N = image_tokens(packed, pid_b, N)
    blocks = blocks_of_image(packed, N, num_blocks, BLOCK)
    first = tokens_before(packed, at_b, N)
    first_block = first_block_of(packed, pid_b, num_blocks, BLOCK)
    batch = pid_b * BLOCK
    offs_c = tl.arange(0, BLOCK)
    due = tl.minimum(tl.load(due_ptr + pid_b), N)
    if order_ptr is not None:
        first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
        made = tl.maximum(tl.minimum(tl.load(count_ptr + pid_b), K) - due, 0)
        order_ptr += first_k + made
        room = K - made
    fresh = tl.zeros([], tl.int32)
    idle = tl.zeros([], tl.int32)  # rounds since the last pick
    goes_on = due > 0
    while goes_on:
        candidates, outside = best_tokens(packed, key_ptr + first, best_ptr + first_block, N, blocks, BLOCK, BLOCKS)
        tokens = tl.minimum(candidates, N - 1)
        picks = tl.load(batch_ptr + batch + offs_c, mask=offs_c < fresh, other=0)
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        s = tl.zeros([BLOCK, BLOCK], tl.float32)
        part = tl.where(fresh > 0, 0, 1)
        while part < 2:  # with this turn's picks, then with each other: one product in the code, not two to compile
            s = cosines_of(
                keys_ptr + at_b * stride_key_b, scale_ptr + first, inverse_ptr + first,
                tokens.to(tl.int64), tl.where(part == 0, picks, tokens).to(tl.int64),
                stride_key_n, stride_key_d, num_channels, DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
            )  # fmt: skip
            to_picks = tl.where((part == 0) & (offs_c < fresh)[None, :], s, float("-inf"))
            m = tl.maximum(m, tl.max(to_picks, axis=1))
            part += 1

        at = first + tokens
        nu = tl.where(candidates < N, tl.load(nu_ptr + at), float("nan"))
        m = tl.maximum(m, tl.load(m_ptr + at))
        before = fresh
        place = tl.min(place_of(score_key(m, nu, suppression, MUL), candidates), axis=0)
        while (fresh < due) & (fresh < BLOCK) & (place < outside):
            pick = inside(packed, place.to(tl.int32), N)
            tl.store(nu_ptr + first + pick, dead(tl.zeros([], tl.int32)))
            tl.store(batch_ptr + batch + fresh, pick)
            if order_ptr is not None:
                tl.store(order_ptr + fresh, pick.to(tl.int64), mask=fresh < room)
            row = tl.max(tl.where((candidates == pick)[:, None], s, float("-inf")), axis=0)
            m = tl.maximum(m, row)
            nu = tl.where(candidates == pick, float("nan"), nu)
            place = tl.min(place_of(score_key(m, nu, suppression, MUL), candidates), axis=0)
            fresh += 1

        tl.store(key_ptr + at, score_key(m, nu, suppression, MUL), mask=candidates < N)
        tl.debug_barrier()  # the keys are read back by other threads
        theirs = candidates // BLOCK
        offs_n = theirs[:, None] * BLOCK + offs_c[None, :]
        key = tl.load(key_ptr + first + offs_n, mask=offs_n < N, other=NOWHERE)
        tl.store(best_ptr + first_block + theirs, tl.min(place_of(key, offs_n), axis=1))
        tl.debug_barrier()

        idle = tl.where(fresh > before, 0, idle + 1)
        rest = due - fresh
        goes_on = (rest > 0) & (fresh < BLOCK) & ((fresh == 0) | (rest > turns_left * BLOCK)) & (idle <= blocks)
    if fresh > 0:  # else other threads may not have read it yet
        tl.store(due_ptr + pid_b, due - fresh)
    tl.store(fresh_ptr + pid_b, fresh)


def launch_turns(w, keys, count, suppression, packed=None, order=None, mul=False):
    """All picks but the first of a loop, which has at most count. Turns enough: each makes a pick, or 64 if need be."""
    n, dk = keys.shape[-2:]
    if packed is not None:
        n = packed.max_seqlen
    blocks, _ = num_blocks_of(n)
    spare = StreamConfig.for_shape().spare_turns
    options = {**tile_options(keys), "MUL": mul}
    factors = (keys, w.scale, w.inverse, w.nu, w.m, w.key, w.best, w.batch, w.fresh)
    strides = (suppression, *strides_of(keys, 3))
    out = (None, None) if order is None else (order, w.count)
    turns = min(count - 1, triton.cdiv(count - 1, BLOCK) + spare)
    for turns_left in reversed(range(turns)):
        launch(update_kernel, (w.best.numel(),), *factors, *strides, n, blocks, dk, packed, **options)
        launch(
            pick_kernel, (w.due.numel(),), *factors, w.due, *out, turns_left, *strides, n, count, blocks, dk, packed,
            **options, BLOCKS=triton.next_power_of_2(blocks),
        )  # fmt: skip
