"""What a cosine needs of its two keys, and cosines of any tokens once that is known: for who stores no s."""

import torch
import triton
import triton.language as tl

from ..._triton.device import INTERPRETED, has_block, image_of_block, image_tokens, tokens_before
from ..._triton.launcher import VARYING, launch, strides_of
from ..._triton.tables import MAX_STORED, SimilarityConfig
from .cosine import can_overflow, cosine_tile, key_factors, token_tier
from .kernel import num_blocks_of, similarity, similarity_and_nearest


@triton.jit(do_not_specialize=VARYING)
def measure_kernel(
    keys_ptr,  # [B, N, Dk], packed: [T, Dk]; likewise the rest
    scores_ptr,  # [B, N]
    mask_ptr,  # [B, N]
    tier_ptr,  # [B, N]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    stride_key_b, stride_key_n, stride_key_d,
    stride_score_b, stride_score_n,
    stride_mask_b, stride_mask_n,
    N, num_blocks, num_channels, packed,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCORES: tl.constexpr, HAS_MASK: tl.constexpr, CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiers and factors of a block of tokens, to the bit those of the tiles of s."""
    pid_b, block = image_of_block(packed, tl.program_id(0), num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, block, BLOCK) == 0:
        return
    channels = DK if INTERPRETED else num_channels
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    finite, scale, inverse = key_factors(
        keys_ptr + at_b * stride_key_b, rows, stride_key_n, stride_key_d, channels,
        DK, BLOCK, BLOCK_D, STAGES, CAN_OVERFLOW,
    )  # fmt: skip
    tier = token_tier(
        scores_ptr + at_b * stride_score_b, mask_ptr + at_b * stride_mask_b, offs_n, finite,
        stride_score_n, stride_mask_n, N, HAS_SCORES, HAS_MASK,
    )  # fmt: skip
    at = tokens_before(packed, at_b, N) + offs_n
    tl.store(tier_ptr + at, tier, mask=offs_n < N)
    tl.store(scale_ptr + at, scale, mask=offs_n < N)
    tl.store(inverse_ptr + at, inverse, mask=offs_n < N)


@triton.jit
def cosines_of(
    keys_ptr, scale_ptr, inverse_ptr, tokens_i, tokens_j, stride_key_n, stride_key_d, num_channels,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK] cosines of two lists of tokens of one image, with the factors that the first pass stored."""
    channels = DK if INTERPRETED else num_channels
    return cosine_tile(
        keys_ptr, tokens_i, tokens_j, tl.load(scale_ptr + tokens_i), tl.load(scale_ptr + tokens_j),
        tl.load(inverse_ptr + tokens_i), tl.load(inverse_ptr + tokens_j), stride_key_n, stride_key_d, channels,
        DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
    )  # fmt: skip


def dense_similarities(keys, scores, mask, metric: str) -> tuple[torch.Tensor, ...]:
    """s, sbar, g and tier, and of distances what comes with them."""
    if metric == "cosine":
        return similarity(keys, scores, mask)
    return similarity_and_nearest(keys, scores, mask, metric=metric)


def check_is_cosine(metric: str) -> None:
    """Of who stores no s: distances are not computed a second time."""
    if metric != "cosine":
        raise ValueError(
            f"metric: expected 'cosine' of images whose similarities are not stored in the Triton kernels, got "
            f"{metric!r}. Remedy: at most {MAX_STORED} tokens an image, smaller packed batches, or CPU tensors."
        )


def tile_options(keys) -> dict:
    """Of a kernel that computes cosines: what it is compiled for, and launched with."""
    config = SimilarityConfig.for_shape(keys.dtype)
    return {
        "DK": keys.shape[-1], "BLOCK": config.block, "BLOCK_D": config.block_d, "CAN_OVERFLOW": can_overflow(keys),
        "INTERPRETED": INTERPRETED, "num_warps": config.num_warps, "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }  # fmt: skip


def launch_measure(keys, scores, mask, tier, scale, inverse, packed=None):
    """Into tier int32, scale and inverse, [B, N] or [T] each: all that the tiles would leave but their sums."""
    n, dk = keys.shape[-2:]
    if packed is not None:
        n = packed.max_seqlen
    blocks, _ = num_blocks_of(n)
    options = tile_options(keys)
    launch(
        measure_kernel,
        (keys.shape[0] * blocks if packed is None else packed.num_slots(SimilarityConfig.block),),
        keys, keys if scores is None else scores, keys if mask is None else mask, tier, scale, inverse,
        *strides_of(keys, 3), *strides_of(scores, 2), *strides_of(mask, 2), n, blocks, dk, packed,
        STAGES=options["num_stages"], HAS_SCORES=scores is not None, HAS_MASK=mask is not None, **options,
    )  # fmt: skip
