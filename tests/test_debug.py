"""The debug switch: each value that a call would have let pass is an error that names image and token."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import condense_kernels as ck

NAN, INF = float("nan"), float("inf")
B, N, D, K = 2, 6, 4, 3
GRID = (2, 3)
CU = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 1, 2], [0, 0, 1])]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    features, scores = torch.rand(B, N, D), torch.rand(B, N)
    s, sbar, _, tier = ck.similarity(features, scores)
    kept = ck.select_and_merge(features, scores, 2, 1, grid=GRID)
    return {
        "features": features,
        "scores": scores,
        "keys": torch.rand(B, N, 2),
        "positions": torch.rand(B, N, 2),
        "mask": torch.ones(B, N, dtype=torch.bool),
        "s": s,
        "sbar": sbar,
        "tier": tier,
        "indices": kept.indices,
        "assignment": kept.assignment,
        "total_keep": 3,
        "max_seqlen": 4,
    } | dict(zip(("cu_seqlens", "cu_anchors", "cu_background"), (cu.clone() for cu in CU), strict=True))


CALLS = {
    "similarity": lambda t: ck.similarity(t["features"], t["scores"], t["mask"]),
    "greedy_select": lambda t: ck.greedy_select(t["s"], t["scores"], 3, sbar=t["sbar"], tier=t["tier"]),
    "assign": lambda t: ck.assign(t["s"], t["indices"], tier=t["tier"], positions=t["positions"]),
    "merge": lambda t: ck.merge(t["features"], t["scores"], t["indices"], t["assignment"]),
    "select_and_merge": lambda t: ck.select_and_merge(
        t["features"], t["scores"], 2, 1, keys=t["keys"], positions=t["positions"], mask=t["mask"]
    ),
    "varlen": lambda t: ck.select_and_merge_varlen(
        t["features"].view(-1, D)[:6], t["scores"].view(-1)[:6], t["cu_seqlens"], t["cu_anchors"], t["cu_background"],
        t["total_keep"], t["max_seqlen"], keys=t["keys"].view(-1, 2)[:6], positions=t["positions"].view(-1, 2)[:6],
    ),
}  # fmt: skip

# call, argument, where, what is written there, what the message must say
CASES = [
    ("similarity", "features", (1, 2, 3), NAN, "keys: expected finite numbers, got nan at image 1, token 2, channel 3"),
    ("similarity", "scores", (0, 5), -0.5, "scores: expected numbers >= 0, got -0.5 at image 0, token 5"),
    ("greedy_select", "s", (1, 0, 4), INF, "s: expected finite numbers, got inf at image 1, token 0, token 4"),
    ("greedy_select", "scores", (1, 3), NAN, "prior: expected finite numbers, got nan at image 1, token 3"),
    ("greedy_select", "sbar", (1,), NAN, "sbar: expected finite numbers, got nan at image 1"),
    ("greedy_select", "tier", (0, 1), 7, "tier: expected values in [0, 4), got 7 at image 0, token 1"),
    ("assign", "indices", (1, 2), 6, "indices: expected values in [-1, 6), got 6 at image 1, row 2"),
    ("assign", "positions", (0, 4, 1), NAN, "positions: expected finite numbers, got nan at image 0, token 4, axis 1"),
    ("merge", "features", (0, 1, 0), INF, "features: expected finite numbers, got inf at image 0, token 1, channel 0"),
    (
        "merge",
        "scores",
        (slice(None), 2),
        -1.0,
        "scores: expected numbers >= 0, got -1.0 at image 0, token 2 and 1 more",
    ),
    ("merge", "assignment", (1, 4), 3, "assignment: expected rows in [-1, 3), got 3 at image 1, token 4"),
    ("select_and_merge", "features", (1, 5, 2), NAN, "features: expected finite numbers, got nan at image 1, token 5"),
    ("select_and_merge", "scores", (1, 5), INF, "scores: expected finite numbers, got inf at image 1, token 5"),
    ("select_and_merge", "scores", (1, 5), -2.0, "scores: expected numbers >= 0, got -2.0 at image 1, token 5"),
    (
        "select_and_merge",
        "keys",
        (0, 0, 1),
        NAN,
        "keys: expected finite numbers, got nan at image 0, token 0, channel 1",
    ),
    (
        "select_and_merge",
        "mask",
        (1, slice(2, None)),
        False,
        "mask: expected at least K = 3 valid tokens an image, got 2",
    ),
    ("varlen", "features", (0, 3, 1), NAN, "features: expected finite numbers, got nan at image 1, token 1, channel 1"),
    ("varlen", "features", (0, 2, 1), INF, "features: expected finite numbers, got inf at image 1, token 0, channel 1"),
    ("varlen", "scores", (0, 1), -1.0, "scores: expected numbers >= 0, got -1.0 at image 0, token 1"),
    ("varlen", "cu_seqlens", (1,), 7, "cu_seqlens: expected running sums, got 6 at offset 2"),
    ("varlen", "cu_seqlens", (2,), 5, "cu_seqlens: expected running sums from 0 up to T = 6, got 0 ... 5"),
    ("varlen", "cu_anchors", (0,), 1, "cu_anchors: expected running sums from 0, got 1 ... 2"),
    ("varlen", "cu_seqlens", (1,), 1, "cu_seqlens: expected at most max_seqlen = 4, got 5 at image 1"),
    ("varlen", "cu_background", (slice(1, None),), 2, "cu_anchors + cu_background: expected at most the tokens of a"),
    ("varlen", "cu_anchors", (2,), 3, "total_keep: expected 4, as the offsets have it, got 3"),
]


@pytest.mark.parametrize(("call", "argument", "where", "value", "message"), CASES)
def test_each_value_is_found_and_named(call, argument, where, value, message):
    wrong = tensors()
    wrong[argument] = wrong[argument].clone()
    wrong[argument][where] = value
    with ck.debug(), pytest.raises(ValueError, match="^" + re.escape(message) + ".*Remedy: "):
        CALLS[call](wrong)


@pytest.mark.parametrize("call", CALLS)
def test_good_values_pass_and_the_result_is_the_same(call):
    with ck.debug():
        looked = CALLS[call](tensors())
    for a, b in zip(looked, CALLS[call](tensors()), strict=True):
        assert torch.equal(a, b)


def test_repeated_indices():
    good = tensors()
    good["indices"][1] = torch.tensor([0, 4, 0])
    with (
        ck.debug(),
        pytest.raises(ValueError, match="^indices: expected distinct tokens, got token 0 again at image 1, row 2"),
    ):
        CALLS["merge"](good)
    good["indices"][1] = torch.tensor([0, -1, -1])  # two rows that do not exist are no repetition
    good["assignment"][1] = 0
    with ck.debug():
        CALLS["merge"](good)


def test_padding_may_hold_anything():
    t = tensors()
    t["mask"][0, 5] = False
    t["features"][0, 5], t["keys"][0, 5], t["scores"][0, 5], t["positions"][0, 5] = NAN, INF, -1.0, NAN
    t["assignment"][0, 5], t["tier"][0, 5] = -1, 2
    t["indices"][0] = torch.tensor([0, 1, 2])
    with ck.debug():
        CALLS["select_and_merge"](t)
        CALLS["assign"](t)
        CALLS["merge"](t)
        CALLS["greedy_select"](t)


def test_results_of_the_caller_are_no_way_around_it():
    t = tensors()
    t["scores"][1, 2] = -1.0
    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    with ck.debug(), pytest.raises(ValueError, match="^scores: .* at image 1, token 2"):
        ck.select_and_merge(t["features"], t["scores"], 2, 1, grid=GRID, workspace=workspace)


def test_tensors_without_values_pass():
    t = tensors()
    with ck.debug():
        for mode in (torch.device("meta"), FakeTensorMode()):
            with mode:
                features, scores = torch.empty(B, N, D), torch.empty(B, N)
                assert ck.select_and_merge(features, scores, 2, 1, grid=GRID).merged.shape == (B, K, D)
        ck.merge(*(t[name].to("meta") for name in ("features", "scores", "indices", "assignment")))


def test_it_is_off_by_default_and_can_be_switched_within():
    t = tensors()
    t["scores"][0, 0] = -1.0
    CALLS["merge"](t)
    with ck.debug():
        with ck.debug(False):
            CALLS["merge"](t)
        with pytest.raises(ValueError, match="^scores"):
            CALLS["merge"](t)
    CALLS["merge"](t)


def test_values_inside_autograd_and_vmap_are_seen_too():
    t = tensors()
    t["scores"][1, 2] = -1.0
    features = t["features"].clone().requires_grad_()
    with ck.debug(), pytest.raises(ValueError, match="^scores: .* at image 1, token 2"):
        ck.select_and_merge(features, t["scores"], 2, 1, grid=GRID)
    with ck.debug(), pytest.raises(ValueError, match="^scores: .* at image 1, token 2"):  # image of the folded batch
        torch.func.vmap(lambda f, s: ck.select_and_merge(f[None], s[None], 2, 1, grid=GRID))(t["features"], t["scores"])


def test_compiled_code_is_not_disturbed():
    t = tensors()
    call = lambda f, s: ck.select_and_merge(f, s, 2, 1, grid=GRID).merged  # noqa: E731
    with ck.debug():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(t["features"], t["scores"])
    assert torch.equal(compiled, call(t["features"], t["scores"]))


@pytest.mark.parametrize(("value", "raises"), [("1", True), ("on", True), ("0", False), ("", False)])
def test_environment(value, raises):
    code = "import torch, condense_kernels as ck; ck.merge(*map(torch.tensor, ([[[1.]]], [[-1.]], [[0]], [[0]])))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CONDENSE_DEBUG": value}
    )
    assert ("ValueError: scores: expected numbers >= 0, got -1.0 at image 0, token 0" in done.stderr) == raises
    assert (done.returncode != 0) == raises, done.stderr
