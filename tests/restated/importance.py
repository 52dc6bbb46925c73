import numpy as np

from .common import cosines, kept_alone, top

ARRAYS = {"query": lambda rng, n, d, k: rng.normal(size=d)}
CASES = {"importance_redundancy": (("query",), [{}, {"alpha": 0.1}, {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.9}])}


def scaled(value):
    return (value - value.min()) / (np.ptp(value) or 1)


def importance_redundancy(features, scores, keep, *, alpha=0.5, query=None, **_):
    similarity = cosines(features, (features[-1] if query is None else query)[None])[:, 0]
    return kept_alone(features, scores, top(alpha * scaled(scores) + (1 - alpha) * (1 - scaled(similarity)), keep))
