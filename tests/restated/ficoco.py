import numpy as np

from .common import top

ARRAYS = {"attention": lambda rng, n, d, k: rng.random((n, n))}
CASES = {"ficoco_v": (("attention",), [{"quantile": 0.9}, {"window": 3, "beta": 0.9}, {}, {}])}


def ficoco_v(features, scores, keep, *, attention, grid=None, beta=0.35, window=2, quantile=0.998):
    n, spread = len(features), attention.mean(axis=1)
    worth = beta * scores / np.linalg.norm(scores) - (1 - beta) * spread / np.linalg.norm(spread)
    if grid is not None:
        before, token = worth.copy(), np.arange(n).reshape(grid)
        for y in range(grid[0] // window):
            for x in range(grid[1] // window):
                cell = token[y * window : (y + 1) * window, x * window : (x + 1) * window].ravel()
                least = cell[before[cell].argmin()]
                worth[least] = before[least] / 2 if before[least] > 0 else before[least] * 2
    indices = sorted(top(worth, keep))
    above = sum(i > quantile * (n - 1) for i in range(n))  # of n ascending values, those beyond the quantile
    total, size = features[indices].copy(), np.ones(keep)
    assignment = np.zeros(n, dtype=int)
    for i in range(n):
        targets = top(attention[i, indices], min(keep, max(1, above)))
        assignment[i] = indices.index(i) if i in indices else targets[0]
        if i not in indices:
            w = np.exp(attention[i, indices][targets])
            total[targets] += (w / w.sum())[:, None] * features[i]
            size[targets] += w / w.sum()
    return total / size[:, None], indices, assignment, [scores[assignment == row].sum() for row in range(keep)]
