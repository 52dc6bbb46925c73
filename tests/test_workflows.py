"""The hosted workflows, as far as they show here: what they call exists, what they name agrees, what they run runs."""

import importlib.util
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import yaml
from processes import ROOT, needs_library

GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(GITHUB.glob("workflows/*.yml"))}
JOBS = {f"{name}, {job}": what for name, flow in WORKFLOWS.items() for job, what in flow["jobs"].items()}
STEPS = [(name, step) for name, job in JOBS.items() for step in job.get("steps", [])]
SCRIPTS = [(name, step["run"]) for name, step in STEPS if "run" in step]
PROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
OLDEST_TORCH = re.search(r'"torch>=([\d.]+)"', PROJECT)[1]


def cells(job: dict) -> list[dict]:
    """The jobs of a matrix; an include that adds to a cell is none of ours."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    include = matrix.pop("include", [])
    product = [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]
    return [cell for cell in product if cell] + include


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    called = {
        word
        for _, script in SCRIPTS
        for words in re.findall(r"^\s*make ((?:-C \w+ )?[a-z -]*)", script, re.MULTILINE)
        for word in re.sub(r"-C \w+", "", words).split()
    }
    called |= {cell["target"] for job in JOBS.values() for cell in cells(job) if "target" in cell}
    assert {"lint", "test", "wheels", "sdist", "ptx-check", "compat", "bench-against"} <= called
    assert called <= targets


def test_versions_agree_with_what_the_package_says():
    tested = cells(JOBS["tests, tests"])
    pythons = [cell["python"] for cell in tested]
    assert f'requires-python = ">={min(pythons, key=lambda v: int(v.strip("t").split(".")[1]))}"' in PROJECT
    assert {cell["python"] for cell in cells(JOBS["wheels, installed"])} <= set(pythons)
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert not named or set(named) == {version.strip("t") for version in pythons}
    oldest = [cell for cell in tested if cell.get("torch")]
    assert [(cell["python"], cell["torch"]) for cell in oldest] == [("3.10", f"torch=={OLDEST_TORCH}.0")]


def test_python_is_given_no_option_that_the_oldest_lacks():
    """3.10 has no -P, and says its usage instead."""
    named = re.compile(r'(python[\d.]* |")-[P]\b')
    texts = {*GITHUB.rglob("*.yml"), *GITHUB.rglob("*.py"), *(ROOT / "tests").rglob("*.py")}
    texts |= {ROOT / "pyproject.toml", ROOT / "Makefile"}
    texts -= {ROOT / "tests" / "processes.py"}  # which asks for the version
    assert [path for path in texts if named.search(path.read_text())] == []


def test_actions_are_pinned_and_each_at_one_commit():
    pins: dict[str, set[str]] = {}
    for path in GITHUB.glob("workflows/*.yml"):
        for used in re.findall(r"uses: (\S+.*)", path.read_text()):
            if not used.startswith("./"):
                action, pin = used.split("@")
                assert re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin), used
                pins.setdefault(action, set()).add(pin)
    assert "actions/checkout" in pins
    assert all(len(found) == 1 for found in pins.values()), pins


def test_rights_are_the_least():
    assert all(flow["permissions"] in ({}, {"contents": "read"}) for flow in WORKFLOWS.values())
    extra = {
        name: {right for right, level in job["permissions"].items() if level == "write"}
        for name, job in JOBS.items()
        if "permissions" in job
    }
    assert {name: rights for name, rights in extra.items() if rights} == {
        "release, publish": {"id-token"},
        "release, announce": {"contents"},
        "docs, deploy": {"pages", "id-token"},
        "benchmarks-comment, comment": {"pull-requests"},
    }
    for path in GITHUB.rglob("*.yml"):
        assert "secrets." not in path.read_text(), path
        assert "pull_request_target" not in path.read_text(), path
    for name, job in JOBS.items():
        assert "timeout-minutes" in job or "uses" in job, name
    for name, step in STEPS:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, name


def test_a_release_is_built_by_the_workflow_that_is_tested():
    release = WORKFLOWS["release"]["jobs"]
    assert release["build"]["uses"] == "./.github/workflows/wheels.yml"
    assert release["build"]["needs"] == "notes"
    assert release["publish"]["needs"] == "build"
    assert release["publish"]["environment"] == "pypi"
    assert all("checkout" not in step.get("uses", "") for step in release["publish"]["steps"])


@pytest.mark.parametrize(("name", "script"), SCRIPTS)
def test_scripts_parse_and_take_nothing_by_pasting(name, script):
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "${{" not in script, name  # what a title or a branch says would be run


def test_cibuildwheel_builds_as_make_wheel_does():
    section = PROJECT[PROJECT.index("[tool.cibuildwheel]") : PROJECT.index("[tool.pytest.ini_options]")]
    assert re.findall(r'build = "(\S+)"', section) == ["cp310-manylinux_*"]  # py3-none: one wheel serves all
    assert f"torch=={OLDEST_TORCH}.0" in section
    assert re.search(r"setuptools>=[\d.]+", PROJECT)[0] in section[section.index("before-build") :]
    repair = re.search(r'repair-wheel-command = "auditwheel repair (.*) --wheel-dir', section)[1]
    recipe = re.search(r"auditwheel repair (.*?)--wheel-dir", MAKEFILE, re.DOTALL)[1].replace("\\\n", "")
    assert repair.split() == recipe.replace("$$", "$").split()
    assert "--no-isolation" in section
    assert f"torch=={OLDEST_TORCH}.0" == emulated.TORCH
    assert emulated.REPAIR.split()[:3] == ["repair", "--plat", "manylinux_2_28_aarch64"]
    for path in re.findall(r"\{project\}/(tests/\S+\.py)", section):
        assert (ROOT / path).is_file()


# The scripts that they run


RELEASE = load(GITHUB / "scripts" / "release_notes.py")
OLDER = "## [0.1.0] - 2026-11-21\n\n- B.\n"
CHANGELOG = f"# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-27\n\n### Added\n\n- A.\n\n{OLDER}"


def tree(tmp_path: Path, version: str, changelog: str) -> Path:
    (tmp_path / "condense_kernels").mkdir()
    (tmp_path / "condense_kernels" / "_version.py").write_text(f'__version__ = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    return tmp_path


def test_notes_are_the_section_of_the_version(tmp_path):
    assert RELEASE.notes("v0.2.0", tree(tmp_path, "0.2.0", CHANGELOG)) == "### Added\n\n- A."


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "message"),
    [
        ("v0.2.1", "0.2.0", CHANGELOG, "expected the tag v0.2.0"),
        ("0.2.0", "0.2.0", CHANGELOG, "expected the tag v0.2.0"),
        ("v0.3.0", "0.3.0", CHANGELOG, "one section .0.3.0., got 0"),
        ("v0.1.0", "0.1.0", CHANGELOG, "newest section, got 0.2.0 above it"),
        ("v0.2.0", "0.2.0", CHANGELOG.replace("- A.\n", ""), "expected entries below .0.2.0., got none"),
        ("v0.2.0", "0.2.0", CHANGELOG.replace(" - 2026-11-27", ""), "got the date ''"),
        ("v0.2.0", "0.2.0", CHANGELOG.replace("11-27", "13-27"), "got the date '2026-13-27'"),
    ],
)
def test_what_is_no_release_is_refused(tmp_path, tag, version, changelog, message):
    with pytest.raises(ValueError, match=message):
        RELEASE.notes(tag, tree(tmp_path, version, changelog))


def smoke(expected: str, **environment: str) -> subprocess.CompletedProcess:
    script = str(GITHUB / "scripts" / "smoke.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, script, expected], env=environment, capture_output=True, text=True)


@needs_library
def test_smoke_tells_a_library_from_none():
    assert smoke("cpp").returncode == 0
    assert smoke("reference", CONDENSE_DISABLE_CPP="1").returncode == 0
    assert "expected cpp, got reference" in smoke("cpp", CONDENSE_DISABLE_CPP="1").stderr


AGAINST = load(ROOT / "benchmarks" / "against.py")


def measured(side: str = "ours") -> dict:
    origin = dict.fromkeys(AGAINST.ORIGIN, "x")
    names = {"op": "merge", "shape": "a", "mode": "call"}
    rows = [{**names, "side": side, "base": [1.0, 1.0], "head": [1.5, 1.4]}]
    rows += [{**names, "side": f"torch {i}", "base": [1.0, 1.0], "head": [1.1, 1.1]} for i in range(9)]
    return {"origin": {"base": origin, "head": origin}, "rows": rows}


def test_a_change_is_told_above_the_noise_alone():
    found = measured()
    assert "1 slower, 0 faster, 0 within the noise of 10%" in AGAINST.table(AGAINST.checked(json.dumps(found)))
    found["rows"][0]["head"] = [1.5, 0.9]  # the rounds do not agree
    assert "0 slower, 0 faster, 1 within" in AGAINST.table(AGAINST.checked(json.dumps(found)))


def noisy(draws: random.Random, factor: float) -> dict:
    """45 rows of ours whose time changes by a factor, 35 baselines; each has a noise of its own, around 5 percent."""
    found = measured()
    found["rows"] = []
    for i in range(80):
        spread = 0.05 * math.exp(draws.gauss(0, 0.7))
        base, head = ([math.exp(draws.gauss(0, spread)) for _ in range(4)] for _ in range(2))
        ours = i < 45
        head = [time * factor if ours else time for time in head]
        names = {"op": "merge", "shape": "a", "mode": "call", "side": f"{'ours' if ours else 'torch'} {i}"}
        found["rows"].append({**names, "base": base, "head": head})
    return found


def test_two_equal_trees_raise_no_alarm():
    draws = random.Random(0)
    alarms = sum("Nothing changed." not in AGAINST.table(noisy(draws, 1.0)) for _ in range(100))
    assert alarms <= 10
    assert re.search(r"Times: 4\d slower, 0 faster", AGAINST.table(noisy(draws, 1.6)))


BENCH = """
import pathlib, subprocess, sys

