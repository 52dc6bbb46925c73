"""What every table sets beside the paper's method: ways to K tokens that take a line or two.

Each takes features [B, N, D], scores [B, N], keep and the grid (rows, columns), and returns Condensed.
"""

import torch
import torch.nn.functional as F

from ..ops.assign import assign
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .families import Grid


def selected(features: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor) -> Condensed:
    """The tokens at ``indices`` [B, K] as they are; nothing is merged into them."""
    b, k = indices.shape
    assignment = torch.full(scores.shape, -1, dtype=torch.int64, device=scores.device)
    rows = torch.arange(k, dtype=torch.int64, device=scores.device).expand(b, k)
    merged = features.gather(1, indices[..., None].expand(-1, -1, features.shape[2]))
    return Condensed(merged, indices, assignment.scatter(1, indices, rows), scores.gather(1, indices))


def merged_at(features: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor, grid: Grid) -> Condensed:
    """Any choice of tokens, with the paper's assignment and merge (Eq. 6 to 8)."""
    s = similarity(features.detach(), scores.detach())[0]  # a choice is a constant to autograd
    assignment = assign(s, indices, grid=grid)
    merged, mass = merge(features, scores, indices, assignment)
    return Condensed(merged, indices, assignment, mass)


def topk(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """The highest scores: FasterVLM's choice, where the scores are those of [CLS]."""
    return selected(features, scores, scores.topk(keep).indices.sort().values)


def random(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """Uniformly, with torch's generator."""
    return selected(features, scores, drawn(scores, keep))


def random_merge(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """Uniformly, and every other token merged into one of those."""
    return merged_at(features, scores, drawn(scores, keep), grid)


def topk_merge(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """The highest scores, and every other token merged into one of those."""
    return merged_at(features, scores, scores.topk(keep).indices.sort().values, grid)


def maxmin(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """The token whose nearest is farthest, by cosine, then always the farthest from those kept: DivPrune's choice."""
    z = F.normalize(features.float(), dim=-1)
    distance = 1 - z @ z.mT  # [B, N, N]
    rows = torch.arange(len(z), dtype=torch.int64, device=z.device)
    alone = distance + torch.diag_embed(torch.full_like(scores, torch.inf, dtype=distance.dtype))
    kept = [alone.amin(dim=2).argmax(dim=1)]
    nearest = torch.full_like(distance[:, 0], torch.inf)  # to a kept token
    for _ in range(keep - 1):
        nearest = nearest.minimum(distance[rows, kept[-1]])
        nearest[rows, kept[-1]] = -torch.inf
        kept.append(nearest.argmax(dim=1))
    return selected(features, scores, torch.stack(kept, dim=1).sort().values)


def uniform(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """The middles of pooling's blocks as they are: a coarser grid, nothing merged."""
    return selected(features, scores, middles(*blocks(keep, grid), grid, scores.device).expand(len(scores), -1))


def pooling(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
    """The mean of each of ``keep`` blocks of the grid."""
    rows, columns = blocks(keep, grid)
    y, x = (torch.arange(side, dtype=torch.int64, device=scores.device) for side in grid)
    block = ((y * rows // grid[0])[:, None] * columns + x * columns // grid[1]).flatten()  # [N]
    of_block = F.one_hot(block, keep).T.to(features.dtype)  # [K, N]
    merged = of_block @ features / of_block.sum(dim=1, keepdim=True)
    mass = torch.zeros_like(scores[:, :keep]).index_add(1, block, scores)
    indices = middles(rows, columns, grid, scores.device)
    return Condensed(merged, indices.expand(len(scores), -1), block.expand(len(scores), -1), mass)


def drawn(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """[B, K] distinct, ascending."""
    noise = torch.rand(scores.shape, dtype=torch.float32, device=scores.device)
    return noise.topk(keep).indices.sort().values


def blocks(keep: int, grid: Grid) -> tuple[int, int]:
    """Rows and columns of ``keep`` blocks whose sides are most alike."""
    splits = [(r, keep // r) for r in range(1, keep + 1) if keep % r == 0] if len(grid) == 2 else []
    fitting = [(r, c) for r, c in splits if r <= grid[0] and c <= grid[1]]
    if not fitting:
        raise ValueError(
            f"num_tokens: expected for pooling and uniform a product of at most {' x '.join(map(str, grid))}, the grid "
            f"of an image, got {keep}. Remedy: a number with such factors, or a method that takes any."
        )
    return min(fitting, key=lambda of: (abs(grid[0] / of[0] - grid[1] / of[1]), of))


def middles(rows: int, columns: int, grid: Grid, device: torch.device) -> torch.Tensor:
    """[rows * columns], ascending."""
    y = (2 * torch.arange(rows, dtype=torch.int64, device=device) + 1) * grid[0] // (2 * rows)
    x = (2 * torch.arange(columns, dtype=torch.int64, device=device) + 1) * grid[1] // (2 * columns)
    return (y[:, None] * grid[1] + x).flatten()
