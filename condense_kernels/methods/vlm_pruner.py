"""VLM-Pruner (Wu et al. 2025): "Buffering for spatial sparsity in an efficient VLM centrifugal token pruning
paradigm"."""

import math

import torch

from .._dispatch.checks import is_int, shown
from ..ops.assign import assign
from ..ops.greedy_select import greedy_select
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import NONE, method
from .results import Grid, at_least_fp32, best, rows

LAST = -4.0  # below every negated cosine times 1.5


@method(
    "VLM-Pruner", "Wu et al. 2025, arXiv 2512.02700", primitive="greedy_select, similarity, assign, merge",
    scores=NONE, cost="N² D / 2 + N K² / 16", needs=["grid"],
)  # fmt: skip
def vlm_pruner(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    grid: Grid,
    keys: torch.Tensor | None = None,  # [B, N, Dk]; theirs: the attention keys of the language model's second layer
    pivots: int = 4,
    batch: int = 16,
) -> Condensed:
    """From a few pivots outwards: in rounds, the tokens least similar to those kept, where what is far from all of them
    counts as more similar, so that it waits. Each dropped token then goes into the kept one most similar to it.

    Pivots: the token whose key has the largest L1 norm, then farthest points of the keys in Euclidean distance. A
    round takes the ``batch`` tokens of the lowest ``max cos * (1 + d / 2)``: cosines of the features to the kept
    tokens, d the distance on the grid to the nearest of those over sqrt(rows² + columns²). A kept token becomes 0.3 of
    itself and 0.7 of the mean of its dropped ones, weighted by their cosines, where one of those is above 0.

    In the paper this happens in the language model, behind its second layer. Differences from the published code: its
    rounds admit what is below a threshold, which rises until there are K, so that the data decides how many rounds;
    here a round is a batch, whatever its similarity, and their number is known. Its cosines are of the 256 channels of
    the largest variance, here of all. Ties go to the lowest index.

    Raises:
        ValueError: pivots or batch is no int of at least 1.
    """
    for name, count in (("pivots", pivots), ("batch", batch)):
        if not is_int(count) or count < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {shown(count)}.")
    z, x = (features if keys is None else keys).detach(), features.detach()
    norm = at_least_fp32(z).abs().sum(dim=2)
    first = best(norm.masked_fill(~norm.isfinite(), -1.0), 1)[:, 0]
    order = greedy_select(keys=z, k=min(pivots, keep), first=first, metric="neg_l2")
    s, _, _, tier = similarity(x)
    d = distances(grid, s)
    for kept in range(order.shape[1], keep, batch):
        like = rows(s, order).amax(dim=1) * (1 + d[order].amin(dim=1) / 2)  # [B, N]
        apart = (-like).masked_fill(tier != 0, LAST).scatter(1, order, -torch.inf)
        order = torch.cat([order, best(apart, min(batch, keep - kept))], dim=1)
    indices = order.sort(dim=1).values
    assignment = assign(s, indices, tier=tier, spatial_weight=0.0)
    weight = rows(s, indices).gather(1, assignment[:, None].clamp(min=0))[:, 0].clamp(min=0).scatter(1, indices, 0)
    mean, total = merge(features, weight, indices, assignment)
    own = rows(features, indices)
    merged = torch.where(total[..., None] > 0, (0.3 * own + 0.7 * mean).to(own.dtype), own)
    return Condensed(merged, indices, assignment, merge(x, scores, indices, assignment)[1])


def distances(grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """[N, N], over sqrt(rows² + columns²)."""
    sides = [torch.arange(side, dtype=like.dtype, device=like.device) for side in grid]
    at = torch.stack([place.flatten() for place in torch.meshgrid(*sides, indexing="ij")], dim=1)
    return (at[:, None] - at).square().sum(dim=2).sqrt() / math.hypot(*grid)
