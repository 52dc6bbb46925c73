"""Condensed from a choice of tokens: as they are, or with the others merged into them."""

from collections.abc import Sequence

import torch

from ..ops.assign import assign
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed

Grid = Sequence[int]


def rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[B, N, D], [B, K] -> [B, K, D]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """[B, K] of the highest scores, ties to the lowest index."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def selected(features: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor) -> Condensed:
    """The tokens at ``indices`` [B, K] as they are; nothing is merged into them."""
    b, k = indices.shape
    assignment = torch.full(scores.shape, -1, dtype=torch.int64, device=scores.device)
    row = torch.arange(k, dtype=torch.int64, device=scores.device).expand(b, k)
    return Condensed(rows(features, indices), indices, assignment.scatter(1, indices, row), scores.gather(1, indices))


def merged_at(
    features: torch.Tensor,
    scores: torch.Tensor,
    indices: torch.Tensor,
    grid: Grid | None,
    *,
    keys: torch.Tensor | None = None,
    spatial_weight: float = 1.0,
) -> Condensed:
    """Any choice of tokens, with the assignment and the merge of CondenseVLM (Eq. 6 to 8)."""
    indices = indices.sort(dim=1).values  # a tie goes to the lowest row
    keys = (features if keys is None else keys).detach()  # a choice is a constant to autograd
    spatial = 0.0 if grid is None else spatial_weight
    assignment = assign(keys=keys, indices=indices, grid=grid, spatial_weight=spatial)
    merged, mass = merge(features, scores, indices, assignment)
    return Condensed(merged, indices, assignment, mass)


def in_picture_order(condensed: Condensed) -> Condensed:
    """Rows by their token's place, as the placeholders that stay are."""
    merged, indices, assignment, mass = condensed
    order = indices.argsort(dim=1)  # [B, K]
    rank = torch.nn.functional.pad(order.argsort(dim=1), (0, 1), value=-1)  # assignment -1 is the last column
    return Condensed(
        merged.gather(1, order[..., None].expand_as(merged)),
        indices.gather(1, order),
        rank.gather(1, assignment.remainder(rank.shape[1])),
        mass.gather(1, order),
    )
