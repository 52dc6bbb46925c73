"""The score-weighted mean of each cluster (Eq. 8), one program per row; and its gradient, one program per block of
tokens.

A gather in token order, not a matrix product over the whole image: there 0 * NaN would poison every row. A program
lists its row's tokens first, so that it can load several of them at once.
"""

# ruff: noqa: RUF005  (*chunks, x) is not in Triton's language

import torch
import triton
import triton.language as tl

from ..._triton.device import image_of_row, image_tokens, inside, narrow, sum_in_pairs, tokens_before
from ..._triton.launcher import VARYING, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MergeBackwardConfig, MergeConfig

FOLD = tl.constexpr(32)  # members after which a partial sum is folded away: long clusters lose less
IN_FLIGHT = tl.constexpr(4)  # members loaded together, while as many are added; divides FOLD
RANKS = (3, 2, 3, 2, 3, 2, 2, 2)  # of the arguments of merge_backward


@triton.jit
def list_members(members_ptr, assignment_ptr, row, stride, N, BLOCK_N: tl.constexpr):
    """Write the tokens of a row, ascending, and return where the list begins and how long it is.

    It begins after as many places as rows before this one have tokens, so the lists of all rows lie side by side.
    """
    before = tl.zeros([BLOCK_N], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs_n = start + tl.arange(0, BLOCK_N)
        of = tl.load(assignment_ptr + offs_n.to(tl.int64) * stride, mask=offs_n < N, other=-1)
        before += ((of >= 0) & (of < row)).to(tl.int32)
        start += BLOCK_N
    first = tl.sum(before, axis=0)
    count = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while start < N:
        offs_n = start + tl.arange(0, BLOCK_N)
        of = tl.load(assignment_ptr + offs_n.to(tl.int64) * stride, mask=offs_n < N, other=-1)
        member = of == row
        rank = tl.cumsum(member.to(tl.int32), axis=0)
        tl.store(members_ptr + (first + count - 1 + rank), offs_n, mask=member)
        count += tl.sum(member.to(tl.int32), axis=0)
        start += BLOCK_N
    tl.debug_barrier()  # the list is read back by other threads
    return first, count


@triton.jit
def load_tokens(members_ptr, start, count, packed, N):
    """IN_FLIGHT tokens of a list from a place on, past its end token 0."""
    tokens = ()
    for i in tl.static_range(IN_FLIGHT):
        token = tl.load(members_ptr + (start + i), mask=start + i < count, other=0)
        tokens = tokens + (inside(packed, token, N).to(tl.int64),)
    return tokens


@triton.jit
def load_members(features_ptr, scores_ptr, tokens, start, count, offs_d, stride_n, stride_d, stride_score, D):
    """Scores and channels of IN_FLIGHT tokens of a list. Past its end they are 0, and so add nothing to a sum."""
    weights = ()
    x = ()
    for i in tl.static_range(IN_FLIGHT):
        there = start + i < count
        weights = weights + (tl.load(scores_ptr + tokens[i] * stride_score, mask=there, other=0.0),)
        pointers = features_ptr + tokens[i] * stride_n + offs_d * stride_d
        x = x + (tl.load(pointers, mask=offs_d < tl.where(there, D, 0), other=0.0),)
    return weights, x


@triton.jit
def weighted_sum(
    features_ptr, scores_ptr, members_ptr, count, offs_d, stride_n, stride_d, stride_score, packed, N, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of score * features [BLOCK_D] and of scores over a list of tokens, in its order.

    What a turn adds was loaded in the turn before: else the compiler, to save registers, would load a member only when
    the one before it is added.
    """
    acc = tl.zeros([BLOCK_D], tl.float32)
    mass = tl.zeros([], tl.float32)
    folded = tl.zeros([BLOCK_D], tl.float32)
    folded_mass = tl.zeros([], tl.float32)
    start = tl.zeros([], tl.int32)
    tokens = load_tokens(members_ptr, start, count, packed, N)
    weights, x = load_members(
        features_ptr, scores_ptr, tokens, start, count, offs_d, stride_n, stride_d, stride_score, D
    )
    tokens = load_tokens(members_ptr, start + IN_FLIGHT, count, packed, N)
    while start < count:
        start += IN_FLIGHT
        next_weights, next_x = load_members(
            features_ptr, scores_ptr, tokens, start, count, offs_d, stride_n, stride_d, stride_score, D
        )
        tokens = load_tokens(members_ptr, start + IN_FLIGHT, count, packed, N)
        for i in tl.static_range(IN_FLIGHT):
            weight = weights[i].to(tl.float32)
            acc = tl.fma(tl.full([BLOCK_D], weight, tl.float32), x[i].to(tl.float32), acc)
            mass += weight
        if start % FOLD == 0:
            folded += acc
            folded_mass += mass
            acc = tl.zeros([BLOCK_D], tl.float32)
            mass = tl.zeros([], tl.float32)
        weights, x = next_weights, next_x
    return acc + folded, mass + folded_mass


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    features_ptr,  # [B, N, D]
    scores_ptr,  # [B, N]
    indices_ptr,  # [B, K]
    assignment_ptr,  # [B, N]
    members_ptr,  # [B, N] int32, written first: the tokens of row 0, then of row 1, ...
    merged_ptr,  # [B, K, D], packed: [total_keep, D]
    mass_ptr,  # [B, K], packed: [total_keep]
    stride_feature_b, stride_feature_n, stride_feature_d,
    stride_score_b, stride_score_n,
    stride_index_b, stride_index_k,
    stride_assignment_b, stride_assignment_n,
    N, K, D, packed,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pid_b, pid_k = image_of_row(packed, pid, K)
    at_b, N = image_tokens(packed, pid_b, N)
    features_ptr += at_b * stride_feature_b
    scores_ptr += at_b * stride_score_b
    assignment_ptr += at_b * stride_assignment_b
    members_ptr += tokens_before(packed, at_b, N)
    if packed is None:
        indices_ptr += pid_b * stride_index_b + pid_k * stride_index_k
    else:
        indices_ptr += pid * stride_index_k
    merged_ptr += pid * D

    own = tl.load(indices_ptr)
    exists = (own >= 0) & (own < N)
    to_itself = tl.load(assignment_ptr + own * stride_assignment_n, mask=exists, other=-1) == pid_k
    first, count = list_members(
        members_ptr, assignment_ptr, pid_k, stride_assignment_n, tl.where(exists, N, 0), BLOCK_N
    )
    start = tl.zeros([], tl.int64)
    while start < D:
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        acc, mass = weighted_sum(
            features_ptr, scores_ptr, members_ptr + first, count, offs_d,
            stride_feature_n, stride_feature_d, stride_score_n, packed, N, D, BLOCK_D,
        )  # fmt: skip
        if exists & ((mass == 0) | ((count == 1) & to_itself)):  # the token's own bits, NaN payloads and all
            kept = tl.load(features_ptr + own * stride_feature_n + offs_d * stride_feature_d, mask=mask_d)
            tl.store(merged_ptr + offs_d, kept, mask=mask_d)
        else:
            mean = tl.div_rn(acc, tl.full([BLOCK_D], 1.0, tl.float32) * tl.where(exists, mass, 1.0))
            tl.store(merged_ptr + offs_d, narrow(mean, merged_ptr.dtype.element_ty), mask=mask_d)
        if start == 0:
            tl.store(mass_ptr + pid, mass)
        start += BLOCK_D


def launch_merge(features, scores, indices, assignment, members, merged, mass, packed=None):
    """The kernel alone, into merged [B, K, D] and mass [B, K], packed: [total_keep, D] and [total_keep], by way of
    members [B, N] int32, packed: [T]."""
    k, d = merged.shape[-2:]
    n = features.shape[1] if packed is None else packed.max_seqlen
    if mass.numel() == 0:
        return
    config = MergeConfig.for_shape(d)
    launch(
        merge_kernel, (mass.numel(),),
        features, scores, indices, assignment, members, merged, mass,
        *strides_of(features, 3), *strides_of(scores, 2), *strides_of(indices, 2), *strides_of(assignment, 2),
        n, k, d, packed,
        BLOCK_N=config.block_n, BLOCK_D=config.block_d,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] in the dtype of features and mass [B, K] fp32."""
    reject_float64(features=features, scores=scores)
    b, n, d = features.shape
    k = indices.shape[1]
    merged = new(features, (b, k, d))
    mass = new(features, (b, k), torch.float32)
    members = new(features, (b, n), torch.int32)
    with on_device_of(features):
        launch_merge(features, scores, indices, assignment, members, merged, mass)
    return merged, mass


@triton.jit(do_not_specialize=VARYING)
def merge_backward_kernel(
    grad_merged_ptr,  # [B, K, D]
    grad_mass_ptr,  # [B, K]
    features_ptr,  # [B, N, D] or None
    scores_ptr,  # [B, N]
    merged_ptr,  # [B, K, D] or None
    mass_ptr,  # [B, K]
    indices_ptr,  # [B, K]
    assignment_ptr,  # [B, N]
    grad_features_ptr,  # [B, N, D]
    grad_scores_ptr,  # [B, N]
    stride_grad_merged_b, stride_grad_merged_k, stride_grad_merged_d,
    stride_grad_mass_b, stride_grad_mass_k,
    stride_feature_b, stride_feature_n, stride_feature_d,
    stride_score_b, stride_score_n,
    stride_merged_b, stride_merged_k, stride_merged_d,
    stride_mass_b, stride_mass_k,
    stride_index_b, stride_index_k,
    stride_assignment_b, stride_assignment_n,
    N, K, D, num_parts,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OF_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of tokens, each from the row it went into.

    OF_ROWS: of a block of rows, the kept tokens of those that have no mass and are not where their token went. Such a
    token has a second gradient, and its first is computed again, as the sum is to be rounded once.
    """
    pid = tl.program_id(0)
    pid_b = (pid // num_parts).to(tl.int64)
    offs = (pid % num_parts * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    grad_merged_ptr += pid_b * stride_grad_merged_b
    mass_ptr += pid_b * stride_mass_b
    indices_ptr += pid_b * stride_index_b
    assignment_ptr += pid_b * stride_assignment_b
    token, mask_n = offs, offs < N
    if OF_ROWS:
        token = tl.load(indices_ptr + offs * stride_index_k, mask=offs < K, other=-1)
        mask_n = (token >= 0) & (token < N)
        mask_n = mask_n & (tl.load(mass_ptr + offs * stride_mass_k, mask=mask_n, other=1.0) == 0)
        mask_n = mask_n & (tl.load(assignment_ptr + token * stride_assignment_n, mask=mask_n, other=0) != offs)
        if tl.max(mask_n.to(tl.int32), axis=0) == 0:
            return

    row = tl.load(assignment_ptr + token * stride_assignment_n, mask=mask_n, other=-1)
    member = (row >= 0) & (row < K)
    own = tl.load(indices_ptr + row * stride_index_k, mask=member, other=-1)
    member = member & (own >= 0) & (own < N)
    mass = tl.load(mass_ptr + row * stride_mass_k, mask=member, other=1.0)
    merges = member & (mass != 0)
    copies = member & (mass == 0) & (own == token)
    mass = tl.where(mass != 0, mass, 1.0)
    score = tl.load(scores_ptr + pid_b * stride_score_b + token * stride_score_n, mask=merges, other=0.0)
    weight = tl.where(copies, 1.0, tl.div_rn(score.to(tl.float32), mass))

    if features_ptr is not None:
        features_ptr += pid_b * stride_feature_b + token[:, None] * stride_feature_n
        merged_ptr += pid_b * stride_merged_b + row[:, None] * stride_merged_k
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = tl.zeros([], tl.int32)
    while start < D:
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask_d = offs_d < D
        gradient_ptrs = grad_merged_ptr + offs_d * stride_grad_merged_d
        from_row = tl.load(
            gradient_ptrs + row[:, None] * stride_grad_merged_k, mask=(merges | copies)[:, None] & mask_d, other=0.0
        ).to(tl.float32)
        if features_ptr is not None:
            merging = merges[:, None] & mask_d
            x = tl.load(features_ptr + offs_d * stride_feature_d, mask=merging, other=0.0).to(tl.float32)
            mean = tl.load(merged_ptr + offs_d * stride_merged_d, mask=merging, other=0.0).to(tl.float32)
            acc = tl.fma(x - mean, from_row, acc)
        gradient = weight[:, None] * from_row
        if OF_ROWS:
            mask = mask_n[:, None] & mask_d
            gradient += tl.load(gradient_ptrs + offs[:, None] * stride_grad_merged_k, mask=mask, other=0.0)
        at = grad_features_ptr + (pid_b * N + token[:, None]) * D + offs_d
        tl.store(at, narrow(gradient, grad_features_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d)
        start += BLOCK_D

    of_mass = tl.load(grad_mass_ptr + pid_b * stride_grad_mass_b + row * stride_grad_mass_k, mask=member, other=0.0)
    gradient = tl.where(merges, tl.div_rn(sum_in_pairs(acc), mass), 0.0) + of_mass
    at = grad_scores_ptr + pid_b * N + token
    tl.store(at, narrow(gradient, grad_scores_ptr.dtype.element_ty), mask=mask_n)


def merge_backward(
    grad_merged: torch.Tensor,  # [B, K, D]
    grad_mass: torch.Tensor,  # [B, K]
    features: torch.Tensor | None,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    merged: torch.Tensor | None,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K] int64, distinct, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of features [B, N, D] and of scores [B, N], in their dtypes."""
    reject_float64(features=grad_merged, scores=scores)  # features have the dtype of their slopes
    (b, n), (k, d) = scores.shape, grad_merged.shape[1:]
    grad_features, grad_scores = new(grad_merged, (b, n, d)), new(scores, (b, n))
    config = MergeBackwardConfig.for_shape(d)
    tensors = (grad_merged, grad_mass, features, scores, merged, mass, indices, assignment)
    strides = [stride for tensor, axes in zip(tensors, RANKS, strict=True) for stride in strides_of(tensor, axes)]
    with on_device_of(grad_merged):
        for count, of_rows in ((n, False), (k, True)):
            parts = triton.cdiv(count, config.block_n)
            if b * n * parts > 0:
                launch(
                    merge_backward_kernel, (b * parts,), *tensors, grad_features, grad_scores, *strides, n, k, d, parts,
                    BLOCK_N=config.block_n, BLOCK_D=config.block_d, OF_ROWS=of_rows,
                    num_warps=config.num_warps, enable_fp_fusion=False,
                )  # fmt: skip
    return grad_features, grad_scores
