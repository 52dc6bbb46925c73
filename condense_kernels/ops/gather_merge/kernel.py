"""Weighted sums of listed tokens, one program per row and block of channels; their gradients, one program per token,
which lists the places that name it, and one per row and block of neighbours."""

# ruff: noqa: RUF005  (*tokens, x) is not in Triton's language

import torch
import triton
import triton.language as tl

from ..._triton.device import narrow, sum_in_pairs
from ..._triton.launcher import VARYING, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import GatherMergeBackwardConfig, GatherMergeConfig, GatherMergeWeightsConfig

IN_FLIGHT = tl.constexpr(4)  # tokens loaded together, while as many are added


@triton.jit
def load_neighbours(neighbours_ptr, start, stride_m, N, M):
    """IN_FLIGHT tokens from a place on; -1 where there is none."""
    tokens = ()
    for j in tl.static_range(IN_FLIGHT):
        at = (start + j).to(tl.int64)
        token = tl.load(neighbours_ptr + at * stride_m, mask=at < M, other=-1)
        tokens = tokens + (tl.where((token >= 0) & (token < N), token, -1),)
    return tokens


@triton.jit
def load_tokens(x_ptr, weights_ptr, tokens, start, offs_d, stride_n, stride_d, stride_m, D):
    """Weights and channels of IN_FLIGHT tokens; zeros, which add nothing, where there is none."""
    weights = ()
    x = ()
    for j in tl.static_range(IN_FLIGHT):
        there = tokens[j] >= 0
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + (start + j).to(tl.int64) * stride_m, mask=there, other=0.0).to(tl.float32)
        else:
            weight = tl.where(there, 1.0, 0.0)
        weights = weights + (weight,)
        pointers = x_ptr + tokens[j] * stride_n + offs_d * stride_d
        x = x + (tl.load(pointers, mask=offs_d < tl.where(there, D, 0), other=0.0),)
    return weights, x


