"""Importance against redundancy: the sweep of Wen et al. 2025, "Are we solving the right problem?"."""

import torch

from .._dispatch.checks import FLOATS, check_tensor, check_weight
from ..ops.select_and_merge import Condensed
from .registry import TEXT, method
from .results import best, selected


@method("Importance and redundancy", "Wen et al. 2025, Eq. 6", primitive="top-k", scores=TEXT, cost="N D")
def importance_redundancy(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    alpha: float = 0.5,
    query: torch.Tensor | None = None,  # [B, D]
) -> Condensed:
    """The K tokens of the largest alpha * attention + (1 - alpha) * (1 - similarity); nothing is merged.

    Both are scaled to [0, 1] over the image (footnote 4); one that is the same for all tokens counts 0. alpha = 1 is
    FastV, 0 what is least like the last token; Table 6 has the tenths between. similarity is a token's cosine to the
    last token: of the sequence in the paper, whose hidden state at FastV's layer is ``query``; without it, the last
    visual token. The mutual information of the printed Eq. 6 is not computed in the paper either. Similarity is to one
    token, so two tokens that are alike are both kept or both dropped.

    Raises:
        TypeError, ValueError: alpha is no number in [0, 1]; a query of another shape, dtype or device.
    """
    check_share("alpha", alpha)
    if query is not None:
        check_tensor("query", query, "B D", {"B": features.shape[0], "D": features.shape[2]}, FLOATS, like=features)
    similarity = cosine_to(features.detach(), features[:, -1].detach() if query is None else query.detach())
    value = alpha * scaled(scores.detach()) + (1 - alpha) * (1 - scaled(similarity))
    return selected(features, scores, best(value, keep))


def check_share(name: str, value: float) -> None:
    check_weight(name, value)
    if value > 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}.")


def cosine_to(features: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[B, N], at least fp32; 0 where either is zero or not finite."""
    accurate = torch.promote_types(torch.promote_types(features.dtype, query.dtype), torch.float32)
    x, q = features.to(accurate), query.to(accurate)[:, None]
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(q, dim=-1)
    return ((x * q).sum(dim=-1) / norms).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # no matmul: TF32 may be on


def scaled(value: torch.Tensor) -> torch.Tensor:
    """From the smallest, 0, to the largest, 1, of each image, at least fp32."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    low, high = value.aminmax(dim=1, keepdim=True)
    return (value - low) / torch.where(high > low, high - low, 1)
