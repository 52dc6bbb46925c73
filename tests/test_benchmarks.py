"""The benchmark suite on tiny shapes: what it refuses, what its baselines compute, what its rows say. No times."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import baselines
import bench_calls
import gates
import harness
import memory
import pytest
import report
import rows
import shapes
import targets
import torch

from condense_kernels._dispatch import library
from condense_kernels._dispatch.declaration import OPERATORS as DECLARED

OPERATORS = (
    "attention_scores",
    "similarity",
    "greedy_select",
    "coverage_select",
    "dpp_select",
    "dpc_knn",
    "assign",
    "gather_merge",
    "merge",
    "select_and_merge",
)
TINY = {f"tiny-{batch}": shapes.Shape(batch, (8, 9), 32, 12, 6) for batch in (1, 3)}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    for name, shape in TINY.items():
        monkeypatch.setitem(shapes.ALL, name, shape)


def sides_of(op: str) -> harness.Sides:
    return importlib.import_module(f"bench_{op}").sides


def built(op: str, name: str) -> dict[str, harness.Side]:
    return sides_of(op)(shapes.ALL[name], *shapes.make(shapes.ALL[name]))


# Shapes and inputs


def test_named_shapes():
    for shape in shapes.ALL.values():
        assert 0 < shape.num_background < shape.kept < shape.num_tokens
    assert shapes.SHAPES["onevision"].num_tokens == 729
    assert (shapes.SHAPES["long-65536"].num_tokens, shapes.SHAPES["long-65536"].kept) == (65536, 1024)
    for op in OPERATORS:
        module = importlib.import_module(f"bench_{op}")
        assert set(module.SHAPES) <= set(shapes.ALL)


def test_inputs_are_like_a_vision_towers():
    shape = shapes.keeping(2, (12, 12), 16, channels=256)
    features, scores = shapes.make(shape)
    assert torch.equal(features, shapes.make(shape)[0])
    assert not torch.equal(features, shapes.make(shape, seed=1)[0])
    assert bool((features != 0).all()) and bool((scores > 0).all())
    z = torch.nn.functional.normalize(features, dim=-1)
    s = z @ z.mT
    neighbours, far = s[:, torch.arange(143), torch.arange(1, 144)].mean(), s[:, :12, -12:].mean()
    assert 0.2 < far < neighbours < 0.9
    assert bool((scores.amax(dim=1) > 5 * scores.mean(dim=1)).all())


# Baselines: each is checked against its definition when a case is built


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_side_passes_its_gate(op, name):
    for side in built(op, name).values():
        side.check(side.call())


def test_compiled_loop_picks_the_same(monkeypatch):
    """The loop around the compiled graph, which here is left uncompiled: 1, 16, 17 and 40 picks."""
    monkeypatch.setattr(baselines, "compiled_picks", baselines.more_picks)
    features, scores = shapes.make(TINY["tiny-3"])
    s = baselines.matmul(baselines.unit(features))
    for k in (1, 16, 17, 40):
        expected = baselines.greedy_running_maximum(s, scores, k)
        assert torch.equal(baselines.greedy_compiled(s, scores, k), expected)
        assert torch.equal(baselines.greedy_compiled(s[0], scores[0], k), expected[0])


def test_blocked_matmul():
    features, _ = shapes.make(TINY["tiny-1"])
    z = baselines.unit(features[0])
    block = torch.zeros(24, 72)
    assert torch.equal(baselines.blocked_matmul(z, block), block)
    torch.testing.assert_close(block, z[48:] @ z.T)


GREEDY = [("greedy_select", name) for name in ("DivPrune", "CDPruner", "IDPruner", "plain loop")]


@pytest.mark.parametrize(("op", "name"), [*GREEDY, ("coverage_select", "SCOPE")])
@pytest.mark.parametrize("pick", [0, 7])
def test_a_wrong_pick_is_found(op, name, pick):
    side = built(op, "tiny-1")[name]
    order = side.call()
    order[0, [pick, 11]] = order[0, [11, pick]]
    with pytest.raises(gates.Mismatch, match=f"order, pick {pick}"):
        side.check(order)


def off(tensor: torch.Tensor) -> torch.Tensor:
    """Another legal-looking value in the last image's last entry."""
    result = tensor.clone()
    result.view(-1)[-1] += 1e-3 * result.abs().amax() if result.is_floating_point() else -1
    return result


