"""Weighted sums of listed tokens: the definition, in fp64."""

import torch

from ..merge.reference import rounded_once


def gather_merge(
    x: torch.Tensor,  # [B, N, D]
    neighbours: torch.Tensor,  # [B, K, m] int64, -1 = none
    weights: torch.Tensor | None = None,  # [B, K, m]; None: ones
) -> torch.Tensor:
    """Return merged [B, K, D] in the dtype of x, summed in fp64 and rounded once. A sum of one token without weights is
    that token bit for bit, NaN payloads and all."""
    (b, _, d), k = x.shape, neighbours.shape[1]
    total = torch.zeros(b, k, d, dtype=torch.float64, device=x.device)
    alone = []  # (image, row, token)
    for i in range(b):
        for r, listed in enumerate(neighbours[i].tolist()):
            there = [(j, token) for j, token in enumerate(listed) if token >= 0]
            for j, token in there:
                weight = 1.0 if weights is None else weights[i, r, j].double()
                total[i, r] += weight * x[i, token].double()
            if weights is None and len(there) == 1:
                alone.append((i, r, there[0][1]))
    merged = rounded_once(total, x.dtype)
    for i, r, token in alone:
        merged[i, r] = x[i, token]
    return merged


def gather_merge_backward(
    grad_merged: torch.Tensor,  # [B, K, D]
    x: torch.Tensor | None,  # [B, N, D]
    neighbours: torch.Tensor,  # [B, K, m] int64, -1 = none
    weights: torch.Tensor | None,  # [B, K, m]; None: ones
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x [B, N, D] fp64 and of weights [B, K, m] fp64, the latter zeros without x.

    d merged_k / d x_i = the sum of weights_kj over the j with neighbours_kj = i; d merged_k / d weights_kj =
    x[neighbours_kj].
    """
    slopes = grad_merged.double()
    b, k, m = neighbours.shape
    grad_x = slopes.new_zeros(b, num_tokens, slopes.shape[2])
    grad_weights = slopes.new_zeros(b, k, m)
    for i in range(b):
        for r, listed in enumerate(neighbours[i].tolist()):
            for j, token in enumerate(listed):
                if token >= 0:
                    grad_x[i, token] += (1.0 if weights is None else weights[i, r, j].double()) * slopes[i, r]
                    if x is not None:
                        grad_weights[i, r, j] = (slopes[i, r] * x[i, token].double()).sum()
    return grad_x, grad_weights
