"""ApET (Ma et al. 2026): "Approximation-error guided token compression for efficient VLMs"."""

import torch

from ..ops.greedy_select import greedy_select
from ..ops.select_and_merge import Condensed
from .registry import NONE, method
from .results import selected


@method(
    "Farthest points", "the basis tokens of ApET: Ma et al. 2026, arXiv 2602.19870",
    primitive='greedy_select(metric="neg_l2")', scores=NONE, cost="N K D",
)  # fmt: skip
def farthest_points(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Condensed:
    """The next token is farthest, by Euclidean distance, from the kept token nearest to it; the first is drawn. Nothing
    is merged.

    ApET expresses all tokens by a basis that is found so, keeps those which it fits worst and merges the others into
    them, in the vision encoder's output and again in a layer of the language model. Only its basis is here: how large
    it is there, and how the others are merged, was not verified. ``generator`` is torch's, of the features' device.
    """
    noise = torch.rand(scores.shape, dtype=torch.float32, device=scores.device, generator=generator)
    keys = (features if keys is None else keys).detach()
    return selected(features, scores, greedy_select(keys=keys, k=keep, first=noise, metric="neg_l2"))
