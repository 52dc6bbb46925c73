import numpy as np

from .common import merged_by, top

CASES = {"sparsevlm": ((), [{}, {"recycled": 2}, {"recycled": 0}, {}, {"recycled": 3}])}


def peaks(x, k):
    """Of the tokens x: densities by the mean square distance to the k nearest, the token itself among them."""
    distance = np.linalg.norm(x[:, None] - x, axis=-1) / x.shape[1] ** 0.5
    density = np.exp(-np.array([np.mean(np.sort(d)[:k] ** 2) for d in distance]))
    score = np.zeros(len(x))
    for i in range(len(x)):
        denser = [j for j in range(len(x)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score[i] = density[i] * (distance[i, denser].min() if denser else distance[i].max())
    return top(score, k), distance


def sparsevlm(features, scores, keep, *, recycled=None, **_):
    n = len(scores)
    clustered = lambda dropped: min(dropped, int(0.3 * dropped) + 1)  # noqa: E731
    if recycled is None:
        recycled = min(keep // 2, clustered(n - keep) // 10 + 1) if n > keep else 0
    order = top(scores, n)
    kept = keep - recycled
    pooled = np.sort(order[kept : kept + clustered(n - kept)])
    assignment = np.full(n, -1)
    assignment[order[:kept]] = np.arange(kept)
    indices = order[:kept]
    if recycled:
        centres, distance = peaks(features[pooled], recycled)
        nearest = distance[:, centres].argmin(axis=1)
        nearest[centres] = np.arange(recycled)
        assignment[pooled] = kept + nearest
        indices = np.concatenate([indices, pooled[centres]])
    picture = np.argsort(indices)
    rank = np.append(np.argsort(picture), -1)
    assignment = rank[assignment]
    merged, indices, assignment, _ = merged_by(features, np.ones(n), indices[picture], assignment)
    return merged, indices, assignment, np.array([scores[assignment == row].sum() for row in range(keep)])
