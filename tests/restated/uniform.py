import numpy as np

from .common import kept_alone


def split(keep, grid):
    fitting = [(r, keep // r) for r in range(1, keep + 1) if keep % r == 0 and r <= grid[0] and keep // r <= grid[1]]
    return min(fitting, key=lambda of: (abs(grid[0] / of[0] - grid[1] / of[1]), of))


def middles(keep, grid):
    rows, columns = split(keep, grid)
    return [
        (2 * y + 1) * grid[0] // (2 * rows) * grid[1] + (2 * x + 1) * grid[1] // (2 * columns)
        for y in range(rows)
        for x in range(columns)
    ]


def uniform(features, scores, keep, *, grid, **_):
    return kept_alone(features, scores, middles(keep, grid))


def pooling(features, scores, keep, *, grid, **_):
    rows, columns = split(keep, grid)
    y, x = np.divmod(np.arange(len(features)), grid[1])
    block = y * rows // grid[0] * columns + x * columns // grid[1]
    merged = np.array([features[block == k].mean(axis=0) for k in range(keep)])
    return merged, np.array(middles(keep, grid)), block, np.array([scores[block == k].sum() for k in range(keep)])
