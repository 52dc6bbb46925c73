"""benchmarks/gpu.sh and what it runs, as far as a machine without a GPU shows: no more than one step is ever lost."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import checks
import harness
import pytest
import rows
import shapes
import torch
from fill_cache import PARTS
from processes import SAFE_PATH

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def bash(script: str, **environment: str) -> subprocess.CompletedProcess:
    script = f"set -uo pipefail\n. {ROOT}/benchmarks/steps.sh\n{script}\nsummary"
    environment = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process where triton compiles, as on a GPU."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *SAFE_PATH, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# Steps


def test_all_right():
    done = bash('step 5 "first" echo one; left_out "second" "no GPU"; step 5 "third" echo two')
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert said.index("== first") < said.index("one") < said.index("left out: no GPU") < said.index("two")
    assert re.search(r"fine +first\n +left out: no GPU +second\n.* fine +third\n.* of 10; all of it right\n$", said)


def test_a_step_that_hangs_is_cut_off_alone():
    """Also one that does not listen, and with what it has started; what they printed is kept."""
    hangs = """bash -c 'trap "" TERM; echo begun; sleep 50 & sleep 50; sleep 50'"""
    done = bash(f'step 1 "hangs" {hangs}; step 9 "next" echo after')
    assert done.returncode == 1
    assert "begun" in done.stdout and "after" in done.stdout
    assert re.search(r"CUT OFF after 1 s +hangs\n.* fine +next\n.* of 10; not all of it right\n$", done.stdout)


@pytest.mark.parametrize("status", [1, 3, 137])
def test_a_step_that_fails_does_not_stop_the_others(status):
    done = bash(f'step 9 "fails" bash -c "exit {status}"; step 9 "next" echo after')
    assert done.returncode == 1 and "after" in done.stdout
    assert re.search(rf"FAILED, exit status {status} +fails\n.* fine +next\n", done.stdout)


def test_what_a_step_leaves_the_next_may_use():
    done = bash('step 30 "quick" true; step 1 "slow" sleep 2')
    assert done.returncode == 0, done.stdout


def test_steps_beside_each_other():
    """They take as long as one, and each has a verdict of its own."""
    many = 'start 40 "a" bash -c "sleep 1; echo of a"; start 2 "b" sleep 50; start 40 "c" bash -c "exit 5"; finish'
    done = bash(f'{many}; start 9 "again" echo more; finish')
    assert done.returncode == 1
    verdicts = r"fine +a\n.* CUT OFF after [12] s +b\n.* FAILED, exit status 5 +c\n.* fine +again\n.* of 49;"
    assert re.search(verdicts, done.stdout), done.stdout
    assert "of a" in done.stdout and "more" in done.stdout


# The script


def budgets() -> int:
    """Of all steps; those that are started beside each other share the largest."""
    total, together = 0, 0
    text = SCRIPT.read_text().replace("for op in similarity greedy_select assign merge merge_backward; do\n", "5 x ")
    for line in text.splitlines():
        if found := re.search(r"^ *(5 x )? *step (\d+) ", line):
            total += int(found[2]) * (5 if found[1] else 1)
        elif found := re.search(r"^ *start (\d+) ", line):
            together = max(together, int(found[1]))
        elif line == "finish":
            total, together = total + together, 0
    return total


def test_the_budgets_add_up():
    assert f"to {budgets()} s" in SCRIPT.read_text() and budgets() < 540


FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *find_spec*) [[ "$*" != *matplotlib* ]] ;;
  *torch.cuda.is_available*) echo 1 ;;
  *) echo "${TRITON_INSTRUMENTATION_MODE:-}${PYTORCH_NO_CUDA_MEMORY_CACHING:-}|$*" >> "$CALLS"
     [[ "$*" != *bench_merge.py* ]] ;;
esac
"""
FAKE_SANITIZER = """#!/bin/bash
echo "sanitizer $*" >> "$CALLS"
while [[ $1 != *python* ]]; do shift; done
"$@"
"""


@pytest.fixture
def scripted(tmp_path) -> tuple[subprocess.CompletedProcess, list[str]]:
    """All steps as on a GPU, with a Python that takes down what it is asked to run and fails once."""
    for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", FAKE_SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    command = ["bash", str(SCRIPT), str(tmp_path / "results"), str(tmp_path / "python")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done, (tmp_path / "calls").read_text().splitlines()


