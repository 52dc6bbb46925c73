"""Calls of greedy_select that are other methods, and calls that are refused."""

import math
import re

import pytest
import torch

from condense_kernels import debug, greedy_select, similarity
from condense_kernels._dispatch import backends

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
needs_triton = pytest.mark.skipif(backends.unavailable("triton", CPU) is not None, reason="no Triton on CPU tensors")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]


# Other methods, each restated over one image in numpy fp64: the picks by a score of (candidates left, picks so far)


def sequential(n, k, first, score):
    order = [first]
    while len(order) < k:
        left = [i for i in range(n) if i not in order]
        order.append(max(left, key=lambda i: score(i, order)))
    return order


def restated(name, s, w, k):
    n, others = len(s), lambda i: [j for j in range(len(s)) if j != i]
    farness = lambda i, js: min(1 - s[j, i] for j in js)  # noqa: E731
    if name == "DivPrune":
        return sequential(n, k, max(range(n), key=lambda i: farness(i, others(i))), farness)
    if name == "FlashVID":
        weighted = lambda i, js: w[i] * farness(i, js)  # noqa: E731
        return sequential(n, k, max(range(n), key=lambda i: weighted(i, others(i))), weighted)
    if name == "IDPruner":
        return sequential(n, k, int(w.argmax()), lambda i, js: 0.3 * w[i] - 0.7 * max(s[j, i] for j in js))
    if name == "ReDiPrune":
        chosen = [i for i in range(n) if w[i] > 0.4]
        rank = sequential(n, n, int(w.argmax()), lambda i, js: (i in chosen, w[i] - max(s[j, i] for j in js)))
        return rank[: min(k, len(chosen))] + [-1] * (k - len(chosen))
    return sequential(n, k, 5, farness)


@pytest.mark.parametrize("name", ["DivPrune", "FlashVID", "IDPruner", "ReDiPrune", "farthest points"])
@pytest.mark.parametrize("k", [1, 9, 20])
def test_other_methods_are_one_call(name, k, backend):
    s, _, _, _, nearest = similarity(torch.randn(1, 20, 6), nearest=True, backend=backend)
    w = torch.rand(1, 20)
    s, prior, options = {
        "DivPrune": (s, None, {"first": "max_min"}),
        "FlashVID": (s, w, {"first": w * (1 - nearest), "combine": "mul"}),
        "IDPruner": (s, 0.3 * w, {"first": w, "suppression": 0.7}),
        "ReDiPrune": (s, w, {"candidates": w > 0.4}),
        "farthest points": (s - 1, None, {"first": torch.tensor([5])}),
    }[name]
    order = greedy_select(s, prior, k, **options, backend=backend)[0].tolist()
    cosines = (s + 1 if name == "farthest points" else s)[0].double().numpy()
    assert order == restated(name, cosines, w[0].double().numpy(), k)


@pytest.mark.parametrize("kind", ["equal", "one zero", "nan"])
def test_max_min_of_degenerate_keys(kind, backend):
    """K distinct tokens: of equal ones by index, a zero token as any other, a NaN one last."""
    keys = torch.ones(1, 9, 4) if kind == "equal" else torch.randn(1, 9, 4)
    keys[0, 7] = {"equal": 1.0, "one zero": 0.0, "nan": math.nan}[kind]
    s, _, _, tier = similarity(keys, backend=backend)
    order = greedy_select(s, None, 9, tier=tier, first="max_min", backend=backend)[0].tolist()
    assert sorted(order) == list(range(9))
    assert kind != "equal" or order == list(range(9))
    assert kind != "nan" or order[-1] == 7


# Errors

