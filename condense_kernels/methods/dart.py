"""DART (Wen et al. 2025): "Stop looking for important tokens in multimodal language models: duplication matters
more"."""

import torch

from .._dispatch.checks import is_int, shown
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import NONE, method
from .results import at_least_fp32, best, rows, selected

LAST = -4.0  # below every negated cosine


@method(
    "DART", "Wen et al. 2025, arXiv 2502.11494", primitive="similarity, top-k", scores=NONE, cost="N² D / 2",
)  # fmt: skip
def dart(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]; theirs: the attention keys of the language model's second layer
    pivots: int = 4,
) -> Condensed:
    """A few pivots, the tokens whose keys have the largest L1 norm, and for each of them in turn the tokens that are
    least similar to it by the cosine of the features. Nothing is merged.

    pivots: how many, at most K; the K - pivots other tokens are shared among them, one more for the first ones where
    they do not divide. A token with a NaN or an infinity is kept last.

    In the paper this happens in the language model, on its second layer's keys and hidden states, and four tokens of
    the text are pivots as well; before the model there is no text, and the four of the picture take all. Differences
    from the published code: K counts the pivots, where theirs keeps 68 for 64 (4 + 8 * 8); pivots are taken in order of
    their norms, where theirs go in the order of a Python set; ties go to the lowest index.

    Raises:
        ValueError: pivots is no int of at least 1.
    """
    if not is_int(pivots) or pivots < 1:
        raise ValueError(f"pivots: expected an int of at least 1, got {shown(pivots)}. Remedy: 4, as published.")
    pivots = min(pivots, keep)
    norm = at_least_fp32((features if keys is None else keys).detach()).abs().sum(dim=2)
    order = best(norm.masked_fill(~norm.isfinite(), -1.0), pivots)
    s, _, _, tier = similarity(features.detach())
    apart = (-rows(s, order)).masked_fill((tier != 0)[:, None], LAST)  # [B, pivots, N]
    for turn in range(pivots):
        share = (keep - pivots + pivots - 1 - turn) // pivots
        order = torch.cat([order, best(apart[:, turn].scatter(1, order, -torch.inf), share)], dim=1)
    return selected(features, scores, order)