@triton.jit(do_not_specialize=VARYING)
def gather_merge_kernel(
    x_ptr,  # [B, N, D]
    neighbours_ptr,  # [B, K, M]
    weights_ptr,  # [B, K, M] or None
    merged_ptr,  # [B, K, D]
    stride_x_b, stride_x_n, stride_x_d,
    stride_neighbour_b, stride_neighbour_k, stride_neighbour_m,
    stride_weight_b, stride_weight_k, stride_weight_m,
    N, K, M, D, num_parts,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    at = pid // num_parts  # of all rows
    pid_b, pid_k = at // K, at % K
    offs_d = pid % num_parts * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += pid_b * stride_x_b
    neighbours_ptr += pid_b * stride_neighbour_b + pid_k * stride_neighbour_k
    if weights_ptr is not None:
        weights_ptr += pid_b * stride_weight_b + pid_k * stride_weight_k

    # What a turn adds was loaded in the turn before, as in merge's weighted_sum.
    acc = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([], tl.int32)
    only = tl.zeros([], tl.int64) - 1
    start = tl.zeros([], tl.int32)
    tokens = load_neighbours(neighbours_ptr, start, stride_neighbour_m, N, M)
    weights, x = load_tokens(x_ptr, weights_ptr, tokens, start, offs_d, stride_x_n, stride_x_d, stride_weight_m, D)
    while start < M:
        start += IN_FLIGHT
        next_tokens = load_neighbours(neighbours_ptr, start, stride_neighbour_m, N, M)
        next_weights, next_x = load_tokens(
            x_ptr, weights_ptr, next_tokens, start, offs_d, stride_x_n, stride_x_d, stride_weight_m, D
        )
        for j in tl.static_range(IN_FLIGHT):
            acc = tl.fma(tl.full([BLOCK_D], weights[j], tl.float32), x[j].to(tl.float32), acc)
            count += (tokens[j] >= 0).to(tl.int32)
            only = tl.where(tokens[j] >= 0, tokens[j], only)
        tokens, weights, x = next_tokens, next_weights, next_x
    merged_ptr += at * D
    copied = False
    if weights_ptr is None:
        copied = count == 1
    if copied:  # the token's own bits, NaN payloads and all
        own = tl.load(x_ptr + only * stride_x_n + offs_d * stride_x_d, mask=offs_d < D)
        tl.store(merged_ptr + offs_d, own, mask=offs_d < D)
    else:
        tl.store(merged_ptr + offs_d, narrow(acc, merged_ptr.dtype.element_ty), mask=offs_d < D)


def gather_merge(
    x: torch.Tensor,  # [B, N, D]
    neighbours: torch.Tensor,  # [B, K, M] int64, -1 = none
    weights: torch.Tensor | None = None,  # [B, K, M]
) -> torch.Tensor:
    """Return merged [B, K, D] in the dtype of x."""
    reject_float64(x=x, weights=weights)
    (b, n, d), (_, k, m) = x.shape, neighbours.shape
    merged = new(x, (b, k, d))
    config = GatherMergeConfig.for_shape(d)
    parts = triton.cdiv(d, config.block_d)
    if b * k == 0:
        return merged
    with on_device_of(x):
        launch(
            gather_merge_kernel, (b * k * parts,),
            x, neighbours, weights, merged,
            *strides_of(x, 3), *strides_of(neighbours, 3), *strides_of(weights, 3), n, k, m, d, parts,
            BLOCK_D=config.block_d, num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return merged


@triton.jit
def load_places(neighbours_ptr, start, stride_k, stride_m, M, count, BLOCK: tl.constexpr):
    """The tokens at BLOCK places of an image's lists, row by row; -1 past the end."""
    place = start + tl.arange(0, BLOCK)
    row = (place // M).to(tl.int64)
    pointers = neighbours_ptr + row * stride_k + (place - row * M) * stride_m
    return place, tl.load(pointers, mask=place < count, other=-1)


@triton.jit
def list_places(places_ptr, neighbours_ptr, token, stride_k, stride_m, M, num_places, BLOCK: tl.constexpr):
    """Write the places that name a token, ascending, and return where the list begins and how long it is.

    It begins after as many as name tokens before this one, so the lists of all tokens lie side by side.
    """
    before = tl.zeros([BLOCK], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < num_places:
        _place, of = load_places(neighbours_ptr, start, stride_k, stride_m, M, num_places, BLOCK)
        before += ((of >= 0) & (of < token)).to(tl.int32)
        start += BLOCK
    first = tl.sum(before, axis=0)
    count = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < num_places:
        place, of = load_places(neighbours_ptr, start, stride_k, stride_m, M, num_places, BLOCK)
        named = of == token
        rank = tl.cumsum(named.to(tl.int32), axis=0)
        tl.store(places_ptr + (first + count - 1 + rank), place, mask=named)
        count += tl.sum(named.to(tl.int32), axis=0)
        start += BLOCK
    tl.debug_barrier()  # the list is read back by other threads
    return first, count


@triton.jit
def load_slopes(
    grad_ptr, weights_ptr, places_ptr, start, count, offs_d, stride_grad_k, stride_grad_d, stride_k, stride_m, M, D
):
    """Weights and slopes of IN_FLIGHT places of a list. Past its end they are 0, and so add nothing to a sum."""
    weights = ()
    slopes = ()
    for j in tl.static_range(IN_FLIGHT):
        there = start + j < count
        place = tl.load(places_ptr + (start + j), mask=there, other=0)
        row = (place // M).to(tl.int64)
        if weights_ptr is not None:
            pointer = weights_ptr + row * stride_k + (place - row * M) * stride_m
            weight = tl.load(pointer, mask=there, other=0.0).to(tl.float32)
        else:
            weight = tl.where(there, 1.0, 0.0)
        weights = weights + (weight,)
        pointers = grad_ptr + row * stride_grad_k + offs_d * stride_grad_d
        slopes = slopes + (tl.load(pointers, mask=offs_d < tl.where(there, D, 0), other=0.0),)
    return weights, slopes


@triton.jit(do_not_specialize=VARYING)
def gather_merge_backward_kernel(
    grad_ptr,  # [B, K, D]
    neighbours_ptr,  # [B, K, M]
    weights_ptr,  # [B, K, M] or None
    places_ptr,  # [B, K * M] int32, written first: where token 0 is named, then token 1, ...
    grad_x_ptr,  # [B, N, D]
    stride_grad_b, stride_grad_k, stride_grad_d,
    stride_neighbour_b, stride_neighbour_k, stride_neighbour_m,
    stride_weight_b, stride_weight_k, stride_weight_m,
    N, K, M, D,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one token: in the order of the places that name it."""
    pid = tl.program_id(0).to(tl.int64)
    pid_b, token = pid // N, pid % N
    places_ptr += pid_b * K * M
    neighbours_ptr += pid_b * stride_neighbour_b
    grad_ptr += pid_b * stride_grad_b
    if weights_ptr is not None:
        weights_ptr += pid_b * stride_weight_b
    num_places = K * M
    M = tl.maximum(M, 1)  # it divides
    first, count = list_places(
        places_ptr, neighbours_ptr, token, stride_neighbour_k, stride_neighbour_m, M, num_places, BLOCK
    )
    places_ptr += first
    part = tl.zeros([], tl.int32)
    while part < D:
        offs_d = part + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_D], tl.float32)
        start = tl.zeros([], tl.int32)
        weights, slopes = load_slopes(
            grad_ptr, weights_ptr, places_ptr, start, count, offs_d, stride_grad_k, stride_grad_d, stride_weight_k,
            stride_weight_m, M, D,
        )  # fmt: skip
        while start < count:
            start += IN_FLIGHT
            next_weights, next_slopes = load_slopes(
                grad_ptr, weights_ptr, places_ptr, start, count, offs_d, stride_grad_k, stride_grad_d, stride_weight_k,
                stride_weight_m, M, D,
            )  # fmt: skip
            for j in tl.static_range(IN_FLIGHT):
                acc = tl.fma(tl.full([BLOCK_D], weights[j], tl.float32), slopes[j].to(tl.float32), acc)
            weights, slopes = next_weights, next_slopes
        tl.store(grad_x_ptr + pid * D + offs_d, narrow(acc, grad_x_ptr.dtype.element_ty), mask=offs_d < D)
        part += BLOCK_D


@triton.jit(do_not_specialize=VARYING)
def gather_merge_weights_kernel(
    grad_ptr,  # [B, K, D]
    x_ptr,  # [B, N, D]
    neighbours_ptr,  # [B, K, M]
    grad_weights_ptr,  # [B, K, M]
    stride_grad_b, stride_grad_k, stride_grad_d,
    stride_x_b, stride_x_n, stride_x_d,
    stride_neighbour_b, stride_neighbour_k, stride_neighbour_m,
    N, K, M, D, num_parts,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of weights: products of a slope and the tokens, zeros where there is no token."""
    pid = tl.program_id(0).to(tl.int64)
    at = pid // num_parts  # of all rows
    pid_b, pid_k = at // K, at % K
    offs_m = pid % num_parts * BLOCK_M + tl.arange(0, BLOCK_M)
    neighbours_ptr += pid_b * stride_neighbour_b + pid_k * stride_neighbour_k
    grad_ptr += pid_b * stride_grad_b + pid_k * stride_grad_k
    token = tl.load(neighbours_ptr + offs_m * stride_neighbour_m, mask=offs_m < M, other=-1)
    there = (token >= 0) & (token < N)
    x_ptr += pid_b * stride_x_b + token[:, None] * stride_x_n
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = tl.zeros([], tl.int32)
    while start < D:
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        slope = tl.load(grad_ptr + offs_d * stride_grad_d, mask=offs_d < D, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs_d * stride_x_d, mask=there[:, None] & (offs_d < D), other=0.0).to(tl.float32)
        acc = tl.fma(x, tl.broadcast_to(slope, [BLOCK_M, BLOCK_D]), acc)
        start += BLOCK_D
    gradient = tl.where(there, sum_in_pairs(acc), 0.0)  # 0 * NaN of a slope is none of a weight that is not read
    at_m = grad_weights_ptr + at * M + offs_m
    tl.store(at_m, narrow(gradient, grad_weights_ptr.dtype.element_ty), mask=offs_m < M)


def gather_merge_backward(
    grad_merged: torch.Tensor,  # [B, K, D]
    x: torch.Tensor | None,  # [B, N, D]
    neighbours: torch.Tensor,  # [B, K, M] int64, -1 = none
    weights: torch.Tensor | None,  # [B, K, M]
    sizes: list[int],  # [N, D]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x [B, N, D] in its dtype and of weights [B, K, M] in theirs, zeros without x."""
    reject_float64(x=grad_merged, weights=weights)  # x has the dtype of its slopes
    (b, k, m), (n, d) = neighbours.shape, sizes
    dtype = torch.float32 if weights is None else weights.dtype
    grad_x = new(grad_merged, (b, n, d))
    grad_weights = new(grad_merged, (b, k, m), dtype, fill=0 if x is None else None)
    places = new(grad_merged, (b, k * m), torch.int32)
    of_tokens, of_weights = GatherMergeBackwardConfig.for_shape(d), GatherMergeWeightsConfig.for_shape(d)
    parts = triton.cdiv(m, of_weights.block_m)
    strides = strides_of(grad_merged, 3), strides_of(neighbours, 3), strides_of(weights, 3)
    with on_device_of(grad_merged):
        if b * n > 0:
            launch(
                gather_merge_backward_kernel, (b * n,),
                grad_merged, neighbours, weights, places, grad_x,
                *strides[0], *strides[1], *strides[2], n, k, m, d,
                BLOCK=of_tokens.block, BLOCK_D=of_tokens.block_d,
                num_warps=of_tokens.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
        if x is not None and b * k * parts > 0:
            launch(
                gather_merge_weights_kernel, (b * k * parts,),
                grad_merged, x, neighbours, grad_weights,
                *strides[0], *strides_of(x, 3), *strides[1], n, k, m, d, parts,
                BLOCK_M=of_weights.block_m, BLOCK_D=of_weights.block_d,
                num_warps=of_weights.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return grad_x, grad_weights
