"""One step of ToMe, against the same in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import condense_kernels as ck


def step(s, r, dst, protected=(), broken=()):
    """One image: which tokens stay, and into which of them each token goes."""
    n = len(s)
    src = [i for i in range(n) if i not in dst]

    def edge(i, j):
        if i in protected or j in protected:
            return -math.inf
        return -2.0 if i in broken or j in broken else s[i][j]

    best = {i: max(sorted(dst), key=lambda j: (edge(i, j), -j)) for i in src} if dst else {}
    merged = sorted(src, key=lambda i: (-edge(i, best[i]), i))[:r] if dst else []
    indices = [i for i in range(n) if i not in merged]
    return indices, [indices.index(best[i] if i in merged else i) for i in range(n)]


@st.composite
def problems(draw):
    n = draw(st.integers(1, 14))
    distinct = draw(st.integers(1, n))  # equal keys make ties
    keys = torch.randn(distinct, 4)[torch.tensor(draw(st.lists(st.integers(0, distinct - 1), min_size=n, max_size=n)))]
    for i in draw(st.lists(st.integers(0, n - 1), max_size=2)):
        keys[i] = draw(st.sampled_from([0.0, math.nan, math.inf]))
    dst = draw(st.none() | st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    return keys, draw(st.integers(0, n + 2)), dst, draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))


@settings(max_examples=400)
@given(problems())
def test_is_the_step_in_plain_python(problem):
    keys, r, dst, protected = problem
    n = len(keys)
    s, _, _, tier = ck.similarity(keys[None])
    broken = tier[0].nonzero().flatten().tolist()
    if dst is None:
        chosen = list(range(1, n, 2))
        r = min(r, (n - len(protected)) // 2, sum(i % 2 == 0 and i not in protected for i in range(n)))
        r = r if set(chosen) - set(protected) else 0
        matching = ck.bipartite_match(keys[None], problem[1], protected=protected)
    else:
        chosen = dst
        r = max(0, min(r, n - len(dst) - len(protected)))
        matching = ck.bipartite_match(
            keys[None], problem[1], dst=torch.tensor(dst, dtype=torch.int64), protected=protected
        )
    indices, assignment = step((s[0] + 0.0).tolist(), r, chosen, protected, broken)
    assert matching.indices[0].tolist() == indices
    assert matching.assignment[0].tolist() == assignment


def soft_matching(metric, r, class_token):
    """ToMe's formula for one image: rows of its merge and sizes, as (row of unm, or dst) by token."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[::2] @ metric[1::2].T
    if class_token:
        scores[0] = -math.inf
    strength, into = scores.max(dim=-1)
    order = strength.argsort(descending=True)
    return {int(2 * i): int(2 * into[i] + 1) for i in order[:r]}


@pytest.mark.parametrize(("n", "class_token"), [(24, False), (25, True), (197, True)])
def test_is_tomes_step(n, class_token):
    keys = torch.randn(1, n, 16)
    r = n // 3
    merged = soft_matching(keys[0], r, class_token)
    indices, assignment = ck.bipartite_match(keys, r, protected=int(class_token))
    assert indices.shape == (1, n - r)
    expected = [merged.get(i, i) for i in range(n)]
    assert indices[0][assignment[0]].tolist() == expected

    features, sizes = torch.randn(1, n, 5), torch.randint(1, 4, (1, n)).float()
    merged_features, new_sizes = ck.merge(features, sizes, indices, assignment)
    for row, token in enumerate(indices[0].tolist()):
        members = [i for i in range(n) if expected[i] == token]
        assert new_sizes[0, row] == sizes[0, members].sum()
        mean = (features[0, members] * sizes[0, members, None]).sum(0) / sizes[0, members].sum()
        torch.testing.assert_close(merged_features[0, row], mean)
    assert torch.equal(ck.unmerge(merged_features, assignment)[0, 0], merged_features[0, assignment[0, 0]])


