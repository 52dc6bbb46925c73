"""How the C++ kernels share threads: the parallel regions of a call, counted in front of torch's runtime of threads,
and images side by side. And copies of tokens whose channels lie apart.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import condense_kernels as ck
from condense_kernels._dispatch.library import listed
from condense_kernels.testing import assert_same_bits

COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>

static long regions;
static unsigned widest;
long regions_entered(void) { return regions; }
unsigned widest_region(void) { return widest; }

void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags) {
  static void (*real)(void (*)(void*), void*, unsigned, unsigned);
  if (!real) real = dlsym(RTLD_NEXT, "GOMP_parallel");
  ++regions;
  widest = threads > widest ? threads : widest;
  real(fn, data, threads, flags);
}
"""

PROGRAM = """
import ctypes, json, sys, torch
import condense_kernels
op, entered = torch.ops.condense, ctypes.CDLL(None).regions_entered

def regions(call, threads=2):
    torch.set_num_threads(threads)
    call()
    before = entered()
    call()
    return entered() - before

def image(b, n, d):
    x, a = torch.randn(b, n, d), torch.rand(b, n)
    return lambda: op.select_and_merge(x, a, 3, 1, spatial_weight=0.0)

def packed(count, n, d):
    cu = torch.arange(count + 1, dtype=torch.int32)
    x, a = torch.randn(count * n, d), torch.rand(count * n)
    return lambda: op.select_and_merge_varlen(x, a, cu * n, cu, cu * 0, count, n, spatial_weight=0.0)

s, prior = torch.rand(1, 1024, 1024), torch.rand(1, 1024)
big = torch.ones(4096, 4096)
torch.set_num_threads(2)
print(json.dumps({
    "torch's own": regions(lambda: big + 1),
    "greedy_select of an image": regions(lambda: op.greedy_select(s, prior, 900)),
    "greedy_select of two": regions(lambda: op.greedy_select(s.expand(2, -1, -1), prior.expand(2, -1), 900)),
    "max_min of an image": regions(lambda: op.greedy_select(s, None, 4, max_min=True)),
    "a small image": regions(image(1, 100, 64)),
    "a large image": regions(image(1, 576, 256)),
    "three of 576": regions(image(3, 576, 256)),
    "five of 49": regions(image(5, 49, 64)),
    "two of 16": regions(image(2, 16, 64)),
    "127 of 49, 32 threads": regions(image(127, 49, 64), 32),
    "packed, no giants": regions(packed(64, 49, 64)),
    "packed, one small": regions(packed(1, 49, 64)),
}))
"""

REGIONS = {
    "torch's own": 1,
    "greedy_select of an image": 0,
    "greedy_select of two": 1,
    "max_min of an image": 1,
    "a small image": 0,
    "a large image": 1,
    "three of 576": 1,
    "five of 49": 1,
    "two of 16": 0,
    "127 of 49, 32 threads": 1,
    "packed, no giants": 1,
    "packed, one small": 0,
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_parallel_regions_of_a_call(cpp, tmp_path):
    (tmp_path / "counter.c").write_text(COUNTER)
    counter = str(tmp_path / "counter.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", str(tmp_path / "counter.c"), "-o", counter, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": counter, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found.pop("torch's own") == 0:
        pytest.skip("this torch has another runtime of threads")
    assert found == {name: count for name, count in REGIONS.items() if name != "torch's own"}


def features_of(b, n, d, dtype=torch.float32, seed=0):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()

    def run(count, call):
        torch.set_num_threads(count)
        return call()

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 3, 5, 33, 127])
def test_small_images_side_by_side(batch, with_threads, cpp):
    """Each as it is alone, whatever the number of threads, and in a workspace of the bytes stated."""
    x, scores = features_of(batch, 49, 64), torch.rand(batch, 49, generator=torch.Generator().manual_seed(1))
    options = dict(grid=[7, 7])
    alone = [
        torch.ops.condense.select_and_merge(x[b : b + 1], scores[b : b + 1], 8, 4, **options) for b in range(batch)
    ]
    expected = tuple(torch.cat(results) for results in zip(*alone, strict=True))
    for count in (1, 2, 32, 64):
        call = lambda: torch.ops.condense.select_and_merge(x, scores, 8, 4, **options)  # noqa: E731
        assert_same_bits(with_threads(count, call), expected, f"{count} threads")
        needed = with_threads(count, lambda: ck.workspace_bytes(x, scores, 8, 4, **options))
        workspace = torch.empty(needed, dtype=torch.uint8)
        own = ck.select_and_merge(x, scores, 8, 4, **options, backend="cpp")
        out = type(own)(*(torch.empty_like(t) for t in own))
        assert_same_bits(ck.select_and_merge(x, scores, 8, 4, **options, out=out, workspace=workspace), expected)


