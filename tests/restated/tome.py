import numpy as np

from .common import cosines

CASES = {"tome": (("keys",), [{}])}


def step(clusters, features, keys, r):
    """Clusters are lists of tokens, the first of which is the one that the others were merged into."""
    mean = lambda x: np.array([x[cluster].mean(axis=0) for cluster in clusters])  # noqa: E731
    edges = cosines(mean(keys)[::2], mean(keys)[1::2])
    strongest = np.argsort(-edges.max(axis=1), kind="stable")[:r]
    into = {2 * int(i): 2 * int(edges[i].argmax()) + 1 for i in strongest}
    grown = [
        cluster + [t for i in sorted(into) if into[i] == j for t in clusters[i]] for j, cluster in enumerate(clusters)
    ]
    return [cluster for j, cluster in enumerate(grown) if j not in into]


def tome(features, scores, keep, *, keys=None, **_):
    keys = features if keys is None else keys
    clusters = [[i] for i in range(len(features))]
    while len(clusters) > keep:
        clusters = step(clusters, features, keys, min(len(clusters) - keep, len(clusters) // 2))
    clusters.sort(key=lambda cluster: cluster[0])
    assignment = np.array([next(row for row, c in enumerate(clusters) if i in c) for i in range(len(features))])
    merged = np.array([features[cluster].mean(axis=0) for cluster in clusters])
    return merged, [c[0] for c in clusters], assignment, [scores[c].sum() for c in clusters]
