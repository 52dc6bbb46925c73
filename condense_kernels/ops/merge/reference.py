"""Each cluster's weighted mean (Eq. 8), sum, or mean blended with its centre: the definitions, in fp64."""

import torch

from ..._dispatch.packing import parts_of

MODES = ("mean", "sum", "lerp")


def rounded_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 x as dtype. torch goes to 16 bits by way of fp32, where a second rounding would meet a tie of the first."""
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    nearest = x.float()
    inexact = (nearest.double() != x) & nearest.isfinite()
    toward_zero = nearest.view(torch.int32) - (nearest.double().abs() > x.abs()).int()
    odd = (toward_zero | 1).view(torch.float32)  # an odd last bit says: not exactly this, but not beyond it
    return torch.where(inexact, odd, nearest).to(dtype)


def weights_of(scores: torch.Tensor | None, assignment: torch.Tensor) -> torch.Tensor:
    """[B, N] fp64."""
    return torch.ones_like(assignment, dtype=torch.float64) if scores is None else scores.double()


def is_copied(
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    mass: torch.Tensor,  # [B, K]
) -> torch.Tensor:  # [B, K] bool
    """Which rows are their kept token: those of zero mass, and those that nothing else went into."""
    if assignment.shape[1] == 0:
        return torch.zeros_like(indices, dtype=torch.bool)
    row = torch.arange(indices.shape[1], dtype=torch.int64, device=indices.device)
    member = assignment[:, None] == row[:, None]  # [B, K, N]
    own = member.gather(2, indices.clamp(min=0)[..., None])[..., 0]
    return (indices >= 0) & ((mass == 0) | (own & (member.sum(dim=2) == 1)))


def copied_tokens(
    scores: torch.Tensor | None,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    mass: torch.Tensor,  # [B, K]
    mode: str,
) -> torch.Tensor:  # [B, K] int64
    """The token whose bits a row is, or -1: its kept token, as is_copied says; of a sum without scores, the only token
    that went into it."""
    if mode != "sum":
        return torch.where(is_copied(indices, assignment, mass), indices, -1)
    copied = torch.full_like(indices, -1)
    for b, k in (indices >= 0).nonzero().tolist():
        members = (assignment[b] == k).nonzero().flatten()
        if scores is None and len(members) == 1:
            copied[b, k] = members[0]
    return copied


def with_copies(
    merged: torch.Tensor,  # [B, K, D]
    features: torch.Tensor,  # [B, N, D], in the dtype of merged
    copied: torch.Tensor,  # [B, K]
) -> torch.Tensor:
    """merged, the copied rows among them moved as bits; torch.where would convert 16-bit numbers, and lose NaNs'."""
    image, row = (copied >= 0).nonzero(as_tuple=True)
    merged[image, row] = features[image, copied[image, row]]
    return merged


def merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] fp64 and mass [B, K] fp64.

    fp64 holds every number of features, but not the bits of every NaN: see merge_as.
    """
    x, a = features.double(), weights_of(scores, assignment)
    merged = x.new_zeros(x.shape[0], indices.shape[1], x.shape[2])
    mass = x.new_zeros(x.shape[0], indices.shape[1])
    for b in range(x.shape[0]):
        for k, own in enumerate(indices[b].tolist()):
            if own < 0:
                continue
            members = (assignment[b] == k).nonzero().flatten()
            mass[b, k] = a[b, members].sum()
            merged[b, k] = (a[b, members, None] * x[b, members]).sum(dim=0)
            if mode != "sum":
                merged[b, k] /= mass[b, k]  # Eq. 8
            if mode == "lerp":
                merged[b, k] = centre_weight * x[b, own] + (1 - centre_weight) * merged[b, k]
    return with_copies(merged, x, copied_tokens(scores, indices, assignment, mass, mode)), mass


def merge_as(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] in the dtype of features, rounded once, and mass [B, K] fp64. What is copied is copied
    bit for bit, NaN payloads and all."""
    merged, mass = merge(features, scores, indices, assignment, mode, centre_weight)
    copied = copied_tokens(scores, indices, assignment, mass, mode)
    return with_copies(rounded_once(merged, features.dtype), features, copied), mass


def merge_backward(
    grad_merged: torch.Tensor,  # [B, K, D]
    grad_mass: torch.Tensor,  # [B, K]
    features: torch.Tensor | None,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    merged: torch.Tensor | None,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K] int64, distinct, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of features [B, N, D] fp64 and of scores [B, N] fp64.

    d mass_k / d scores_i = 1 for the tokens i of row k, whatever the mode. With w = centre_weight for lerp, else 0:
    d merged_k / d features_i = (1 - w) scores_i / mass_k, and w more for the row's kept token c;
    d merged_k / d scores_i = ((1 - w) features_i + w features_c - merged_k) / mass_k.
    A row of zero mass is its kept token: 1 for that, else 0. A sum has scores_i and features_i instead.
    Without features the gradient of scores is that of mass alone.
    """
    a = weights_of(scores, assignment)
    w = centre_weight if mode == "lerp" else 0.0
    grad_features, grad_scores = a.new_zeros(*a.shape, grad_merged.shape[2]), torch.zeros_like(a)
    for b in range(a.shape[0]):
        for k, own in enumerate(indices[b].tolist()):
            if own < 0:
                continue
            members = (assignment[b] == k).nonzero().flatten()
            gradient, total = grad_merged[b, k].double(), mass[b, k].double()
            grad_scores[b, members] = grad_mass[b, k].double()
            if mode == "sum":
                grad_features[b, members] += a[b, members, None] * gradient
                if features is not None:
                    grad_scores[b, members] += (features[b, members].double() * gradient).sum(dim=-1)
            elif total == 0:
                grad_features[b, own] += gradient
            else:
                grad_features[b, members] += (1 - w) * a[b, members, None] / total * gradient
                if mode == "lerp":
                    grad_features[b, own] += w * gradient
                if features is not None and merged is not None:  # both or neither
                    apart = (1 - w) * features[b, members].double() - merged[b, k].double()
                    if mode == "lerp":
                        apart += w * features[b, own].double()
                    grad_scores[b, members] += (apart * gradient).sum(dim=-1) / total
    return grad_features, grad_scores


def merge_varlen(
    features: torch.Tensor,  # [T, D]
    scores: torch.Tensor | None,  # [T]
    indices: torch.Tensor,  # [total_keep] int64 within the segment
    assignment: torch.Tensor,  # [T] int64 within the segment
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    mode: str = "mean",
    centre_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [total_keep, D] in the dtype of features and mass [total_keep] fp64: each segment alone. An index
    or a row that a segment does not have counts as -1."""
    merged = features.new_zeros(len(indices), features.shape[1])
    mass = torch.zeros(len(indices), dtype=torch.float64, device=features.device)
    for part in parts_of(cu_seqlens, cu_kept, len(features), len(indices), max_seqlen):
        own, rows = indices[part.rows], assignment[part.tokens]
        own = torch.where((own >= 0) & (own < part.num_tokens), own, -1)
        rows = torch.where((rows >= 0) & (rows < part.num_rows), rows, -1)
        a = None if scores is None else scores[part.tokens][None]
        alone = merge_as(features[part.tokens][None], a, own[None], rows[None], mode, centre_weight)
        merged[part.rows], mass[part.rows] = alone[0][0], alone[1][0]
    return merged, mass
