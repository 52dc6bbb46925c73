"""The attention that keys get (Eq. 1), without the map: every query's normaliser, then the mean of every column.

Two launches, each of which computes the products again, a tile at a time; neither stores one. Both keep their sums a
number for each place in a tile and add those up in the end, in pairs: the order follows the tile and the number of
queries or keys, and neither the layout that the compiler gives a tile nor what else is in the batch.
"""

import math

import torch
import triton
import triton.language as tl

from ..._triton.device import INTERPRETED, has_block, image_of_block, image_tokens, sum_in_pairs
from ..._triton.launcher import VARYING, Packed, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import AttentionConfig
from ..similarity.cosine import load_rows

LOG2E = tl.constexpr(1.4426950408889634)  # exponents are of 2, as the hardware's are
NONE = tl.constexpr(-(2**30))  # no query: below the place of every key, also less or plus a number of tokens


@triton.jit
def slots_of_image(packed, pid_b, M, N, R):
    """Of an image: its place on the batch axis, its queries, its keys, and the slots of its chosen queries."""
    at_b, N = image_tokens(packed, pid_b, N)
    if packed is not None:
        M = N
        R = N
    return at_b, M, N, R


@triton.jit
def chosen_queries(rows_ptr, slots, stride_r, M, R):
    """The queries in some slots, NONE where a row is -1 or whatever else is not in [0, M)."""
    exists = slots < R
    query = slots
    if rows_ptr is not None:
        row = tl.load(rows_ptr + slots.to(tl.int64) * stride_r, mask=exists, other=-1)
        query = tl.where(row >> 32 == 0, row.to(tl.int32), -1)  # narrow at once: a thread has one for every column
        exists = (query >= 0) & (query < M)
    return tl.where(exists, query, NONE)


@triton.jit
def product(x, y, acc):
    """acc [I, J] + x [I, C] y^T. In the interpreter tl.dot is a BLAS, which rounds an element by its place."""
    if INTERPRETED:
        lanes = x.to(tl.float32)[:, None, :] * y.to(tl.float32)[None, :, :]
        channels = tl.reshape(lanes, [x.shape[0] * y.shape[0], x.shape[1]])
        return acc + tl.reshape(sum_in_pairs(channels), acc.shape)
    return tl.dot(x, tl.trans(y), acc, input_precision="ieee")


