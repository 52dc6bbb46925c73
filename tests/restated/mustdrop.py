import numpy as np

from .common import cosines, merged_by, top

CASES = {"mustdrop": ((), [{"threshold": -1.0}, {"window": 2, "threshold": 0.15}, {"window": 2, "threshold": 0.0}, {}])}


def mustdrop(features, scores, keep, *, grid, window=3, threshold=0.8):
    height, width = grid
    cells = [
        [(top_ + y) * width + left + x for y in range(window) for x in range(window)]
        for top_ in range(0, height - window + 1, window)
        for left in range(0, width - window + 1, window)
    ]
    pairs = [(a, b) for a in range(window**2) for b in range(window**2) if a != b]
    s = cosines(features)
    mean = np.array([np.mean([s[cell[a], cell[b]] for a, b in pairs]) for cell in cells])
    groups, left = {i: [i] for i in range(len(features))}, len(features)
    for w in top(mean, len(cells)):
        if mean[w] >= threshold and left - (window**2 - 1) >= keep:
            left -= window**2 - 1
            for i in cells[w]:
                del groups[i]
            groups[cells[w][window**2 // 2]] = cells[w]
    stand = sorted(groups)
    worth = np.array([scores[groups[i]].mean() for i in stand])
    indices = sorted(stand[i] for i in top(worth, keep))
    assignment = np.full(len(features), -1)
    for row, i in enumerate(indices):
        assignment[groups[i]] = row
    merged, *_ = merged_by(features, np.ones(len(features)), indices, assignment)
    return merged, indices, assignment, [scores[assignment == row].sum() for row in range(keep)]
