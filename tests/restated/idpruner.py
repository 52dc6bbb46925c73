from .common import best, cosines, kept_alone

CASES = {"idpruner": (("keys",), [{"balance": 0.0}, {}, {"balance": 0.8}, {}, {"balance": 0.2}])}


def idpruner(features, scores, keep, *, keys=None, balance=0.5, **_):
    s = cosines(features if keys is None else keys)
    importance = (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)
    picks = [best(importance)]
    while len(picks) < keep:
        picks.append(best(balance * importance - (1 - balance) * s[picks].max(axis=0), picks))
    return kept_alone(features, scores, picks)
