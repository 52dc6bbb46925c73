"""CondenseVLM: "Zero in on faithful anchors", and the steps of its ablation (Table 7)."""

import torch

from ..budget import DEFAULT_BACKGROUND_RATIO, condense
from ..ops.greedy_select import greedy_select
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import CLS, method
from .results import Grid, best, selected

SOURCE = "CondenseVLM, "


@method(
    "CondenseVLM", SOURCE + "Eq. 2 to 8", primitive="select_and_merge", scores=CLS,
    cost="N² D / 2 + N K",
)  # fmt: skip
def condensevlm(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid | None = None,
    keys: torch.Tensor | None = None,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    spatial_weight: float = 1.0,
) -> Condensed:
    """Anchors by attention and background by global similarity, both greedily against what is like the kept ones; each
    other token is merged into the nearest of those, by cosine and place. Without a grid, by cosine alone."""
    return condense(
        features, scores, keep, background_ratio, grid, keys=keys,
        spatial_weight=0.0 if grid is None else spatial_weight,
    )  # fmt: skip


@method("CondenseVLM, attention alone", SOURCE + "Table 7, row 1 (A_p)", primitive="top-k", scores=CLS, cost="-")
def condensevlm_attention(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
) -> Condensed:
    """The first row of the ablation: what FasterVLM does."""
    return selected(features, scores, best(scores, keep))


@method(
    "CondenseVLM, not merged", SOURCE + "Table 7, row 2 (A_p, S_p)", primitive="greedy_select", scores=CLS,
    cost="N² D / 2 + N K",
)  # fmt: skip
def condensevlm_suppressed(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """The second row: all K tokens are anchors of Eq. 2, nothing is merged."""
    s, sbar, _, tier = similarity((features if keys is None else keys).detach(), scores.detach())
    return selected(features, scores, greedy_select(s, scores, keep, sbar=sbar, tier=tier))


@method(
    "CondenseVLM, merged by cosine", SOURCE + "Table 7, row 3 (A_p, S_p, S_m)", primitive="select_and_merge",
    scores=CLS, cost="N² D / 2 + N K",
)  # fmt: skip
def condensevlm_cosine(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """The third row: the anchors of the second, and each other token is merged into the most similar of them."""
    return condense(features, scores, keep, 0.0, keys=keys, spatial_weight=0.0)


@method(
    "CondenseVLM, without background", SOURCE + "Table 7, row 4 (A_p, S_p, S_m, D_m)", primitive="select_and_merge",
    scores=CLS, cost="N² D / 2 + N K", needs=["grid"],
)  # fmt: skip
def condensevlm_anchors(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid,
    keys: torch.Tensor | None = None,
) -> Condensed:
    """The last row: the third with Eq. 6's distances. The table has no column for the background, so none is here;
    Figure 7 varies it, and ``condensevlm`` has a quarter."""
    return condense(features, scores, keep, 0.0, grid, keys=keys)
