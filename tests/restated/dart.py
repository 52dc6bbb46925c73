import numpy as np

from .common import cosines, kept_alone, top

CASES = {"dart": (("keys",), [{}, {"pivots": 2}, {"pivots": 5}, {"pivots": 1}])}


def dart(features, scores, keep, *, keys=None, pivots=4, **_):
    pivots = min(pivots, keep)
    picked = [int(i) for i in top(np.abs(features if keys is None else keys).sum(axis=1), pivots)]
    s, found = cosines(features), list(picked)
    for at, pivot in enumerate(picked):
        share = len(range(at, keep - pivots, pivots))  # dealt out in turn
        rest = [i for i in range(len(features)) if i not in found]
        found += sorted(rest, key=lambda i, p=pivot: s[p, i])[:share]
    return kept_alone(features, scores, found)
