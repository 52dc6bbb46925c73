"""ReDiPrune (Yu et al. 2026): "Relevance-diversity pre-projection token pruning for efficient multimodal LLMs"."""

import torch

from .._dispatch.checks import check_count
from ..ops.greedy_select import greedy_select
from ..ops.select_and_merge import Condensed
from .registry import TEXT, method
from .results import at_least_fp32, best, selected


@method(
    "ReDiPrune", "Yu et al. 2026, arXiv 2603.24680, relevance and max-min diversity", primitive="greedy_select",
    scores=TEXT, cost="N K D",
)  # fmt: skip
def rediprune(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
    alpha: float = 0.5,
    among: int | None = None,
) -> Condensed:
    """The next token has the largest alpha * relevance + (1 - cos) to the kept token most like it; the first is the
    most relevant one. Nothing is merged.

    ``scores``: the relevance as it is; there, the cosine of a token with a weighted mean of the question's embeddings.
    among: look at that many of the most relevant tokens alone, or at ``keep`` where that is more; None: at all. The
    published code, with a threshold above 0, looks at 3 * keep where keep < N / 2; where it is more, at those above the
    threshold, a number that depends on the data. It prunes the vision encoder's output, before the projector: that is
    what ``features`` should be, or ``keys``.
    """
    relevance, candidates = at_least_fp32(scores.detach()), None
    if among is not None:
        check_count("among", among, 1, scores.shape[1], f"N = {scores.shape[1]} tokens")
        most = best(relevance, max(among, keep))
        candidates = torch.zeros_like(relevance, dtype=torch.bool).scatter(1, most, True)
    order = greedy_select(
        keys=(features if keys is None else keys).detach(), prior=alpha * relevance, k=keep, first=relevance,
        candidates=candidates, scale_prior=False,
    )  # fmt: skip
    return selected(features, scores, order)
