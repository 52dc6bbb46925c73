"""The device itself: that it runs what a launch runs, and that a kernel which is wrong does not pass."""

import inspect
import pathlib

import pytest
import torch
import triton
import triton.language as tl

from condense_kernels import merge, similarity
from condense_kernels.testing import exact_similarity, make_inputs, similarity_bound

from . import compiling, plugin
from .device import Checks

N = 300


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + OFFSET, mask=offs < n)
    tl.store(y_ptr + offs, x, mask=offs < n)


@triton.jit
def total_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.program_id(0), tl.sum(x))


@triton.jit
def leave_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0))


@triton.jit
def gather_kernel(index_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + tl.load(index_ptr + offs)))


@triton.jit
def count_kernel(y_ptr, n):
    i = 0
    while i != n:
        i += 2
        tl.store(y_ptr, i)


@triton.jit
def power_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.exp2(tl.load(x_ptr + offs)))


def line_of(kernel, text: str) -> str:
    lines, first = inspect.getsourcelines(kernel.fn)
    (found,) = (number for number, line in enumerate(lines, first) if text in line)
    return f"ptx/test_device.py:{found}"


def copied(offset: int) -> torch.Tensor:
    x, y = torch.rand(N), torch.empty(N)
    copy_kernel[(3,)](x, y, N, offset, BLOCK=128)
    assert torch.equal(y[1:-1], x[1 + offset : N - 1 + offset])
    return y


def test_nothing_is_found_in_a_kernel_that_is_right(ptx_device):
    copied(0)
    (launch,) = ptx_device.launches
    assert (
        (launch.kernel, launch.grid) == ("copy_kernel", (3,))
        and launch.instructions > 3 * 4
        and ptx_device.findings == []
    )


@pytest.mark.parametrize("offset", [-1, 1])
def test_an_index_that_is_off_by_one(ptx_device, offset):
    copied(offset)
    (found,) = ptx_device.take()
    assert (found["kind"], found["at"], found["count"]) == ("out of bounds", line_of(copy_kernel, "tl.load"), 1)
    assert found["tensor"] == f"x_ptr [{N}], byte {-4 if offset < 0 else 4 * N} of {4 * N}"


def test_a_part_of_a_tensor_is_all_that_a_launch_may_touch(ptx_device):
    x, y = torch.rand(N), torch.empty(100)
    copy_kernel[(1,)](x[:99], y, 100, 0, BLOCK=128)
    assert [(found["kind"], found["count"]) for found in ptx_device.take()] == [("out of bounds", 1)]


def without_barriers(statements, labels):
    return [("nop" if text.startswith("bar.sync") else text, place) for text, place in statements], labels


def test_a_barrier_that_is_missing(ptx_device):
    x, y = torch.rand(4, 512), torch.empty(4)
    total_kernel[(4,)](x, y, BLOCK=512)
    torch.testing.assert_close(y, x.sum(1))
    assert ptx_device.take() == []
    ptx_device.mutate = lambda text: without_barriers
    total_kernel[(4,)](x, y, BLOCK=512)
    races = [found for found in ptx_device.take() if found["kind"] == "race between warps"]
    assert races and all(found["space"] == "shared" and "standard.py" in found["at"] for found in races), races


def test_programs_that_write_to_one_place(ptx_device):
    leave_kernel[(2,)](torch.zeros(1, dtype=torch.int32))
    assert [found["kind"] for found in ptx_device.take()] == ["race between CTAs"]


def test_an_index_that_nobody_wrote(ptx_device):
    index, x = torch.empty(32, dtype=torch.int64), torch.rand(32)
    gather_kernel[(1,)](index, x, torch.empty(32), BLOCK=32)
    assert "address uninitialised" in {found["kind"] for found in ptx_device.take()}
    gather_kernel[(1,)](index.copy_(torch.arange(32)), x, torch.empty(32), BLOCK=32)
    assert ptx_device.take() == []


