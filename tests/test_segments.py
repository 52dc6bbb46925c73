"""Budgets and top-k of segments, against the same in plain Python."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import condense_kernels as ck
from condense_kernels.segments import RULES

EXACT = ("largest_remainder", "floor_largest")


def proportional(weights, total):
    """Exactly; equal shares where no weight is above 0."""
    weights = [Fraction(w) for w in weights] if any(weights) else [Fraction(1)] * len(weights)
    return [w * total / sum(weights) for w in weights]


def bounded_shares(weights, low, high, total):
    """In proportion, but within bounds: what is outside is held there, one side at a time, and the rest shared anew."""
    if not any(weights):
        weights = [1] * len(weights)
    share, free = list(low), {i for i, w in enumerate(weights) if w > 0}
    while free:
        left = total - sum(s for i, s in enumerate(share) if i not in free)
        tried = dict(zip(sorted(free), proportional([weights[i] for i in sorted(free)], left), strict=True))
        over = sum((tried[i] - high[i] for i in free if tried[i] > high[i]), Fraction(0))
        under = sum((low[i] - tried[i] for i in free if tried[i] < low[i]), Fraction(0))
        if over == under == 0:
            for i in free:
                share[i] = tried[i]
            break
        for i in sorted(free):
            if over >= under and tried[i] > high[i]:
                share[i], _ = high[i], free.remove(i)
            elif under >= over and tried[i] < low[i]:
                share[i], _ = low[i], free.remove(i)
    rest = total - sum(share)
    idle = [i for i, w in enumerate(weights) if w == 0]
    if rest > 0 and idle:
        more = bounded_shares([1] * len(idle), [share[i] for i in idle], [high[i] for i in idle],
                              rest + sum(share[i] for i in idle))  # fmt: skip
        for i, value in zip(idle, more, strict=True):
            share[i] = value
    return share


def whole(shares, first, high, total):
    """Floors, and one more each in the order of ``first``, until the total is reached."""
    budget = [math.floor(s) for s in shares]
    for i in sorted(range(len(shares)), key=lambda i: (-first[i], i)):
        if sum(budget) < total and budget[i] < high[i]:
            budget[i] += 1
    return budget


@st.composite
def allocations(draw):
    c = draw(st.integers(1, 7))
    weights = draw(st.lists(st.sampled_from([0, 1]) | st.integers(0, 30), min_size=c, max_size=c))
    capacity = draw(st.none() | st.lists(st.integers(0, 40), min_size=c, max_size=c))
    return weights, draw(st.integers(0, 90)), capacity, draw(st.integers(0, 6))


@settings(max_examples=400)
@given(allocations(), st.sampled_from(EXACT))
def test_exact_rules_in_fractions(problem, rule):
    weights, total, capacity, minimum = problem
    high = [total if capacity is None else min(c, total) for c in capacity or weights]
    due, low, left = min(total, sum(high)), [], min(total, sum(high))
    for most in high:
        low.append(min(minimum, most, left))
        left -= low[-1]
    shares = bounded_shares(weights, low, high, due)
    used = weights if any(weights) else [1] * len(weights)
    first = used if rule == "floor_largest" else [s - math.floor(s) for s in shares]
    expected = whole(shares, first, high, due)
    options = {"rule": rule, "minimum": minimum, "capacity": None if capacity is None else torch.tensor(capacity)}
    budget = ck.allocate_budget(torch.tensor(weights), total, **options)
    assert budget.tolist() == expected
    assert sum(expected) == due


@settings(max_examples=300)
@given(
    st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=9),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 10**5),
    st.sampled_from(EXACT),
)
def test_totals_are_kept_whatever_the_weights(weights, total, capacity, rule):
    """From subnormal to huge ones, in any mixture."""
    budget = ck.allocate_budget(torch.tensor(weights), total, rule=rule, capacity=capacity).tolist()
    most = total if capacity is None else capacity
    assert sum(budget) == min(total, most * len(weights))
    assert all(0 <= b <= most for b in budget)
    if capacity is None:
        for b, share in zip(budget, proportional(weights, total), strict=True):
            assert abs(b - share) < 1 + 1e-5


@settings(max_examples=200)
@given(allocations())
def test_published_rules_as_published(problem):
    weights, total, capacity, minimum = problem
    shares = proportional(weights, total)
    limit = [10**9] * len(weights) if capacity is None else capacity
    tensor = None if capacity is None else torch.tensor(capacity)
    cut = lambda budget, low: [min(max(b, low), most) for b, most in zip(budget, limit, strict=True)]  # noqa: E731
    call = lambda rule: ck.allocate_budget(  # noqa: E731
        torch.tensor(weights), total, rule=rule, capacity=tensor, minimum=minimum
    ).tolist()
    assert call("int_clamp") == cut([math.floor(s) for s in shares], minimum)
    assert call("round_min1") == cut([round(s) for s in shares], max(minimum, 1))


def test_published_rules_lose_the_total_and_the_exact_ones_do_not():
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sums = {rule: int(ck.allocate_budget(weights, 143, rule=rule).sum()) for rule in RULES}
    assert sums == {"largest_remainder": 143, "floor_largest": 143, "int_clamp": 141, "round_min1": 145}


@pytest.mark.parametrize("rule", EXACT)
def test_weights_that_are_no_weights(rule):
    nan, inf = math.nan, math.inf
    call = lambda *weights, **options: ck.allocate_budget(torch.tensor(weights), 6, rule=rule, **options).tolist()  # noqa: E731
    assert call(0.0, 0.0, 0.0) == call(nan, -1.0, -inf) == [2, 2, 2]
    assert call(nan, 1.0, -3.0) == [0, 6, 0]
    assert call(inf, 5.0, inf) == [3, 0, 3]
    assert call(3e38, 3e38, 1e-45) == [3, 3, 0]
    assert call(0.0, 1.0, 0.0, capacity=4) == [1, 4, 1]  # those of weight 0, once the others are full
    assert call(1.0, 1.0, 1.0, capacity=1) == [1, 1, 1]
    assert call(1.0, 1.0, 9.0, minimum=3) == [3, 3, 0]  # no room for all minima


def test_shares_that_are_whole_are_so_in_floats():
    """0.3 * 6 / (0.1 + 0.2 + 0.3) is 2.9999999999999996."""
    weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    for rule in RULES:
        assert ck.allocate_budget(weights, 6, rule=rule).tolist() == [1, 2, 3]


def test_rows_are_independent_and_totals_may_differ():
    weights, totals = torch.rand(4, 3, 6), torch.randint(0, 99, (4, 3))
    capacity = torch.randint(0, 40, (4, 3, 6))
    for rule in RULES:
        budget = ck.allocate_budget(weights, totals, rule=rule, capacity=capacity)
        for i in range(4):
            for j in range(3):
                alone = ck.allocate_budget(weights[i, j], int(totals[i, j]), rule=rule, capacity=capacity[i, j])
                assert torch.equal(budget[i, j], alone)
    assert ck.allocate_budget(torch.empty(0, 3), 5).shape == (0, 3)
    alone = torch.tensor([1.0, 2.0])
    assert ck.allocate_budget(alone, torch.tensor(6), capacity=torch.tensor(5)).tolist() == [2, 4]


def top(scores, k, largest=True, mask=None):
    """Indices of the kept tokens of one segment, ascending."""
    worth = {i: -math.inf if math.isnan(x) else (x if largest else -x) for i, x in enumerate(scores)}
    valid = [i for i in worth if mask is None or mask[i]]
    return sorted(sorted(valid, key=lambda i: (-worth[i], i))[:k])


few = st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, -math.inf, math.nan]) | st.floats(-3, 3, width=16)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    scores = draw(st.lists(few, min_size=sum(lengths), max_size=sum(lengths)))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    keep = draw(st.lists(st.integers(0, 11), min_size=len(lengths), max_size=len(lengths)))
    return lengths, scores, mask, keep, draw(st.booleans())


@settings(max_examples=300)
@given(batches(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), st.data())
def test_packed_segments_in_plain_python(batch, dtype, data):
    lengths, scores, mask, keep, largest = batch
    scores = torch.tensor(scores, dtype=dtype)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = [slice(a, b) for a, b in itertools.pairwise(ends)]
    expected = [
        top(scores[row].tolist(), k, largest, None if mask is None else mask[row])
        for row, k in zip(rows, keep, strict=True)
    ]
    options = {
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        "mask": None if mask is None else torch.tensor(mask, dtype=torch.bool),
        "largest": largest,
    }
    kept = ck.segment_topk(scores, keep, **options)
    assert [kept[row].nonzero().flatten().tolist() for row in rows] == expected
    assert torch.equal(kept, ck.segment_topk(scores, torch.tensor(keep, dtype=torch.int32), **options))

    flat = [i for row in expected for i in row]
    total = data.draw(st.integers(0, len(scores)))
    indices, cu_kept = ck.segment_topk_indices(scores, keep, total, **options)
    assert indices.tolist() == (flat + [-1] * total)[:total]
    assert cu_kept.tolist() == [min(sum(map(len, expected[:s])), total) for s in range(len(lengths) + 1)]
    assert cu_kept.dtype == torch.int32


def test_rows_are_segments():
    scores, k = torch.randn(2, 3, 40), torch.randint(0, 50, (2, 3))
    kept = ck.segment_topk(scores, k)
    for i in range(2):
        for j in range(3):
            assert kept[i, j].nonzero().flatten().tolist() == top(scores[i, j].tolist(), int(k[i, j]))
    total = int(kept.sum())
    indices, cu_kept = ck.segment_topk_indices(scores, k, total)
    packed = ck.segment_topk_indices(scores.flatten(), k.flatten(), total, cu_seqlens=torch.arange(7) * 40)
    assert torch.equal(indices, packed[0])
    assert torch.equal(cu_kept, packed[1])
    assert torch.equal(
        kept.flatten().nonzero().flatten(), indices + 40 * torch.arange(6).repeat_interleave(cu_kept.diff())
    )
    for seven in (7, torch.tensor(7)):  # one segment, without axes
        assert ck.segment_topk(scores[0, 0], seven).sum() == 7
    assert ck.segment_topk_indices(scores[:0], k[:0], 0)[1].tolist() == [0]


def test_wrong_offsets_are_harmless():
    scores = torch.arange(6.0)
    for cu in ([4, 2, 9], [-3, 3, 2], [7, 7, 7], [2, 4, 5]):
        cu_seqlens = torch.tensor(cu, dtype=torch.int32)
        kept = ck.segment_topk(scores, [9, 9], cu_seqlens=cu_seqlens)
        indices, cu_kept = ck.segment_topk_indices(scores, [9, 9], 6, cu_seqlens=cu_seqlens)
        assert int(kept.sum()) == int(cu_kept[-1]) == int((indices >= 0).sum())
    assert ck.segment_topk(scores, [1, 1], cu_seqlens=torch.tensor([2, 4, 5])).tolist() == [False] * 3 + [True] * 2 + [
        False
    ]


def test_kept_tokens_are_gathered():
    features, scores = torch.randn(20, 3), torch.rand(20)
    cu_seqlens = torch.tensor([0, 8, 8, 20], dtype=torch.int32)
    keep = ck.allocate_budget(torch.tensor([1.0, 1.0, 2.0]), 9, capacity=cu_seqlens.diff())
    indices, cu_kept = ck.segment_topk_indices(scores, keep, 9, cu_seqlens=cu_seqlens)
    assert keep.tolist() == cu_kept.diff().tolist() == [3, 0, 6]
    gathered = ck.gather_tokens(indices, features, cu_seqlens=cu_seqlens, cu_kept=cu_kept)
    assert torch.equal(gathered, features[ck.segment_topk(scores, keep, cu_seqlens=cu_seqlens)])


def test_they_compile_and_read_no_value():
    """On fake tensors, which have none; open sizes stay open."""

    def call(scores, weights):
        keep = ck.allocate_budget(weights, 20, capacity=scores.shape[1], minimum=1)
        return ck.segment_topk(scores, keep), *ck.segment_topk_indices(scores, keep, 20)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for c in (4, 5):
        scores, weights = torch.randn(c, 30), torch.rand(c)
        for actual, expected in zip(compiled(scores, weights), call(scores, weights), strict=True):
            assert torch.equal(actual, expected)
    on_meta = call(torch.empty(4, 30, device="meta"), torch.empty(4, device="meta"))
    assert [tuple(t.shape) for t in on_meta] == [(4, 30), (20,), (5,)]


rand = torch.rand
WRONG = {
    "no tensor": (TypeError, "weights: expected", lambda: ck.allocate_budget([1.0], 3)),
    "a number": (ValueError, "weights: expected axes", lambda: ck.allocate_budget(torch.tensor(1.0), 3)),
    "no segment": (ValueError, "weights: expected at least one", lambda: ck.allocate_budget(torch.empty(2, 0), 3)),
    "bool": (TypeError, "weights: expected dtype", lambda: ck.allocate_budget(torch.tensor([True]), 3)),
    "rule": (ValueError, "rule: expected 'largest_remainder' or", lambda: ck.allocate_budget(rand(2), 3, rule="floor")),
    "total": (ValueError, "total: expected 0 <=", lambda: ck.allocate_budget(rand(2), -1)),
    "a ratio": (TypeError, "total: expected an int", lambda: ck.allocate_budget(rand(2), 0.5)),
    "totals": (ValueError, "total: expected an int, or", lambda: ck.allocate_budget(rand(2), torch.ones(3).int())),
    "capacity": (TypeError, "capacity: expected", lambda: ck.allocate_budget(rand(2), 3, capacity=rand(2))),
    "minimum": (ValueError, "minimum: expected", lambda: ck.allocate_budget(rand(2), 3, minimum=-1)),
    "integers": (TypeError, "scores: expected dtype", lambda: ck.segment_topk(torch.arange(4), 2)),
    "k": (ValueError, "k: expected ints >= 0", lambda: ck.segment_topk(rand(2, 4), [1, -1])),
    "ks": (ValueError, "k: expected one for each", lambda: ck.segment_topk(rand(2, 4), [1])),
    "k tensor": (ValueError, "k: expected an int, or", lambda: ck.segment_topk(rand(2, 4), torch.ones(1).long())),
    "of k": (ValueError, "k: expected device", lambda: ck.segment_topk(rand(4), torch.tensor(1, device="meta"))),
    "packed": (ValueError, "scores: expected 1", lambda: ck.segment_topk(rand(1, 4), 1, cu_seqlens=torch.arange(2))),
    "offsets": (TypeError, "cu_seqlens: expected dtype", lambda: ck.segment_topk(rand(4), 1, cu_seqlens=rand(2))),
    "mask": (ValueError, "mask: expected the shape", lambda: ck.segment_topk(rand(4), 1, mask=torch.ones(3).bool())),
    "largest": (TypeError, "largest: expected True", lambda: ck.segment_topk(rand(4), 1, largest=1)),
    "total_keep": (ValueError, "total_keep: expected", lambda: ck.segment_topk_indices(rand(4), 1, 5)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_errors_name_the_argument(what):
    error, match, call = WRONG[what]
    with pytest.raises(error, match=match):
        call()
