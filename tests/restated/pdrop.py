from .common import kept_alone, top


def pdrop(features, scores, keep, **_):
    return kept_alone(features, scores, top(scores, keep))
