"""Peak memory of the C++ flagship: N x N fp32 and at most 1 MB beside it for each image in flight."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, torch
import condense_kernels as ck

def peak_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(2)
n, d, k = map(int, sys.argv[1:])
features, scores = torch.randn(1, n, d), torch.rand(1, n)
ck.select_and_merge(features[:, :512], scores[:, :512], k, 0, spatial_weight=0.0)  # threads, code, allocator
out = torch.ones(k * d + n * 8)  # as large as the results, and touched: what the peak may hold besides
del out
ctypes.CDLL(None).malloc_trim(0)  # else memory that the first call left to the heap would serve the second
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak_bytes()
result = ck.select_and_merge(features, scores, k, 0, spatial_weight=0.0)
print(peak_bytes() - before - n * n * 4 - sum(t.numel() * t.element_size() for t in result))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("n", "d"), [(1000, 1024), (2880, 1024), (2880, 4096)])
def test_peak_memory(n, d, cpp):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(n), str(d), "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1024 * 1024
