"""What is drawn is an argument here: ``noise`` [N], uniform numbers, of which the highest are taken."""

from .common import assigned, kept_alone, merged_by, top

CASES = {"random": (("noise",), [{}]), "random_merge": (("noise", "keys"), [{}])}


def random(features, scores, keep, *, noise, **_):
    return kept_alone(features, scores, top(noise, keep))


def random_merge(features, scores, keep, *, noise, grid=None, keys=None):
    indices = sorted(top(noise, keep))
    return merged_by(features, scores, indices, assigned(features if keys is None else keys, indices, grid))
