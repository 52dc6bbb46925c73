"""Compiler flags of the user's environment change no result: setup.py undoes them, or refuses to build.

A probe stands in for csrc/: operations of which each would be replaced under some flag.
"""

import platform
import shutil
import subprocess
import sys

import pytest
from builds import Builder, script

PROBE = """
#include <cmath>

extern "C" __attribute__((visibility("default"))) void probe(const float* x, const double* y, double* out) {
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += x[i];
  *out++ = sum;                         // in this order
  *out++ = x[0] * x[1] + x[2];          // two roundings
  *out++ = y[0] * y[1] + y[2];
  *out++ = (y[3] + y[4]) - y[3];        // is not y[4]
  *out++ = x[3] + 0.0f;                 // of -0
  *out++ = 0.0f - x[4];                 // of 0
  *out++ = x[5] == x[5];                // of NaN
  *out++ = std::isinf(x[6]);
  *out++ = x[6] * 0.0f;                 // of an infinity
  for (int i = 8; i < 24; ++i) *out++ = x[i] / x[7];  // no product with a reciprocal
  *out++ = 1.0f / std::sqrt(x[7]);
  *out++ = y[5] + 0.1;                  // a constant of type double
  *out++ = x[24] * x[25] / x[25];       // overflows
  *out++ = x[26] * x[27];               // a subnormal number
}
"""
CALL = """
import ctypes, math, sys
n = [math.sin(1.7 * i) * 10 ** (i % 9 - 4) for i in range(64)]
x = [1 + 2**-12, 1 + 2**-13, -1.0, -0.0, 0.0, math.nan, math.inf, 3.1, *n[8:24], 3.1, 3e38, 1e-38, 1e-3, *n[28:]]
y = [1 + 2**-30, 1 + 2**-29, -1.0, 1.0, 1e-9, 0.3]
out = (ctypes.c_double * 32)()
ctypes.CDLL(sys.argv[1]).probe((ctypes.c_float * 64)(*x), (ctypes.c_double * 6)(*y), out)
print(bytes(out).hex(), sys.float_info.min / 2 > 0)  # and that the process has subnormal numbers still
"""

UNDONE = [
    "-Ofast",
    "-ffast-math",
    "-funsafe-math-optimizations",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
    "-freciprocal-math",
    "-ffinite-math-only",
    "-fno-signed-zeros",
    "-ffp-contract=fast -march=native",
    "-O1 -g -march=native -fno-strict-aliasing",
]


class Prober(Builder):
    """Compiles the probe for real, against a torch whose libraries hold nothing."""

    def __init__(self, folder, interpreter, compiler):
        super().__init__(folder, interpreter)
        self.compiler = compiler
        for source in (self.tree / "csrc").glob("*.cpp"):
            source.unlink()
        (self.tree / "csrc" / "probe.cpp").write_text(PROBE)
        self.has_torch("2.13.0")
        libraries = self.site / "torch" / "lib"
        libraries.mkdir()
        for name in ("libtorch_cpu.so", "libc10.so"):
            (libraries / name).write_text("/* a linker script */")

    def bits(self, **environment: str) -> str:
        done = self.run("build_ext", "--inplace", CONDENSE_BUILD_EXT="1", **environment)
        assert done.returncode == 0, done.stderr
        library = self.tree / "condense_kernels" / "_C.abi3.so"
        return subprocess.run([sys.executable, "-c", CALL, library], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=["g++", "clang++"])
def prober(request, tmp_path_factory, bare_python):
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return Prober(tmp_path_factory.mktemp("prober"), bare_python, request.param)


@pytest.fixture(scope="module")
def bits(prober) -> str:
    return prober.bits()


@pytest.mark.parametrize("flags", UNDONE)
def test_flags_that_change_results_are_undone(prober, bits, flags):
    """At the link, too: GCC would make the process that loads the library flush subnormal numbers."""
    assert bits.endswith("True\n")
    assert prober.bits(CXXFLAGS=flags, LDFLAGS=flags) == bits


def test_flags_in_other_variables_are_undone_or_not_read(prober, bits):
    assert prober.bits(CXX=f"{prober.compiler} -Ofast", CFLAGS="-Ofast", CPPFLAGS="-Ofast") == bits


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86_64")
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("-ffast-math", "this compiler replaces floating-point operations by others"),
        ("-mfpmath=387", "float is computed in a wider type"),
        ("-fsingle-precision-constant", "double constants are of type float"),
    ],
)
def test_flags_that_cannot_be_undone_are_refused(prober, tmp_path, flags, reason):
    """As behind ours they are, from a compiler that adds its own."""
    if prober.compiler != "g++" and flags != "-ffast-math":
        pytest.skip("flags of g++")
    compiler = script(tmp_path / "compiler", f'#!/bin/sh\nexec {prober.compiler} "$@" {flags}\n')
    done = prober.run("build_ext", "--inplace", CONDENSE_BUILD_EXT="1", CXX=compiler)
    assert done.returncode == 1
    assert f"{compiler} failed with status 1 (" in done.stderr
    assert reason in done.stderr
