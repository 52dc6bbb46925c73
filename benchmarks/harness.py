"""Times the sides of a case beside each other, and only once every one of them gives the right result.

case = Case("merge", "llava15-64", sides)     # builds the inputs, checks every side, warms up
for _ in range(case.rounds): case.round()     # one call of each side, in another order each time
rows = case.rows()
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from gates import Mismatch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rows import Row, case_table, comparison_table, provenance, read_commit, results_file, write
from shapes import ALL, SHAPES, SWEPT, Shape, make

from condense_kernels._dispatch import backends, library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 31
MIN_CALLS, SECONDS = 3, 1.0  # of a side in a case: a slow one is called less often
ROTATED_BYTES = 2**30  # inputs of a case, at most four sets


class Work(NamedTuple):
    """What a task needs at least: arithmetic, and bytes in and out, each once."""

    flop: float
    byte: float


class Side(NamedTuple):
    """One way to do the task, bound to its inputs."""

    call: Callable[[], object]
    check: Callable[[object], None]  # raises gates.Mismatch
    work: Work | None = None
    dtype: torch.dtype = torch.float32  # of the arithmetic that its ceiling is measured with
    leaves_out: str = ""
    capturable: bool = True  # in a CUDA graph
    inference: bool = True  # called in torch.inference_mode(), as a server does; else with gradients
    memory: bool = False  # on CPU, where that takes a process of its own


Sides = Callable[[Shape, torch.Tensor, torch.Tensor], dict[str, Side]]  # of features [B, N, D] and scores [B, N]


class Ceilings(NamedTuple):
    flops: float  # of a large product
    bytes_per_second: float
    peak: float | None = None  # of multiply-adds that wait for nothing


def seconds(call: Callable[[], object], device: str, repeats: int = 1, *, launches_count: bool = True) -> float:
    """One call: by the host's clock on CPU, between two events on a GPU whose cache holds nothing of it.

    Where ``launches_count``, the GPU is idle before the call and waits for its launches, as it does for an eager
    caller; else it is still busy with the cache while the host launches, and only its own time is taken.
    """
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush_l2()
    if launches_count:
        torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def busy(for_seconds: float = 0.1) -> None:
    """Keep the GPU at work, so that what is timed next finds its clock up, as it is not after idling."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda")
    end = time.perf_counter() + for_seconds
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(a, a)
        torch.cuda.synchronize()


@functools.cache
def _larger_than_l2() -> torch.Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")


def flush_l2() -> None:
    _larger_than_l2().zero_()


_ceilings: dict[tuple[torch.dtype, str], Ceilings] = {}


def ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """What this machine reaches: the best of the large products and copies so far, to which every call adds some.

    16 bits reach at least what fp32 does, in which a processor without instructions for them computes.
    """
    n, copied = (2048, 2**28) if device == "cpu" else (8192, 2**31)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.ones(copied, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)

    def best(call: Callable) -> float:
        return min(seconds(call, device) for _ in range(4))

    before = _ceilings.get((dtype, device)) or _ceilings.get((torch.float32, device)) or Ceilings(0, 0)
    flops, rate = 2 * n**3 / best(lambda: torch.mm(a, b)), 2 * copied / best(lambda: target.copy_(source))
    highest = max(peak(dtype) if device == "cpu" else 0, before.peak or 0)
    _ceilings[dtype, device] = Ceilings(max(flops, before.flops), max(rate, before.bytes_per_second), highest or None)
    return _ceilings[dtype, device]


def spinner() -> Callable[[int, int], int]:
    """(bytes of a number, rounds) -> multiply-adds done; the library's own, which nobody else needs."""
    spin = ctypes.CDLL(str(library.FOLDER / library.FILE)).condense_spin  # ctypes lets other threads run beside it
    spin.argtypes, spin.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
    return spin


def peak(dtype: torch.dtype, seconds: float = 0.02, repeats: int = 10) -> float:
    """FLOP a second of multiply-adds that wait for nothing, on as many threads as torch has: the best of some tries.

    By the instruction set that the library runs with: pairs of bf16 where it has them, else fp32, to which 16 bits are
    widened. 0 where it is not known.
    """
    if library.cpp_unavailable() is not None:
        return 0
    spin = spinner()
    has_pairs = spin(torch.bfloat16.itemsize, 1) > 0
    size = 4 if dtype == torch.float16 or (dtype == torch.bfloat16 and not has_pairs) else dtype.itemsize

    def flops(rounds: int) -> float:
        start = time.perf_counter()
        return 2 * spin(size, rounds) / (time.perf_counter() - start)

    threads = torch.get_num_threads()
    rounds = max(1, round(seconds * flops(10000) / (2 * spin(size, 1))))
    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(flops, [rounds] * threads)) for _ in range(repeats))


