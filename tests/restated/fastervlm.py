from .common import assigned, kept_alone, merged_by, top

CASES = {"topk_merge": (("keys",), [{}])}


def fastervlm(features, scores, keep, **_):
    return kept_alone(features, scores, top(scores, keep))


def topk_merge(features, scores, keep, *, grid=None, keys=None):
    indices = sorted(top(scores, keep))
    return merged_by(features, scores, indices, assigned(features if keys is None else keys, indices, grid))
