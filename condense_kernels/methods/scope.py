"""SCOPE (Deng et al. 2025): "Saliency-coverage oriented token pruning for efficient multimodel LLMs"."""

import torch

from ..ops.coverage_select import coverage_select
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import CLS, method
from .results import at_least_fp32, selected


@method(
    "SCOPE", "Deng et al. 2025, arXiv 2510.24214, the SCOPE score", primitive="coverage_select", scores=CLS,
    cost="N² D / 2 + N² K",
)  # fmt: skip
def scope(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> Condensed:
    """The next token covers most of what is not covered yet, times its attention to the power of ``alpha``. Nothing is
    merged.

    What token j covers anew: the sum over tokens i of max(0, cos_ij - covered_i), where covered_i is the largest cosine
    of i to a kept token, or 0. A negative score counts as 0. Which layer of the vision encoder attends is the caller's
    choice. The greedy is lazy: N² K is the most that it computes. Published code also has attention added to the gain;
    here it multiplies, as in the paper.
    """
    s = similarity((features if keys is None else keys).detach())[0]
    saliency = at_least_fp32(scores.detach()).clamp(min=0) ** alpha
    return selected(features, scores, coverage_select(s, keep, weight=saliency))
