"""IDPruner (Tan et al. 2026): "Harmonizing importance and diversity in visual token pruning for MLLMs"."""

import torch

from ..ops.greedy_select import greedy_select
from ..ops.select_and_merge import Condensed
from .registry import CLS, method
from .results import at_least_fp32, selected


@method(
    "IDPruner", "Tan et al. 2026, arXiv 2602.13315, maximal marginal relevance", primitive="greedy_select", scores=CLS,
    cost="N K D",
)  # fmt: skip
def idpruner(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
    balance: float = 0.5,
) -> Condensed:
    """The next token has the largest ``balance * importance - (1 - balance) * cos`` to the kept token most like it; the
    first is the most important one, whatever ``balance`` is. Nothing is merged.

    importance: ``scores``, scaled to [0, 1] by image: (score - lowest) / (highest - lowest + 1e-6). balance: the
    paper's lambda, in [0, 1]. The published code (AngelSlim) takes importance from a trained scorer, VisionSelector;
    here it is whatever comes as ``scores``. It can pick several tokens a step (parallel_k), here one.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance: expected a number in [0, 1], got {balance!r}. Remedy: 1 is importance alone.")
    scale = at_least_fp32(scores.detach())
    low, high = scale.aminmax(dim=1, keepdim=True)
    importance = (scale - low) / (high - low + 1e-6)
    order = greedy_select(
        keys=(features if keys is None else keys).detach(), prior=balance * importance, k=keep, first=importance,
        suppression=1 - balance, scale_prior=False,
    )  # fmt: skip
    return selected(features, scores, order)
