"""FiCoCo-V (Han et al. 2024): "Filter, correlate, compress: training-free token reduction for MLLM acceleration"."""

import math

import torch
import torch.nn.functional as F

from .._dispatch.checks import FLOATS, check_tensor
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from .registry import CLS, method
from .results import Grid, at_least_fp32, best, rows


@method(
    "FiCoCo-V", "Han et al. 2024, arXiv 2411.17686, section 3", primitive="sorts of attention, a product",
    scores=CLS, cost="N K D", needs=["attention"],
)  # fmt: skip
def ficoco_v(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid | None = None,
    attention: torch.Tensor | None = None,  # [B, N, N], of token i to token j, mean over the heads
    balance: float = 0.35,
    penalty: float = 2.0,
    quantile: float = 0.998,
) -> Condensed:
    """Filter: tokens that attend much to others and get little from [CLS] are redundant, the most redundant one of
    each 2 x 2 window more so. Correlate: each of the N - K most redundant goes to the kept tokens that it attends to
    most. Compress: a kept token's row is the mean of it (weight 1) and of what came (weights: attention, of one token
    1 together).

    The value of a token is balance * scores / |scores| - (1 - balance) * mean row of attention / its norm over the
    image; what the penalty halves or doubles is the lowest value of a window. "Most" is above the quantile over the
    K kept tokens, at least one. The published code does this in many blocks of the vision encoder, some tokens at a
    time, takes the softmax of the attention again, cuts all tokens at the largest number of targets that one of them
    has, counts them by the quantile of all tokens (two of 576), and may send a token to one that is dropped; here it
    is one step, as the paper has it. Without a grid there is no penalty; windows that the grid cuts off have none.
    """
    b, n = scores.shape
    check_tensor("attention", attention, "B N N", {"B": b, "N": n}, FLOATS, like=features)  # type: ignore[arg-type]
    a = at_least_fp32(attention).detach().nan_to_num(0.0)  # type: ignore[arg-type]  # needs=
    heard = F.normalize(at_least_fp32(scores).detach(), dim=1)
    value = balance * heard - (1 - balance) * F.normalize(a.mean(dim=2), dim=1)
    if grid is not None:
        lowest = lowest_of_windows(value, grid)
        value = torch.where(lowest, torch.where(value > 0, value / penalty, value * penalty), value)
    kept = best(value, keep).sort(dim=1).values
    is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
    towards = a.gather(2, kept[:, None].expand(b, n, keep))  # [B, N, K]
    above = towards >= quantile_of(towards, quantile)
    sent = torch.where(above & ~is_kept[..., None], towards, 0)
    weights = (sent / sent.sum(dim=2, keepdim=True)).nan_to_num(0.0, posinf=0.0)
    x = at_least_fp32(features)
    came = weights.mT @ x.masked_fill(~x.isfinite(), 0)
    came = came.masked_fill((weights.mT @ (~x.isfinite()).to(x.dtype)) > 0, torch.nan)  # to its targets alone
    merged = (rows(x, kept) + came) / (1 + weights.sum(dim=1)[..., None])
    row = torch.arange(keep, dtype=torch.int64, device=scores.device).expand_as(kept)
    assignment = towards.argmax(dim=2).scatter(1, kept, row)
    _, mass = merge(features.detach(), scores, kept, assignment)
    return Condensed(merged.to(features.dtype), kept, assignment, mass)


def quantile_of(x: torch.Tensor, q: float) -> torch.Tensor:
    """Of the last axis, as torch.quantile, which takes no more than 16 million numbers."""
    place = q * (x.shape[-1] - 1)
    ordered = x.sort(dim=-1).values
    low, high = ordered[..., math.floor(place), None], ordered[..., math.ceil(place), None]
    return torch.lerp(low, high, place % 1)


def lowest_of_windows(value: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[B, N] bool: the lowest of each whole window of 2 x 2, the first of equals."""
    height, width = grid[-2], grid[-1]
    lowest = torch.zeros_like(value, dtype=torch.bool).view(len(value), -1, height, width)
    h, w = height // 2, width // 2
    windows = value.view(lowest.shape)[:, :, : 2 * h, : 2 * w].unflatten(3, (w, 2)).unflatten(2, (h, 2))
    flat = windows.permute(0, 1, 2, 4, 3, 5).flatten(4)  # [B, T, h, w, 4]
    at = flat.argmin(dim=4, keepdim=True)
    hit = torch.zeros_like(flat, dtype=torch.bool).scatter(4, at, True).unflatten(4, (2, 2))
    lowest[:, :, : 2 * h, : 2 * w] = hit.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    return lowest.flatten(1)
