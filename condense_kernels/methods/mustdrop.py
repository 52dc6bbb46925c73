"""MustDrop (Liu et al. 2024): "Multi-stage vision token dropping"."""

import torch
import torch.nn.functional as F

from .._dispatch.checks import is_int, shown
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from .registry import CLS, method
from .results import Grid, at_least_fp32, best

THRESHOLD = (
    "The published merging takes every window above the threshold, so that the data choose K; the nearest with an int "
    "is this one, which then drops or takes apart until K are left."
)


@method(
    "MustDrop, vision stage", "Liu et al. 2024, arXiv 2411.10803, section 3.2", primitive="window means, merge",
    scores=CLS, cost="N D", needs=["grid"], data_dependent=THRESHOLD,
)  # fmt: skip
def mustdrop(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    threshold: float = 0.8,
    window: tuple[int, int] = (3, 3),
) -> Condensed:
    """Windows whose tokens are alike (mean cosine of their pairs >= threshold) become their mean, at their last
    token's place; then the K rows of the highest [CLS] attention are kept, a window's being its mean.

    Of MustDrop this is the stage in the vision encoder alone: there windows merge before the second layer, in the
    language model text attention drops further tokens, and while decoding the cache is trimmed. Where fewer than K rows
    are left, further tokens of the merged windows are kept as rows of their own, by attention. Windows that the grid
    cuts off are not merged. 0.8 and windows of 3 x 3 are the published code's. It merges in every image of a batch as
    many windows as that with the fewest alike has; here each image has its own. Its key tokens, the 8 % that [CLS]
    attends to most, are those that text attention must not drop; here [CLS] attention decides down to K.
    """
    is_pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not is_pair or not all(is_int(side) and side >= 1 for side in window):
        raise ValueError(f"window: expected (rows, columns) of at least 1, got {shown(window)}. Remedy: (3, 3).")
    n = scores.shape[1]
    at = torch.arange(n, dtype=torch.int64, device=scores.device)
    first, last, is_whole = windows(at, grid, window)
    z = F.normalize(at_least_fp32(features if keys is None else keys).detach(), dim=2)
    is_merged = is_whole & (likeness(z, first, window[0] * window[1]) >= threshold)  # the same for a window's tokens
    known = at_least_fp32(scores)
    mean = torch.zeros_like(known).index_add(1, first, known)[:, first] / (window[0] * window[1])
    is_row = ~is_merged | (last == at)
    value = torch.where(is_merged & is_row, mean, known)
    order = best(value, n)
    indices = order.gather(1, best(is_row.gather(1, order).int(), keep)).sort(dim=1).values  # rows first, each by value
    row = torch.arange(keep, dtype=torch.int64, device=scores.device).expand_as(indices)
    own_row = torch.full_like(order, -1).scatter(1, indices, row)
    of_window = own_row[:, last].masked_fill(~is_merged, -1)
    assignment = torch.where(own_row >= 0, own_row, of_window)
    merged, _ = merge(features, torch.ones_like(known), indices, assignment)
    _, mass = merge(features.detach(), scores, indices, assignment)
    return Condensed(merged, indices, assignment, mass)


def windows(at: torch.Tensor, grid: Grid, window: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N] each: the first and the last token of each token's window, and whether the window is whole. A token of
    another one is its own last."""
    (height, width), (h, w) = grid[-2:], window
    y, x = at // width % height, at % width
    first = at - y % h * width - x % w
    is_whole = (y - y % h + h <= height) & (x - x % w + w <= width)
    return first, torch.where(is_whole, first + (h - 1) * width + w - 1, at), is_whole


def likeness(z: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """[B, N] mean cosine of the pairs of each token's window: the sum of all is the square of the vectors' sum."""
    total = torch.zeros_like(z).index_add(1, first, z)[:, first]
    own = torch.zeros_like(z[..., 0]).index_add(1, first, z.square().sum(dim=2))[:, first]
    return (total.square().sum(dim=2) - own) / max(count * (count - 1), 1)
