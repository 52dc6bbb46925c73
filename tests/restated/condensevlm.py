import numpy as np

from .common import assigned, best, cosines, kept_alone, merged_by, top

CASES = {
    "condensevlm": (("keys",), [{}, {"background_ratio": 0.5}, {"spatial_weight": 0.0}]),
    "condensevlm_suppressed": (("keys",), [{}]),
    "condensevlm_cosine": (("keys",), [{}]),
    "condensevlm_anchors": (("keys",), [{}]),
}


def greedy(s, prior, k, free):
    """Eq. 2 and 4: the prior at the scale of |S|, minus the largest cosine to a pick of this loop."""
    utility = np.abs(s).mean() / np.abs(prior).mean() * prior
    picks = [best(utility, (), free)]
    while len(picks) < k:
        picks.append(best(utility - s[picks].max(axis=0), picks, free))
    return picks


def condensevlm(
    features, scores, keep, *, grid=None, keys=None, background_ratio=0.25, spatial_weight=1.0
):  # fmt: skip
    keys = features if keys is None else keys
    s = cosines(keys)
    background = int(np.floor(keep * background_ratio + 0.5))
    every = np.ones(len(features), dtype=bool)
    picks = greedy(s, scores, keep - background, every) if keep > background else []
    if background:
        rest = every.copy()
        rest[picks] = False
        picks = picks + greedy(s, s.sum(axis=1), background, rest)
    indices = np.sort(picks)
    return merged_by(features, scores, indices, assigned(keys, indices, grid, spatial_weight))


def condensevlm_attention(features, scores, keep, **_):
    return kept_alone(features, scores, top(scores, keep))


def condensevlm_suppressed(features, scores, keep, *, keys=None, **_):
    every = np.ones(len(features), dtype=bool)
    return kept_alone(features, scores, greedy(cosines(features if keys is None else keys), scores, keep, every))


def condensevlm_cosine(features, scores, keep, *, keys=None, **_):
    return condensevlm(features, scores, keep, keys=keys, background_ratio=0)


def condensevlm_anchors(features, scores, keep, *, grid, keys=None):
    return condensevlm(features, scores, keep, grid=grid, keys=keys, background_ratio=0)
