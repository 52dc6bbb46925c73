"""FastV (Chen et al. 2024), "An image is worth 1/2 tokens after layer 2", and its variants of Wen et al. 2025."""

import torch

from .._dispatch.checks import is_int
from ..ops.select_and_merge import Condensed
from .registry import TEXT, method
from .results import Grid, best, selected

SOURCE = "Wen et al. 2025, Algorithm "


@method("FastV", f"Chen et al. 2024, arXiv 2403.06764; {SOURCE}1", primitive="top-k", scores=TEXT, cost="-")
def fastv(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
) -> Condensed:
    """The K tokens that the last token of the prompt attends to most; nothing is merged.

    FastV does this once inside the language model, on the hidden states behind layer 2, by that layer's attention,
    averaged over heads; here the caller has that row. Given the attention of the last visual token instead, this is
    FastV_VIS of Wen et al. 2025, Table 5. Their K is floor(N r). Equal scores: the lowest index, where torch.topk
    promises nothing.
    """
    return selected(features, scores, best(scores, keep))


@method("Reverse FastV", f"{SOURCE}2", primitive="top-k", scores=TEXT, cost="-")
def reverse_fastv(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
) -> Condensed:
    """The K tokens that are attended to least: a ranking that should be bad, and a test of what FastV's is worth.

    The printed algorithm turns the sign of the scores in line 6 and again in line 8, which would be FastV; the text
    says the lowest scores, and so it is here.
    """
    return selected(features, scores, scores.sort(dim=1, stable=True).indices[:, :keep])


@method("Window FastV", f"{SOURCE}3", primitive="stable sorts", scores=TEXT, cost="-", needs=["grid"])
def window_fastv(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid,
    window: tuple[int, int] = (4, 4),
) -> Condensed:
    """FastV within each window of the grid, so that no region is left without tokens.

    Windows of ``window`` rows and columns tile each frame from its first token; at the far sides they may be smaller.
    The budget is shared in proportion to their tokens, and what does not divide goes to the windows whose next token
    is attended to most: tokens come in the order of (2 r + 1) / size, r = 0, 1, ... their rank in a window of that
    size, and by score where this is equal. So K is exact, also below the number of windows.

    The paper's "predetermined reduction ratio and window size" are printed nowhere: 4 by 4 is assumed. Its lines 10 and
    11 rank the mean of a window, of which there is one; its text, and here, the scores within it.

    Raises:
        ValueError: a grid without rows and columns, or no such window.
    """
    window_of = windows(grid, window, scores.device)  # [N]
    by_score = best(scores, len(window_of))  # [B, N]
    by_window = by_score.gather(1, window_of[by_score].argsort(dim=1, stable=True))  # and in each by score
    of_row, row = window_of.sort().values, torch.arange(len(window_of), dtype=torch.int64, device=scores.device)
    first, behind = (torch.searchsorted(of_row, of_row, right=right) for right in (False, True))
    turn = (2 * (row - first) + 1).double() / (behind - first)  # [N], the same for all images
    turn_of = turn.expand(by_window.shape).gather(1, by_window.argsort(dim=1))  # [B, N]
    order = by_score.gather(1, turn_of.gather(1, by_score).argsort(dim=1, stable=True))
    return selected(features, scores, order[:, :keep])


def windows(grid: Grid, window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """[N], the window of each token: ascending along rows of windows, then along frames."""
    if len(grid) < 2:
        raise ValueError(f"grid: expected rows and columns, or frames before them, got {tuple(grid)}.")
    if len(window) != 2 or not all(is_int(side) and side >= 1 for side in window):
        raise ValueError(f"window: expected (rows, columns), both ints >= 1, got {window!r}. Remedy: (4, 4).")
    axes = [torch.arange(side, dtype=torch.int64, device=device) for side in grid]
    y, x = axes[-2] // window[0], axes[-1] // window[1]
    down, across = (-(-side // cut) for side, cut in zip(grid[-2:], window, strict=True))
    frame = torch.arange(grid[0] if len(grid) > 2 else 1, dtype=torch.int64, device=device)
    return ((frame[:, None, None] * down + y[:, None]) * across + x).flatten()
