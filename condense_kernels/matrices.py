"""The merge as a matrix, for hosts that multiply. In torch; the host waits for no value."""

from typing import Any

import torch

from ._dispatch import tracing
from ._dispatch.checks import FLOATS, check_tensor
from .ops.merge.op import WEIGHTS, as_column, check_mode
from .ops.similarity.op import compute_dtype


@tracing.leaf()
def merge_matrix(
    assignment: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K]
    scores: torch.Tensor | None = None,  # [B, N]
    *,
    mode: str = "mean",
    centre_weight: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """W [B, K, N], with ``W @ features`` the rows of ``merge(features, scores, indices, assignment)`` up to rounding.

    For hosts that apply a merge as a product (AngelSlim's ``W @ hidden``), or look at who weighs what. :func:`merge`
    reads each token once where a product reads K x N weights, and keeps a NaN within its row, which a product does not.

    Args:
        assignment: [B, N] int64, the row of each token; -1 belongs to none, and so does a value out of range.
        indices: [B, K] int64, each row's own token; -1, or out of range, is no row: zeros.
        scores, mode, centre_weight: as in :func:`merge`. None: ones.
        dtype: of W, floating. Weights are computed in fp32, in fp64 where scores or dtype are.

    Returns:
        W [B, K, N]. "mean": scores_i / mass_k for the tokens of row k. "sum": scores_i. "lerp": (1 - centre_weight)
        times the mean, and centre_weight more for the row's own token. A row of zero mass, or of its own token alone,
        has a one there, as a mean and as a blend. Differentiable in scores.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, mode or centre_weight.
    """
    scores = as_column(scores)
    tracing.checked(check, assignment, indices, scores, mode, centre_weight, dtype)
    wide = torch.float64 if dtype == torch.float64 else compute_dtype(scores)
    rows, tokens = (torch.arange(t.shape[1], dtype=torch.int64, device=t.device) for t in (indices, assignment))
    exists = (indices >= 0) & (indices < assignment.shape[1])
    member = (assignment[:, None] == rows[:, None]) & exists[..., None]  # [B, K, N]
    itself = indices[..., None] == tokens
    weights = member.to(wide) if scores is None else torch.where(member, scores.to(wide)[:, None], 0)
    if mode != "sum":
        mass = weights.sum(dim=-1, keepdim=True)
        mean = weights / torch.where(mass == 0, 1, mass)
        centre = itself.to(wide)
        if mode == "lerp":
            mean = centre_weight * centre + (1 - centre_weight) * mean
        copied = (mass == 0) | (member == itself).all(dim=-1, keepdim=True)
        weights = torch.where(copied, centre, mean)
    return weights.to(dtype)


def check(assignment: Any, indices: Any, scores: Any, mode: Any, centre_weight: Any, dtype: Any) -> None:
    sizes: dict[str, int] = {}
    check_tensor("assignment", assignment, "B N", sizes, (torch.int64,))
    check_tensor("indices", indices, "B K", sizes, (torch.int64,), assignment)
    if scores is not None:
        check_tensor("scores", scores, "B N", sizes, WEIGHTS, assignment)
    check_mode(mode, centre_weight)
    if dtype not in FLOATS:
        allowed = ", ".join(map(str, FLOATS))
        raise TypeError(f"dtype: expected one of {allowed}, got {dtype!r}. Remedy: leave it out for torch.float32.")
