"""What several hosts ask for: masks, and merged rows at the places of their tokens."""

import torch

from ..ops.select_and_merge import Condensed


def mask_of(indices: torch.Tensor, n: int) -> torch.Tensor:
    """[B, K] -> [B, n] bool, True at the indices."""
    mask = torch.zeros((indices.shape[0], n), dtype=torch.bool, device=indices.device)
    return mask.scatter(1, indices, True)


def in_place(rows: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """[B, K, D] -> [B, n, D]: rows at their indices, zeros elsewhere; what their mask picks are the rows again."""
    whole = rows.new_zeros((rows.shape[0], n, rows.shape[2]))
    image = torch.arange(len(rows), dtype=torch.int64, device=rows.device)
    return whole.index_put_((image[:, None], indices), rows)


def count_of(n: int, share: float, name: str) -> int:
    """round(share * n), at least 1 of a share above 0: the rule of AngelSlim and UniPruneBench."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {share}.")
    return max(round(share * n), int(share > 0 and n > 0))


def check_one(name: str, value: torch.Tensor) -> None:
    if value.shape[0] != 1:
        raise ValueError(
            f"{name}: expected one sequence [1, L, ...], as in the host, got {list(value.shape)}. Remedy: one by one."
        )


def merges_by(found: Condensed, weights: torch.Tensor, features: torch.Tensor, channels: int = 8) -> bool:
    """Whether weights [B, K, N] times features [B, N, D] are the merged rows: looked up in the first channels."""
    x, y = (t[..., :channels].to(weights.dtype) for t in (features.detach(), found.merged.detach()))
    slack = 8 * torch.finfo(features.dtype).eps * x.abs().amax().clamp(min=1e-30)
    return not bool(((weights.detach() @ x - y).abs() > slack).any())  # which NaN is not
