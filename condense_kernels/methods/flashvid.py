"""FlashVID (Fan et al. 2026): "Efficient video large language models via training-free tree-based spatiotemporal token
merging"."""

import torch

from ..ops.greedy_select import greedy_select
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import CLS, method
from .results import at_least_fp32, selected


@method(
    "FlashVID, its selection", "Fan et al. 2026, arXiv 2602.08024, attention and diversity based token selection",
    primitive='greedy_select(combine="mul")', scores=CLS, cost="N² D / 2 + N K",
)  # fmt: skip
def flashvid(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """The next token has the largest attention * (1 - cos) to the kept token most like it; the first, to its nearest
    neighbour. A negative score counts as 0. Nothing is merged.

    Each frame is an image: the published ``attn_div``. Its ``attn_div_v2`` multiplies attention by a token's mean dot
    product with the means of the frames: do so to ``scores``. Its ``div`` is ``divprune``. Not here: the segments of a
    video, and the trees over frames that merge the other tokens, as many as the data has.
    """
    s, _, _, tier, nearest = similarity((features if keys is None else keys).detach(), nearest=True)
    attention = at_least_fp32(scores.detach()).clamp(min=0)
    order = greedy_select(s, attention, keep, tier=tier, combine="mul", first=attention * (1 - nearest))
    return selected(features, scores, order)
