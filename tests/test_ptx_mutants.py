"""What the checks of compiled kernels notice, of kernels that were changed: docs/checking.md tells who survives."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ptx import engine

TESTS = pathlib.Path(__file__).parent
# The least of what has to be caught, as a share. A moved edge of a loop is often none: the tile behind it is masked.
CAUGHT = {"wait": 1.0, "barrier": 0.75, "index": 0.5, "predicate": 0.5, "compare": 0.05}


@pytest.mark.slow
@pytest.mark.skipif(engine.compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_most_mutants_are_caught(target, tmp_path):
    """A sample that is always the same: other changes than what it was measured on move the shares a little."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "benchmarks"), *sys.path])
    command = [sys.executable, "-m", "ptx.mutants", "--target", target, "--sample", "40", "--json", "outcomes.json"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    print(done.stdout)  # the survivors, and the seed
    for kind, least in CAUGHT.items():
        caught = [bool(one["caught"]) for one in outcomes if one["kind"] == kind]
        assert caught and sum(caught) >= least * len(caught), kind