@triton.jit
def logit_tile(
    held, held_ptr, offs_i, stride_i, stride_i_d, ptr, offs_j, stride_j, stride_j_d, factor, channels,
    DK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[I, J] logits, in units of log 2, of the rows that a program holds with others; long ones are read again."""
    offs_i = offs_i.to(tl.int64)
    offs_j = offs_j.to(tl.int64)
    acc = tl.zeros([offs_i.shape[0], offs_j.shape[0]], tl.float32)
    if DK <= BLOCK_D:
        acc = product(held, load_rows(ptr, offs_j, 0, stride_j, stride_j_d, DK, BLOCK_D), acc)
    else:
        d = tl.zeros([], tl.int32)
        while d < channels:
            x = load_rows(held_ptr, offs_i, d, stride_i, stride_i_d, DK, BLOCK_D)
            acc = product(x, load_rows(ptr, offs_j, d, stride_j, stride_j_d, DK, BLOCK_D), acc)
            d += BLOCK_D
    return acc * factor


@triton.jit(do_not_specialize=VARYING)
def attention_lse_kernel(
    queries_ptr,  # [B, Hq, M, d]
    keys_ptr,  # [B, Hkv, N, d]
    rows_ptr,  # [B, R] or None
    mask_ptr,  # [B, N] or None
    lse_ptr,  # [B, Hq, R]: log2 of the sum of a row's exponentials, -inf where it sees no key
    stride_query_b, stride_query_h, stride_query_m, stride_query_d,  # but for the last, these strides are in UNITs
    stride_key_b, stride_key_h, stride_key_n, stride_key_d,
    stride_row_b, stride_row_r,
    stride_mask_b, stride_mask_n,
    stride_lse_b, stride_lse_h, stride_lse_r,
    M, N, R, num_blocks, group, num_channels, factor, packed,
    DK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """A program holds a block of queries of one head and goes through the keys."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK_M)
    pid_h = tl.program_id(1).to(tl.int64)
    at_b, M, N, R = slots_of_image(packed, pid_b, M, N, R)
    if has_block(packed, N, block, BLOCK_M) == 0:
        return
    queries_ptr += (at_b * stride_query_b + pid_h * stride_query_h) * UNIT
    keys_ptr += (at_b * stride_key_b + pid_h // group * stride_key_h) * UNIT
    stride_query_m *= UNIT
    stride_key_n *= UNIT
    if rows_ptr is not None:
        rows_ptr += at_b * stride_row_b
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = chosen_queries(rows_ptr, slots, stride_row_r, M, R)
    last = query + (N - M)  # of the keys that it sees, if CAUSAL
    query = tl.maximum(query, 0)
    held = load_rows(queries_ptr, query.to(tl.int64), 0, stride_query_m, stride_query_d, DK, BLOCK_D)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    stop = N
    if CAUSAL:
        stop = tl.minimum(N, tl.max(last, axis=0) + 1)
    for start in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys = tl.minimum(offs_n, N - 1)
        logits = logit_tile(
            held, queries_ptr, query, stride_query_m, stride_query_d, keys_ptr, keys, stride_key_n, stride_key_d,
            factor, num_channels, DK, BLOCK_D,
        )  # fmt: skip
        if mask_ptr is not None:
            present = tl.load(mask_ptr + at_b * stride_mask_b + keys.to(tl.int64) * stride_mask_n) != 0
            offs_n = tl.where(present, offs_n, N)  # which none sees
        visible = (offs_n < N)[None, :]
        if CAUSAL:
            visible = visible & (offs_n[None, :] <= last[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        sums = tl.fma(sums, tl.exp2(top - base)[:, None], tl.exp2(logits - base[:, None]))
        top = higher
    lse = top + tl.log2(sum_in_pairs(sums))
    tl.store(lse_ptr + at_b * stride_lse_b + pid_h * stride_lse_h + slots.to(tl.int64) * stride_lse_r, lse, slots < R)


@triton.jit(do_not_specialize=VARYING)
def attention_columns_kernel(
    queries_ptr,  # [B, Hq, M, d]
    keys_ptr,  # [B, Hkv, N, d]
    rows_ptr,  # [B, R] or None
    mask_ptr,  # [B, N] or None
    lse_ptr,  # [B, Hq, R] from the launch before, or GIVEN: [B, Hq, M], the natural logarithm
    scores_ptr,  # [B, Hq, N]
    stride_query_b, stride_query_h, stride_query_m, stride_query_d,  # but for the last, these strides are in UNITs
    stride_key_b, stride_key_h, stride_key_n, stride_key_d,
    stride_row_b, stride_row_r,
    stride_mask_b, stride_mask_n,
    stride_lse_b, stride_lse_h, stride_lse_r,
    stride_score_b, stride_score_h, stride_score_n,
    M, N, R, num_blocks, group, num_channels, factor, packed,
    DK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """A program holds a block of keys and goes through the chosen queries of one head."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK_N)
    pid_h = tl.program_id(1).to(tl.int64)
    at_b, M, N, R = slots_of_image(packed, pid_b, M, N, R)
    if has_block(packed, N, block, BLOCK_N) == 0:
        return
    queries_ptr += (at_b * stride_query_b + pid_h * stride_query_h) * UNIT
    keys_ptr += (at_b * stride_key_b + pid_h // group * stride_key_h) * UNIT
    stride_query_m *= UNIT
    stride_key_n *= UNIT
    lse_ptr += at_b * stride_lse_b + pid_h * stride_lse_h
    if rows_ptr is not None:
        rows_ptr += at_b * stride_row_b
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = tl.minimum(offs_n, N - 1)
    held = load_rows(keys_ptr, keys.to(tl.int64), 0, stride_key_n, stride_key_d, DK, BLOCK_D)

    first = tl.zeros([], tl.int32)
    if CAUSAL and rows_ptr is None:  # the queries before see none of these keys
        first = tl.maximum(block * BLOCK_N - (N - M), 0) // BLOCK_M * BLOCK_M
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    counts = tl.zeros([BLOCK_M], tl.int32)
    for start in tl.range(first, R, BLOCK_M, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK_M)
        query = chosen_queries(rows_ptr, slots, stride_row_r, M, R)
        counts += (query >= 0).to(tl.int32)
        at = tl.maximum(query, 0)
        if GIVEN:
            lse = (tl.load(lse_ptr + at.to(tl.int64) * stride_lse_r) * LOG2E).to(tl.float32)
            query = tl.where(tl.abs(lse) == float("inf"), NONE, query)  # a row that saw no key, where lse is from
        else:
            lse = tl.load(lse_ptr + slots.to(tl.int64) * stride_lse_r, mask=slots < R, other=float("inf"))
        logits = logit_tile(
            held, keys_ptr, keys, stride_key_n, stride_key_d, queries_ptr, at, stride_query_m, stride_query_d,
            factor, num_channels, DK, BLOCK_D,
        )  # fmt: skip
        weights = tl.exp2(logits - lse[None, :])
        if CAUSAL:
            weights = tl.where((offs_n - (N - M))[:, None] <= query[None, :], weights, 0.0)
        elif GIVEN or rows_ptr is not None:
            weights = tl.where((query >= 0)[None, :], weights, 0.0)
        # else a slot past the end is query 0 over infinity: 0, or NaN where query 0 itself makes one of the column
        sums += weights
    count = M
    if rows_ptr is not None:
        count = tl.sum(counts, axis=0)

    mean = tl.div_rn(sum_in_pairs(sums), tl.full([BLOCK_N], 1.0, tl.float32) * tl.maximum(count, 1))
    if mask_ptr is not None:
        mean = tl.where(tl.load(mask_ptr + at_b * stride_mask_b + keys.to(tl.int64) * stride_mask_n) != 0, mean, 0.0)
    scores_ptr += at_b * stride_score_b + pid_h * stride_score_h
    tl.store(scores_ptr + offs_n.to(tl.int64) * stride_score_n, mean, mask=offs_n < N)


def strides_by_image(tensor: torch.Tensor, packed: Packed | None) -> tuple[int, ...]:
    """Of [B, H, N, ...]; packed, [H, T, ...]: an image is where its first token is, so its stride is that of tokens."""
    return tensor.stride() if packed is None else (tensor.stride(1), *tensor.stride())


def unit_of(*tensors: torch.Tensor) -> int:
    """What all strides but those of channels are multiples of. The compiler, which is to load 16 bytes at a time, would
    know that of multiples of 16 alone, and heads have 72 channels, too."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return 8 if all(stride % 8 == 0 and stride < 2**31 for stride in strides) else 1


def strides_in_units(tensor: torch.Tensor, packed: Packed | None, unit: int) -> tuple[int, ...]:
    *rows, channels = strides_by_image(tensor, packed)
    return *(stride // unit for stride in rows), channels


def launch_attention(queries, keys, rows, mask, lse, scale, causal, scores, packed=None):
    """Both launches, or the second alone, into scores [B, Hq, N], packed: [Hq, T].

    queries [B, Hq, M, d], keys [B, Hkv, N, d], lse [B, Hq, M] or None; packed: [Hq, T, d], [Hkv, T, d], [Hq, T].
    """
    (heads, m, d), (kv_heads, n) = queries.shape[-3:], keys.shape[-3:-1]
    r = m if rows is None else rows.shape[-1]
    given = lse is not None
    if not given:
        lse = new(queries, (*queries.shape[:-2], r), torch.float32)
    config = AttentionConfig.for_shape(queries.dtype, d)
    tensors, unit = (queries, keys, rows, mask, lse), unit_of(queries, keys)
    strides = (
        *strides_in_units(queries, packed, unit), *strides_in_units(keys, packed, unit),
        *strides_of(rows, 2), *strides_of(mask, 2), *strides_by_image(lse, packed),
    )  # fmt: skip
    scale = 1 / math.sqrt(d) if scale is None else scale
    options = {
        "DK": d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d,
        "STAGES": config.num_stages, "UNIT": unit, "CAUSAL": causal,
        "num_warps": config.num_warps, "enable_fp_fusion": False,
    }  # fmt: skip

    def programs(tokens: int, block: int) -> tuple[int, int]:
        """Blocks of an image, and programs of a head."""
        blocks = triton.cdiv(tokens, block)
        return blocks, len(queries) * blocks if packed is None else packed.num_slots(block)

    def sizes(blocks: int) -> tuple:
        return m, n, r, blocks, heads // kv_heads, d, as_fp32(scale * LOG2E.value), packed

    if not given:
        blocks, slots = programs(r, config.block_m)
        launch(attention_lse_kernel, (slots, heads), *tensors, *strides, *sizes(blocks), **options)
    blocks, slots = programs(n, config.block_n)
    launch(
        attention_columns_kernel,
        (slots, heads),
        *tensors,
        scores,
        *strides,
        *strides_by_image(scores, packed),
        *sizes(blocks),
        **options,
        GIVEN=given,
    )


def attention_scores(
    queries: torch.Tensor,  # [B, Hq, M, d]
    keys: torch.Tensor,  # [B, Hkv, N, d]
    *,
    rows: torch.Tensor | None = None,  # [R] or [B, R] int64 in [-1, M)
    mask: torch.Tensor | None = None,  # [B, N] bool
    lse: torch.Tensor | None = None,  # [B, Hq, M] fp32 or fp64
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Return scores [B, Hq, N] fp32."""
    reject_float64(queries=queries, keys=keys)
    (b, heads, m, _), n = queries.shape, keys.shape[2]
    scores = new(queries, (b, heads, n), torch.float32)
    if scores.numel() == 0:
        return scores
    if rows is not None:
        rows = rows.expand(b, -1)
    if m == 0 or (rows is not None and rows.shape[1] == 0):
        return scores.zero_()
    with on_device_of(queries):
        launch_attention(queries, keys, rows, mask, lse, scale, causal, scores)
    return scores