OF_FEATURES = {
    "similarity": lambda op, x: op.similarity(x),
    "select_and_merge": lambda op, x: op.select_and_merge(x, x[:, :, 0].float(), 5, 3, spatial_weight=0.0),
    "with keys": lambda op, x: op.select_and_merge(x + 1, x[:, :, 0].float(), 5, 3, keys=x, spatial_weight=0.0),
    "merge": lambda op, x: op.merge(x, None, *clusters(*x.shape[:2])),
    "greedy_select": lambda op, x: op.greedy_select_from_keys(x, None, 5),
    "dpp_select": lambda op, x: op.dpp_select_from_keys(x, None, 5),
    "assign": lambda op, x: op.assign_from_keys(x, clusters(*x.shape[:2])[0], spatial_weight=0.0),
}


def clusters(b, n):
    return torch.arange(7).expand(b, -1), (torch.arange(n) % 7).expand(b, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", OF_FEATURES)
def test_channels_that_lie_apart(name, dtype, with_threads, cpp):
    """Around the blocks of the copy; the channels of a token 1, 2 or N numbers apart."""
    for n, d in ((31, 1), (32, 63), (33, 64), (64, 65), (65, 130)):
        x = features_of(2, n, d, dtype)
        expected = with_threads(1, lambda x=x: OF_FEATURES[name](torch.ops.condense, x))
        middle = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # [N, D, B] in memory
        for y in (x.mT.contiguous().mT, x.repeat_interleave(2, dim=2)[:, :, ::2], middle):
            assert torch.equal(x, y)
            for count in (1, 3):
                found = with_threads(count, lambda y=y: OF_FEATURES[name](torch.ops.condense, y))
                assert_same_bits(listed(found), listed(expected), f"{n} x {d}, strides {y.stride()}")


def test_packed_channels_that_lie_apart(cpp):
    op, cu = torch.ops.condense, torch.tensor([0, 40, 40, 73], dtype=torch.int32)
    kept, x = torch.tensor([0, 4, 4, 7], dtype=torch.int32), features_of(1, 73, 70)[0]
    y = x.mT.contiguous().mT
    scores = x[:, 0].contiguous()
    options = dict(spatial_weight=0.0)
    expected = op.select_and_merge_varlen(x, scores, cu, kept, kept * 0, 7, 40, **options)
    assert_same_bits(op.select_and_merge_varlen(y, scores, cu, kept, kept * 0, 7, 40, **options), expected)
    rows = expected[1], expected[2]
    assert_same_bits(
        op.merge_varlen(y, scores, *rows, cu, kept, 40),
        op.merge_varlen(x, scores, *rows, cu, kept, 40),
    )
    assert_same_bits(op.similarity_varlen(y, cu, 40), op.similarity_varlen(x, cu, 40))


def test_a_copy_is_counted(cpp):
    """A channels-first image takes its own size more of the workspace, keys of another layout theirs, and no more."""
    x, scores = features_of(1, 64, 48), torch.rand(1, 64)
    apart = x.mT.contiguous().mT

    def needed(features, **keys):
        return ck.workspace_bytes(features, scores, 8, 4, spatial_weight=0.0, **keys)

    size = x.numel() * x.element_size()
    assert needed(apart) == needed(x) + size
    assert needed(apart, keys=apart) == needed(x) + size
    assert needed(apart, keys=apart.clone(memory_format=torch.preserve_format)) == needed(x) + 2 * size
