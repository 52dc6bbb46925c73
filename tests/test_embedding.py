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


def prumerge(features, keys, attention, k, m=32):
    kept = np.argsort(-attention, kind="stable")[:k]
    s = without_diagonal(cosines(keys))[kept]
    nearest = np.argsort(-s, axis=1, kind="stable")[:, :m]
    merged = features[kept] + np.einsum("km,kmd->kd", attention[nearest], features[nearest])
    rest = np.setdiff1d(np.arange(len(features)), kept)
    return np.concatenate([merged, (attention[rest] @ features[rest])[None]])


def arguments(name, inputs, k):
    features, keys, attention = inputs
    return {
        "visionzip": (features, keys, attention, k // 2, max(k // 4, 1)),
        "tome": (features, keys, (4 * attention).ceil(), k // 2),
        "prumerge": (features, keys, attention, k),
    }[name]


def ordinary(b):
    return torch.randn(b, N, D), torch.randn(b, N, D), torch.rand(b, N)


METHODS = tuple(name for name, recipe in RECIPES.items() if name in globals() and callable(recipe))
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
    """All functions of the page but the two that they share."""
    functions = {name for name, value in RECIPES.items() if callable(value)} - {"rows", "highest"}
    assert functions == set(METHODS) and METHODS


@BY_NAME
def test_a_recipe_is_its_method(name):
    check(name, arguments(name, ordinary(2), K))


@BY_NAME
def test_an_image_alone(name):
    given = arguments(name, ordinary(3), K)
    together = listed(RECIPES[name](*given))
    for b in range(3):
        for one, all_ in zip(listed(RECIPES[name](*alone(given, b))), together, strict=True):
            assert_same_bits(one[0], all_[b])


@BY_NAME
def test_bf16_is_as_good_as_fp32(name):
    """The same values: the same choices, since arithmetic is fp32 in either case."""
    features, keys, attention = (x.bfloat16() for x in ordinary(2))
    narrow = listed(RECIPES[name](*arguments(name, (features, keys, attention), K)))
    wide = listed(RECIPES[name](*arguments(name, (features.float(), keys.float(), attention.float()), K)))
    for one, other in zip(narrow, wide, strict=True):
        if other.is_floating_point():
            torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-7 * float(other.abs().max()))
        else:
            assert torch.equal(one, other)
