import numpy as np

from .common import kept_alone, top

CASES = {"window_fastv": ((), [{}, {"window": [2, 3]}, {"window": [1, 4]}, {"window": [3, 5]}])}


def fastv(features, scores, keep, **_):
    return kept_alone(features, scores, top(scores, keep))


def reverse_fastv(features, scores, keep, **_):
    return kept_alone(features, scores, top(-scores, keep))


def window_fastv(features, scores, keep, *, grid, window=(4, 4)):
    """One token after the other: from the window with the smallest (2 kept + 1) / size, the best that is left."""
    left = {}
    for token in top(scores, len(scores)):
        y, x = divmod(int(token), grid[1])
        left.setdefault((y // window[0], x // window[1]), []).append(int(token))
    size = {where: len(tokens) for where, tokens in left.items()}
    picks = []
    while len(picks) < keep:
        turn = {where: (2 * (size[where] - len(tokens)) + 1) / size[where] for where, tokens in left.items() if tokens}
        next_in_turn = [left[where][0] for where in turn if turn[where] == min(turn.values())]
        pick = min(next_in_turn, key=lambda token: (-scores[token], token))
        left[next(where for where in turn if left[where][0] == pick)].pop(0)
        picks.append(pick)
    return kept_alone(features, scores, np.array(picks))
