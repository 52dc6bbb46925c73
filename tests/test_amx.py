"""The AMX products on processors without AMX: the header compiled with the tile instructions as plain functions."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_products_with_emulated_tile_instructions(tmp_path, cpp):
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "clang++"]
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    program = tmp_path / "amx_emulated"
    source = ROOT / "tests" / "amx_emulated.cpp"
    subprocess.run([*compiler, "-std=c++17", "-O1", "-I", ROOT / "csrc", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
