import numpy as np

from .common import top

ARRAYS = {"attention": lambda rng, n, d, k: rng.dirichlet(np.full(n, 0.5), size=n) + 0.001}
CASES = {
    "ficoco_v": (("attention",), [{}, {"balance": 0.9}, {"quantile": 0.7}, {"penalty": 5.0}, {"quantile": 0.35}]),
}


def ficoco_v(features, scores, keep, *, attention, grid=None, balance=0.35, penalty=2.0, quantile=0.998):
    spread = attention.mean(axis=1)
    value = balance * scores / np.linalg.norm(scores) - (1 - balance) * spread / np.linalg.norm(spread)
    if grid is not None:
        before = value.copy()
        for y in range(0, grid[0] - 1, 2):
            for x in range(0, grid[1] - 1, 2):
                tokens = [(y + i) * grid[1] + x + j for i in (0, 1) for j in (0, 1)]
                lowest = min(tokens, key=lambda i: before[i])
                value[lowest] = before[lowest] / penalty if before[lowest] > 0 else before[lowest] * penalty
    kept = sorted(int(i) for i in top(value, keep))
    total, weight = features[kept].copy(), np.ones(keep)
    assignment = np.zeros(len(features), dtype=int)
    for i in range(len(features)):
        if i in kept:
            assignment[i] = kept.index(i)
            continue
        towards = attention[i, kept]
        sent = np.where(towards >= np.quantile(towards, quantile), towards, 0)
        sent = sent / sent.sum()
        total, weight = total + sent[:, None] * features[i], weight + sent
        assignment[i] = towards.argmax()
    mass = [scores[assignment == row].sum() for row in range(keep)]
    return total / weight[:, None], kept, assignment, mass
