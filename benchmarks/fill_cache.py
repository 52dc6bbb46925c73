"""Compiles what the benchmarks and the checks will launch, all of it before and on every core, into Triton's cache.

    python benchmarks/fill_cache.py [--target sm_90] [--processes N]

Goes through the calls themselves, on CPU tensors, with Triton's own way to a launch up to where it would compile: there
the kernel, its signature, constants, attributes and options are taken down, and nothing runs. So what is compiled is
what will be looked for, and no list has to be kept. Without --target for the GPU that is there; asked in a process of
its own, so that this one, which forks, has not touched it.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import checks
import torch
import triton
import variants
from harness import console, progress
from inspect_kernels import TARGETS
from shapes import ALL, SWEPT
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from condense_kernels._dispatch.backends import on_triton
from condense_kernels._dispatch.library import listed
from condense_kernels.ops.select_and_merge.kernel import select_and_merge
from condense_kernels.testing import KINDS, make_inputs

TIMED = (
    "similarity", "greedy_select", "coverage_select", "dpc_knn", "assign", "merge", "merge_backward",
    "attention_scores", "select_and_merge", "select_and_merge_varlen",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Job(NamedTuple):
    """One compilation."""

    kernel: triton.JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    def compile(self, target: GPUTarget) -> Any:
        return triton.compile(self.source, target=target, options=self.options)


class NoDevice:
    """As much of a driver as Triton asks before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


class OnTriton(TorchDispatchMode):
    """Within, the operators take CPU tensors to their Triton kernels, as they do those of a GPU; all results are 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "condense":
            return func(*args, **(kwargs or {}))
        results = on_triton[func.name().partition("::")[2]](*args, **(kwargs or {}))
        for result in listed(results):
            if isinstance(result, torch.Tensor):
                result.zero_()
        return results


@contextlib.contextmanager
def recording(target: GPUTarget) -> Iterator[list[Job]]:
    """Within, a kernel that would be compiled for ``target`` and launched is put into the list, once."""
    jobs: dict[str, Job] = {}

    def take_down(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        if (known := f"{kernel.cache_key} {key}") not in jobs:
            options = json.loads(compile["specialization_data"])["options"]
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
            [attributes] = compile["configs"]
            jobs[known] = Job(kernel, compile["signature"], compile["constants"], attributes, options)
        return True  # do not compile, do not launch

    found: list[Job] = []
    knobs, before = triton.knobs.runtime, driver._active
    driver.set_active(NoDevice(target))
    hook, knobs.jit_cache_hook = knobs.jit_cache_hook, take_down
    try:
        with OnTriton():
            yield found
    finally:
        knobs.jit_cache_hook = hook
        driver._active = before
        found += jobs.values()
        for job in found:
            job.kernel.device_caches.clear()  # they are for a device that is not there


def timed() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What every benchmark calls ours."""

    def call(op: str, name: str) -> None:
        shape = ALL[name]
        built = importlib.import_module(f"bench_{op}").sides(
            shape, *made(shape.batch, shape.num_tokens, shape.channels)
        )
        for side, (run, *_) in built.items():
            if side.startswith("ours"):
                run()

    for op in TIMED:
        shapes = importlib.import_module(f"bench_{op}").SHAPES + (SWEPT if op == "select_and_merge" else ())
        yield from ((f"{op}, {name}", functools.partial(call, op, name)) for name in shapes)


def varied() -> Iterator[tuple[str, Callable[[], Any]]]:
    def call(n: int, kept: tuple[int, ...], changes: variants.Changes) -> None:
        features, scores = made(1, n, variants.CHANNELS)
        with variants.changed(changes):
            select_and_merge(features.bfloat16(), scores, *kept, grid=(1, n))

    for name, (n, *kept) in variants.SHAPES.items():
        for label, changes in variants.variants(n).items():
            yield f"{name}, {label}", functools.partial(call, n, kept, changes)


