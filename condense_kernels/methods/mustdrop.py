"""MustDrop (Liu et al. 2024): "Multi-stage vision token dropping: towards efficient multimodal large language
model"."""

import torch

from .._dispatch.checks import is_int, shown
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import CLS, method
from .results import Grid, at_least_fp32, best, rows

THRESHOLD = (
    "The published threshold on the similarity of windows lets the data choose K. With an int the most similar windows "
    "above it are merged, and [CLS] attention keeps K of what is there then."
)


@method(
    "MustDrop, spatial merging", "Liu et al. 2024, arXiv 2411.10803", primitive="similarity, merge", scores=CLS,
    cost="N window² D / 2", needs=["grid"], data_dependent=THRESHOLD,
)  # fmt: skip
def mustdrop(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid,
    window: int = 3,
    threshold: float = 0.8,
) -> Condensed:
    """Windows of the grid whose tokens are alike become one token each, their mean; of those and of the tokens that are
    left, the K with the highest [CLS] attention stay.

    A window is alike by the mean cosine of its pairs of tokens. Windows are merged in that order as long as it is at
    least ``threshold`` and K tokens are left, so at most (N - K) // (window² - 1). A merged token stands at the middle
    of its window, and competes with the mean of its scores; mass is their sum. threshold=-1: by rank alone, which for
    576 tokens in windows of nine takes all to reach 64: a pooling.

    The first stage of the paper, vision encoding; in the prefilling it drops by text attention, never one of its key
    tokens (the 8 % that [CLS] attends to most), and in the decoding by the cache. Differences from the published code:
    K is exact, where its threshold leaves any number, the same for all images of a batch, that of the image with the
    fewest windows alike; here every image has its own. It merges once, behind the encoder's first layer, here in the
    features; theirs stand at a window's last token and come before all others. A grid that windows do not divide, which
    theirs refuses, has tokens in none at its lower and right edge, which are never merged. That [CLS] attention decides
    what remains, not text, is ours.

    Raises:
        ValueError: a grid of other than two sides, window is no int of at least 2.
    """
    cells = windows(grid, window, scores.device)  # [M, window²]
    merging = alike(features.detach(), cells, len(scores[0]) - keep, threshold)[..., None]  # [B, M, 1]
    b, (m, size), middle = len(scores), cells.shape, cells[:, window * window // 2]
    token = torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device).expand_as(scores)
    inside = cells.flatten().expand(b, -1)
    into = token.scatter(1, inside, torch.where(merging, middle[:, None], cells).flatten(1))
    weight = at_least_fp32(scores.detach())
    of = weight[:, cells.flatten()].unflatten(1, (m, size))
    weight = weight.scatter(1, inside, torch.where(merging, of.mean(dim=2, keepdim=True), of).flatten(1))
    indices = best(weight.masked_fill(into != token, -torch.inf), keep).sort(dim=1).values
    row = torch.full_like(token, -1).scatter(1, indices, token[:, :keep])
    assignment = row.gather(1, into)
    merged, _ = merge(features, None, indices, assignment)
    return Condensed(merged, indices, assignment, merge(features.detach(), scores, indices, assignment)[1])


def windows(grid: Grid, window: int, device: torch.device) -> torch.Tensor:
    """[M, window²]: the tokens of each whole window, row by row."""
    if len(grid) != 2:
        raise ValueError(f"grid: expected (rows, columns) for mustdrop, got {tuple(grid)}.")
    if not is_int(window) or window < 2:
        raise ValueError(f"window: expected an int of at least 2, a side in tokens, got {shown(window)}.")
    sizes = (grid[0] // window, grid[1] // window, window)
    down, across, side = (torch.arange(size, dtype=torch.int64, device=device) for size in sizes)
    corner = window * (down[:, None] * grid[1] + across).flatten()
    return corner[:, None] + (side[:, None] * grid[1] + side).flatten()


def alike(features: torch.Tensor, cells: torch.Tensor, spare: int, threshold: float) -> torch.Tensor:
    """[B, M] bool: the most similar windows, as many as may be merged to lose at most ``spare`` tokens."""
    b, (m, size) = len(features), cells.shape
    x = rows(features, cells.flatten().expand(b, -1)).reshape(b * m, size, features.shape[2])
    s = similarity(x)[0]  # [B M, window², window²]
    pairs = s.sum(dim=(1, 2)) - s.diagonal(dim1=1, dim2=2).sum(dim=1)
    mean = pairs.view(b, m) / (size * (size - 1))
    chosen = best(mean, min(m, spare // (size - 1)))
    return torch.zeros_like(mean, dtype=torch.bool).scatter(1, chosen, True) & (mean >= threshold)
