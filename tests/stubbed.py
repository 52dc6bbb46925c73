"""What cases on the stub of the CUDA driver (benchmarks/stub_driver.py) share. Each runs in a process of its own, in
which Triton compiles; nothing of the package is imported before."""

import os
import shutil

import pytest
import torch
from processes import needs_library

MARKS = [
    needs_library,  # it stands behind what is put in the place of its kernels
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton would find the driver of the GPU"),
    pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler for the stub"),
]


def on_stub(test):
    for mark in MARKS:
        test = mark(test)
    return test


def without_interpreter():
    """The package and the stub."""
    os.environ.pop("TRITON_INTERPRET", None)
    import stub_driver

    import condense_kernels

    return condense_kernels, stub_driver
