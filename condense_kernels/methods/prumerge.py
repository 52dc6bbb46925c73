"""LLaVA-PruMerge (Shang et al. 2024): "Adaptive token reduction for efficient large multimodal models"."""

import torch

from .._dispatch.checks import is_int, shown
from ..ops.gather_merge import gather_merge
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import CLS, method
from .results import best, rows

IQR = (
    "The published rule keeps the outliers of the attention, by its quartiles, so that the data choose K: no engine "
    "can size its buffers by it. The nearest is the paper's mean, 40 of 576 (a fifteenth)."
)


@method(
    "LLaVA-PruMerge", "Shang et al. 2024, arXiv 2403.15388, Algorithm 1", primitive="similarity, gather_merge",
    scores=CLS, cost="N² D / 2 + 32 K D", data_dependent=IQR,
)  # fmt: skip
def prumerge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]; theirs: the attention keys of the last layer but one
    neighbours: int = 32,
    rest: bool = True,
) -> Condensed:
    """The K - 1 tokens of the highest [CLS] attention, each with its nearest others added, weighted by their
    attention, and one token of all that was not kept, weighted likewise.

    A row is its token plus sums, as in the published code, not a mean. A token may be among the neighbours of several
    rows, and kept tokens may be neighbours; ``assignment`` has the dropped tokens in the last row, which stands at the
    one of them with the highest score. Theirs returns one token more than the rule gives; here K counts it.
    rest=False leaves it out, and the K highest are kept. K = N and K = 1 have no rest.
    """
    if not is_int(neighbours) or neighbours < 0:
        raise ValueError(f"neighbours: expected an int >= 0, got {shown(neighbours)}. Remedy: 32, as published.")
    n = scores.shape[1]
    picked = keep - 1 if rest and 1 < keep < n else keep
    order = best(scores, n)
    kept, dropped = order[:, :picked], order[:, picked:]
    keys = (features if keys is None else keys).detach()
    s = rows(similarity(keys)[0], kept).scatter(2, kept[..., None], -torch.inf)  # [B, K, N]
    nearest = s.sort(dim=2, descending=True, stable=True).indices[..., : min(neighbours, n - 1)]
    weights = scores[:, None].expand_as(s).gather(2, nearest)
    ones = torch.ones_like(kept[..., None], dtype=weights.dtype)
    around = torch.cat([kept[..., None], nearest], dim=2)  # [B, K, 1 + m]
    merged = gather_merge(features, around, torch.cat([ones, weights], dim=2))
    row = torch.arange(picked, dtype=torch.int64, device=scores.device).expand_as(kept)
    assignment = torch.full_like(order, -1).scatter(1, kept, row)
    mass = scores.gather(1, kept)
    if picked == keep:
        return Condensed(merged, kept, assignment, mass)
    left_out = gather_merge(features, dropped[:, None], scores.gather(1, dropped)[:, None])
    return Condensed(
        torch.cat([merged, left_out], dim=1),
        order[:, :keep],
        assignment.masked_fill(assignment < 0, picked),
        torch.cat([mass, scores.gather(1, dropped).sum(dim=1, keepdim=True)], dim=1),
    )
