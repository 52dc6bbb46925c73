"""The diff in CONTRIBUTING.md that adds an operator: as it stands, it applies, builds, passes, and comes off again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIFF = re.search(r"^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)[1]
PARTS = ("condense_kernels", "csrc", "tests", "benchmarks", "docs", "setup.py", "pyproject.toml", "README.md")


def run(*command: str, cwd: Path, input: str | None = None, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "CONDENSE_BUILD_EXT": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, input=input)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled(*command: str, cwd: Path) -> str:
    """As make ptx-check; the engine and what else is built once is shared."""
    built = ROOT / "build" / "ptx"
    built.mkdir(parents=True, exist_ok=True)
    (cwd / "build").mkdir(exist_ok=True)
    (cwd / "build" / "ptx").symlink_to(built)
    path = {"PYTHONPATH": os.pathsep.join(map(str, (cwd, cwd / "tests", cwd / "benchmarks")))}
    return run(*command, "-p", "ptx.plugin", cwd=cwd, **path)


def sources(checkout: Path) -> dict[str, bytes]:
    files = (path for part in PARTS for path in [checkout / part, *(checkout / part).rglob("*")])
    return {str(path.relative_to(checkout)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.slow(minutes=2)  # compiles the library
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_operator_that_contributing_adds(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part, **({"ignore": ignore} if copy is shutil.copytree else {}))
    before = sources(tmp_path)
    run("git", "apply", "-", cwd=tmp_path, input=DIFF)
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tmp_path)
    tests = ("tests/test_operators.py", "tests/test_weigh.py", "tests/test_docs.py")
    test = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "weigh")
    report = run(*test, *tests, cwd=tmp_path)
    passed = re.search(r"(\d+) passed", report)
    assert passed and int(passed[1]) > 30 and "skipped" not in report, report
    report = compiled(*test, *tests, cwd=tmp_path)
    assert re.search(r"(\d+) passed", report) and " launches of weigh_kernel\n" in report, report
    run("git", "apply", "--reverse", "-", cwd=tmp_path, input=DIFF)
    for built in [*tmp_path.rglob("__pycache__"), *tmp_path.rglob("*.so")]:
        shutil.rmtree(built) if built.is_dir() else built.unlink()
    assert sources(tmp_path) == before
