"""The score-weighted mean of each cluster (Eq. 8): the definition, in fp64."""

import torch


def merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    assignment: torch.Tensor,  # [B, N] int64 in [-1, K)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return merged [B, K, D] fp64 and mass [B, K] fp64."""
    x, a = features.double(), scores.double()
    merged = x.new_zeros(x.shape[0], indices.shape[1], x.shape[2])
    mass = x.new_zeros(x.shape[0], indices.shape[1])
    for b in range(x.shape[0]):
        for k, own in enumerate(indices[b].tolist()):
            if own < 0:
                continue
            members = (assignment[b] == k).nonzero().flatten()
            mass[b, k] = a[b, members].sum()
            if mass[b, k] == 0 or members.tolist() == [own]:
                merged[b, k] = x[b, own]
            else:
                merged[b, k] = (a[b, members, None] * x[b, members]).sum(dim=0) / mass[b, k]  # Eq. 8
    return merged, mass
