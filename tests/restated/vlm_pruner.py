import numpy as np

from .common import best, cosines

CASES = {"vlm_pruner": (("keys",), [{}, {"batch": 2}, {"batch": 3, "pivots": 2}, {}, {"batch": 1}])}


def vlm_pruner(features, scores, keep, *, grid, keys=None, pivots=4, batch=16):
    keys, n = features if keys is None else keys, len(features)
    at = np.stack(np.unravel_index(np.arange(n), grid), axis=1)
    distance = np.linalg.norm(at[:, None] - at, axis=-1) / np.linalg.norm(grid)
    picks = [int(np.abs(keys).sum(axis=1).argmax())]
    while len(picks) < min(pivots, keep):
        picks.append(best(np.linalg.norm(keys[:, None] - keys[picks], axis=-1).min(axis=1), picks))
    s = cosines(features)
    while len(picks) < keep:
        like = s[picks].max(axis=0) * (1 + 0.5 * distance[picks].min(axis=0))
        for _ in range(min(batch, keep - len(picks))):
            picks.append(best(-like, picks))
    indices = sorted(picks)
    assignment = s[:, indices].argmax(axis=1)
    assignment[indices] = np.arange(keep)
    merged = features[indices].copy()
    for row, centre in enumerate(indices):
        others = [i for i in range(n) if assignment[i] == row and i != centre and s[i, centre] > 0]
        if others:
            mean = np.average(features[others], axis=0, weights=s[others, centre])
            merged[row] = 0.3 * features[centre] + 0.7 * mean
    return merged, indices, assignment, [scores[assignment == row].sum() for row in range(keep)]
