import numpy as np

from .common import cosines, top

CASES = {"visionzip": (("keys",), [{}, {"contextual": 2}, {"contextual": 5}, {"contextual": 0}])}


def visionzip(features, scores, keep, *, keys=None, contextual=None, **_):
    contextual = round(keep * 10 / 64) if contextual is None else contextual
    order = top(scores, len(scores))
    chosen, rest = sorted(order[: keep - contextual]), sorted(order[keep - contextual :])
    centres = rest[:: len(rest) // contextual][:contextual] if contextual else []
    s = cosines(features if keys is None else keys)
    indices = sorted([*chosen, *centres])
    assignment = np.full(len(features), -1)
    for i in range(len(features)):
        if i in indices:
            assignment[i] = indices.index(i)
        elif centres:
            assignment[i] = indices.index(centres[int(s[i, centres].argmax())])
    merged = features[indices].copy()
    for row, kept in enumerate(indices):
        others = [i for i in range(len(features)) if assignment[i] == row and i != kept]
        if others:
            merged[row] += features[others].mean(axis=0)
    return merged, indices, assignment, [scores[assignment == row].sum() for row in range(keep)]
