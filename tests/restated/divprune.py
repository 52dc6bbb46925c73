import numpy as np

from .common import best, cosines, kept_alone

CASES = {"divprune": (("keys",), [{}])}


def divprune(features, scores, keep, *, keys=None, **_):
    s = cosines(features if keys is None else keys)
    alone = np.where(np.eye(len(s), dtype=bool), -np.inf, s)
    picks = [int((1 - alone.max(axis=1)).argmax())]
    while len(picks) < keep:
        picks.append(best(1 - s[picks].max(axis=0), picks))
    return kept_alone(features, scores, picks)
