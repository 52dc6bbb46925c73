import numpy as np

from .common import cosines, top

CASES = {"prumerge": (("keys",), [{}, {"neighbours": 4}, {"rest": False, "neighbours": 2}, {}])}


def prumerge(features, scores, keep, *, keys=None, neighbours=32, rest=True, **_):
    n = len(features)
    order = [int(i) for i in top(scores, n)]
    picked = keep - 1 if rest and 1 < keep < n else keep
    s = cosines(features if keys is None else keys)
    found = []
    for token in order[:picked]:
        others = [i for i in np.argsort(-s[token], kind="stable") if i != token][:neighbours]
        found.append((token, features[token] + sum(scores[i] * features[i] for i in others), scores[token]))
    dropped = order[picked:]
    if picked < keep:
        found.append((dropped[0], sum(scores[i] * features[i] for i in dropped), scores[dropped].sum()))
    found.sort(key=lambda row: row[0])
    assignment = np.full(n, -1)
    for row, (token, *_) in enumerate(found):
        assignment[token] = row
        if picked < keep and token == dropped[0]:
            assignment[dropped] = row
    return np.array([r[1] for r in found]), [r[0] for r in found], assignment, [r[2] for r in found]
