"""What several restatements need. argmax takes the first of equals, as the package promises."""

import numpy as np


def cosines(x, y=None):
    """[N, M]; a zero token is like nothing."""
    unit = lambda z: z / np.where((norm := np.linalg.norm(z, axis=-1, keepdims=True)) > 0, norm, 1)  # noqa: E731
    return np.einsum("id,jd->ij", unit(x), unit(x if y is None else y))


def best(score, picks=(), allowed=None):
    """The index of the highest score that is not picked yet."""
    score = np.array(score, dtype=float)
    score[list(picks)] = -np.inf
    if allowed is not None:
        score[~allowed] = -np.inf
    return int(score.argmax())


def top(scores, k):
    """The k highest, ties to the lowest index; in order of their scores."""
    return np.argsort(-np.asarray(scores), kind="stable")[:k]


def kept_alone(features, scores, picks):
    """Nothing is merged: the result of a selection."""
    indices = np.sort(np.asarray(picks))
    assignment = np.full(len(features), -1)
    assignment[indices] = np.arange(len(indices))
    return features[indices], indices, assignment, scores[indices]


def merged_by(features, weights, indices, assignment):
    """Means of clusters, weighted; the plain mean where the weights of a cluster sum to 0."""
    merged, mass = [], []
    for row in range(len(indices)):
        members = assignment == row
        w = weights[members]
        mass.append(w.sum())
        merged.append(np.average(features[members], axis=0, weights=w if w.sum() else None))
    return np.array(merged), np.asarray(indices), assignment, np.array(mass)


def assigned(keys, indices, grid=None, spatial_weight=1.0):
    """Eq. 6 and 7 of CondenseVLM: cosine minus the distance on the grid over the largest one there is."""
    value = cosines(keys, keys[indices])
    if grid is not None and spatial_weight:
        at = np.stack(np.unravel_index(np.arange(len(keys)), grid), axis=1).astype(float)
        distance = np.linalg.norm(at[:, None] - at[indices], axis=-1)
        largest = np.linalg.norm(np.array(grid, dtype=float) - 1)
        value = value - spatial_weight * distance / max(largest, 1)
    assignment = value.argmax(axis=1)
    assignment[indices] = np.arange(len(indices))
    return assignment
