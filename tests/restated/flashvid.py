import numpy as np

from .common import best, cosines, kept_alone

CASES = {"flashvid": (("keys",), [{}])}


def flashvid(features, scores, keep, *, keys=None, **_):
    distance = (1 - cosines(features if keys is None else keys)) * scores  # of column j, times what j is worth
    picks = [best(np.where(np.eye(len(distance), dtype=bool), np.inf, distance).min(axis=0))]
    while len(picks) < keep:
        picks.append(best(distance[picks].min(axis=0), picks))
    return kept_alone(features, scores, picks)
