"""Middles and means of a coarser grid: the baselines that no attention is needed for."""

import torch

from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from .registry import NONE, method
from .results import Grid, selected


def blocks(keep: int, grid: Grid) -> tuple[int, int]:
    """Rows and columns of ``keep`` blocks whose sides are most alike."""
    fitting = [(r, k // r) for k in (keep,) for r in range(1, k + 1) if fits(r, k, grid)]
    if not fitting:
        near = [k for k in range(1, grid[0] * grid[-1] + 1) if any(fits(r, k, grid) for r in range(1, k + 1))]
        nearest = min(near, key=lambda k: (abs(k - keep), -k)) if len(grid) == 2 else None
        raise ValueError(
            f"keep: expected for pooling and uniform a product of at most {' x '.join(map(str, grid))}, the grid of an "
            f"image, got {keep}. Remedy: {nearest or 'a grid of rows and columns'}, or a method that takes any number."
        )
    return min(fitting, key=lambda of: (abs(grid[0] / of[0] - grid[1] / of[1]), of))


def fits(rows: int, keep: int, grid: Grid) -> bool:
    return len(grid) == 2 and keep % rows == 0 and rows <= grid[0] and keep // rows <= grid[1]


def middles(rows: int, columns: int, grid: Grid, device: torch.device) -> torch.Tensor:
    """[rows * columns], ascending; each lies in its own block, also where sides hardly differ: 4 blocks of 5."""
    y, x = (middles_of(count, side, device) for count, side in ((rows, grid[0]), (columns, grid[1])))
    return (y[:, None] * grid[1] + x).flatten()


def middles_of(count: int, side: int, device: torch.device) -> torch.Tensor:
    block = torch.arange(count, dtype=torch.int64, device=device)
    first = (block * side + count - 1) // count
    return torch.maximum((2 * block + 1) * side // (2 * count), first)


@method("Uniform grid", "ours: the middles of Pooling's blocks", primitive="-", scores=NONE, cost="-", needs=["grid"])
def uniform(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    grid: Grid,
) -> Condensed:
    """The middles of ``keep`` blocks of the grid as they are: a coarser grid, nothing merged.

    Raises:
        ValueError: keep is not a number of rows times a number of columns of at most those of the grid.
    """
    at = middles(*blocks(keep, grid), grid, scores.device)
    return selected(features, scores, at.expand(len(scores), -1))


@method(
    "Pooling", "Wen et al. 2025, Algorithm 4", primitive="means over blocks", scores=NONE, cost="N D", needs=["grid"]
)
def pooling(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    grid: Grid,
) -> Condensed:
    """The mean of each of ``keep`` blocks of the grid; indices are the middles of the blocks.

    The paper pools square windows in the language model's second layer and keeps the position of each window's token
    of the largest L1 norm; here any rectangles that tile the grid (sides differ by one where they do not divide), and
    the middle's position.
    """
    rows, columns = blocks(keep, grid)
    y, x = (torch.arange(side, dtype=torch.int64, device=scores.device) for side in grid)
    block = ((y * rows // grid[0])[:, None] * columns + x * columns // grid[1]).flatten()  # [N]
    mass = torch.zeros_like(scores[:, :keep]).index_add(1, block, scores)
    indices = middles(rows, columns, grid, scores.device).expand(len(scores), -1)
    block = block.expand(len(scores), -1)
    merged, _ = merge(features, None, indices, block)
    return Condensed(merged, indices, block, mass)
