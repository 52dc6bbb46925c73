import numpy as np

from .common import best, cosines, kept_alone, top

CASES = {"rediprune": (("keys",), [{}, {}, {"alpha": 2.0}, {"among": 9}, {"among": 9}])}


def rediprune(features, scores, keep, *, keys=None, alpha=0.5, among=None, **_):
    distance = 1 - cosines(features if keys is None else keys)
    allowed = np.zeros(len(scores), dtype=bool)
    allowed[top(scores, len(scores) if among is None else max(among, keep))] = True
    picks = [best(scores)]
    while len(picks) < keep:
        picks.append(best(alpha * scores + distance[picks].min(axis=0), picks, allowed))
    return kept_alone(features, scores, picks)