@pytest.mark.parametrize(
    ("op", "side", "outputs"),
    [
        ("attention_scores", "ours fp32", ("scores",)),
        ("similarity", "ours fp32", ("s", "sbar", "g", "tier")),
        ("greedy_select", "ours", ("order",)),
        ("coverage_select", "ours", ("order",)),
        ("assign", "ours", ("assignment",)),
        ("merge", "ours fp32", ("merged", "mass")),
        ("select_and_merge", "ours fp32", ("merged", "indices", "assignment", "mass")),
        ("select_and_merge", "VisionZip", ("merged", "indices", "rows")),
        ("select_and_merge", "top-k", ("features", "indices")),
    ],
)
def test_a_wrong_output_is_found_and_named(op, side, outputs):
    side = built(op, "tiny-3")[side]
    result = side.call()
    parts = result if isinstance(result, tuple) else (result,)
    for i, output in enumerate(outputs):
        wrong = tuple(off(part) if j == i else part for j, part in enumerate(parts))
        with pytest.raises(gates.Mismatch, match=output):
            side.check(wrong if isinstance(result, tuple) else wrong[0])


# The harness


def with_a_wrong_side(shape, features, scores):
    sides = sides_of("merge")(shape, features, scores)
    right = sides["ours fp32"]
    return sides | {"wrong": right._replace(call=lambda: (right.call()[0] * 1.01, right.call()[1]))}


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "seconds", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(gates.Mismatch, match=r"merge, tiny-1, side 'wrong': merged: .* Nothing is timed"):
        harness.Case("merge", "tiny-1", with_a_wrong_side, device="cpu")


@pytest.fixture
def measured(monkeypatch) -> list[rows.Row]:
    monkeypatch.setattr(harness, "ceilings", lambda *_: harness.Ceilings(1.6e11, 2e10, 2e11))
    case = harness.Case("merge", "tiny-3", sides_of("merge"), rounds=5, device="cpu")
    for _ in range(case.rounds):
        case.round()
    return case.rows()


def test_rows_say_what_was_measured_and_where(measured):
    assert [row.side for row in measured] == ["index_add", "one-hot matmul", "ours fp32", "ours bf16"]
    for row in measured:
        assert (row.op, row.shape, row.mode, row.B, row.N, row.D, row.K) == ("merge", "tiny-3", "call", 3, 72, 32, 18)
        assert row.calls == 5 and 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.gflops == pytest.approx(row.gflop / row.median_ms * 1e3)
        assert (row.torch, row.threads) == (torch.__version__, torch.get_num_threads())
        assert row.device and row.commit and row.date
        assert (row.ceiling_gflops, row.ceiling_gbs, row.peak_gflops) == (160, 20, 200)
        assert row.instruction_set == ("" if library.cpp_unavailable() else torch.ops.condense.cpu_capability())
    assert measured[0].x_base == 1
    assert measured[2].x_base == pytest.approx(measured[2].median_ms / measured[0].median_ms)


def test_a_slow_side_is_called_less_often_but_spread_out(monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 0.0)
    case = harness.Case("merge", "tiny-1", sides_of("merge"), rounds=9, device="cpu")
    calls = []
    for _ in range(9):
        case.round()
        calls.append(len(case.contenders["index_add", "call"].times))
    assert calls == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_peak_memory(monkeypatch):
    """The plain loop keeps S, N x N; taken in a process of its own."""
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads Linux's /proc")
    found = harness.peak_extra("select_and_merge", "llava15-64", ["plain loop"], {})
    assert 576 * 576 * 4 < found["plain loop"] < 30e6
    assert memory.peak_bytes() > 1e6


# Rows, comparison, targets, pictures


def test_rows_survive_a_file_and_replace_their_namesakes(measured, tmp_path):
    path = tmp_path / "rows.csv"
    rows.write(path, measured)
    again = rows.read_path(path)
    assert [row.key for row in again] == [row.key for row in measured]
    assert again[0].median_ms == pytest.approx(measured[0].median_ms, rel=1e-3)
    assert again[0].peak_extra_mb is None and again[0].commit == measured[0].commit
    rows.write(path, [dataclasses.replace(measured[1], median_ms=7.0)])
    assert [row.median_ms == 7.0 for row in rows.read_path(path)] == [False, True, False, False]


