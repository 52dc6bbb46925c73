"""VLM-Pruner (Wu et al. 2025): "Buffering for spatial sparsity in an efficient VLM centrifugal token pruning
paradigm"."""

import torch

from .._dispatch.checks import is_int, shown
from ..ops.assign import assign
from ..ops.greedy_select import greedy_select
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import NONE, method
from .results import Grid, at_least_fp32, best, rows


@method(
    "VLM-Pruner", "Wu et al. 2025, arXiv 2512.02700", primitive="greedy_select, assign, merge",
    scores=NONE, cost="N² D / 2 + N K", needs=["grid"],
)  # fmt: skip
def vlm_pruner(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    grid: Grid,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    pivots: int = 4,
    buffering: float = 0.5,
) -> Condensed:
    """Pivots far apart, then tokens that are least like the kept ones, of which near ones come first; dropped tokens
    go into 0.7 of the row of the kept token most like them.

    Pivots are farthest points of the keys, from the one with the largest L1 norm. The likeness of token i to a kept
    token j is cos(i, j) * (1 + buffering * d_ij / diagonal of the grid), so that what lies far away counts as more
    alike, and the choice grows outwards. A row is 0.3 of its token and 0.7 of the mean of what came, weighted by
    cosine; a token to which nothing came, or nothing with a cosine above 0, stays as it is.
    The published code works in the language model, on 256 channels of the largest variance, takes tokens in batches
    below a threshold that rises until K are found, and has the distance to the nearest kept token in place of d_ij;
    here it is one token at a time, all channels, and pairs.
    """
    if not is_int(pivots) or pivots < 1:
        raise ValueError(f"pivots: expected an int of at least 1, got {shown(pivots)}.")
    if len(grid) != 2:
        raise ValueError(f"grid: expected (rows, columns) for vlm_pruner, got {tuple(grid)}.")
    keys = at_least_fp32(features if keys is None else keys).detach()
    norm = keys.abs().sum(dim=2).nan_to_num(-1.0, posinf=-1.0)
    far = greedy_select(keys=keys, k=min(pivots, keep), first=best(norm, 1)[:, 0], metric="neg_l2")
    s = similarity(features.detach())[0]
    prior = torch.zeros_like(s[:, 0]).scatter(1, far, 10.0)  # above every likeness: pivots are picked first
    buffered = s * (1 + buffering * distances(grid, s))
    kept = greedy_select(buffered, prior, keep).sort(dim=1).values
    assignment = assign(s, kept, spatial_weight=0.0)
    likeness = s.gather(1, kept.gather(1, assignment)[:, None])[:, 0].clamp(min=0)  # of a token to its row's
    mean, came = merge(features, likeness.scatter(1, kept, 0), kept, assignment)
    own = rows(features, kept)
    mixed = torch.lerp(at_least_fp32(own), at_least_fp32(mean), 0.7).to(own.dtype)
    merged = torch.where(came[..., None] > 0, mixed, own)
    _, mass = merge(features.detach(), scores, kept, assignment)
    return Condensed(merged, kept, assignment, mass)


def distances(grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """[N, N] between places, over the length of (height, width) of the grid."""
    sides = [torch.arange(side, dtype=like.dtype, device=like.device) for side in grid]
    at = torch.cartesian_prod(*sides).view(-1, len(grid))
    apart = (at[:, None] - at).square().sum(dim=2).sqrt()
    return apart / sum(side * side for side in grid) ** 0.5
