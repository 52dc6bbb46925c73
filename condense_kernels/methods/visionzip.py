"""VisionZip (Yang et al. 2024): "Longer is better but not necessary in vision language models"."""

import torch

from .._dispatch.checks import is_int, shown
from ..ops.assign import assign
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from .registry import CLS, method
from .results import best, rows


@method(
    "VisionZip", "Yang et al. 2024, arXiv 2412.04467, sections 3.2 and 3.3", primitive="assign, merge", scores=CLS,
    cost="N K D",
)  # fmt: skip
def visionzip(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]; theirs: the attention keys, averaged over the heads
    contextual: int | None = None,
) -> Condensed:
    """Dominant tokens by [CLS] attention stay as they are; contextual ones stand evenly spaced among the others, and
    each is added the mean of the others that are most similar to it.

    ``contextual`` of the K tokens are of the second kind: by default round(K * 10 / 64), as the paper has 54 + 10 of
    64. A contextual token's features are its own plus a mean, so about twice as long as a token's, as published.
    The published code hard-codes 54 + 10 and 576 tokens; [CLS] itself, which it keeps besides, is not of the picture.
    A dominant token's mass is its score, a contextual one's that of its cluster.
    """
    contextual = round(keep * 10 / 64) if contextual is None else contextual
    if not is_int(contextual) or not 0 <= contextual <= keep:
        raise ValueError(f"contextual: expected an int from 0 to {keep}, a part of keep, got {shown(contextual)}.")
    dominant, n = keep - contextual, scores.shape[1]
    order = best(scores, n)
    chosen, rest = order[:, :dominant], order[:, dominant:].sort(dim=1).values
    centres = rest[:, :: max(rest.shape[1] // max(contextual, 1), 1)][:, :contextual]  # evenly spaced
    is_source = torch.ones_like(scores, dtype=torch.bool).scatter(1, chosen, False)
    every = torch.cat([chosen, centres], dim=1)  # [B, K]
    assignment = assigned_among(features if keys is None else keys, centres, is_source, every)
    ones = torch.ones_like(scores, dtype=torch.float32)
    is_centre = torch.zeros_like(is_source).scatter(1, centres, True)
    mean, count = merge(features, ones.masked_fill(is_centre, 0), every, assignment)
    own = rows(features, every)
    at = torch.arange(keep, dtype=torch.int64, device=scores.device) >= dominant
    has_others = at & (count > 0)
    merged = torch.where(has_others[..., None], own + mean, own)
    _, mass = merge(features.detach(), scores, every, assignment)
    return Condensed(merged, every, assignment, mass)


def assigned_among(
    keys: torch.Tensor,  # [B, N, Dk]
    centres: torch.Tensor,  # [B, M]
    is_source: torch.Tensor,  # [B, N] bool
    every: torch.Tensor,  # [B, K], of which the last M are the centres
) -> torch.Tensor:
    """[B, N]: the row of the most similar centre; tokens that are no source have a row of their own or none."""
    k, m = every.shape[1], centres.shape[1]
    row = torch.arange(k, dtype=torch.int64, device=keys.device).expand_as(every)
    if m == 0:
        return torch.full_like(is_source, -1, dtype=torch.int64).scatter(1, every, row)
    nearest = assign(keys=keys.detach(), indices=centres, sources=is_source, spatial_weight=0.0)
    return torch.where(nearest >= 0, nearest + k - m, -1).scatter(1, every, row)
