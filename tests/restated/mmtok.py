import numpy as np

from .common import best, cosines, kept_alone

ARRAYS = {"text": lambda rng, n, d, k: rng.normal(size=(3, d))}
CASES = {"mmtok": (("text", "keys"), [{}, {}, {"alpha": 4.0}, {}, {"text_temperature": 0.2, "temperature": 0.5}])}


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def mmtok(
    features, scores, keep, *, text, keys=None, alpha=0.5, text_temperature=0.02, temperature=0.2, **_
):  # fmt: skip
    of_words = softmax(cosines(text, features) / text_temperature) / len(text)
    of_tokens = softmax(cosines(features if keys is None else keys) / temperature) / len(features)
    c = np.concatenate([of_words, alpha * of_tokens])
    covered, picks = np.zeros(len(c)), []
    while len(picks) < keep:
        picks.append(best(np.maximum(c - covered[:, None], 0).sum(axis=0), picks))
        covered = np.maximum(covered, c[:, picks[-1]])
    return kept_alone(features, scores, picks)
