"""DivPrune (Alvar et al. 2025): "Diversity-based visual token pruning for large multimodal models"."""

import torch

from ..ops.greedy_select import greedy_select
from ..ops.select_and_merge import Condensed
from .registry import NONE, method
from .results import selected


@method(
    "DivPrune", "Alvar et al. 2025, arXiv 2503.02175, Algorithm 1", primitive='greedy_select(first="max_min")',
    scores=NONE, cost="N² D / 2 + N K",
)  # fmt: skip
def divprune(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """Max-min diversity: the next token is the one whose nearest kept token is farthest, by cosine.

    The first is the one whose nearest neighbour is farthest. The published code can pick a token twice where several
    are equal; here K are distinct. It measures the projected features, as here without ``keys``. Also called max-min.
    """
    order = greedy_select(keys=(features if keys is None else keys).detach(), k=keep, first="max_min")
    return selected(features, scores, order)
