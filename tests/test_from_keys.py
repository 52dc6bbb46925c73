"""greedy_select and assign from keys: the picks and rows of similarity and the operator on s, bit for bit."""

import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

import condense_kernels as ck
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.testing import make_inputs

PATHS = {"cpp": [{}], "reference": [{}], "triton": [{}, {"store_s": False}]}  # the Triton kernels' in turns, too


def problem(pick: random.Random, most: int, wide: bool = True, metrics=("cosine", "neg_l2")) -> tuple:
    """Keys, prior, k, mask, whether to scale, options: anything beside anything, drawn by torch's generator."""
    b, n, d = pick.choice([1, 2]), pick.choice([1, 5, 30, 70, most]), pick.choice([3, 8, 33])
    k = pick.choice([1, n // 8, n // 3, n])
    keys = torch.randn(b, n, d)
    if pick.random() < 0.4:  # in many copies
        keys = keys[:, torch.randint(0, max(1, n // 10), (n,))]
    if pick.random() < 0.2:
        keys[0, 0, 0] = float("nan")
    keys = keys.to(pick.choice([torch.float32, torch.bfloat16, *[torch.float64] * wide]))
    options = {"suppression": pick.choice([0.0, 0.5, 1.0]), "combine": pick.choice(["sub", "mul"])}
    rule = pick.random()
    if rule < 0.3:
        options["max_min"] = True
    elif rule < 0.5:
        options["first"] = torch.randint(0, n, (b,))
    elif rule < 0.7:
        options["first"] = torch.rand(b, n)
    if pick.random() < 0.4:
        options["candidates"] = torch.rand(b, n) > 0.3
    prior, mask = pick.choice([None, torch.rand(b, n)]), pick.choice([None, torch.rand(b, n) > 0.2])
    return keys, prior, k, mask, pick.random() < 0.5, pick.choice(metrics), options


def on_s(keys, prior, k, mask, scale_prior, metric, options, backend):
    s, sbar, _, tier = ck.similarity(keys, prior, mask, metric=metric, backend=backend)
    sbar = sbar if scale_prior else None
    return ck.greedy_select(s, prior, k, sbar=sbar, tier=tier, **options, backend=backend)


def from_keys(keys, prior, k, mask, scale_prior, metric, options, backend):
    given = {"mask": mask, "scale_prior": scale_prior, "metric": metric, **options}
    return ck.greedy_select(keys=keys, prior=prior, k=k, **given, backend=backend)


def check_rows(keys, order, mask, metric, pick, backend):
    n = keys.shape[1]
    where = pick.choice([{"spatial_weight": 0.0}, {"positions": torch.rand(n, 2), "spatial_weight": 0.5}])
    where["sources"] = pick.choice([None, torch.rand(keys.shape[:2]) > 0.3])
    s, _, _, tier = ck.similarity(keys, None, mask, metric=metric, backend=backend)
    expected = ck.assign(s, order, tier=tier, **where, backend=backend)
    found = ck.assign(keys=keys, indices=order, mask=mask, metric=metric, **where, backend=backend)
    assert torch.equal(found, expected), (where.keys(), metric)


@pytest.mark.parametrize("seed", range(12))
def test_picks_and_rows_are_those_on_s(seed, backend):
    if backend != "cpp" and seed >= 5:
        return  # the interpreter is slow
    pick = random.Random(seed)
    for _ in range(8 if backend == "cpp" else 1):
        path = PATHS[backend][-1 if seed % 3 else 0]
        metrics = ("cosine",) if path else ("cosine", "neg_l2")
        given = problem(pick, 600 if backend == "cpp" else 70, backend != "triton", metrics)
        order = on_s(*given, backend)
        with trying(FusedConfig, **path):
            assert torch.equal(from_keys(*given, backend), order), given
            check_rows(given[0], order, given[3], given[5], pick, backend)


def test_rounds_that_end_after_few_picks_go_on_with_all_of_s(cpp):
    """Five directions of 600 equal tokens: here every pick ends a round; and what the rounds are meant for."""
    for keys, k in (
        (torch.eye(5).repeat_interleave(600, dim=0)[torch.randperm(3000)], 60),
        (torch.randn(1500, 16), 200),
        (make_inputs("clustered", batch=1, num_tokens=1500).features[0].float(), 100),
    ):
        for combine in ("sub", "mul"):
            given = keys[None], torch.rand(1, len(keys)), k, None, False, "cosine", {"combine": combine}
            assert torch.equal(from_keys(*given, cpp), on_s(*given, cpp))


@pytest.mark.parametrize("metric", ["cosine", "neg_l2"])
@pytest.mark.parametrize("size", [149, 201, 301])
def test_all_of_s_after_rounds_of_an_odd_number_of_tokens(size, metric, cpp):
    """Three groups, their halves, quarters, ..., each equal tokens: rounds end early, and s fills no cache lines."""
    group, within = torch.arange(3 * size) // size, torch.arange(3 * size) % size
    cells = [group * 2**level + within * 2**level // size for level in range(5)]
    keys = torch.cat([torch.nn.functional.one_hot(cell).float() for cell in cells], dim=1)
    given = keys[None], (1 - group / 192)[None], size // 5, None, False, metric, {}
    assert torch.equal(from_keys(*given, cpp), on_s(*given, cpp))


def test_images_whose_s_is_stored_by_nobody(cpp):
    """More tokens than CONDENSE_STORED_TOKENS, which is read but once."""
    program = """
import random, sys, torch
sys.path.insert(0, "tests")
from test_from_keys import from_keys, on_s, problem
for seed in range(25):
    torch.manual_seed(seed)
    given = problem(random.Random(seed), 600)
    assert torch.equal(from_keys(*given, "cpp"), on_s(*given, "cpp")), (seed, given)
"""
    env = {**os.environ, "CONDENSE_STORED_TOKENS": "20", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def farthest(keys, k) -> list[int]:
    """Farthest points in numpy fp64, from the token whose nearest neighbour is farthest."""
    x = keys.astype("float64")
    distance = numpy.sqrt(((x[:, None] - x[None]) ** 2).sum(axis=-1))
    alone = distance + numpy.diag([numpy.inf] * len(x))
    kept = [int(alone.min(axis=1).argmax())]
    while len(kept) < k:
        nearest = distance[kept].min(axis=0)
        nearest[kept] = -1
        kept.append(int(nearest.argmax()))
    return kept


def test_farthest_points(backend):
    keys = 100 + torch.randn(1, 40, 6)
    order = ck.greedy_select(keys=keys, k=12, first="max_min", metric="neg_l2", backend=backend)
    assert order[0].tolist() == farthest(keys[0].numpy(), 12)


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_batch_nor_threads_nor_k_matter(threads, backend):
    n = 1300 if backend == "cpp" else 40
    keys, prior = torch.randn(3, n, 12), torch.rand(3, n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = ck.greedy_select(keys=keys, prior=prior, k=n // 8, scale_prior=False, backend=backend)
        alone = [ck.greedy_select(keys=x[None], prior=p[None], k=n // 9, scale_prior=False, backend=backend) for x, p in zip(keys, prior, strict=True)]  # fmt: skip  # noqa: E501
        assert torch.equal(whole[:, : n // 9], torch.cat(alone))  # the first picks are those of fewer
        rows = ck.assign(keys=keys, indices=whole, spatial_weight=0.0, backend=backend)
        again = ck.assign(keys=keys.mT.contiguous().mT[1:2], indices=whole[1:2], spatial_weight=0.0, backend=backend)
        assert torch.equal(rows[1:2], again)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(6))
def test_packed(seed, backend):
    """An empty segment, one of a token, one that keeps all: each as alone."""
    if backend != "cpp" and seed >= 3:
        return
    pick = random.Random(seed)
    torch.manual_seed(seed)
    path = PATHS[backend][-1 if seed % 3 else 0]
    metric = "cosine" if path else pick.choice(["cosine", "neg_l2"])
    lengths = [9, 0, 1, 70, 13] if backend != "cpp" else [9, 0, 1, 700, 130]
    kept = [3, 0, 1, lengths[3] // 10, 13]
    cu_seqlens, cu_kept = (torch.tensor([0, *numpy.cumsum(x)], dtype=torch.int32) for x in (lengths, kept))
    t, total = sum(lengths), sum(kept)
    keys, mask, sources, positions = torch.randn(t, 6), torch.rand(t) > 0.2, torch.rand(t) > 0.5, torch.rand(t, 2)
    prior = pick.choice([None, torch.rand(t)])
    options = {"suppression": 0.5, "combine": pick.choice(["sub", "mul"]), "scale_prior": pick.random() < 0.5}
    options |= {"max_min": pick.random() < 0.5, "metric": metric, "backend": backend}
    with trying(FusedConfig, **path):
        order = ck.greedy_select_varlen(None, prior, cu_seqlens, cu_kept, total, max(lengths), keys=keys, mask=mask, **options)  # fmt: skip  # noqa: E501
        where = {"keys": keys, "mask": mask, "positions": positions, "sources": sources, "metric": metric}
        rows = ck.assign_varlen(None, order, cu_seqlens, cu_kept, max(lengths), **where, backend=backend)
    for i, n in enumerate(lengths):
        tokens, picks = slice(*cu_seqlens[i : i + 2].tolist()), slice(*cu_kept[i : i + 2].tolist())
        if n == 0:
            continue
        its = {"keys": keys[None, tokens], "mask": mask[None, tokens]}
        its_prior = None if prior is None else prior[None, tokens]
        expected = ck.greedy_select(None, its_prior, kept[i], **its, **options)
        assert torch.equal(order[None, picks], expected)
        its |= {"positions": positions[None, tokens], "sources": sources[None, tokens], "metric": metric}
        assert torch.equal(rows[None, tokens], ck.assign(None, order[None, picks], **its, backend=backend))


def test_wrong_offsets_are_harmless(backend):
    keys, prior = torch.randn(23, 5), torch.rand(23)
    for offsets in ([0, 30, -5, 23], [7, 3, 3, 9], [0, 0, 0, 0], [23, 23, 0, 99]):
        cu = torch.tensor(offsets, dtype=torch.int32)
        for path in PATHS[backend]:
            with trying(FusedConfig, **path):
                order = ck.greedy_select_varlen(None, prior, cu, cu // 2, 9, 12, keys=keys, backend=backend)
                assert ((order >= -1) & (order < 23)).all()
                rows = ck.assign_varlen(None, order.clamp(max=0), cu, cu // 2, 12, keys=keys, spatial_weight=0.0, backend=backend)  # fmt: skip  # noqa: E501
                assert ((rows >= -1) & (rows < 9)).all()


def test_what_does_not_go_together():
    s, keys, prior = torch.rand(1, 4, 4), torch.rand(1, 4, 3), torch.rand(1, 4)
    kept, tier, mask = torch.tensor([[0, 2]]), torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 4, dtype=torch.bool)
    for call in (
        lambda **given: ck.greedy_select(prior=prior, k=2, **given),
        lambda **given: ck.assign(indices=kept, spatial_weight=0.0, **given),
    ):
        with pytest.raises(ValueError, match=r"^s, keys: expected one of the two, got neither\."):
            call()
        with pytest.raises(ValueError, match=r"^s, keys: expected one of the two, got both\."):
            call(s=s, keys=keys)
        with pytest.raises(ValueError, match=r"^tier: expected None beside keys, .*got a tensor\. Remedy: "):
            call(keys=keys, tier=tier)
        with pytest.raises(ValueError, match=r"^mask: expected None beside s, .*got a tensor\. Remedy: "):
            call(s=s, mask=mask)
        with pytest.raises(ValueError, match=r"^metric: expected 'cosine' or 'neg_l2', got 'dot'"):
            call(keys=keys, metric="dot")
    with pytest.raises(ValueError, match=r"^scale_prior: expected True beside s, .*got False"):
        ck.greedy_select(s, prior, 2, scale_prior=False)


def test_the_debug_switch(backend):
    keys, prior = torch.rand(1, 4, 3), torch.rand(1, 4)
    keys[0, 2, 1] = float("nan")
    with ck.debug():
        with pytest.raises(ValueError, match=r"^keys: expected finite numbers, got nan at image 0, token 2, channel 1"):
            ck.greedy_select(keys=keys, prior=prior, k=2, backend=backend)
        with pytest.raises(ValueError, match=r"^indices: expected distinct tokens, got token 1 again"):
            ck.assign(keys=keys.nan_to_num(), indices=torch.tensor([[1, 1]]), spatial_weight=0.0, backend=backend)