S, P = torch.rand(2, 6, 6), torch.rand(2, 6)
REFUSED = {
    "a mask for a tier": (
        {"tier": P < 0.5},
        TypeError,
        "tier: expected dtype int8, got bool. Remedy: candidates= says which tokens may be picked.",
    ),
    "a number for a mask": ({"candidates": P}, TypeError, "candidates: expected dtype bool, got float32"),
    "two rules": (
        {"first": P, "max_min": True},
        ValueError,
        "first, max_min: expected one of the two, got both. Remedy: leave out first.",
    ),
    "int32": ({"first": P[:, 0].int()}, TypeError, "first: expected dtype int64"),
    "an index too many": ({"first": torch.zeros(3).long()}, ValueError, "first: expected shape [B] = [2]"),
    "a utility too many": ({"first": torch.zeros(2, 7)}, ValueError, "first: expected shape [B N] = [2, 6]"),
    "a column": ({"prior": P[..., None]}, ValueError, "prior: expected 2 axes [B N], got 3: [2, 6, 1]"),
    "another product": ({"combine": "max"}, ValueError, "combine: expected 'sub' or 'mul', got 'max'."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, cpp):
    options, error, message = REFUSED[case]
    options = {"s": S, "prior": P, "k": 2, **options}
    with pytest.raises(error, match=re.escape(message)):
        greedy_select(**options)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.condense.greedy_select(**options)


def test_a_column_has_a_remedy():
    with pytest.raises(ValueError, match=r"Remedy: prior\.squeeze\(-1\)\.$"):
        greedy_select(S, P[..., None], 2)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"^first: expected 'prior', 'max_min' or a tensor, got 'last'\.$"):
        greedy_select(S, P, 2, first="last")


@pytest.mark.parametrize("backend", [b for b in ("cpp", "reference") if b in (*FAST, "reference")])
def test_an_index_out_of_range_is_refused_on_cpu(backend):
    for first in (6, -2):
        with pytest.raises(RuntimeError, match=rf"^first: expected values in \[-1, 6\), got {first}\.$"):
            greedy_select(S, P, 2, first=torch.tensor([0, first]), backend=backend)


@needs_triton
def test_an_index_out_of_range_is_none_in_a_kernel(bounded):
    expected = greedy_select(S, P, 4, backend="triton")
    for first in (6, -2, 2**32, -(2**62)):
        order = greedy_select(S, P, 4, first=torch.full((2,), first), backend="triton")
        assert torch.equal(order, expected)


LOOKED_AT = {
    "an infinity in s": ({"s": (1, 2, 3, -INF)}, "s: expected finite numbers, got -inf at image 1, token 2, token 3"),
    "a negative factor": ({"prior": (0, 4, -1.0), "combine": "mul"}, "prior: expected numbers >= 0, as combine is"),
    "an index": ({"first": torch.tensor([1, 6])}, "first: expected values in [-1, N), got 6 at image 1. Remedy: "),
    "a token that may not be picked": (
        {"first": torch.tensor([-1, 2])},
        "first: expected a candidate of tier 0, got 2 at image 1. Remedy: a token that may be picked, or -1.",
    ),
    "of another tier": ({"first": torch.tensor([0, -1])}, "first: expected a candidate of tier 0, got 0 at image 0"),
    "a NaN": (
        {"first": torch.tensor([[NAN, NAN, 0, 0, 0, 0]] * 2)},
        "first: expected finite numbers, got nan at image 0, token 1",
    ),
}


@pytest.mark.parametrize("case", LOOKED_AT)
def test_the_debug_switch_looks(case):
    changes, message = LOOKED_AT[case]
    tensors = {"s": S.clone(), "prior": P.clone()}
    candidates, tier = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.int8)
    candidates[1, 2], tier[0, 0] = False, 1
    options = {"candidates": candidates, "tier": tier}
    for name, value in changes.items():
        if isinstance(value, tuple):
            tensors[name][value[:-1]] = value[-1]
        else:
            options[name] = value
    with debug(), pytest.raises(ValueError, match="^" + re.escape(message)):
        greedy_select(**tensors, k=2, **options)


def test_the_debug_switch_names_the_remedy():
    s = S.clone()
    s[:, :, 3] = -INF  # as attention is masked: here it counts as 0, and token 3 is picked
    assert 3 in greedy_select(s, P, 6)[0]
    with debug(), pytest.raises(ValueError, match=r"Remedy: candidates=, or tier 3, for what must not be picked"):
        greedy_select(s, P, 6)


def test_the_debug_switch_takes_any_similarity():
    """Not symmetric, negative, beyond 1; negative utilities of who is no candidate; any number for them."""
    few = P > 0.3
    with debug():
        greedy_select(100 * S - 50, torch.where(few, P, -P), 3, combine="mul", candidates=few)
        greedy_select(S, P, 3, first=torch.where(few, P, NAN), candidates=few)
        greedy_select(S, None, 3, first="max_min")
