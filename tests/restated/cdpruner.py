import numpy as np

from .common import best, cosines, kept_alone

CASES = {"cdpruner": (("keys",), [{}])}


def largest_volume(kernel, keep, rest, eps=1e-5):
    """Greedy: the next pick multiplies the determinant of the picks' kernel most; when none does, by ``rest``."""
    picks: list[int] = []
    while len(picks) < keep:
        across = kernel[picks]  # the factor is the diagonal of the Schur complement
        gain = kernel.diagonal() - (across * np.linalg.solve(across[:, picks], across)).sum(axis=0)
        if (np.delete(gain / kernel.diagonal(), picks) <= eps).all():
            break
        picks.append(best(gain, picks))
    while len(picks) < keep:
        picks.append(best(rest, picks))
    return picks


def cdpruner(features, scores, keep, *, keys=None, **_):
    r = (scores - scores.min() + 1e-6) / (scores.max() - scores.min())
    kernel = r[:, None] * cosines(features if keys is None else keys) * r
    return kept_alone(features, scores, largest_volume(kernel, keep, r))