def test_a_result_that_was_not_written(ptx_device):
    x, y, z = torch.rand(N), torch.empty(N), torch.empty(N)
    copy_kernel[(2,)](x, y, N, 0, BLOCK=128)
    copy_kernel[(3,)](y, z, N, 0, BLOCK=128)
    assert ptx_device.memory.count_unwritten(y) == ptx_device.memory.count_unwritten(z) == N - 2 * 128
    ptx_device.checks = Checks(loads=True)
    copy_kernel[(3,)](y, z, N, 0, BLOCK=128)
    assert {found["kind"] for found in ptx_device.take()} == {"load of uninitialised"}


def test_a_kernel_that_does_not_end(ptx_device):
    y = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](y, 8)
    assert y == 8 and ptx_device.take() == []
    ptx_device.limit = 10_000
    count_kernel[(1,)](y, 9)
    assert [found["kind"] for found in ptx_device.take()] == ["does not end"]


def test_every_call_is_launched_here(ptx_device):
    """None is prepared and repeated past the device."""
    x, scores, indices, assignment = (
        torch.rand(1, 9, 4),
        torch.rand(1, 9),
        torch.tensor([[0, 5]]),
        torch.zeros(1, 9).long(),
    )
    first = merge(x, scores, indices, assignment, backend="triton")
    again = merge(x, scores, indices, assignment, backend="triton")
    assert [launch.kernel for launch in ptx_device.launches] == 2 * ["merge_kernel"]
    assert torch.equal(first[0], again[0])


def test_workspaces_are_cut_apart(ptx_device):
    make_inputs("random", batch=1, num_tokens=20, channels=8, num_anchors=2, num_background=2).run("triton")
    assert len(ptx_device.memory.copies) > len(
        {"features", "scores", "merged", "indices", "assignment", "mass", "workspace"}
    )


@pytest.mark.parametrize("guard_bits", [0, 1, 2, None])
def test_similarity_where_tensor_cores_truncate(ptx_device, guard_bits):
    """Sums come out too small, as on hardware, and stay within the bound."""
    inputs = make_inputs("clustered", batch=1, num_tokens=33, channels=1024, dtype=torch.float16)
    exact = exact_similarity(inputs)[0]
    ptx_device.checks = Checks(guard_bits=guard_bits)
    s = similarity(inputs.features, inputs.scores, backend="triton")[0]
    error = s.double() - exact
    assert error.abs().max() <= similarity_bound(1024, torch.float32)
    mean = error[0].diagonal().mean()
    assert mean < -1e-7 / 2 ** (guard_bits or 0) if guard_bits is not None else mean.abs() < 1e-7


def test_approximate_instructions(ptx_device):
    x, exact, inexact = torch.rand(256), torch.empty(256), torch.empty(256)
    power_kernel[(1,)](x, exact, BLOCK=256)
    ptx_device.checks = Checks(inexact=True)
    power_kernel[(1,)](x, inexact, BLOCK=256)
    ulps = (exact.view(torch.int32) - inexact.view(torch.int32)).abs()
    assert 0 < ulps.max() <= 2
    torch.testing.assert_close(exact, x.exp2())


def test_ptx_is_kept_by_what_it_is_compiled_from(ptx_device, tmp_path, monkeypatch):
    compiled, compile_to_ptx = [], compiling.compile_to_ptx

    def counted(source, *args):
        compiled.append(source.constants)
        return compile_to_ptx(source, *args)

    monkeypatch.setattr(compiling, "BUILT", tmp_path)
    monkeypatch.setattr(compiling, "compile_to_ptx", counted)
    for offset in (0, 1, 0, 1):
        copied(offset)
    ptx_device.take()
    assert len(compiled) == len(list(tmp_path.glob("*/copy_kernel-*.ptx"))) == 2


def test_nothing_is_assembled(ptx_device, tmp_path, monkeypatch):
    def refuse(*args):
        pytest.fail("calls ptxas")

    monkeypatch.setattr(compiling, "BUILT", tmp_path)
    monkeypatch.setattr("triton.backends.nvidia.compiler.CUDABackend.make_cubin", refuse)
    copied(0)


@pytest.mark.parametrize("name", [*plugin.WRONG_ON_PURPOSE, *plugin.NOT_HERE])
def test_what_is_treated_apart_exists(name):
    file, test = name.split("::")
    assert f"\ndef {test}(" in (pathlib.Path(__file__).parents[1] / file).read_text()
