import numpy as np

from .common import best, cosines, kept_alone

CASES = {"dart": (("keys",), [{}, {"pivots": 1}, {"pivots": 5}])}


def dart(features, scores, keep, *, keys=None, pivots=4, **_):
    norm = np.abs(features if keys is None else keys).sum(axis=1)
    s, of = cosines(features), []
    while len(of) < min(pivots, keep):
        of.append(best(norm, of))
    picks, (share, more) = list(of), divmod(keep - len(of), len(of))
    for turn, pivot in enumerate(of):
        for _ in range(share + (turn < more)):
            picks.append(best(-s[pivot], picks))
    return kept_alone(features, scores, picks)
