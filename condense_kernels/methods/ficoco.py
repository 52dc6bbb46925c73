"""FiCoCo (Han et al. 2024): "Filter, correlate, compress: training-free token reduction for MLLM acceleration"."""

import math

import torch

from .._dispatch.checks import FLOATS, check_tensor
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from .mustdrop import windows
from .registry import CLS, method
from .results import Grid, at_least_fp32, best, rows


@method(
    "FiCoCo-V", "Han et al. 2024, arXiv 2411.17686", primitive="top-k, merge", scores=CLS, cost="N²",
    needs=["attention"],
)  # fmt: skip
def ficoco_v(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    attention: torch.Tensor,  # [B, N, N]
    grid: Grid | None = None,
    beta: float = 0.35,
    window: int = 2,
    quantile: float = 0.998,
) -> Condensed:
    """The tokens that stay are attended to by [CLS] and attend little to other patches; each other token goes into the
    few of them that it attends to most.

    Filter: a token is worth ``beta * scores - (1 - beta) * mean of its row of attention``, both scaled to length 1
    over the image; with a grid, the least worth token of each ``window`` x ``window`` is worth less by half (twice as
    far below 0), so that what leaves is spread. Correlate: targets of a token are the kept ones that it attends to
    most, as many as lie above the ``quantile`` of N values: 2 of 576, at least 1. Compress: a kept token becomes
    (x + sum of w x_i) / (1 + sum of w), where the w of each dropped token i are the softmax of its attention to its
    targets. ``assignment`` is the first target; mass the sum of scores by it.

    Args:
        attention: from patches (rows) to patches (columns), mean over the heads, [CLS] left out.

    All of it is in the vision encoder: the published code drops some tokens in each of several layers; here once, from
    N to K, behind it. FiCoCo-L, in the language model, is another method. The constants and the softmax of what has
    been through one already are the code's. Differences from it: targets are kept tokens, where its indices of the
    whole image are used as rows of what is left; their number is fixed, where it waits for the largest of all tokens;
    it remembers penalties from layer to layer, and from image to image; ties go to the lowest index.

    Raises:
        TypeError, ValueError: attention of another shape, beta not in [0, 1], quantile not in [0, 1), grid or window.
    """
    check(attention, features, beta, quantile)
    attention = at_least_fp32(attention.detach())
    worth = worth_of(at_least_fp32(scores.detach()), attention.mean(dim=2), beta)
    indices = best(worth if grid is None else penalised(worth, windows(grid, window, scores.device)), keep)
    indices, n = indices.sort(dim=1).values, scores.shape[1]
    at = indices[:, None].expand(-1, n, -1)
    order = attention.gather(2, at).sort(dim=2, descending=True, stable=True)
    number = min(keep, max(1, n - 1 - math.floor(quantile * (n - 1))))
    weights = order.values[..., :number].softmax(dim=2)
    x, stays = at_least_fp32(features), torch.zeros_like(worth, dtype=torch.bool).scatter(1, indices, True)
    total, size = rows(x, indices), torch.ones_like(worth[:, :keep])
    for target in range(number):
        into = order.indices[..., target].masked_fill(stays, -1)
        added, weight = merge(x, weights[..., target].contiguous(), indices, into, mode="sum")
        total, size = total + added, size + weight
    row = torch.arange(keep, dtype=torch.int64, device=scores.device).expand_as(indices)
    assignment = order.indices[..., 0].scatter(1, indices, row)
    _, mass = merge(features.detach(), scores, indices, assignment)
    return Condensed((total / size[..., None]).to(features.dtype), indices, assignment, mass)


def worth_of(scores: torch.Tensor, spread: torch.Tensor, beta: float) -> torch.Tensor:
    """[B, N]"""
    unit = torch.nn.functional.normalize
    return beta * unit(scores, dim=1) - (1 - beta) * unit(spread, dim=1)


def penalised(worth: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """[B, N]: the least worth token of each window [M, window²] is worth less."""
    least = worth[:, cells].sort(dim=2, stable=True)  # [B, M, window²]
    at = cells.expand_as(least.indices).gather(2, least.indices[..., :1])[..., 0]
    value = least.values[..., 0]
    return worth.scatter(1, at, torch.where(value > 0, value / 2, value * 2))


def check(attention: torch.Tensor, features: torch.Tensor, beta: float, quantile: float) -> None:
    b, n, _ = features.shape
    check_tensor("attention", attention, "B N N", {"B": b, "N": n}, FLOATS, like=features)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}. Remedy: 0.35, as published.")
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile: expected a number in [0, 1), got {quantile!r}. Remedy: 0.998, as published.")
