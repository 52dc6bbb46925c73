import numpy as np

from .common import best, cosines

CASES = {"vlm_pruner": (("keys",), [{}, {"pivots": 2}, {"buffering": 2.0}, {"pivots": 1, "buffering": 0.0}])}


def vlm_pruner(features, scores, keep, *, grid, keys=None, pivots=4, buffering=0.5, **_):
    keys, s = features if keys is None else keys, cosines(features)
    picks = [best(np.abs(keys).sum(axis=1))]
    while len(picks) < min(pivots, keep):
        picks.append(best(np.linalg.norm(keys[:, None] - keys[picks], axis=-1).min(axis=1), picks))
    at = np.stack(np.unravel_index(np.arange(len(keys)), grid), axis=1).astype(float)
    apart = np.linalg.norm(at[:, None] - at, axis=-1) / np.linalg.norm(grid)
    while len(picks) < keep:
        picks.append(best(-(s * (1 + buffering * apart))[picks].max(axis=0), picks))
    kept = sorted(picks)
    assignment = s[:, kept].argmax(axis=1)
    assignment[kept] = range(keep)
    merged = features[kept].copy()
    for row, token in enumerate(kept):
        others = [i for i in range(len(keys)) if assignment[i] == row and i != token]
        weights = np.maximum(s[others, token], 0)
        if weights.sum() > 0:
            merged[row] = 0.3 * merged[row] + 0.7 * np.average(features[others], axis=0, weights=weights)
    return merged, kept, assignment, [scores[assignment == row].sum() for row in range(keep)]
