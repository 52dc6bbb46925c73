"""The whole image, and its crops behind it."""

import numpy as np

from .common import kept_alone, top

CASES = {
    "hired": ((), [{"crops": [1, 3]}, {}, {"crops": [1, 3], "alpha": 0.3}, {"crops": [1, 1]}, {"crops": [3, 1]}]),
}


def shape(scores, grid, crops):
    """Height and width of one of the grids."""
    width = grid[-1]
    return len(scores) // (1 + crops[0] * crops[1]) // width, width


def region(y, x, height, width, crops):
    """By the middle of the token."""
    return int((y + 0.5) / height * crops[0]) * crops[1] + int((x + 0.5) / width * crops[1])


def shared(weights, total, capacity):
    """In proportion, the largest remainders rounded up; what is beyond the capacity of one goes to the others."""
    weights = np.array(weights, dtype=float)
    weights = weights if weights.sum() else np.ones(len(weights))
    share, full = np.zeros(len(weights)), np.zeros(len(weights), dtype=bool)
    while not full.all():
        w = np.where(full, 0, weights)
        w = w if w.sum() else (~full).astype(float)
        share = np.where(full, capacity, w / w.sum() * (total - capacity * full.sum()))
        if not (share > capacity).any():
            break
        full |= share >= capacity
    share = share.round(6)
    budget = np.floor(share).astype(int)
    for c in top(share - budget, total - budget.sum()):
        budget[c] += 1
    return budget


def tops(by_grid, budget):
    size = by_grid.shape[1]
    return np.concatenate([c * size + top(a, k) for c, (a, k) in enumerate(zip(by_grid, budget, strict=True))])


def hired(features, scores, keep, *, grid=None, crops=None, alpha=0.5, early=None, **_):
    if crops is None:
        return kept_alone(features, scores, top(scores, keep))
    count, (height, width) = crops[0] * crops[1], shape(scores, grid, crops)
    size = height * width
    whole = max(min(int(keep * alpha), size), keep - count * size)
    seen = top(scores[:size] if early is None else early, int(size * (1 - alpha)))
    counted = np.zeros(count)
    for token in seen:
        counted[region(*divmod(token, width), height, width, crops)] += 1
    budget = shared(counted, keep - whole, size)
    return kept_alone(features, scores, tops(scores.reshape(-1, size), [whole, *budget]))
