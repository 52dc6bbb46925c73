"""DART (Wen et al. 2025): "Stop looking for important tokens: duplication matters more"."""

import torch
import torch.nn.functional as F

from .._dispatch.checks import is_int, shown
from ..ops.select_and_merge import Condensed
from .registry import NONE, method
from .results import at_least_fp32, best, rows, selected


@method("DART", "Wen et al. 2025, arXiv 2502.11494, section 3", primitive="cosines to a few pivots", scores=NONE,
        cost="4 N D")  # fmt: skip
def dart(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    pivots: int = 4,
) -> Condensed:
    """Pivots are the tokens whose keys have the largest L1 norm; each in turn takes the tokens that are least like it,
    by the cosine of features, of those that are left. Nothing is merged.

    DART runs in the language model, behind its second layer, on that layer's keys and hidden states, and has text
    pivots besides (4 and 4); here all pivots are of the picture. The published code gives each pivot an equal share,
    rounded, so that 64 become 68, and visits pivots in the order of a Python set; here K are kept, the first pivots
    take one more where K - pivots does not divide, and the largest norm comes first. At most K pivots.
    """
    if not is_int(pivots) or pivots < 1:
        raise ValueError(f"pivots: expected an int of at least 1, got {shown(pivots)}. Remedy: 4, as published.")
    pivots = min(pivots, keep)
    norm = at_least_fp32(features if keys is None else keys).detach().abs().sum(dim=2)
    picked = best(norm.nan_to_num(-1.0, posinf=-1.0), pivots)  # [B, P], what is not finite last
    z = F.normalize(at_least_fp32(features).detach(), dim=2)
    is_free = torch.ones_like(scores, dtype=torch.bool).scatter(1, picked, False)
    found = [picked]
    for at, pivot in enumerate(rows(z, picked).unbind(dim=1)):
        share = (keep - pivots) // pivots + (at < (keep - pivots) % pivots)
        unlike = -(z * pivot[:, None]).sum(dim=2).nan_to_num(2.0)
        found.append(best(unlike.masked_fill(~is_free, -torch.inf), share))
        is_free = is_free.scatter(1, found[-1], False)
    return selected(features, scores, torch.cat(found, dim=1))
