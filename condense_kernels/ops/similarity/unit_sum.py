"""Global similarity (Eq. 3) without s: each unit key times the sum of all those of its image.

Unit keys are added as integers: neither the order of the programs nor how many there are leaves a trace in the sum.
"""

import triton
import triton.language as tl

from ..._triton.device import INTERPRETED, has_block, image_of_block, image_tokens, sum_in_pairs, tokens_before
from ..._triton.launcher import VARYING, launch, strides_of, zero
from ..._triton.tables import SimilarityConfig, UnitSumConfig
from .cosine import can_overflow, key_factors, load_rows, token_tier

FIXED_POINT = tl.constexpr(16777216.0)  # 2**24: an int32 holds the sum of 64 numbers of unit keys


@triton.jit
def scaled_rows(
    keys_ptr, rows, d, scale, stride_n, stride_d, DK: tl.constexpr, BLOCK_D: tl.constexpr, CAN_OVERFLOW: tl.constexpr
):
    x = load_rows(keys_ptr, rows, d, stride_n, stride_d, DK, BLOCK_D).to(tl.float32)
    return x * scale[:, None] if CAN_OVERFLOW else x


@triton.jit(do_not_specialize=VARYING)
def unit_sum_kernel(
    keys_ptr,  # [B, N, Dk], packed: [T, Dk]; likewise the rest
    scores_ptr,  # [B, N]
    mask_ptr,  # [B, N]
    tier_ptr,  # [B, N]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    sums_ptr,  # [B, Dk] int64, packed: [S, Dk]: zeros, to which 2**24 z of all tokens of tier 0 is added
    stride_key_b, stride_key_n, stride_key_d,
    stride_score_b, stride_score_n,
    stride_mask_b, stride_mask_n,
    N, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_MASK: tl.constexpr, CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiers and factors of a block of tokens, to the bit those of the tiles of s, and the sum of its unit keys."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK) == 0:
        return
    channels = DK if INTERPRETED else num_channels
    keys_ptr += at_b * stride_key_b
    sums_ptr += pid_b * DK
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    finite, scale, inverse = key_factors(
        keys_ptr, rows, stride_key_n, stride_key_d, channels, DK, BLOCK, BLOCK_D, STAGES, CAN_OVERFLOW
    )
    tier = token_tier(
        scores_ptr + at_b * stride_score_b, mask_ptr + at_b * stride_mask_b, offs_n, finite,
        stride_score_n, stride_mask_n, N, HAS_SCORES, HAS_MASK,
    )  # fmt: skip
    at = tokens_before(packed, at_b, N) + offs_n
    tl.store(tier_ptr + at, tier.to(tier_ptr.dtype.element_ty), mask=offs_n < N)
    tl.store(scale_ptr + at, scale, mask=offs_n < N)
    tl.store(inverse_ptr + at, inverse, mask=offs_n < N)
    valid = (tier == 0)[:, None]
    for d in tl.range(0, channels, BLOCK_D, num_stages=STAGES):
        x = scaled_rows(keys_ptr, rows, d, scale, stride_key_n, stride_key_d, DK, BLOCK_D, CAN_OVERFLOW)
        z = tl.where(valid, x * inverse[:, None], 0.0)
        fixed = tl.floor(z * FIXED_POINT + 0.5).to(tl.int32)
        offs_d = d + tl.arange(0, BLOCK_D)
        tl.atomic_add(sums_ptr + offs_d, tl.sum(fixed, axis=0).to(tl.int64), mask=offs_d < DK, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def global_similarity_kernel(
    keys_ptr,  # [B, N, Dk], packed: [T, Dk]; likewise the rest
    tier_ptr,  # [B, N]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    sums_ptr,  # [B, Dk], packed: [S, Dk]
    g_ptr,  # [B, N]
    stride_key_b, stride_key_n, stride_key_d,
    N, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """g of a block of tokens. Equal keys have equal ones, as all are multiplied and added alike."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK) == 0:
        return
    channels = DK if INTERPRETED else num_channels
    keys_ptr += at_b * stride_key_b
    sums_ptr += pid_b * DK
    first = tokens_before(packed, at_b, N)
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    scale = tl.load(scale_ptr + first + rows)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for d in tl.range(0, channels, BLOCK_D, num_stages=STAGES):
        x = scaled_rows(keys_ptr, rows, d, scale, stride_key_n, stride_key_d, DK, BLOCK_D, CAN_OVERFLOW)
        offs_d = d + tl.arange(0, BLOCK_D)
        total = tl.load(sums_ptr + offs_d, mask=offs_d < DK, other=0).to(tl.float32)
        acc = tl.fma(x, total[None, :], acc)
    product = sum_in_pairs(acc) * (tl.load(inverse_ptr + first + rows) * (1.0 / FIXED_POINT))
    g = tl.where(tl.load(tier_ptr + first + rows) == 0, product, 0.0) + 0.0  # never -0
    tl.store(g_ptr + first + offs_n, g, mask=offs_n < N)


def launch_global_similarity(keys, scores, mask, tier, scale, inverse, sums, g, packed=None) -> None:
    """Into tier, scale, inverse and g, [B, N] or [T] each. sums [B, Dk], packed [S, Dk], is what it works in."""
    n, dk = keys.shape[-2:]
    if packed is not None:
        n = packed.max_seqlen
    config = UnitSumConfig.for_shape()
    blocks = triton.cdiv(n, config.block)
    programs = keys.shape[0] * blocks if packed is None else packed.num_slots(config.block)
    of_keys = SimilarityConfig.for_shape(keys.dtype)  # on which the bits of a norm depend
    options = {
        "DK": dk, "BLOCK": config.block, "BLOCK_D": of_keys.block_d, "STAGES": config.num_stages,
        "CAN_OVERFLOW": can_overflow(keys), "INTERPRETED": INTERPRETED, "num_warps": config.num_warps,
        "enable_fp_fusion": False,
    }  # fmt: skip
    zero(sums)
    if programs > 0:
        launch(
            unit_sum_kernel, (programs,),
            keys, keys if scores is None else scores, keys if mask is None else mask, tier, scale, inverse, sums,
            *strides_of(keys, 3), *strides_of(scores, 2), *strides_of(mask, 2), n, blocks, dk, packed,
            HAS_SCORES=scores is not None, HAS_MASK=mask is not None, **options,
        )  # fmt: skip
        launch(
            global_similarity_kernel, (programs,), keys, tier, scale, inverse, sums, g, *strides_of(keys, 3),
            n, blocks, dk, packed, **options,
        )  # fmt: skip