def test_files_older_than_a_column(measured, tmp_path):
    path, new = tmp_path / "rows.csv", ("peak_gflops", "instruction_set")
    lines = [dataclasses.asdict(row) for row in measured]
    rows.replace(path, [{name: value for name, value in line.items() if name not in new} for line in lines])
    assert {(row.peak_gflops, row.instruction_set) for row in rows.read_path(path)} == {(None, "")}
    assert rows.read_path(path)[0].ceiling_gflops == 160


@pytest.fixture
def repository(tmp_path, monkeypatch):
    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(rows, "ROOT", tmp_path)
    git("init")
    return git


def test_compare_with_a_commit(measured, tmp_path, repository, monkeypatch):
    path = tmp_path / "results.csv"
    rows.write(path, [dataclasses.replace(row, median_ms=2 * row.median_ms) for row in measured])
    repository("add", "results.csv")
    repository("commit", "-m", "rows")
    before = rows.read_commit("HEAD", path)
    console = harness.Console(width=160)
    with console.capture() as captured:
        console.print(rows.comparison_table(measured, before, "HEAD"))
    assert captured.get().count("-50%") == 4
    with pytest.raises(ValueError, match="expected a commit that has other.csv, got 'HEAD'"):
        rows.read_commit("HEAD", tmp_path / "other.csv")