def made(b: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(b, n, d), torch.ones(b, n)


def checked() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield from ((check.name, check.call) for check in checks.checks("cpu"))


def tested() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The kinds and sizes of tests/test_gpu.py; its other tests are few."""
    small = [(kind, {"num_tokens": n, "channels": 72}) for kind in KINDS for n in (30, 130)]
    real = [
        {"batch": 1, "num_tokens": n, "channels": 1024, "num_anchors": anchors, "num_background": background}
        for n, anchors, background in ((1, 1, 0), (576, 144, 48), (729, 54, 18), (2880, 240, 80))
    ]
    for dtype in DTYPES:
        for kind, size in [*small, *(("clustered", size) for size in real)]:
            inputs = make_inputs(kind, dtype=dtype, **size)
            yield f"{kind}, {size['num_tokens']} tokens, {dtype}", inputs.run
            yield f"{kind}, {size['num_tokens']} tokens, {dtype}, stages", inputs.run_stages


PARTS = {part.__name__: part for part in (checked, timed, varied, tested)}


def jobs_of(parts: Iterable[str], target: GPUTarget) -> tuple[list[Job], int]:
    """What has to be compiled, those that take longest first; and of how many calls it is not known."""
    failed = 0
    with recording(target) as jobs, progress() as bar:
        for part in parts:
            task = bar.add_task(part, total=None)
            for label, call in PARTS[part]():
                bar.update(task, description=f"{part}: {label}")
                try:
                    call()
                except Exception as error:  # the others are still worth compiling
                    failed += 1
                    bar.console.print(f"{part}, {label}: {type(error).__name__}: {error}", style="bold")
            bar.remove_task(task)
    return sorted(jobs, key=lambda job: "select" not in job.kernel.__name__), failed


def compiled(i: int) -> tuple[str, float, str]:
    """Kernel, seconds, what went wrong. In a process of the pool, which was forked with what it needs."""
    jobs, target = _work
    start = time.perf_counter()
    try:
        jobs[i].compile(target)
    except Exception as error:  # of one kernel; a step that needs it says so again
        return jobs[i].kernel.__name__, time.perf_counter() - start, f"{type(error).__name__}: {error}"
    return jobs[i].kernel.__name__, time.perf_counter() - start, ""


def fill(jobs: list[Job], target: GPUTarget, processes: int) -> list[tuple[str, float, str]]:
    global _work
    _work = jobs, target
    with multiprocessing.get_context("fork").Pool(processes) as pool, progress() as bar:
        task = bar.add_task("compiling", total=len(jobs))
        done = []
        for result in pool.imap_unordered(compiled, range(len(jobs)), chunksize=1):
            done.append(result)
            bar.advance(task)
        return done


def target_here() -> GPUTarget | None:
    """Of the GPU that is there; None without one."""
    code = "import torch; from triton.runtime import driver; t = torch.cuda.is_available() and driver.active"
    code += ".get_current_target(); print(*(t and (t.backend, t.arch, t.warp_size) or ()))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if not answer:
        return None
    backend, arch, warp = answer
    return GPUTarget(backend, int(arch) if arch.isdecimal() else arch, int(warp))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), help="for this GPU, and not the one that is there")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="of these (all of them)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    target = TARGETS[arguments.target] if arguments.target else target_here()
    jobs, failed = jobs_of(arguments.parts, target or TARGETS["sm_90"])
    if target is None:
        console().print(f"no GPU, so nothing is compiled: {len(jobs)} compilations on one like sm_90")
        sys.exit(1 if failed else 0)
    start = time.perf_counter()
    done = fill(jobs, target, arguments.processes)
    wrong = [(name, error) for name, _, error in done if error]
    for name, error in wrong:
        console().print(f"{name}: {error}", style="bold")
    slowest, seconds = max(((name, seconds) for name, seconds, _ in done), key=lambda x: x[1], default=("none", 0.0))
    console().print(
        f"{len(done)} compilations, {sum(seconds for _, seconds, _ in done):.0f} s of CPU in "
        f"{time.perf_counter() - start:.0f} s; the slowest {slowest}, {seconds:.1f} s"
    )
    sys.exit(1 if wrong or failed else 0)


if __name__ == "__main__":
    main()