def test_dst_of_each_image_and_of_all():
    """tomesd's: one token of each 2 x 2 window, drawn anew for each image, or the first one."""
    h, w = 6, 8
    keys = torch.randn(3, h * w, 7)
    windows = torch.arange(h * w).view(h // 2, 2, w // 2, 2).transpose(1, 2).reshape(-1, 4)
    drawn = windows.expand(3, -1, 4).gather(2, torch.randint(4, (3, len(windows), 1)))[..., 0]
    batch = ck.bipartite_match(keys, 20, dst=drawn)
    for b in range(3):
        alone = ck.bipartite_match(keys[b : b + 1], 20, dst=drawn[b])
        assert torch.equal(batch.indices[b], alone.indices[0])
        assert torch.equal(batch.assignment[b], alone.assignment[0])
        assert set(drawn[b].tolist()) <= set(batch.indices[b].tolist())
    assert (
        ck.bipartite_match(keys, 999, dst=windows[:, 0]).indices.tolist() == [windows[:, 0].sort().values.tolist()] * 3
    )


def test_r_is_cut():
    keys = torch.randn(2, 9, 3)
    assert [ck.bipartite_match(keys, r).indices.shape[1] for r in (0, 3, 4, 9)] == [9, 6, 5, 5]
    assert [ck.bipartite_match(keys, 9, protected=p).indices.shape[1] for p in (1, 2, 8, 9)] == [5, 6, 9, 9]
    assert ck.bipartite_match(keys, 5, dst=torch.empty(0, dtype=torch.int64)).indices.shape == (2, 9)
    assert ck.bipartite_match(keys[:, :1], 3).assignment.tolist() == [[0], [0]]
    assert ck.bipartite_match(keys[:0], 3).indices.shape == (0, 6)


def test_wrong_and_repeated_dst_are_harmless():
    keys = torch.randn(1, 8, 3)
    for dst in ([1, 1, 1], [-4, 99, 2]):
        indices, assignment = ck.bipartite_match(keys, 4, dst=torch.tensor(dst))
        assert indices.shape == (1, 4)
        assert int(assignment.min()) >= 0
        assert int(assignment.max()) < 4


def test_scores_are_fp32_whatever_the_dtype():
    keys = torch.randn(2, 33, 8).bfloat16()
    for dtype in (torch.float32, torch.float64):
        assert all(map(torch.equal, ck.bipartite_match(keys, 9), ck.bipartite_match(keys.to(dtype), 9)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ck.bipartite_match(keys.float(), 9).indices, ck.bipartite_match(keys, 9).indices)


def test_it_compiles_and_reads_no_value():
    def call(keys):
        return ck.bipartite_match(keys, 7, protected=1)

    keys = torch.randn(2, 21, 6)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(keys), call(keys)))
    assert ck.bipartite_match(torch.empty(2, 21, 6, device="meta"), 7, protected=[0, 5]).indices.shape == (2, 14)


WRONG = {
    "keys": (ValueError, "keys: expected 3 axes", lambda x: ck.bipartite_match(x[0], 2)),
    "r": (ValueError, "r: expected 0 <= r", lambda x: ck.bipartite_match(x, -1)),
    "a ratio": (TypeError, "r: expected an int", lambda x: ck.bipartite_match(x, 0.5)),
    "dst dtype": (TypeError, "dst: expected dtype int64", lambda x: ck.bipartite_match(x, 2, dst=torch.ones(8).bool())),
    "dst batch": (ValueError, "dst: expected shape", lambda x: ck.bipartite_match(x, 2, dst=torch.ones(2, 3).long())),
    "dst size": (ValueError, "dst: expected at most", lambda x: ck.bipartite_match(x, 2, dst=torch.arange(9))),
    "protected": (ValueError, "protected: expected 0 <=", lambda x: ck.bipartite_match(x, 2, protected=9)),
    "tokens": (ValueError, "protected: expected ints in", lambda x: ck.bipartite_match(x, 2, protected=[8])),
    "a mask": (TypeError, "protected: expected an int, or", lambda x: ck.bipartite_match(x, 2, protected=x[0])),
    "backend": (ValueError, "backend: expected one of", lambda x: ck.bipartite_match(x, 2, backend="cuda")),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_errors_name_the_argument(what):
    error, match, call = WRONG[what]
    with pytest.raises(error, match=match):
        call(torch.randn(1, 8, 3))
