import numpy as np

from .common import kept_alone


def split(keep, grid):
    fitting = [(r, keep // r) for r in range(1, keep + 1) if keep % r == 0 and r <= grid[0] and keep // r <= grid[1]]
    return min(fitting, key=lambda of: (abs(grid[0] / of[0] - grid[1] / of[1]), of))


def middles(keep, grid):
    rows, columns = split(keep, grid)

    def of(count, side):
        """Of the places in a block that which is nearest to its middle, rounded down."""
        blocks = [[i for i in range(side) if i * count // side == block] for block in range(count)]
        return [min(own, key=lambda i, m=(2 * b + 1) * side // (2 * count): abs(i - m)) for b, own in enumerate(blocks)]

    return [y * grid[1] + x for y in of(rows, grid[0]) for x in of(columns, grid[1])]


def uniform(features, scores, keep, *, grid, **_):
    return kept_alone(features, scores, middles(keep, grid))


def pooling(features, scores, keep, *, grid, **_):
    rows, columns = split(keep, grid)
    y, x = np.divmod(np.arange(len(features)), grid[1])
    block = y * rows // grid[0] * columns + x * columns // grid[1]
    merged = np.array([features[block == k].mean(axis=0) for k in range(keep)])
    return merged, np.array(middles(keep, grid)), block, np.array([scores[block == k].sum() for k in range(keep)])