def test_a_changed_tree_is_dirty_unless_only_results_changed(tmp_path, repository):
    for name in ("code.py", "benchmarks/results/a.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    repository("add", ".")
    repository("commit", "-m", "first")
    (tmp_path / "benchmarks/results/a.csv").write_text("2")
    assert not rows.commit().endswith("+dirty")
    (tmp_path / "code.py").write_text("2")
    assert rows.commit().endswith("+dirty")


def synthetic(measured, **changes) -> rows.Row:
    return dataclasses.replace(measured[0], **changes)


def test_targets(measured):
    """Against matmul 4 ms: 2.6 is within 0.70; with a roofline of 1.7 ms, 1/6 of a loop of 6 ms cannot be met."""
    at = {"op": "select_and_merge", "shape": "llava15-192", "B": 1, "N": 576, "D": 1024, "device": "cpu avx512f"}
    found = [
        synthetic(measured, side=side, median_ms=ms, **at)
        for side, ms in (("ours fp32", 2.6), ("ours bf16", 2.9), ("matmul", 4.0), ("plain loop", 6.0))
    ]
    verdicts = {m.target.case: m for m in targets.judge(found)}
    assert verdicts["fp32, 1 x 576, K = 192 / matmul"].met
    missed = verdicts["bf16 / fp32 matmul, without AMX"]
    assert not missed.met and "2.80 ms are allowed, 2.90 ms taken, 59% of peak" in missed.target.reason(missed)
    impossible = verdicts["576, K = 192 / plain loop"]
    assert not impossible.met and "so it cannot be met" in impossible.target.reason(impossible)
    assert "bf16 / fp32 matmul, with AMX" not in verdicts and "8 x 576, K = 64 / bmm" not in verdicts
    amx = [dataclasses.replace(row, device="cpu amx_bf16") for row in found]
    assert {m.target.case: m.met for m in targets.judge(amx)}["bf16 / fp32 matmul, with AMX"] is False


@pytest.mark.parametrize(("milliseconds", "met"), [(1.99, True), (2.01, False)])
def test_a_share_of_the_peak(measured, milliseconds, met):
    """1 x 576 x 1024 at 200 GFLOP/s: 1.702 ms, 85 % of 2.002; nothing is judged where no peak was measured."""
    at = {"op": "similarity", "shape": "llava15-192", "side": "ours fp32", "B": 1, "N": 576, "D": 1024}
    row = synthetic(measured, median_ms=milliseconds, **at)
    (verdict,) = targets.judge([row])
    assert targets.floor_ms(row) == pytest.approx(576 * 577 * 1024 / 200e6)
    assert verdict.target.case == "similarity, 576, fp32" and verdict.met == met
    assert targets.shown(verdict)[1] == "at least 85%" and targets.shown(verdict)[0].endswith("% of peak")
    assert targets.judge([dataclasses.replace(row, peak_gflops=None)]) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_peak(cpp, dtype):
    """What the multiply-adds are counted as, by the width of a vector, and that a rate comes of it."""
    capability = torch.ops.condense.cpu_capability()
    lanes = {"default": 4, "avx2": 8}.get(capability, 16)
    chains = 24 if capability.startswith(("avx512", "amx")) else 12
    expected = {8: chains * lanes // 2, 4: chains * lanes, 2: 2 * chains * lanes if capability == "avx512_bf16" else 0}
    spin = harness.spinner()
    for size, count in expected.items():
        assert (spin(size, 0), spin(size, 3)) == (0, 3 * count)
    assert harness.peak(dtype, seconds=1e-4, repeats=1) > 0


def test_graph_and_eager_goals_of_a_gpu_are_apart(measured):
    """50 us more for 128 picks more; an eager call is held to its own goal alone."""
    at = {"op": "select_and_merge", "side": "ours bf16", "B": 1, "N": 576, "D": 1024, "device": "a GPU"}
    found = [
        synthetic(measured, shape=f"llava15-{k}", K=k, mode=mode, median_ms=ms, **at)
        for k, mode, ms in ((64, "graph", 0.039), (192, "graph", 0.089), (64, "plain", 0.091))
    ]
    verdicts = {m.target.case: (m.value, m.met) for m in targets.judge(found)}
    assert verdicts == {
        "1 x 576, K = 64, graph": (pytest.approx(39), True),
        "1 x 576, K = 192, graph": (pytest.approx(89), True),
        "1 x 576, K = 192 - 64, graph": (pytest.approx(50 / 128), True),
        "1 x 576, K = 64, eager": (pytest.approx(91), False),
    }
    assert len(targets.judge(found[:1])) == 1  # no cost of a pick from one row
    there = set(importlib.import_module("bench_select_and_merge").SHAPES)
    assert {name for target in targets.GPU for name in (target.shape, target.less) if name} <= there


def test_targets_name_what_exists():
    for target in targets.CPU:
        sides = built(target.op, "overhead" if target.shape == "overhead" else "tiny-1")
        if not target.shape.startswith("long"):
            assert target.side in sides
            assert not target.over or target.over in sides
        assert target.shape in importlib.import_module(f"bench_{target.op}").SHAPES


def test_pictures(measured, tmp_path):
    plot = pytest.importorskip("plot", reason="needs matplotlib", exc_type=ImportError)
    sweeps = [
        dataclasses.replace(
            measured[0], op="select_and_merge", shape=name, side=side, B=shape.batch, N=shape.num_tokens, K=shape.kept
        )
        for sweep in shapes.SWEEPS.values()
        for name, shape in sweep.items()
        for side in ("matmul", "ours fp32")
    ]
    point = dataclasses.replace(measured[2], shape="llava15-192")
    older = dataclasses.replace(point, peak_gflops=None, instruction_set="")
    plot.draw([older], tmp_path)
    plot.draw([*sweeps, point], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"speed_n.png", "speed_k.png", "speed_b.png", "roofline.png"}


def test_the_table_of_the_page(measured):
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.replaced(page, measured)
    assert "old" not in new and new.startswith("before\n") and new.endswith("after\n")
    assert report.replaced(new, measured) == new


def test_make_bench(tmp_path, cpp):
    """One case of the real thing: tables and targets are printed, rows written."""
    path = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "--benchmark-quiet",
        "-q",
        "-k",
        "assign and llava15",
    ]
    options = ["--rounds", "2", "--csv", str(path), "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command + options, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "assign, llava15-192: 1 x 576 x 1024, K = 192" in done.stdout and "targets" in done.stdout
    sides = ("torch", "ours", "ours, with similarity", "ours, from keys")
    assert {(row.op, row.side) for row in rows.read_path(path)} == {("assign", side) for side in sides}


def test_every_declared_operator_is_timed_as_a_call():
    """And checked before: a result that is not the reference's is not timed."""

    shape, inputs = shapes.ALL["overhead"], shapes.make(shapes.ALL["overhead"])
    built = bench_calls.sides(shape, *inputs)
    assert {name.partition(",")[0] for name in built} == set(DECLARED) - {"select_and_merge_out", "workspace_bytes"}
    for side in built.values():
        side.check(side.call())
    right = built["similarity, function"].call()
    with pytest.raises(gates.Mismatch, match="sbar"):
        built["similarity, function"].check((right[0], right[1] * 1.001, *right[2:]))
