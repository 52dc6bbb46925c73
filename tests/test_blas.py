"""The interpreted kernels and the library that numpy multiplies matrices with: they do not use it, whichever it is.

OpenBLAS rounds an element of a product by its place in the matrix, on some processors and not on others.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from condense_kernels import similarity
from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.testing import make_inputs

if not backends.triton_interprets():
    pytest.skip("of the interpreter alone: on a GPU nothing is numpy's", allow_module_level=True)

TESTS = Path(__file__).parent


@pytest.mark.parametrize("store_s", [True, False], ids=["stored", "streamed"])
def test_no_product_is_numpys(store_s, monkeypatch):
    """Which is why the processors below need no more than the tests that are there."""
    for name in ("matmul", "dot", "vdot", "inner", "tensordot", "einsum"):
        monkeypatch.setattr(numpy, name, lambda *_, name=name, **__: pytest.fail(f"numpy.{name} is called"))
    inputs = make_inputs("clustered", num_tokens=70, channels=8)
    with trying(FusedConfig, store_s=store_s):
        inputs.run("triton")
    similarity(inputs.features, backend="triton")


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("processor", ["Haswell", "SkylakeX", "Zen", "Prescott"])
def test_on_other_processors(processor):
    """OpenBLAS as it is there, by its own switch: symmetry, equal tokens, and s computed twice, to the bit."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OPENBLAS_CORETYPE"] = processor
    if subprocess.run([sys.executable, "-c", "import numpy"], env=environment).returncode != 0:
        pytest.skip(f"this processor lacks instructions of {processor}")
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", "triton and (similarity or stored)"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, TESTS / "test_similarity.py", TESTS / "test_triton.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
