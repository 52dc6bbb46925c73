import itertools

import numpy as np

from .common import cosines

CASES = {
    "mustdrop": (
        ("keys",),
        [
            {"threshold": 0.2, "window": [2, 2]},
            {"threshold": -1.0, "window": [2, 2]},
            {"threshold": -1.0},
            {},
            {"threshold": -0.1, "window": [2, 3]},
        ],
    )
}


def mustdrop(features, scores, keep, *, grid, keys=None, threshold=0.8, window=(3, 3), **_):
    s, (height, width), (h, w) = cosines(features if keys is None else keys), grid, window
    clusters = {i: [i] for i in range(len(features))}
    for y, x in itertools.product(range(0, height - h + 1, h), range(0, width - w + 1, w)):
        tokens = [(y + i) * width + x + j for i in range(h) for j in range(w)]
        if np.mean([s[a, b] for a, b in itertools.permutations(tokens, 2)]) >= threshold:
            for token in tokens:
                clusters.pop(token)
            clusters[tokens[-1]] = tokens
    kept = sorted(clusters, key=lambda i: (-np.mean(scores[clusters[i]]), i))[:keep]
    rest = [i for i in range(len(features)) if i not in clusters]
    kept = sorted(kept + sorted(rest, key=lambda i: (-scores[i], i))[: keep - len(kept)])
    assignment = np.full(len(features), -1)
    for row, token in enumerate(kept):
        for member in clusters.get(token, []):
            assignment[member] = row
    assignment[kept] = range(keep)
    merged = np.array([features[assignment == row].mean(axis=0) for row in range(keep)])
    return merged, kept, assignment, [scores[assignment == row].sum() for row in range(keep)]
