"""The merge of each cluster (Eq. 8), one program per row; and its gradient, one program per block of tokens.

A gather in token order, not a matrix product over the whole image: there 0 * NaN would poison every row. A program
lists its row's tokens first, so that it can load several of them at once.
"""

# ruff: noqa: RUF005  (*chunks, x) is not in Triton's language

import torch
import triton
import triton.language as tl

from ..._triton.device import image_of_row, image_rows, image_tokens, inside, narrow, sum_in_pairs, tokens_before
from ..._triton.launcher import VARYING, Packed, as_fp32, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import MergeBackwardConfig, MergeConfig

FOLD = tl.constexpr(32)  # members after which a partial sum is folded away: long clusters lose less
IN_FLIGHT = tl.constexpr(4)  # members loaded together, while as many are added; divides FOLD
RANKS = (3, 2, 3, 2, 3, 2, 2, 2)  # of the arguments of merge_backward
MODES = {"mean": 0, "sum": 1, "lerp": 2}
SUM, LERP = tl.constexpr(MODES["sum"]), tl.constexpr(MODES["lerp"])


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
        if scores_ptr is None:
            weights = weights + (tl.where(there, 1.0, 0.0),)
        else:
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
    scores_ptr,  # [B, N] or None: 1 each
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
    centre_weight,  # of LERP, else None
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pid_b, pid_k = image_of_row(packed, pid, K)
    at_b, N = image_tokens(packed, pid_b, N)
    features_ptr += at_b * stride_feature_b
    if scores_ptr is not None:
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
    if packed is not None:
        _, due, _ = image_rows(packed, pid_b, N, K, 0)
        exists = exists & (pid_k >= 0) & (pid_k < due)
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
        token, is_copied = own, exists & ((mass == 0) | ((count == 1) & to_itself))
        if MODE == SUM:
            is_copied = count == 1
            if scores_ptr is None:
                token = tl.load(members_ptr + first, mask=is_copied, other=0)
                token = inside(packed, token, N).to(tl.int64)
            else:
                is_copied = count < 0  # never: it has a factor
        if is_copied:  # the token's own bits, NaN payloads and all
            kept = tl.load(features_ptr + token * stride_feature_n + offs_d * stride_feature_d, mask=mask_d)
            tl.store(merged_ptr + offs_d, kept, mask=mask_d)
        else:
            if MODE != SUM:
                acc = tl.div_rn(acc, tl.full([BLOCK_D], 1.0, tl.float32) * tl.where(exists, mass, 1.0))
            if MODE == LERP:
                centre = features_ptr + own * stride_feature_n + offs_d * stride_feature_d
                centre = tl.load(centre, mask=offs_d < tl.where(exists, D, 0), other=0.0).to(tl.float32)
                weight = tl.full([BLOCK_D], 1.0, tl.float32) * centre_weight
                acc = tl.fma(weight, centre, (1.0 - weight) * acc)
            tl.store(merged_ptr + offs_d, narrow(acc, merged_ptr.dtype.element_ty), mask=mask_d)
        if start == 0:
            tl.store(mass_ptr + pid, mass)
        start += BLOCK_D


def launch_merge(
    features, scores, indices, assignment, members, merged, mass, packed=None, mode="mean", centre_weight=0.5
):
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
        n, k, d, packed, as_fp32(centre_weight) if mode == "lerp" else None,
        BLOCK_N=config.block_n, BLOCK_D=config.block_d, MODE=MODES[mode],
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    *,
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] in the dtype of features and mass [B, K] fp32."""
    reject_float64(features=features, scores=scores)
    b, n, d = features.shape
    k = indices.shape[1]
    merged = new(features, (b, k, d))
    mass = new(features, (b, k), torch.float32)
    members = new(features, (b, n), torch.int32)
    with on_device_of(features):
        launch_merge(
            features, scores, indices, assignment, members, merged, mass, mode=mode, centre_weight=centre_weight
        )
    return merged, mass


def merge_varlen(
    features: torch.Tensor,  # [T, D]
    scores: torch.Tensor | None,  # [T]
    indices: torch.Tensor,  # [total_keep] int64 within the segment
    assignment: torch.Tensor,  # [T] int64 within the segment
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [total_keep, D] in the dtype of features and mass [total_keep] fp32."""
    reject_float64(features=features, scores=scores)
    (num_tokens, d), total_keep = features.shape, indices.shape[0]
    max_seqlen = min(max_seqlen, num_tokens)
    if cu_seqlens.shape[0] == 1 or max_seqlen == 0:
        return new(features, (total_keep, d), fill=0), new(features, (total_keep,), torch.float32, fill=0)
    merged = new(features, (total_keep, d))
    mass = new(features, (total_keep,), torch.float32)
    members = new(features, (num_tokens,), torch.int32)
    packed = Packed.kept(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen)
    with on_device_of(features):
        launch_merge(features, scores, indices, assignment, members, merged, mass, packed, mode, centre_weight)
    return merged, mass


