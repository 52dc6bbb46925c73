"""The score-weighted mean of each cluster (Eq. 8): the definition, in fp64."""

import torch


def rounded_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 x as dtype. torch goes to 16 bits by way of fp32, where a second rounding would meet a tie of the first."""
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    nearest = x.float()
    inexact = (nearest.double() != x) & nearest.isfinite()
    toward_zero = nearest.view(torch.int32) - (nearest.double().abs() > x.abs()).int()
    odd = (toward_zero | 1).view(torch.float32)  # an odd last bit says: not exactly this, but not beyond it
    return torch.where(inexact, odd, nearest).to(dtype)


def is_copied(
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
    mass: torch.Tensor,  # [B, K]
) -> torch.Tensor:  # [B, K] bool
    """Which rows are their kept token: those of zero mass, and those that nothing else went into."""
    row = torch.arange(indices.shape[1], dtype=torch.int64, device=indices.device)
    member = assignment[:, None] == row[:, None]  # [B, K, N]
    own = member.gather(2, indices.clamp(min=0)[..., None])[..., 0]
    return (indices >= 0) & ((mass == 0) | (own & (member.sum(dim=2) == 1)))


def with_copies(
    merged: torch.Tensor,  # [B, K, D]
    features: torch.Tensor,  # [B, N, D], in the dtype of merged
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
    mass: torch.Tensor,  # [B, K]
) -> torch.Tensor:
    """merged, the copied rows among them moved as bits; torch.where would convert 16-bit numbers, and lose NaNs'."""
    image, row = is_copied(indices, assignment, mass).nonzero(as_tuple=True)
    merged[image, row] = features[image, indices[image, row]]
    return merged


def merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] fp64 and mass [B, K] fp64.

    fp64 holds every number of features, but not the bits of every NaN: see merge_as.
    """
    x, a = features.double(), scores.double()
    merged = x.new_zeros(x.shape[0], indices.shape[1], x.shape[2])
    mass = x.new_zeros(x.shape[0], indices.shape[1])
    for b in range(x.shape[0]):
        for k, own in enumerate(indices[b].tolist()):
            if own < 0:
                continue
            members = (assignment[b] == k).nonzero().flatten()
            mass[b, k] = a[b, members].sum()
            merged[b, k] = (a[b, members, None] * x[b, members]).sum(dim=0) / mass[b, k]  # Eq. 8
    return with_copies(merged, x, indices, assignment, mass), mass


def merge_as(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] in the dtype of features, rounded once, and mass [B, K] fp64. What is copied is copied
    bit for bit, NaN payloads and all."""
    merged, mass = merge(features, scores, indices, assignment)
    return with_copies(rounded_once(merged, features.dtype), features, indices, assignment, mass), mass


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
    """Return the gradients of features [B, N, D] fp64 and of scores [B, N] fp64.

    d merged_k / d features_i = scores_i / mass_k, d merged_k / d scores_i = (features_i - merged_k) / mass_k and
    d mass_k / d scores_i = 1 for the tokens i of row k. A row of zero mass is its kept token: 1 for that, else 0.
    Without features and merged, the gradient of scores is that of mass alone.
    """
    a = scores.double()
    grad_features, grad_scores = a.new_zeros(*a.shape, grad_merged.shape[2]), torch.zeros_like(a)
    for b in range(a.shape[0]):
        for k, own in enumerate(indices[b].tolist()):
            if own < 0:
                continue
            members = (assignment[b] == k).nonzero().flatten()
            gradient, total = grad_merged[b, k].double(), mass[b, k].double()
            grad_scores[b, members] = grad_mass[b, k].double()
            if total == 0:
                grad_features[b, own] += gradient
            else:
                grad_features[b, members] += a[b, members, None] / total * gradient
                if features is not None and merged is not None:  # both or neither
                    apart = features[b, members].double() - merged[b, k].double()
                    grad_scores[b, members] += (apart * gradient).sum(dim=-1) / total
    return grad_features, grad_scores