def test_of_the_tree(benchmark, pytestconfig):
    benchmark(int)
    script = pathlib.Path(__file__).with_name("memory.py")
    rows = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
    pytestconfig.getoption("csv").write_text(rows)
"""
OPTION = """
import pathlib

def pytest_addoption(parser):
    parser.addoption("--csv", type=pathlib.Path)
"""


def test_a_benchmark_finds_what_is_beside_it(tmp_path, monkeypatch):
    """Also where safe paths are asked for: harness.py runs memory.py, which imports shapes.py."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of a worker, which times nothing
        monkeypatch.delenv(name)
    (tmp_path / "benchmarks").mkdir()
    files = {
        "conftest.py": OPTION,
        "test_bench.py": BENCH,
        "memory.py": "import shapes",
        "shapes.py": "print('op,median_ms\\nmerge,1')",
    }
    for name, text in files.items():
        (tmp_path / "benchmarks" / name).write_text(text)
    assert AGAINST.run(tmp_path, tmp_path / "rows.csv", []) == [{"op": "merge", "median_ms": "1"}]


@pytest.mark.parametrize("side", ["[link](x)", "<img>", "@somebody", "a\nb", "`", 3])
def test_what_is_posted_is_names_and_numbers(side):
    with pytest.raises(ValueError, match="expected a name"):
        AGAINST.checked(json.dumps(measured(side)))
