"""ToMe (tome/merge.py) and tomesd (tomesd/merge.py): matchings as closures, and ToMe's weighted mean by them."""

from collections.abc import Callable

import torch

from ..matching import Matching, bipartite_match
from ..ops.merge import merge as merge_tokens
from ..tokens import gather_tokens, unmerge

Closures = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]
MODES = ("mean", "sum", "amax")


class Merge:
    """x [B, N, C] -> [B, N - r, C], rows in the order of the tokens."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching

    def __call__(self, x: torch.Tensor, mode: str = "mean") -> torch.Tensor:
        """mode: "mean", "sum" or "amax" over the tokens of a row, those of scatter_reduce that the hosts use."""
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}.")
        indices, assignment = self.matching
        if mode == "amax":
            rows = gather_tokens(indices, x)
            return rows.scatter_reduce(1, assignment[..., None].expand_as(x), x, "amax")
        return merge_tokens(x, None, indices, assignment, mode=mode)[0]


def do_nothing(x: torch.Tensor, mode: str | None = None) -> torch.Tensor:
    return x


def closures(matching: Matching) -> Closures:
    def back(x: torch.Tensor) -> torch.Tensor:  # [B, N - r, C] -> [B, N, C]
        return unmerge(x, matching.assignment)

    return Merge(matching), back


def bipartite_soft_matching(
    metric: torch.Tensor,  # [B, N, C]
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
) -> Closures:
    """In place of ToMe's function of this name: (merge, unmerge), r cut to (N - protected) // 2.

    What differs: the rows that stay are in the order of the tokens, so class and distillation token stay first, where
    ToMe puts the even tokens before the odd ones; ties go to the lowest index; a zero metric has cosines of 0, not NaN;
    fp16 and bf16 are computed as fp32, sums too.
    """
    protected = [0] * class_token + [1] * distill_token
    matching = bipartite_match(metric.detach(), max(r, 0), protected=protected)
    if matching.indices.shape[1] == metric.shape[1]:
        return do_nothing, do_nothing
    return closures(matching)


def merge_wavg(
    merge: Callable[..., torch.Tensor],
    x: torch.Tensor,  # [B, N, C]
    size: torch.Tensor | None = None,  # [B, N, 1]
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of ToMe's: (the mean of x by sizes [B, N - r, C], the new sizes [B, N - r, 1] in their dtype).

    Of a merge of this module one read of x, sums in fp32; ToMe scatters x * size and size, and divides. Of any other
    merge as there.
    """
    size = torch.ones_like(x[..., :1]) if size is None else size
    if isinstance(merge, Merge):
        merged, mass = merge_tokens(x, size[..., 0], *merge.matching)
        return merged, mass[..., None].to(size.dtype)
    sizes = merge(size, mode="sum")
    return merge(x * size, mode="sum") / sizes, sizes


def bipartite_soft_matching_random2d(
    metric: torch.Tensor,  # [B, N, C], N = h * w
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> Closures:
    """In place of tomesd's: one token of every sy x sx window, drawn or its first, is merged into; all others may be.

    What differs as above; of a side that the windows do not divide, the tokens beyond them are merged and never
    merged into, as there. The draw is torch's, by ``generator``.

    Raises:
        ValueError: N is not h * w, or a window that is larger than the picture.
    """
    n, device = metric.shape[1], metric.device
    if h * w != n or not (0 < sx <= w and 0 < sy <= h):
        raise ValueError(f"w, h, sx, sy: expected windows within {n} tokens, got {h} x {w} of {sy} x {sx}.")
    if r <= 0:
        return do_nothing, do_nothing
    rows, columns = h // sy, w // sx
    corner = torch.arange(n, dtype=torch.int64, device=device).view(h, w)[: rows * sy : sy, : columns * sx : sx]
    drawn = torch.zeros(rows, columns, dtype=torch.int64, device=device)
    if not no_rand:
        drawn = torch.randint(sx * sy, (rows, columns), generator=generator, dtype=torch.int64, device=device)
    dst = (corner + drawn // sx * w + drawn % sx).flatten()
    return closures(bipartite_match(metric.detach(), r, dst=dst))
