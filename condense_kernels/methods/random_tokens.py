"""Tokens at random: the baseline of every table (Wen et al. 2025, "Are We Solving the Right Problem?", section 4)."""

import torch

from ..ops.select_and_merge import Condensed
from .registry import NONE, method
from .results import Grid, merged_at, selected


def drawn(scores: torch.Tensor, keep: int, generator: torch.Generator | None) -> torch.Tensor:
    """[B, K] distinct."""
    noise = torch.rand(scores.shape, dtype=torch.float32, device=scores.device, generator=generator)
    return noise.topk(keep).indices


@method("Random", "Wen et al. 2025, section 4", primitive="torch.rand, top-k", scores=NONE, cost="-")
def random(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    generator: torch.Generator | None = None,
) -> Condensed:
    """K tokens drawn uniformly, each at most once; nothing is merged.

    ``generator`` is torch's, of the features' device; None: the global one. In the paper tokens leave inside the
    language model, at FastV's layer; here before it.
    """
    return selected(features, scores, drawn(scores, keep, generator))


@method(
    "Random + merge",
    "ours: Random, then Eq. 6 to 8 of CondenseVLM",
    primitive="assign, merge",
    scores=NONE,
    cost="N K D",
)
def random_merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    grid: Grid | None = None,
    keys: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Condensed:
    """K tokens drawn uniformly, every other one merged into one of those as CondenseVLM does it.

    What a selection is worth beyond its merge: no paper's table has it, and in ours it is hard to beat
    (docs/evidence.md).
    """
    return merged_at(features, scores, drawn(scores, keep, generator), grid, keys=keys)