def test_every_step_is_started_in_its_order(scripted):
    done, calls = scripted
    assert done.returncode == 1 and "FAILED, exit status 1" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("  fine ") == 20 and "left out: no matplotlib" in done.stdout
    order = ("fill_cache.py", "checks.py", "select_and_merge.py", "variants.py", "targets.py", "test_gpu.py")
    places = [next(i for i, call in enumerate(calls) if word in call) for word in order]
    watched = [i for i, call in enumerate(calls) if call.startswith("sanitizer")]
    assert places == sorted(places) and places[-1] < min(watched)
    for call in calls:
        for file in re.findall(r"\b(?:tests|benchmarks)/\S+\.py", call):
            assert (ROOT / file).exists(), file
        named = re.search(r"--shapes ([\w -]+?) --", call)
        assert not named or set(named[1].split()) <= set(shapes.ALL), call


def test_its_pytest_collects():
    """With its options, and without the plugins that a machine with a GPU may lack."""
    options = re.search(r'^pytest=\("\$python" (.*)\)$', SCRIPT.read_text(), re.MULTILINE)[1].split()
    script = SCRIPT.read_text().replace("\\\n", "")  # a command is a line
    files = re.search(r'"\$\{pytest\[@\]\}" (tests/.*)$', script, re.MULTILINE)[1].split()
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, *options, "--collect-only", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "test_gpu.py::test_launches" in done.stdout and len(files) == 4


def test_sanitizers(scripted):
    _, calls = scripted
    tools = {call.split("--tool ")[1].split()[0]: call for call in calls if call.startswith("sanitizer")}
    assert set(tools) == {"memcheck", "racecheck", "synccheck", "initcheck"}
    for tool, call in tools.items():
        assert "--report-api-errors no" in call and "--error-exitcode 1" in call
        assert call.endswith("--without graph packed varlen" if tool == "initcheck" else "--without graph")
    assert sum(call.startswith("1|") for call in calls) == 4  # without PyTorch's cache, in which all memory is valid
    assert sum(call.startswith("gsan|") and call.endswith("--gsan") for call in calls) == 1


def test_checks_that_are_left_out_exist():
    names = [check.name for check in checks.checks("cpu")]
    for word in ("packed", "varlen"):
        assert any(word in name for name in names)
    assert '"from a graph"' in Path(checks.__file__).read_text()  # is there on a GPU alone


# What it runs


def test_what_is_filled_in_is_what_is_looked_for(tmp_path):
    """On Triton's own way to a launch, against a driver that launches nothing: each kernel is in the cache."""
    code = """
import fill_cache, stub_driver, torch
from inspect_kernels import TARGETS
from condense_kernels.testing import make_inputs
inputs = make_inputs("masked", num_tokens=30, dtype=torch.bfloat16)
stages = inputs.run_stages("reference")
odd = torch.nn.functional.pad(inputs.features, (1, 0))[..., 1:]  # neither its address nor its rows are multiples of 16
merge = torch.ops.condense.merge
calls = [lambda x=x: merge(x, inputs.scores, stages.condensed.indices, stages.condensed.assignment)
         for x in (inputs.features, odd, inputs.features.float())]
with fill_cache.recording(TARGETS["sm_90"]) as jobs:
    for call in calls * 2:
        call()
assert len(jobs) == 3, jobs
assert [error for *_, error in fill_cache.fill(jobs, TARGETS["sm_90"], 2)] == [""] * 3
with stub_driver.device(90) as counts:
    for call in calls:
        call()
print(counts.launches, [compilation.cached for compilation in counts.compilations])
"""
    done = python(code, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'merge_kernel': 3} [True, True, True]"


@pytest.mark.slow
def test_all_that_is_launched_is_filled_in():
    """Every benchmark's and check's own specialisations, as a launch would look them up."""
    code = """
import fill_cache, stub_driver, triton
from inspect_kernels import TARGETS
from triton.runtime.cache import get_cache_key

def key(source, target, options):
    backend = triton.compiler.make_backend(target)
    return get_cache_key(source, backend, backend.parse_options(dict(options)), {})

jobs, failed = fill_cache.jobs_of(fill_cache.PARTS, TARGETS["sm_90"])
filled = {key(job.source, TARGETS["sm_90"], job.options) for job in jobs}
looked_for = set()

def take_down(kernel, k, signature, device, constants, options, attributes, warmup):
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    looked_for.add(key(source, TARGETS["sm_90"], options.__dict__))
    compiled = kernel.device_caches[device][0][k] = stub_driver.Uncompiled(name=kernel.__name__)
    return compiled

with stub_driver.device(90, compiling=False):
    triton.JITFunction._do_compile = take_down
    for part in fill_cache.PARTS.values():
        for label, call in part():
            with fill_cache.OnTriton():
                call()
print(failed, len(looked_for) > 50, filled == looked_for)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "True", "True"], done.stdout


def test_every_part_of_the_filling_has_calls():
    for name, part in PARTS.items():
        assert len(list(part())) > 10, name


KILLED = """
import os, signal, sys
import inspect_kernels, variants
left = 3
def inspect_compiled(*_):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return dict.fromkeys(("instructions", "registers", "spills", "shared", "pick_loop", "barriers"), 7)
inspect_kernels.inspect_compiled = inspect_compiled
variants.interpreted = lambda: {"default": True}
variants.main()
"""

KILLED_ON_A_GPU = """
import os, signal
import torch, variants
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "a GPU"
variants.harness.busy = lambda: None
variants.inputs = lambda *_: (None, None)
left = 40
class Captured:
    def __init__(self, features, scores, num_anchors, num_background, changes):
        if changes and "num_stages" in changes[0][1]:
            raise RuntimeError("out of shared memory")
        self.out = [torch.ones(3)]
    def microseconds(self):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 12.5
