"""Every token to the kept token that is most similar and near (Eq. 6, 7): the definition, in fp64."""

from collections.abc import Sequence

import torch

from ..similarity.reference import MASKED


def grid_positions(grid: Sequence[int]) -> torch.Tensor:  # [N, P] int64 on CPU
    """The coordinates of a row-major token grid: (h, w) or (t, h, w)."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.int64, device="cpu") for size in grid))


def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x - y in fp64, rounded once: also of int64, which fp64 does not hold."""
    if x.is_floating_point():
        return x - y
    high, low = (x >> 32) - (y >> 32), (x & 0xFFFFFFFF) - (y & 0xFFFFFFFF)  # x = 2**32 * high + low
    return high.double() * 2.0**32 + low.double()


def relative_distance(
    positions: torch.Tensor,  # [N, P]
    indices: torch.Tensor,  # [K]
    valid: torch.Tensor,  # [N] bool
) -> torch.Tensor:  # [N, K] in [0, 1]
    """d_ij / dmax of Eq. 6: dmax is the diagonal of the valid tokens' bounding box."""
    positions = positions.double() if positions.is_floating_point() else positions.long()
    finite = positions.isfinite().all(dim=-1)
    boxed = positions[finite & valid]
    if len(boxed) == 0:
        return torch.zeros(len(positions), len(indices), dtype=torch.float64, device=positions.device)
    if apart(boxed.amax(dim=0), boxed.amin(dim=0)).isinf().any():
        positions, boxed = positions / 2, boxed / 2  # too far apart for fp64, and what this rounds is nothing to that
    sides = apart(boxed.amax(dim=0), boxed.amin(dim=0))
    extent = sides.amax()
    if extent == 0:
        return torch.zeros(len(positions), len(indices), dtype=torch.float64, device=positions.device)
    box = sides / extent
    difference = apart(positions[:, None], positions[indices]) / extent  # [N, K, P]
    distance = difference.square().sum(dim=-1).sqrt() / box.square().sum().sqrt()
    return torch.where(finite[:, None] & finite[indices], distance, 0.0)


def assign(
    s: torch.Tensor,  # [B, N, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    grid: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [B, N] bool
) -> torch.Tensor:
    """Return assignment [B, N] int64: the row of each token; -1 where masked, and where neither a source nor kept."""
    if grid is not None:
        positions = grid_positions(grid).to(s.device)
    masked = torch.zeros(s.shape[:2], dtype=torch.bool, device=s.device) if tier is None else tier == MASKED
    assignment = torch.full(s.shape[:2], -1, dtype=torch.int64, device=s.device)
    for b in range(s.shape[0]):
        rows = [k for k, i in enumerate(indices[b].tolist()) if i >= 0 and not masked[b, i]]
        if rows:
            kept = indices[b, rows]
            affinity = s[b].double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)[kept].T  # [N, rows]: s[kept, token]
            if positions is not None and spatial_weight != 0:
                where = positions if positions.dim() == 2 else positions[b]
                affinity = affinity - spatial_weight * relative_distance(where, kept, ~masked[b])  # Eq. 6
            best = (affinity == affinity.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)  # Eq. 7, lowest row
            row_of = torch.tensor(rows, dtype=torch.int64, device=s.device)
            assignment[b] = row_of[best]
            if sources is not None:
                assignment[b, ~sources[b]] = -1
            assignment[b, kept.flip(0)] = row_of.flip(0)  # a kept token is its own
        assignment[b, masked[b]] = -1
    return assignment
