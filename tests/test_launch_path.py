"""Triton's own launch path, to a stub of the CUDA driver: what reaches the driver, what a call costs the host, and how
often a kernel is compiled. Nothing of the package is imported here: see stubbed.py."""

import os
import struct

import pytest
import torch
from processes import fresh
from stubbed import MARKS, without_interpreter

pytestmark = MARKS
MAX_COMPILATIONS = 24  # of 1000 images of mixed sizes, dense and packed


def image(n: int = 64, d: int = 64, dtype: torch.dtype = torch.bfloat16):
    return torch.zeros(1, n, d, dtype=dtype), torch.zeros(1, n, dtype=dtype), 6, 2


# What reaches the driver


def a_repeated_call():
    ck, stub_driver = without_interpreter()
    args, options = image(), {"grid": (8, 8)}
    with stub_driver.device(record=True) as counts:
        out = ck.select_and_merge(*args, **options)
        options |= {"out": out, "workspace": torch.empty(ck.workspace_bytes(*args, **options), dtype=torch.uint8)}
        counts.take()
        counts.reset()
        ck.select_and_merge(*args, **options)  # in the way of Triton, into memory that is known
        first, compiled = counts.take(), counts.compiled
        ck.select_and_merge(*args, **options)  # prepared
        again = counts.take()
        counts.current_stream = 7
        ck.select_and_merge(*args, **options)
        elsewhere = counts.take()
        torch.ops.condense.select_and_merge_out(*args, grid=[8, 8], workspace=options["workspace"], **out._asdict())
        raw = counts.take()
    return first, compiled, again, elsewhere, raw, [t.data_ptr() for t in (args[0], out.merged)]


def test_a_prepared_call_launches_what_the_first_did():
    """Grids, streams and every byte of the arguments, as the driver gets them."""
    first, compiled, again, elsewhere, raw, (features, merged) = fresh(a_repeated_call)
    assert not compiled  # the call before compiled them
    kernels = [launch.kernel for launch in first]
    assert kernels[0] == "similarity_tile_kernel" and kernels[-1] == "merge_kernel" and "select_kernel" in kernels
    assert all(launch.params and min(launch.grid) > 0 and launch.stream == 0 for launch in first)
    assert struct.unpack_from("<Q", first[0].params)[0] == features
    assert struct.pack("<Q", merged) in first[-1].params
    assert again == first
    assert elsewhere == [launch._replace(stream=7) for launch in first]
    assert raw == elsewhere


def two_targets():
    ck, stub_driver = without_interpreter()
    features, scores, *_ = image()
    found = []
    for capability in (90, 80, 90):
        with stub_driver.device(capability) as counts:
            for _ in range(2):
                ck.merge(features, scores, torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64))
        found.append((counts.compiled, counts.launches))
    return found


def test_another_target_compiles_anew():
    assert fresh(two_targets) == [({"merge_kernel": 1}, {"merge_kernel": 2})] * 3


def outside_of_it():
    ck, stub_driver = without_interpreter()
    args = torch.rand(1, 64, 64), torch.rand(1, 64), 6, 2
    expected = ck.select_and_merge(*args, grid=(8, 8))
    with stub_driver.device(compiling=False) as counts:
        ck.select_and_merge(*args, grid=(8, 8))
    assert counts.compilations and not counts.launches  # of the GPU's kernels
    assert all(map(torch.equal, ck.select_and_merge(*args, grid=(8, 8)), expected))  # and again the CPU's


def test_the_device_is_gone_afterwards():
    fresh(outside_of_it)


# What a call costs the host


def functions_called():
    _, stub_driver = without_interpreter()
    import bench_launch

    with stub_driver.device():
        found = bench_launch.sides()
        return {name: bench_launch.calls_of_python(call) for name, call in found.items()}


def test_a_repeated_call_is_short():
    """Counted, as no time is the same twice: functions that Python enters, beside those of the launches alone."""
    counts = fresh(functions_called)
    alone = counts["the launches alone"]
    assert alone >= 4
    assert counts["operator"] - alone <= 150
    assert counts["function"] - alone <= 200
    assert counts["out= and workspace="] - alone <= 220


# Compilations


def counted(seed: int):
    without_interpreter()
    import count_compilations

    found = count_compilations.count(count_compilations.grids(1000, seed), seed=seed)
    return {name: [compilation.kernel for compilation in part] for name, part in found.items()}


def test_images_of_mixed_sizes_compile_little():
    found = fresh(counted, 0)
    assert {"similarity_tile_kernel", "select_kernel", "assign_kernel", "merge_kernel"} <= set(found["dense"])
    assert len(found["both"]) == len(found["dense"]) + len(found["packed"])  # no kernel serves both
    assert len(found["both"]) <= MAX_COMPILATIONS, found["both"]
    assert len(fresh(counted, 1)["both"]) <= MAX_COMPILATIONS


def compiled_anew(folder: str):
    os.environ["TRITON_CACHE_DIR"] = folder
    _, stub_driver = without_interpreter()
    import count_compilations

    with stub_driver.device() as counts:
        count_compilations.warm()
        counts.reset()
        images = count_compilations.grids(1000, 0)
        count_compilations.run_dense(images)
        count_compilations.run_packed(images)
    return counts.compilations


@pytest.mark.slow
def test_no_compilation_is_long(tmp_path):
    """On sm_90, in seconds of CPU: 3 on an idle machine, of which this allows for another and a busy one."""
    found = fresh(compiled_anew, str(tmp_path))
    assert not any(compilation.cached for compilation in found)
    longest = max(found, key=lambda compilation: compilation.seconds)
    assert longest.seconds < 6, longest
