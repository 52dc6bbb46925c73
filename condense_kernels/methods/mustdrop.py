"""MustDrop (Liu et al. 2024): "Multi-stage vision token dropping"."""

import torch
import torch.nn.functional as F

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
    window: tuple[int, int] = (2, 2),
) -> Condensed:
    """Windows whose tokens are alike (mean cosine of their pairs >= threshold) become their mean, at their last
    token's place; then the K rows of the highest [CLS] attention are kept, a window's being its mean.

    Of MustDrop this is the stage in the vision encoder alone: there windows merge before the second layer, in the
    language model text attention drops further tokens, and while decoding the cache is trimmed. Where fewer than K
    rows are left, further tokens of the merged windows are kept as rows of their own, by attention. Windows that the
    grid cuts off are not merged. The threshold is an option of the published code; that 0.8 is its value is assumed.
    """
    (h, w), (b, n) = window, scores.shape
    height, width = grid[-2], grid[-1]
    z = F.normalize(at_least_fp32(features if keys is None else keys).detach(), dim=2)
    at = torch.arange(n, dtype=torch.int64, device=scores.device)
    y, x = at // width % height, at % width
    first = at - y % h * width - x % w  # of the token's window
    last = first + (h - 1) * width + w - 1
    is_whole = (y - y % h + h <= height) & (x - x % w + w <= width)
    last = torch.where(is_whole, last, at).expand(b, n)
    count = h * w
    total = torch.zeros_like(z).index_add(1, first, z)[:, first]
    own = torch.zeros_like(z[..., 0]).index_add(1, first, z.square().sum(dim=2))[:, first]
    alike = (total.square().sum(dim=2) - own) / max(count * (count - 1), 1)
    is_merged = is_whole & (alike >= threshold)  # [B, N], the same for a window's tokens
    known = at_least_fp32(scores)
    mean = torch.zeros_like(known).index_add(1, first, known)[:, first] / count
    is_row = ~is_merged | (last == at)
    value = torch.where(is_merged & is_row, mean, known)
    order = best(value, n)
    indices = order.gather(1, best(is_row.gather(1, order).int(), keep)).sort(dim=1).values  # rows first, each by value
    row = torch.arange(keep, dtype=torch.int64, device=scores.device).expand_as(indices)
    own_row = torch.full_like(last, -1).scatter(1, indices, row)
    of_window = own_row.gather(1, last).masked_fill(~is_merged, -1)
    assignment = torch.where(own_row >= 0, own_row, of_window)
    merged, _ = merge(features, torch.ones_like(known), indices, assignment)
    _, mass = merge(features.detach(), scores, indices, assignment)
    return Condensed(merged, indices, assignment, mass)