def captured(call: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """A CUDA graph's replay, and the result that it writes."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def launches(call: Callable[[], object]) -> int:
    call()  # what is allocated or compiled once is no part of it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_extra(op: str, shape: str, sides: list[str], built: dict[str, Side]) -> dict[str, float]:
    """Bytes above what was there before a call, results included."""
    if DEVICE == "cuda":
        found = {}
        for name in sides:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            built[name].call()
            torch.cuda.synchronize()
            found[name] = torch.cuda.max_memory_allocated() - before
        return found
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), op, shape, *sides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{op}, {shape}: measuring memory failed:\n{done.stderr}")
    return json.loads(done.stdout)


def with_launches(rows: list[Row], sides: dict[str, Sides]) -> list[Row]:
    """The rows of a GPU with the launches of what can be captured; ``sides`` by operator.

    After everything is timed: once a profiler has been there, launches may take longer.
    """
    if DEVICE != "cuda":
        return rows
    counts = {}
    for op, name in dict.fromkeys((row.op, row.shape) for row in rows if row.shape in SHAPES):
        for side, built in sides[op](ALL[name], *make(ALL[name], device=DEVICE)).items():
            if built.capturable:
                counts[op, name, side] = launches(built.call)
    return [dataclasses.replace(row, launches=counts.get((row.op, row.shape, row.side))) for row in rows]


class Contender(NamedTuple):
    """A side in one mode, how often it comes, and its times so far."""

    seconds: Callable[[int], float]  # of one call on the inputs of a round
    count: int
    times: list[float]


class Case:
    """An operator at a shape: its sides, checked, and their times so far."""

    def __init__(self, op: str, shape: str, sides: Sides, *, rounds: int = ROUNDS, device: str = DEVICE):
        self.op, self.name, self.shape, self.rounds, self.device = op, shape, ALL[shape], rounds, device
        self.done, self._shuffle = 0, random.Random(0)
        size = self.shape.batch * self.shape.num_tokens * self.shape.channels * 4
        sets = max(1, min(4, rounds, ROTATED_BYTES // (4 * size)))
        inputs = [make(self.shape, seed=seed, device=device) for seed in range(sets)]
        self.sides = [sides(self.shape, *tensors) for tensors in inputs]  # a set of sides for each set of inputs
        for name, side in self.sides[0].items():  # of the first set: the others differ in their values alone
            with torch.inference_mode(side.inference):
                result = side.call()
            self._gate(name, result, side)
        if device == "cuda":
            busy()
        self.contenders = {
            (name, mode): self._contender(name, mode) for name in self.sides[0] for mode in self._modes(name)
        }

    def _gate(self, name: str, result: object, side: Side) -> None:
        try:
            side.check(result)
        except Mismatch as error:
            raise Mismatch(f"{self.op}, {self.name}, side {name!r}: {error}. Nothing is timed.") from None

    def _modes(self, name: str) -> tuple[str, ...]:
        if self.device == "cpu":
            return ("call",)
        return ("plain", "graph") if self.sides[0][name].capturable else ("plain",)

    def _contender(self, name: str, mode: str) -> Contender:
        calls, inference = [built[name].call for built in self.sides], self.sides[0][name].inference
        if mode == "graph":
            with torch.inference_mode(inference):
                graphs = [captured(call) for call in calls]
            graphs[0][0]()
            torch.cuda.synchronize()
            self._gate(f"{name} (graph)", graphs[0][1], self.sides[0][name])
            calls = [replay for replay, _ in graphs]
        repeats, plain = self.shape.back_to_back, mode != "graph"

        def timed(turn: int) -> float:
            with torch.inference_mode(inference):
                return seconds(calls[turn % len(calls)], self.device, repeats, launches_count=plain)

        once = min(timed(turn) for turn in range(max(2, len(calls)))) * repeats  # also warms up, every set of inputs
        return Contender(timed, max(MIN_CALLS, min(self.rounds, math.floor(SECONDS / once))), [])

    def round(self) -> None:
        """One call of each contender whose turn it is, in a new order, so that none is always after the same one."""
        turn, self.done = self.done, self.done + 1
        due = [
            c for c in self.contenders.values() if (turn + 1) * c.count // self.rounds > turn * c.count // self.rounds
        ]
        self._shuffle.shuffle(due)
        gc.disable()
        try:
            for contender in due:
                contender.times.append(contender.seconds(turn))
        finally:
            gc.enable()

    def rows(self) -> list[Row]:
        built, shape = self.sides[0], self.shape
        measured = [name for name, side in built.items() if self.device == "cuda" or side.memory]
        measured = measured if self.name in SHAPES else []
        memory = peak_extra(self.op, self.name, measured, built) if measured else {}
        base: dict[str, float] = {}  # the first side's median, in each mode
        for (_, mode), contender in self.contenders.items():
            base.setdefault(mode, statistics.median(contender.times))
        origin, result = provenance(self.device), []
        ceiling_of = {
            dtype: ceilings(dtype, self.device) for dtype in dict.fromkeys(side.dtype for side in built.values())
        }
        for (name, mode), contender in self.contenders.items():
            side, median = built[name], statistics.median(contender.times)
            low, high = torch.tensor(contender.times).quantile(torch.tensor([0.2, 0.8])).tolist()
            ceiling = ceiling_of[side.dtype]
            result.append(
                Row(
                    op=self.op,
                    shape=self.name,
                    side=name,
                    mode=mode,
                    B=shape.batch,
                    N=shape.num_tokens,
                    D=shape.channels,
                    K=shape.kept,
                    median_ms=median * 1e3,
                    p20_ms=low * 1e3,
                    p80_ms=high * 1e3,
                    calls=len(contender.times),
                    x_base=median / base[mode],
                    gflop=side.work and side.work.flop * 1e-9,
                    mbyte=side.work and side.work.byte * 1e-6,
                    gflops=side.work and side.work.flop / median * 1e-9,
                    gbs=side.work and side.work.byte / median * 1e-9,
                    ceiling_gflops=ceiling.flops * 1e-9,
                    ceiling_gbs=ceiling.bytes_per_second * 1e-9,
                    peak_gflops=ceiling.peak and ceiling.peak * 1e-9,
                    peak_extra_mb=memory[name] * 1e-6 if name in memory else None,
                    launches=None,
                    **origin,
                )
            )
        return result

    @property
    def leaves_out(self) -> dict[str, str]:
        return {name: side.leaves_out for name, side in self.sides[0].items()}


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def require_kernels() -> None:
    """The reference would answer in place of a library that was not built, and be timed as ours."""
    reason = backends.unavailable("triton" if DEVICE == "cuda" else "cpp", torch.device(DEVICE))
    if reason is not None:
        raise SystemExit(f"no kernels to time on {DEVICE}: {reason}")


def print_origin(device: str) -> None:
    """Where the numbers come from, and whether others are at work on the processor."""
    if os.getloadavg()[0] > 0.5:
        console().print(
            f"load average {os.getloadavg()[0]:.1f}: others use this machine, the times are noisy", style="bold"
        )
    console().print(", ".join(f"{key} {value}" for key, value in provenance(device).items() if value), highlight=False)


def main(op: str, sides: Sides, shapes: tuple[str, ...]) -> None:
    parser = argparse.ArgumentParser(description=f"Times {op} beside its baselines; see docs/benchmarks.md.")
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=list(ALL), metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--sweeps", action="store_const", const=SWEPT, dest="shapes", help="the shapes of the plots")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls of a side that is not slow (%(default)s)")
    parser.add_argument("--csv", type=Path, help="put the rows into this file; rows of the same names are replaced")
    parser.add_argument("--compare", metavar="REF", help="show the change against the results file of a commit")
    arguments = parser.parse_args()
    try:
        before = read_commit(arguments.compare, results_file(DEVICE)) if arguments.compare else []
    except ValueError as error:
        parser.error(str(error))
    require_kernels()
    print_origin(DEVICE)
    found: list[Row] = []
    failed = []
    with progress() as bar:
        for name in arguments.shapes:
            task = bar.add_task(f"{op} {name}: checking", total=arguments.rounds)
            try:
                case = Case(op, name, sides, rounds=arguments.rounds)
                bar.update(task, description=f"{op} {name}")
                for _ in range(arguments.rounds):
                    case.round()
                    bar.advance(task)
                rows = case.rows()
            except Exception as error:  # a wrong result, too little memory: the other shapes may do
                failed.append(name)
                console().print(f"{op}, {name}: {type(error).__name__}: {error}", style="bold", markup=False)
                continue
            finally:
                bar.remove_task(task)
            console().print(case_table(rows, case.leaves_out))
            found += rows
            if arguments.csv:  # case by case, so that a run that is cut off leaves what it has
                write(arguments.csv, rows)
    found = with_launches(found, {op: sides})
    if arguments.csv and found:
        write(arguments.csv, found)
    if arguments.compare:
        console().print(comparison_table(found, before, arguments.compare))
    if failed:
        sys.exit(f"not timed: {', '.join(failed)}")
