"""Peak memory of the C++ flagship: N x N fp32 and at most 1 MB beside it for each image in flight. And what the C++
kernels say where there is no memory.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import condense_kernels as ck

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


KEPT = """
import functools, resource, sys, threading, torch
import condense_kernels as ck

torch.set_num_threads(1)

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

@functools.cache
def inputs(n, dtype):
    return torch.randn(1, n, 8, dtype=dtype), torch.rand(1, n, dtype=dtype)

def call(n, dtype=torch.float32):
    ck.select_and_merge(*inputs(n, dtype), 12, 4, spatial_weight=0.0)

def faults(*sizes, **options):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for n in sizes:
        call(n, **options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def kept(program: str) -> list[int]:
    """What a program prints in which s is stored at any size."""
    environment = {**os.environ, "CONDENSE_STORED_TOKENS": "10000", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KEPT + textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_call_that_is_repeated_finds_its_memory(cpp):
    """Counted in pages that are faulted in: all of s would be 10,000 of 4 KB, or 21 of 2 MB."""
    found = kept(
        """
        for sizes in ([3300], [4096], [3300, 3290, 3310, 3200], [576, 3300, 100, 49]):
            faults(*sizes)
            faults(*sizes)
            print(faults(*sizes))
        faults(4096, dtype=torch.float64)
        print(faults(4096, dtype=torch.float64))
        call(3300)
        other = threading.Thread(target=lambda: (call(49), print(faults(3300))))
        other.start(), other.join()
        call(6500)  # alone more than is kept: the others stay
        print(faults(3300))
        """
    )
    assert max(found) < 16, found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_idle_threads_hold_no_more_than_all_may(cpp):
    """16 threads at once, 44 MB each; then what is left of it when a thousand calls have not needed it."""
    held, later = kept(
        """
        call(100)
        barrier = threading.Barrier(17)
        def call_and_idle():
            barrier.wait()
            call(3300)
            barrier.wait()
            barrier.wait()
        threads = [threading.Thread(target=call_and_idle) for _ in range(16)]
        before = status("VmRSS")
        for thread in threads:
            thread.start()
        barrier.wait(), barrier.wait()
        print(status("VmRSS") - before)
        barrier.wait()
        for thread in threads:
            thread.join()
        for _ in range(1001):
            call(49)
        print(status("VmRSS") - before)
        """
    )
    assert 80 << 20 <= held <= 176 << 20, held
    assert later <= 16 << 20, later


# In place of the C library's: of the large allocations since fail_at(n), the n-th finds no memory.
ALLOCATOR = """
#include <errno.h>
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);

static _Thread_local long left = -1;
void fail_at(long n) { left = n; }
static int fails(size_t size) { return size >= 1 << 19 && left >= 0 && left-- == 0; }

void* malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }
void* aligned_alloc(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** to, size_t alignment, size_t size) {
  *to = aligned_alloc(alignment, size);
  return *to ? 0 : ENOMEM;
}
"""

SWEEP = """
import ctypes, itertools, json, torch
import condense_kernels

torch.set_num_threads(1)
fail_at = ctypes.CDLL(None).fail_at

def messages(op, *args, **options):
    found = []
    for n in itertools.count():
        fail_at(ctypes.c_long(n))
        try:
            getattr(torch.ops.condense, op)(*args, **options)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            return found
        finally:
            fail_at(ctypes.c_long(-1))

b = 1 << 20  # images of one token: every tensor of a call is about as large as the others
x, a, index = torch.ones(b, 1, 1), torch.ones(b, 1), torch.zeros(b, 1, dtype=torch.int64)
half, wide = a.half(), index.repeat(1, 2)[:, :1]
cu = torch.arange(b + 1, dtype=torch.int32)
nowhere = {"spatial_weight": 0.0}
calls = {
    "similarity": lambda: messages("similarity", x, half, (a.repeat(1, 2) > 0)[:, :1]),
    "greedy_select": lambda: messages(
        "greedy_select", x, half, 1, sbar=a[:, 0].double(), tier=wide.to(torch.int8).repeat(1, 2)[:, :1]
    ),
    "assign": lambda: messages("assign", x.repeat(1, 1, 2)[:, :, ::2], wide, **nowhere),
    "merge": lambda: messages("merge", x, half, wide, wide),
    "merge_backward": lambda: messages(
        "merge_backward", x, a.repeat(1, 2)[:, :1], x, half, x, a.repeat(1, 2)[:, :1], wide, wide
    ),
    "select_and_merge": lambda: messages("select_and_merge", x, a, 1, 0, **nowhere),
    "select_and_merge_varlen": lambda: messages(
        "select_and_merge_varlen", x[:, 0], a[:, 0], cu, cu, cu * 0, b, 1, **nowhere
    ),
}
print(json.dumps({op: call() for op, call in calls.items()}))
"""

ALLOCATED = {  # units of 2**20 bytes, and what for
    "similarity": {"4 for s", "4 for sbar", "4 for g", "1 for tier", "4 for a copy of scores", "1 for a copy of mask"},
    "greedy_select": {"8 for order", "4 for a copy of prior", "4 for a copy of sbar", "1 for a copy of tier"},
    "assign": {"8 for assignment", "8 for a copy of indices"},
    "merge": {
        *("4 for merged", "4 for mass", "4 for a copy of scores"),
        *("8 for a copy of indices", "8 for a copy of assignment"),
    },
    "merge_backward": {
        *("4 for grad_features", "2 for grad_scores", "4 for a copy of scores", "4 for a copy of mass"),
        *("4 for a copy of grad_mass", "8 for a copy of indices", "8 for a copy of assignment"),
    },
    "select_and_merge": {"4 for merged", "8 for indices", "8 for assignment", "4 for mass"},
    "select_and_merge_varlen": {
        *("4 for merged", "8 for indices", "8 for assignment", "4 for mass"),
        *("8 for the offsets", "48 for the segments", "24 for the segments"),
    },
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_every_allocation_that_fails_says_what_it_was_for(cpp, tmp_path):
    """Each in its turn, until there is none left to fail."""
    (tmp_path / "allocator.c").write_text(ALLOCATOR)
    allocator = str(tmp_path / "allocator.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", str(tmp_path / "allocator.c"), "-o", allocator], check=True)
    environment = {**os.environ, "LD_PRELOAD": allocator, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for op, messages in json.loads(done.stdout).items():
        found = set()
        for message in messages:
            number, what = re.fullmatch(
                "RuntimeError: could not allocate ([0-9]+) bytes (for .*)[.] Remedy: fewer images a call, fewer tokens "
                "kept, or smaller windows[.]",
                message,
            ).groups()
            found.add(f"{int(number) >> 20} {what}")
        assert found == ALLOCATED[op], op


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ck.similarity(torch.ones(1).expand(2**10, 2**19, 4)), f"{2**50} bytes for s"),
        (lambda: ck.similarity(torch.ones(1).expand(2**30, 2**19, 4)), f"{2**63 - 1} or more bytes for s"),
        (lambda: ck.merge(*merge_of(2**46)), f"{2**48} bytes for merged"),
        (
            lambda: ck.assign(torch.ones(1, 4, 4), torch.tensor([[0, 1]]), positions=torch.ones(1).expand(4, 2**58)),
            "bytes of working memory",
        ),
    ],
    ids=["terabytes", "beyond int64", "channels", "working memory beyond int64"],
)
def test_sizes_that_nothing_could_hold(call, message, cpp):
    with pytest.raises(RuntimeError, match=f"could not allocate .*{message}.* Remedy: fewer images a call"):
        call()


def merge_of(channels):
    ones = torch.ones(1, 1)
    return ones[..., None].expand(1, 1, channels), ones, torch.zeros(1, 1).long(), torch.zeros(1, 1).long()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_result_that_the_c_library_maps_is_on_huge_pages(cpp):
    """s of 3300 tokens, 43 MB: 10,635 small pages a call."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    is_given = huge.exists() and "[never]" not in huge.read_text()
    (found,) = kept(
        """
        def call(n):
            ck.similarity(torch.ones(1, n, 8))
        faults(3300)
        print(faults(3300))
        """
    )
    assert found < 2000 or not is_given, found
