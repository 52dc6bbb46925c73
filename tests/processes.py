"""Processes that have imported torch alone, or nothing, and copies of the package for them to import.

Nothing of the package is imported here.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGE = Path(importlib.util.find_spec("condense_kernels").origin).parent
VERSION = re.search('"(.*)"', (PACKAGE / "_version.py").read_text())[1]
LIBRARY = PACKAGE / "_C.abi3.so"
ENVIRONMENT = runpy.run_path(PACKAGE / "_dispatch" / "environment.py")  # without the package, which tests import anew
HAS_LIBRARY = LIBRARY.is_file() and not ENVIRONMENT["read"]("CONDENSE_DISABLE_CPP")
# Without the working directory on the path. Python 3.10 has no such option, and finds there what was installed, too.
SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the compiled library was not built, or is switched off")

TORCH_IMPORTED = multiprocessing.get_context("forkserver")
TORCH_IMPORTED.set_forkserver_preload(["torch"])


def fresh(case, *args):
    """Run ``case`` in a process that has imported torch alone; what it raises is raised here."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=TORCH_IMPORTED) as pool:
        return pool.submit(case, *args).result()


def python(*arguments: str, interpreter: str = sys.executable, **environment: str) -> subprocess.CompletedProcess:
    """A process from its start to its end: where the import of torch or the exit matters."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run([interpreter, *arguments], capture_output=True, text=True, env=environment)


def copy_package(parent: Path, *, library: bytes | None = None, **edits: tuple[str, str]) -> Path:
    """Another installed copy: with the built library, or these bytes, and a text replaced in a file."""
    copy = parent / "condense_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if library is not None:
        (copy / LIBRARY.name).write_bytes(library)
    for file, (old, new) in edits.items():
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new))
    return copy


def vendored(engine: Path, **edits) -> Path:
    """A copy inside a serving engine: engine._vendor.condense_kernels."""
    for folder in (engine, engine / "_vendor"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    return copy_package(engine / "_vendor", **edits)


def import_from(folder: Path, name: str = "condense_kernels"):
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def condensed(package, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    features, scores = (torch.rand(shape, generator=generator).to(device) for shape in ((2, 12, 8), (2, 12)))
    return package.select_and_merge(features, scores, 3, 2, grid=(3, 4))


def gradient(op) -> torch.Tensor:
    features = torch.linspace(0, 1, 12 * 8).sin().reshape(1, 12, 8).requires_grad_()
    op(features, torch.ones(1, 12), 3, 2, grid=(3, 4))[0].square().sum().backward()
    return features.grad


def assert_works_like(package, other) -> None:
    """On CPU, in its fake and autograd kernels; that of a GPU is there."""
    for result, expected in zip(condensed(package), condensed(other), strict=True):
        assert torch.equal(result, expected)
    assert condensed(package, "meta").merged.shape == (2, 5, 8)
    assert torch.equal(gradient(package.select_and_merge), gradient(torch.ops.condense.select_and_merge))
    for op in package._dispatch.library.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"condense::{op}", "CUDA")
