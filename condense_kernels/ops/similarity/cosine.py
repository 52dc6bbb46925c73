"""Cosines of a tile of tokens, on tensor cores: what every kernel that needs one computes it with."""

import torch
import triton
import triton.language as tl

from ..._triton.device import INFINITY_BITS, is_finite, magnitude_bits, power_of_two, sum_in_pairs


@triton.jit
def load_rows(keys_ptr, offs_n, d, stride_n, stride_d, DK: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = d + tl.arange(0, BLOCK_D)
    pointers = keys_ptr + offs_n[:, None] * stride_n + offs_d[None, :].to(tl.int64) * stride_d
    if DK % BLOCK_D == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=offs_d[None, :] < DK, other=0.0)


def can_overflow(keys: torch.Tensor) -> bool:
    """Whether squares of keys can leave fp32's range."""
    return keys.dtype != torch.float16


@triton.jit
def token_tier(
    scores_ptr, mask_ptr, offs_n, finite, stride_score, stride_mask, N,
    HAS_SCORES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """0 valid, 1 with a NaN or infinity in its key or score, 2 masked or past the end."""
    mask_n = offs_n < N
    if HAS_SCORES:
        score = tl.load(scores_ptr + offs_n.to(tl.int64) * stride_score, mask=mask_n, other=0.0).to(tl.float32)
        finite = finite & is_finite(score)
    present = mask_n
    if HAS_MASK:
        present = tl.load(mask_ptr + offs_n.to(tl.int64) * stride_mask, mask=mask_n, other=0) != 0
    return tl.where(present & mask_n, tl.where(finite, 0, 1), 2)


@triton.jit
def key_factors(
    keys_ptr, offs_n, stride_n, stride_d, channels,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, CAN_OVERFLOW: tl.constexpr,
):  # fmt: skip
    """For each key: is it finite, the power of two to scale it with, and 1 / the norm of the scaled key.

    Only a key whose squares could overflow or vanish in fp32 is scaled, and then the block is read again. Scaling
    the others as well would not change a bit: a power of two is exact.
    """
    scale = tl.full([BLOCK], 1.0, tl.float32)
    top = tl.zeros([BLOCK], tl.int32)
    square = tl.zeros([BLOCK], tl.float32)
    again = True
    while again:
        tops = tl.zeros([BLOCK, BLOCK_D], tl.int32)
        squares = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for d in tl.range(0, channels, BLOCK_D, num_stages=STAGES):
            x = load_rows(keys_ptr, offs_n, d, stride_n, stride_d, DK, BLOCK_D).to(tl.float32)
            if CAN_OVERFLOW:
                x = x * scale[:, None]
            tops = tl.maximum(tops, magnitude_bits(x))
            squares = tl.fma(x, x, squares)
        top = tl.max(tops, axis=1)
        square = sum_in_pairs(squares)
        again = False
        if CAN_OVERFLOW:
            exponent = (top >> 23) - 127  # top is in [2**exponent, 2**(exponent + 1))
            extreme = (top > 0) & (top < INFINITY_BITS) & ((exponent < -30) | (exponent > 30))
            scale = tl.where(extreme, power_of_two(tl.minimum(tl.maximum(-exponent, -126), 126)), scale)
            again = tl.max(extreme.to(tl.int32), axis=0) > 0
    inverse = tl.where(square > 0, tl.div_rn(1.0, tl.sqrt_rn(square)), 0.0)  # a zero key has cosine 0 with everything
    return top < INFINITY_BITS, scale, inverse


@triton.jit
def dot_tile(
    keys_ptr, offs_i, offs_j, scale_i, scale_j, stride_n, stride_d, channels,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK] products, each summed in an order that its place has no part in.

    In the interpreter tl.dot is a BLAS, which rounds an element by its place, so there the channels are added apart.
    """
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if INTERPRETED:
        lanes = tl.zeros([BLOCK, BLOCK, BLOCK_D], tl.float32)
    for d in range(0, channels, BLOCK_D):
        x = load_rows(keys_ptr, offs_i, d, stride_n, stride_d, DK, BLOCK_D)
        y = load_rows(keys_ptr, offs_j, d, stride_n, stride_d, DK, BLOCK_D)
        if SCALED:  # exact in the input's own dtype, too
            x = (x.to(tl.float32) * scale_i[:, None]).to(x.dtype)
            y = (y.to(tl.float32) * scale_j[:, None]).to(y.dtype)
        if INTERPRETED:
            lanes += x.to(tl.float32)[:, None, :] * y.to(tl.float32)[None, :, :]
        elif x.dtype == tl.float32:  # not one chain of all channels, which loses more; + would be made one again
            acc = tl.fma(tl.dot(x, tl.trans(y), input_precision="ieee"), tl.full([BLOCK, BLOCK], 1.0, tl.float32), acc)
        else:
            acc = tl.dot(x, tl.trans(y), acc, input_precision="ieee")
    if INTERPRETED:
        acc = tl.reshape(sum_in_pairs(tl.reshape(lanes, [BLOCK * BLOCK, BLOCK_D])), [BLOCK, BLOCK])
    return acc


@triton.jit
def cosine_tile(
    keys_ptr, offs_i, offs_j, scale_i, scale_j, inverse_i, inverse_j, stride_n, stride_d, channels,
    DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK] cosines of any tokens with any others; those of tier 1 may be NaN.

    The one product there is: a cosine's bits depend on its two keys alone, not on its place in a tile.
    """
    scaled = tl.max(tl.where((scale_i != 1.0) | (scale_j != 1.0), 1, 0), axis=0) > 0
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if CAN_OVERFLOW and scaled:
        acc = dot_tile(
            keys_ptr, offs_i, offs_j, scale_i, scale_j, stride_n, stride_d, channels,
            DK, BLOCK, BLOCK_D, True, INTERPRETED,
        )  # fmt: skip
    else:
        acc = dot_tile(
            keys_ptr, offs_i, offs_j, scale_i, scale_j, stride_n, stride_d, channels,
            DK, BLOCK, BLOCK_D, False, INTERPRETED,
        )  # fmt: skip
    return acc * (inverse_i[:, None] * inverse_j[None, :])
