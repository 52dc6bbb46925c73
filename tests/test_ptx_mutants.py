"""What the checks of compiled kernels notice, of kernels that were changed: docs/checking.md tells who survives."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ptx import engine

TESTS = pathlib.Path(__file__).parent
# The least of those that are reached, as a share. Of moved edges none: what lies behind one is masked, as a rule.
CAUGHT = {"wait": 0.85, "barrier": 0.8, "index": 0.6, "predicate": 0.5}


@pytest.mark.slow(minutes=1)
@pytest.mark.skipif(engine.compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_most_mutants_are_caught(target, tmp_path):
    """A sample that is always the same: other changes than what it was measured on move the shares a little."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "benchmarks"), *sys.path])
    command = [sys.executable, "-m", "ptx.mutants", "--target", target, "--sample", "20", "--json", "outcomes.json"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    print(done.stdout)  # the survivors, and the seed
    for kind, least in CAUGHT.items():
        ends = [one["outcome"] for one in outcomes if one["kind"] == kind and one["outcome"] != "not reached"]
        assert ends and ends.count("survives") <= (1 - least) * len(ends), kind