variants.Captured = Captured
variants.main()
"""


@pytest.mark.parametrize("code", [KILLED, KILLED_ON_A_GPU], ids=["compiled", "timed"])
def test_rows_of_variants_survive_a_kill(code, tmp_path):
    path = tmp_path / "variants.csv"
    done = python(code, "--csv", str(path))
    assert done.returncode == -9, done.stderr
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert all(row["shape"] == "N=576 K=192" and row["commit"] for row in found)
    if code == KILLED:
        assert [row["registers"] for row in found] == ["7"] * 3
    else:
        failed = [row for row in found if row["error"]]
        assert [row["variant"] for row in failed] == ["similarity: 2 stages", "similarity: 4 stages"]
        assert all("out of shared memory" in row["error"] and not row["median_us"] for row in failed)
        rest = [row for row in found if not row["error"]]
        assert {(row["rounds"], row["median_us"], row["same_bits"]) for row in rest} == {("1", "12.5", "True")}


def test_a_file_of_rows_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "rows.csv"
    rows.replace(path, [{"a": 1.23456, "b": "x"}])
    assert path.read_text() == "a,b\n1.235,x\n"
    with pytest.raises(ValueError, match="c"):
        rows.replace(path, [{"a": 1, "b": "y"}, {"c": 2}])
    assert path.read_text() == "a,b\n1.235,x\n"


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def raises(_):
        raise AssertionError("other bits")

    monkeypatch.setattr(sys, "argv", ["checks.py", "--without", "third"])
    three = [
        checks.Check(name, lambda: None, hold) for name, hold in (("first", raises), ("second", id), ("third", raises))
    ]
    monkeypatch.setattr(checks, "checks", lambda: three)
    monkeypatch.setattr(checks, "require_kernels", lambda: None)
    with pytest.raises(SystemExit, match="1 checks failed"):
        checks.main()
    said = capsys.readouterr().out
    assert re.search(r"first .* WRONG: AssertionError: other bits\nsecond .* right\n$", said)


def test_checks_find_a_wrong_result():
    for check in checks.checks("cpu"):
        if check.name in ("random, 130 tokens", "merge, operator", "packed", "not stored"):
            result = check.call()
            check.hold(result)
            first = result[0]
            wrong = first if isinstance(first, torch.Tensor) else first[0]
            wrong.view(-1)[0] += 1
            with pytest.raises(AssertionError):
                check.hold(result)


def test_a_shape_that_cannot_be_timed_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    for name in ("tiny-a", "tiny-b"):
        monkeypatch.setitem(shapes.ALL, name, shapes.Shape(1, (8, 9), 32, 12, 6))

    def sides(shape, features, scores):
        if shape is shapes.ALL["tiny-a"]:
            raise RuntimeError("out of memory")
        return {"sum": harness.Side(features.sum, lambda _: None)}

    path = tmp_path / "rows.csv"
    monkeypatch.setattr(harness, "ceilings", lambda *_: harness.Ceilings(1.0, 1.0))
    monkeypatch.setattr(sys, "argv", ["x", "--shapes", "tiny-a", "tiny-b", "--rounds", "2", "--csv", str(path)])
    monkeypatch.setattr(harness, "require_kernels", lambda: None)
    with pytest.raises(SystemExit, match="not timed: tiny-a"):
        harness.main("merge", sides, ())
    assert "merge, tiny-a: RuntimeError: out of memory" in capsys.readouterr().out
    assert [row.shape for row in rows.read_path(path)] == ["tiny-b"]
