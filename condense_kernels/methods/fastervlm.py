"""FasterVLM (Zhang et al. 2024): "[CLS] attention is all you need for training-free visual token pruning"."""

import torch

from ..ops.select_and_merge import Condensed
from .registry import CLS, method
from .results import Grid, best, merged_at, selected


@method("FasterVLM", "Zhang et al. 2024, arXiv 2412.01818, Eq. 4", primitive="top-k", scores=CLS, cost="-")
def fastervlm(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
) -> Condensed:
    """The K tokens with the highest [CLS] attention, in picture order; nothing is merged. Also called top-k.

    Equal scores: the lowest index, where torch.topk of the published code promises nothing.
    """
    return selected(features, scores, best(scores, keep))


@method(
    "FasterVLM + merge", "ours: FasterVLM, then Eq. 6 to 8 of CondenseVLM", primitive="top-k, assign, merge",
    scores=CLS, cost="N K D",
)  # fmt: skip
def topk_merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid | None = None,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """FasterVLM's tokens, every other one merged into one of those as CondenseVLM does it."""
    return merged_at(features, scores, best(scores, keep), grid, keys=keys)
