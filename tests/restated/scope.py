import numpy as np

from .common import best, cosines, kept_alone

CASES = {"scope": (("keys",), [{}, {}, {"alpha": 2.0}, {}, {"alpha": 0.5}])}


def scope(features, scores, keep, *, keys=None, alpha=1.0, **_):
    s = cosines(features if keys is None else keys)
    covered, picks = np.zeros(len(s)), []
    while len(picks) < keep:
        gain = np.array([np.maximum(s[:, j] - covered, 0).sum() for j in range(len(s))])
        picks.append(best(gain * scores**alpha, picks))
        covered = np.maximum(covered, s[:, picks[-1]])
    return kept_alone(features, scores, picks)
