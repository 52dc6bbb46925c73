import numpy as np

from .common import kept_alone, top
from .hired import region, shape, shared, tops

CASES = {
    "globalcom2": (
        (),
        [{"crops": [1, 3]}, {}, {"crops": [1, 3], "temperature": 0.5}, {"crops": [1, 1]}, {"crops": [3, 1]}],
    ),
}


def bilinear(image, y, x):
    """Half-pixel centres; beyond the outermost ones their values."""
    (h, w), value = image.shape, 0.0
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    for j in range(h):
        for i in range(w):
            value += image[j, i] * max(0, 1 - abs(y - j)) * max(0, 1 - abs(x - i))
    return value


def globalcom2(features, scores, keep, *, grid=None, crops=None, temperature=10.0, **_):
    if crops is None:
        return kept_alone(features, scores, top(scores, keep))
    height, width = shape(scores, grid, crops)
    size, (rows, columns) = height * width, crops
    whole, of_crops = scores[:size].reshape(height, width), scores[size:].reshape(-1, size)
    total, guide = np.zeros(rows * columns), []
    for y in range(height):
        for x in range(width):
            total[region(y, x, height, width, crops)] += whole[y, x]
    for r in range(rows):
        for c in range(columns):
            ys = [(r * height + j + 0.5) / rows - 0.5 for j in range(height)]
            xs = [(c * width + i + 0.5) / columns - 0.5 for i in range(width)]
            guide.append([bilinear(whole, y, x) for y in ys for x in xs])
    p = np.exp(total / temperature) / np.exp(total / temperature).sum()
    budget = shared([1, *(1 + p - p.mean())], keep, size)
    unit = lambda a: np.array(a) / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    return kept_alone(
        features, scores, tops(np.concatenate([whole.reshape(1, -1), unit(of_crops) + unit(guide)]), budget)
    )
