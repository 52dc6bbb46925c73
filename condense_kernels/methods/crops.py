"""An image in high resolution: the whole of it in low resolution, and behind that its crops, row by row."""

from typing import NamedTuple

import torch

from .._dispatch.checks import is_int
from ..segments import segment_topk
from .results import Grid, best


class Crops(NamedTuple):
    """(1 + rows * columns) grids of height * width tokens, one behind the other."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def number(self) -> int:
        return self.rows * self.columns

    @property
    def size(self) -> int:
        return self.height * self.width

    def region(self, device: torch.device) -> torch.Tensor:
        """[height * width] of the whole image: the crop that shows a token's middle."""
        y, x = (
            (2 * torch.arange(side, dtype=torch.int64, device=device) + 1) * cut // (2 * side)
            for side, cut in ((self.height, self.rows), (self.width, self.columns))
        )
        return (y[:, None] * self.columns + x).flatten()

    def regional(self, value: torch.Tensor) -> torch.Tensor:
        """[B, height * width] of the whole image -> [B, crops], the sum in each crop's region, fp64."""
        crop = torch.arange(self.number, dtype=torch.int64, device=value.device)
        return (value.double()[:, None] * (self.region(value.device) == crop[:, None])).sum(dim=2)


def split(grid: Grid | None, crops: tuple[int, int]) -> Crops:
    """What ``crops=(rows, columns)`` cuts a grid into."""
    if not isinstance(crops, (tuple, list)) or len(crops) != 2 or not all(is_int(side) and side >= 1 for side in crops):
        raise ValueError(f"crops: expected (rows, columns) of crops, both ints >= 1, got {crops!r}. Remedy: (2, 2).")
    if grid is None:
        raise ValueError("grid: expected (1 + crops, height, width) beside crops, got None.")
    frames, lines = 1 + crops[0] * crops[1], torch.Size(grid[:-1]).numel()
    if lines % frames or (len(grid) > 2 and grid[0] != frames):
        raise ValueError(
            f"grid: expected (1 + crops, height, width), the whole image and {frames - 1} crops behind it, "
            f"got {tuple(grid)}. Remedy: ({frames}, height, width), of one crop."
        )
    return Crops(crops[0], crops[1], lines // frames, grid[-1])


def tops(scores: torch.Tensor, budget: torch.Tensor, keep: int) -> torch.Tensor:
    """[B, frames, size], [B, frames] that sum to keep -> [B, K], the tokens of the highest scores of each frame."""
    return best(segment_topk(scores, budget).flatten(1).byte(), keep)
