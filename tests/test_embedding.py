"""The recipes of docs/embedding.md against the methods restated in numpy, in fp64."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from condense_kernels.testing import assert_same_bits

PAGE = Path(__file__).parent.parent / "docs" / "embedding.md"
RECIPES: dict = {}
for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
    exec(compile(block, PAGE, "exec"), RECIPES)

N, D, K = 60, 32, 17

# The methods, of one image. argmax takes the first of equals, as the page promises.


def cosines(x, y=None):
    unit = lambda z: z / np.where((norm := np.linalg.norm(z, axis=-1, keepdims=True)) > 0, norm, 1)  # noqa: E731
    return np.einsum("id,jd->ij", unit(x), unit(x if y is None else y))


def without_diagonal(s):
    return np.where(np.eye(len(s), dtype=bool), -np.inf, s)


def best(score, picks, allowed=None):
    score = np.array(score, dtype=float)
    score[picks] = -np.inf
    if allowed is not None:
        score[~allowed] = -np.inf
    return int(score.argmax())


def divprune(features, k):
    distance = 1 - cosines(features)
    picks = [int((1 - without_diagonal(cosines(features)).max(axis=1)).argmax())]
    while len(picks) < k:
        picks.append(best(distance[picks].min(axis=0), picks))
    return picks


def idpruner(features, importance, k, balance=0.5):
    s, picks = cosines(features), [int(importance.argmax())]
    while len(picks) < k:
        picks.append(best(balance * importance - (1 - balance) * s[picks].max(axis=0), picks))
    return picks


def flashvid(features, attention, k):
    distance = (1 - cosines(features)) * attention  # of column j, times what j is worth
    picks = [int((attention * (1 - without_diagonal(cosines(features)).max(axis=1))).argmax())]
    while len(picks) < k:
        picks.append(best(distance[picks].min(axis=0), picks))
    return picks


def rediprune(features, relevance, k, alpha=0.5, candidates=None):
    distance, picks = 1 - cosines(features), [best(relevance, [], candidates)]
    while len(picks) < k:
        picks.append(best(distance[picks].min(axis=0) + alpha * relevance, picks, candidates))
    return picks


def farthest_points(features, start, k):
    picks = [int(start)]
    while len(picks) < k:
        picks.append(best(np.linalg.norm(features[:, None] - features[picks], axis=-1).min(axis=1), picks))
    return picks


def cdpruner(features, relevance, k):
    kernel, picks = relevance[:, None] * cosines(features) * relevance, []
    while len(picks) < k:
        if picks:
            across = kernel[picks]
            gain = kernel.diagonal() - (across * np.linalg.solve(across[:, picks], across)).sum(axis=0)
        else:
            gain = kernel.diagonal()
        picks.append(best(gain, picks))
    return picks


def coverage(c, k, weight=1.0):
    covered, picks = np.zeros(len(c)), []
    while len(picks) < k:
        picks.append(best(np.maximum(c - covered[:, None], 0).sum(axis=0) * weight, picks))
        covered = np.maximum(covered, c[:, picks[-1]])
    return picks


def scope(features, attention, k, alpha=1.0):
    return coverage(cosines(features), k, attention**alpha)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def mmtok(features, patches, text, k, alpha=0.5):
    to_text = softmax(cosines(text, features) / 0.01) / len(text)
    return coverage(np.concatenate([to_text, alpha * softmax(cosines(patches) / 0.2) / len(patches)]), k)


def fastervlm(attention, k):
    return np.argsort(-attention, kind="stable")[:k].tolist()


def visionzip(features, keys, attention, dominant, contextual):
    order = np.argsort(-attention, kind="stable")
    chosen, rest = np.sort(order[:dominant]), np.sort(order[dominant:])
    centres = rest[:: len(rest) // contextual][:contextual]
    context = features[centres].copy()
    others = [i for i in rest if i not in centres]
    nearest = cosines(keys)[np.ix_(others, centres)].argmax(axis=1)
    for c in range(contextual):
        if (nearest == c).any():
            context[c] += features[np.array(others)[nearest == c]].mean(axis=0)
    return np.concatenate([features[chosen], context])


def tome(features, keys, sizes, r):
    """Even tokens are merged into odd ones; what is left keeps its order in the picture."""
    source, target = np.arange(0, len(keys), 2), np.arange(1, len(keys), 2)
    s = cosines(keys)[np.ix_(source, target)]
    gone = np.argsort(-s.max(axis=1), kind="stable")[:r]
    into = {int(source[i]): int(target[s[i].argmax()]) for i in gone}
    kept = [i for i in range(len(keys)) if i not in into]
    merged, mass = [], []
    for j in kept:
        members = [j, *(i for i in into if into[i] == j)]
        mass.append(sizes[members].sum())
        merged.append((sizes[members, None] * features[members]).sum(axis=0) / mass[-1])
    return np.array(merged), np.array(mass)


def recycle(features, k):
    distance = np.linalg.norm(features[:, None] - features, axis=-1) / features.shape[1] ** 0.5
    mean = np.sort(distance, axis=1)[:, :k].__pow__(2).mean(axis=1)  # the token itself is its nearest
    denser = (mean[None] < mean[:, None]) | ((mean[None] == mean[:, None]) & np.tri(len(mean), k=-1, dtype=bool))
    delta = np.where(denser, distance, distance.max()).min(axis=1)
    centres = np.argsort(-np.exp(-mean) * delta, kind="stable")[:k]
    nearest = distance[:, centres].argmin(axis=1)
    nearest[centres] = np.arange(k)
    return np.stack([features[nearest == c].mean(axis=0) for c in range(k)])


def prumerge(features, keys, attention, k, m=32):
    kept = np.argsort(-attention, kind="stable")[:k]
    s = without_diagonal(cosines(keys))[kept]
    nearest = np.argsort(-s, axis=1, kind="stable")[:, :m]
    merged = features[kept] + np.einsum("km,kmd->kd", attention[nearest], features[nearest])
    rest = np.setdiff1d(np.arange(len(features)), kept)
    return np.concatenate([merged, (attention[rest] @ features[rest])[None]])


def per_crop(attention, weights, total):  # [C, N], [C]
    share = weights / weights.sum() * total
    budget = np.floor(share).astype(int)
    for c in np.argsort(-(share - budget), kind="stable")[: total - budget.sum()]:
        budget[c] += 1
    chosen = np.zeros(attention.shape, dtype=bool)
    for c, k in enumerate(budget):
        chosen[c, np.argsort(-attention[c], kind="stable")[:k]] = True
    return chosen


# The inputs


def ordinary(b):
    return torch.randn(b, N, D), torch.randn(b, N, D), torch.rand(b, N)


def alike(b):
    """Tokens of +-1, whose cosines are exact: many equal tokens, a zero token, ties in attention."""
    kinds = torch.randint(2, (b, 20, 16)) * 2.0 - 1
    features = kinds[torch.arange(b)[:, None], torch.randint(20, (b, N))]
    features[:, 7] = 0
    return features, features.roll(1, dims=1), torch.randint(1, 5, (b, N)) / 4


def arguments(name, inputs, k):
    features, keys, attention = inputs
    start = attention[:, 0].mul(N - 1).long()
    text = features[:, :5] + 0.25 * keys[:, :5]
    return {
        "divprune": (features, k),
        "idpruner": (features, attention, k),
        "flashvid": (features, attention, k),
        "rediprune": (features, attention, k),
        "farthest_points": (features, start, k),
        "cdpruner": (features, attention, k),
        "scope": (features, attention, k),
        "mmtok": (features, keys, text, k),
        "fastervlm": (attention, k),
        "visionzip": (features, keys, attention, k // 2, max(k // 4, 1)),
        "tome": (features, keys, (4 * attention).ceil(), k // 2),
        "recycle": (features, k),
        "prumerge": (features, keys, attention, k),
        "per_crop": (attention.unflatten(1, (4, -1)), attention[:, :4], k),
    }[name]


METHODS = tuple(name for name, recipe in RECIPES.items() if name in globals() and callable(recipe))
SELECTIONS = METHODS[: METHODS.index("fastervlm") + 1]
BY_NAME = pytest.mark.parametrize("name", METHODS)


def listed(result):
    return result if isinstance(result, tuple) else (result,)


def image(arguments, b):
    return tuple(value[b].double().numpy() if isinstance(value, torch.Tensor) else value for value in arguments)


def alone(arguments, b):
    return tuple(value[b : b + 1] if isinstance(value, torch.Tensor) else value for value in arguments)


def check(name, given):
    ours = listed(RECIPES[name](*given))
    for b in range(len(ours[0])):
        for one, theirs in zip(ours, listed(globals()[name](*image(given, b))), strict=True):
            if one.is_floating_point():
                torch.testing.assert_close(one[b].double(), torch.as_tensor(theirs), rtol=1e-5, atol=1e-5)
            else:
                assert one[b].tolist() == np.asarray(theirs).tolist()


def test_every_recipe_is_restated():
    """All functions of the page but the one that gathers."""
    functions = {name for name, value in RECIPES.items() if callable(value)} - {"rows"}
    assert functions == set(METHODS) and len(METHODS) == 14


@BY_NAME
def test_a_recipe_is_its_method(name):
    check(name, arguments(name, ordinary(2), K))


@pytest.mark.parametrize("name", ["divprune", "idpruner", "flashvid", "rediprune", "farthest_points", "fastervlm"])
def test_equal_tokens_and_a_zero_token(name):
    """Where rounding plays no part, down to the last tie."""
    check(name, arguments(name, alike(2), K))


@BY_NAME
def test_an_image_alone(name):
    given = arguments(name, ordinary(3), K)
    together = listed(RECIPES[name](*given))
    for b in range(3):
        for one, all_ in zip(listed(RECIPES[name](*alone(given, b))), together, strict=True):
            assert_same_bits(one[0], all_[b])


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("k", [1, K, N])
@pytest.mark.parametrize("kind", ["ordinary", "alike", "zero", "nan"])
def test_k_distinct_tokens_whatever_comes(name, k, kind):
    inputs = {"ordinary": ordinary, "alike": alike}.get(kind, ordinary)(2)
    if kind in ("zero", "nan"):
        inputs = tuple(torch.full_like(x, 0.0 if kind == "zero" else torch.nan) for x in inputs[:2]) + inputs[2:]
    order = RECIPES[name](*arguments(name, inputs, k))
    assert order.shape == (2, k) and order.min() >= 0 and order.max() < N
    assert all(len(set(picks)) == k for picks in order.tolist())


@BY_NAME
def test_bf16_is_as_good_as_fp32(name):
    """The same values: the same choices, since arithmetic is fp32 in either case."""
    if name == "mmtok":
        pytest.skip("its softmax, in the recipe, is torch's own in the dtype that it is given")
    features, keys, attention = (x.bfloat16() for x in ordinary(2))
    narrow = listed(RECIPES[name](*arguments(name, (features, keys, attention), K)))
    wide = listed(RECIPES[name](*arguments(name, (features.float(), keys.float(), attention.float()), K)))
    for one, other in zip(narrow, wide, strict=True):
        if other.is_floating_point():
            torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-7 * float(other.abs().max()))
        else:
            assert torch.equal(one, other)


def test_rediprune_looks_at_candidates_alone():
    features, _, attention = ordinary(2)
    candidates = attention > 0.3
    order = RECIPES["rediprune"](features, attention, K, candidates=candidates)
    for b in range(2):
        expected = rediprune(*image((features, attention), b), K, candidates=candidates[b].numpy())
        assert order[b].tolist() == expected


def test_idpruner_without_importance_starts_from_it():
    features, _, attention = ordinary(1)
    order = RECIPES["idpruner"](features, attention, K, balance=0.0)
    assert order[0].tolist() == idpruner(*image((features, attention), 0), K, balance=0.0)
