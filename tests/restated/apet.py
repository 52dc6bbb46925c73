import numpy as np

from .common import best, kept_alone

CASES = {"farthest_points": (("noise", "keys"), [{}])}


def farthest_points(features, scores, keep, *, noise, keys=None, **_):
    keys, picks = features if keys is None else keys, [best(noise)]
    while len(picks) < keep:
        picks.append(best(np.linalg.norm(keys[:, None] - keys[picks], axis=-1).min(axis=1), picks))
    return kept_alone(features, scores, picks)
