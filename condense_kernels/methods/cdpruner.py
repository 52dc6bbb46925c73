"""CDPruner (Zhang et al. 2025): "Beyond attention or similarity: maximizing conditional diversity for token pruning in
MLLMs"."""

import torch

from ..ops.dpp_select import dpp_select
from ..ops.select_and_merge import Condensed
from .registry import TEXT, method
from .results import at_least_fp32, selected


@method(
    "CDPruner", "Zhang et al. 2025, arXiv 2506.10967, greedy MAP of a determinantal point process",
    primitive="dpp_select", scores=TEXT, cost="N² D / 2 + N K² / 2",
)  # fmt: skip
def cdpruner(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """The tokens whose kernel r_i cos_ij r_j has the largest determinant, greedily; r is relevance to the text. Nothing
    is merged.

    r: ``scores``, scaled by image: (score - lowest + 1e-6) / (highest - lowest), 1 where all are equal. Any relevance
    will do, higher for what the question is about. The published code takes the mean cosine of CLIP's image and text
    embeddings, negated; scales over the whole batch, so that an image's tokens change with its neighbours; and returns
    tokens twice where the rank is exhausted. Here the rest of K then comes by relevance. Its cosines are those of the
    projected features, as here without ``keys``.
    """
    scale = at_least_fp32(scores.detach())
    low, high = scale.aminmax(dim=1, keepdim=True)
    relevance = torch.where(high > low, (scale - low + 1e-6) / (high - low), 1.0)
    keys = (features if keys is None else keys).detach()
    tier = (~keys.isfinite().all(dim=2)).to(torch.int8)  # such a token is last, whatever its relevance
    return selected(features, scores, dpp_select(keys=keys, quality=relevance, k=keep, tier=tier))