@triton.jit(do_not_specialize=VARYING)
def merge_backward_kernel(
    grad_merged_ptr,  # [B, K, D]
    grad_mass_ptr,  # [B, K]
    features_ptr,  # [B, N, D] or None: not for the gradient of scores
    scores_ptr,  # [B, N] or None: 1 each
    merged_ptr,  # [B, K, D] or None
    mass_ptr,  # [B, K]
    indices_ptr,  # [B, K]
    assignment_ptr,  # [B, N]
    grad_features_ptr,  # [B, N, D]
    grad_scores_ptr,  # [B, N] or None: nobody's
    stride_grad_merged_b, stride_grad_merged_k, stride_grad_merged_d,
    stride_grad_mass_b, stride_grad_mass_k,
    stride_feature_b, stride_feature_n, stride_feature_d,
    stride_score_b, stride_score_n,
    stride_merged_b, stride_merged_k, stride_merged_d,
    stride_mass_b, stride_mass_k,
    stride_index_b, stride_index_k,
    stride_assignment_b, stride_assignment_n,
    N, K, D, num_parts,
    centre_weight,  # of LERP, else None
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OF_ROWS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of tokens, each from the row it went into.

    OF_ROWS: of a block of rows, the kept tokens of those that have no mass, or a centre, and are not where their token
    went. Such a token has a second gradient, and its first is computed again, as the sum is to be rounded once.
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
        own_mass = tl.load(mass_ptr + offs * stride_mass_k, mask=mask_n, other=1.0)
        if MODE != LERP:
            mask_n = mask_n & (own_mass == 0)
        mask_n = mask_n & (tl.load(assignment_ptr + token * stride_assignment_n, mask=mask_n, other=0) != offs)
        if tl.max(mask_n.to(tl.int32), axis=0) == 0:
            return

    row = tl.load(assignment_ptr + token * stride_assignment_n, mask=mask_n, other=-1)
    member = (row >= 0) & (row < K)
    own = tl.load(indices_ptr + row * stride_index_k, mask=member, other=-1)
    member = member & (own >= 0) & (own < N)
    merges, gets = member, member  # whom its score weighs there, who gets something of the row's gradient
    if MODE != SUM:
        mass = tl.load(mass_ptr + row * stride_mass_k, mask=member, other=1.0)
        merges = member & (mass != 0)
        copies = member & (mass == 0) & (own == token)
        gets = merges | copies
        mass = tl.where(mass != 0, mass, 1.0)
    if scores_ptr is None:
        weight = tl.full([BLOCK_N], 1.0, tl.float32)
    else:
        scores_ptr += pid_b * stride_score_b + token * stride_score_n
        weight = tl.load(scores_ptr, mask=merges, other=0.0).to(tl.float32)
    if MODE != SUM:
        weight = tl.div_rn(weight, mass)
        if MODE == LERP:
            weight = (1.0 - centre_weight) * weight + tl.where(own == token, centre_weight, 0.0)
        weight = tl.where(copies, 1.0, weight)

    if features_ptr is not None:
        if MODE == LERP:
            centre_ptr = features_ptr + pid_b * stride_feature_b + own[:, None] * stride_feature_n
        features_ptr += pid_b * stride_feature_b + token[:, None] * stride_feature_n
        if MODE != SUM:
            merged_ptr += pid_b * stride_merged_b + row[:, None] * stride_merged_k
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = tl.zeros([], tl.int32)
    while start < D:
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask_d = offs_d < D
        gradient_ptrs = grad_merged_ptr + offs_d * stride_grad_merged_d
        from_row = tl.load(
            gradient_ptrs + row[:, None] * stride_grad_merged_k, mask=gets[:, None] & mask_d, other=0.0
        ).to(tl.float32)
        if features_ptr is not None:
            merging = merges[:, None] & mask_d
            x = tl.load(features_ptr + offs_d * stride_feature_d, mask=merging, other=0.0).to(tl.float32)
            if MODE != SUM:
                mean = tl.load(merged_ptr + offs_d * stride_merged_d, mask=merging, other=0.0).to(tl.float32)
                if MODE == LERP:
                    centre = tl.load(centre_ptr + offs_d * stride_feature_d, mask=merging, other=0.0).to(tl.float32)
                    x = (1.0 - centre_weight) * (x - centre)
                    mean -= centre
                x -= mean
            acc = tl.fma(x, from_row, acc)
        gradient = weight[:, None] * from_row
        if OF_ROWS:
            mask = mask_n[:, None] & mask_d
            of_row = tl.load(gradient_ptrs + offs[:, None] * stride_grad_merged_k, mask=mask, other=0.0)
            if MODE == LERP:
                of_row = tl.where(own_mass != 0, centre_weight, 1.0)[:, None] * of_row.to(tl.float32)
            gradient += of_row
        at = grad_features_ptr + (pid_b * N + token[:, None]) * D + offs_d
        tl.store(at, narrow(gradient, grad_features_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d)
        start += BLOCK_D

    if grad_scores_ptr is not None:
        of_mass = tl.load(grad_mass_ptr + pid_b * stride_grad_mass_b + row * stride_grad_mass_k, mask=member, other=0.0)
        gradient = sum_in_pairs(acc)
        if MODE != SUM:
            gradient = tl.div_rn(gradient, mass)
        gradient = tl.where(merges, gradient, 0.0) + of_mass
        at = grad_scores_ptr + pid_b * N + token
        tl.store(at, narrow(gradient, grad_scores_ptr.dtype.element_ty), mask=mask_n)


def merge_backward(
    grad_merged: torch.Tensor,  # [B, K, D]
    grad_mass: torch.Tensor,  # [B, K]
    features: torch.Tensor | None,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    merged: torch.Tensor | None,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K] int64, distinct, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    *,
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of features [B, N, D] and of scores [B, N], in their dtypes; [B, 0] where scores are no
    floating tensor."""
    reject_float64(features=grad_merged, scores=scores)  # features have the dtype of their slopes
    (b, n), (k, d) = assignment.shape, grad_merged.shape[1:]
    grad_features = new(grad_merged, (b, n, d))
    of_scores = scores is not None and scores.is_floating_point()
    grad_scores = new(scores, (b, n)) if of_scores else new(mass, (b, 0))
    if not of_scores:
        features = merged = None
    config = MergeBackwardConfig.for_shape(d)
    tensors = (grad_merged, grad_mass, features, scores, merged, mass, indices, assignment)
    strides = [stride for tensor, axes in zip(tensors, RANKS, strict=True) for stride in strides_of(tensor, axes)]
    launches = ((n, False),) if mode == "sum" else ((n, False), (k, True))
    with on_device_of(grad_merged):
        for count, of_rows in launches:
            parts = triton.cdiv(count, config.block_n)
            if b * n * parts > 0:
                launch(
                    merge_backward_kernel, (b * parts,), *tensors, grad_features, grad_scores if of_scores else None,
                    *strides, n, k, d, parts, as_fp32(centre_weight) if mode == "lerp" else None,
                    BLOCK_N=config.block_n, BLOCK_D=config.block_d, OF_ROWS=of_rows, MODE=MODES[mode],
                    num_warps=config.num_warps, enable_fp_fusion=False,
                )  # fmt: skip
    return grad_features, grad_scores
