"""The paper's bound: of a choice S of the rows of X, log det(I + gamma * C_S C_S^T) with C = X (X^T X)^(1/2)."""

import numpy as np

from .common import best, kept_alone

CASES = {"otprune": (("keys",), [{}, {}, {"gamma": 1.0}, {}, {"gamma": 100.0}])}


def otprune(features, scores, keep, *, keys=None, gamma=0.01, **_):
    x = features if keys is None else keys
    x = x / np.linalg.norm(x, axis=0)
    values, vectors = np.linalg.eigh(x.T @ x)
    c = x @ (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    bound = lambda rows: np.linalg.slogdet(np.eye(len(rows)) + gamma * c[rows] @ c[rows].T)[1]  # noqa: E731
    picks: list[int] = []
    while len(picks) < keep:
        picks.append(best([bound([*picks, j]) if j not in picks else -np.inf for j in range(len(x))], picks))
    return kept_alone(features, scores, picks)
