"""Threads that call operators for a long time: `make soak`. Described in docs/load.md.

    python tests/soak.py --seconds 3600 --threads 8

Each thread calls what was drawn beforehand, in an order of its own, and holds each result to that of a single thread,
bit for bit. After some seconds all threads end and others begin; in between, what is left is counted: memory, files,
threads. It may not grow.
"""

import argparse
import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from drawn import Call, listed
from draws import draw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits

LIFE = 10.0  # seconds of a thread: what belongs to it has to go with it
WARM_UP = 0.25  # of the time, in which each size is met by several threads at once
GROWTH = 0.01  # of memory, from the first third after that to the last
LARGE = ((1, 576, 64, 1024), (2, 1024, 128, 256), (1, 2304, 256, 64))  # B, N, K, D: with several torch threads, too
FORGOTTEN = 1100  # calls, after which csrc/memory.cpp has given back the blocks that they did not need
PAGE = os.sysconf("SC_PAGE_SIZE")
LIBC = ctypes.CDLL(None)
ONE_HEAP, MAPPED = (-8, 1), (-3, 128 << 10)  # M_ARENA_MAX, M_MMAP_THRESHOLD of mallopt


@dataclass
class Case:
    words: str
    run: Callable[[], tuple]
    expected: tuple


def plain(call: Call) -> Callable[[], tuple]:
    """A workspace belongs to one call at a time, so each takes its own."""
    if "workspace" not in call.arguments:
        return call.run
    size = call.arguments["workspace"].numel()
    return lambda: call.run(workspace=torch.empty(size, dtype=torch.uint8))


def large(b: int, n: int, k: int, d: int) -> Callable[[], tuple]:
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(b, n, d, generator=generator)
    scores = torch.rand(b, n, generator=generator)
    return lambda: tuple(ck.condense(features, scores, keep=k, grid=(n // 16, 16)))


def into_own_memory(b: int, n: int, k: int, d: int) -> Callable[[], tuple]:
    generator = torch.Generator().manual_seed(n + 1)
    features, scores = torch.randn(b, n, d, generator=generator), torch.rand(b, n, generator=generator)
    call = (features, scores, k, 0)

    def run() -> tuple:
        out = ck.select_and_merge(*call, spatial_weight=0)
        workspace = torch.empty(ck.workspace_bytes(*call, spatial_weight=0), dtype=torch.uint8)
        return tuple(ck.select_and_merge(*call, spatial_weight=0, workspace=workspace, out=out))

    return run


def training(b: int, n: int, k: int, d: int) -> Callable[[], tuple]:
    generator = torch.Generator().manual_seed(n + 2)
    x, a = torch.randn(b, n, d, generator=generator), torch.rand(b, n, generator=generator)

    def run() -> tuple:
        features, scores = x.clone().requires_grad_(), a.clone().requires_grad_()
        out = ck.select_and_merge(features, scores, k, 0, spatial_weight=0)
        gradients = torch.autograd.grad(out.merged.square().sum() + out.mass.sum(), (features, scores))
        return (*(part.detach() for part in out), *gradients)

    return run


def wrong() -> tuple:
    """A call that is refused, beside those that are not."""
    try:
        ck.condense(torch.zeros(1, 9, 4), torch.zeros(1, 8), keep=3)
    except ValueError as error:
        return (torch.tensor(len(str(error))),)
    return (torch.tensor(0),)


def cases_of(seed: int, count: int) -> list[Case]:
    """With what a single thread makes of them."""
    torch.set_num_threads(1)
    calls = [draw(seed, index) for index in range(count)]
    runs = [(call.words(), plain(call)) for call in calls]
    for sizes in LARGE:
        runs += [(f"{make.__name__}{sizes}", make(*sizes)) for make in (large, into_own_memory, training)]
    runs.append(("wrong()", wrong))
    return [Case(words, run, tuple(part.clone() for part in listed(run()))) for words, run in runs]


@dataclass
class Soak:
    seed: int
    cases: list[Case]
    ends: float
    calls: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    interrupted: bool = False

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends or bool(self.failures)

    def work(self, number: int) -> None:
        """The life of a thread."""
        order, own = random.Random(f"{self.seed}/{number}"), Counter()
        torch.set_num_threads(order.choice((1, 1, 2, 3)))
        ends = time.monotonic() + LIFE
        while time.monotonic() < ends and not self.is_over:
            case = order.choice(self.cases)
            try:
                assert_same_bits(case.run(), case.expected, f"thread {number}, {torch.get_num_threads()} of torch")
            except Exception as error:  # whatever it is, it is a finding
                with self.lock:
                    self.failures.append(f"{case.words}\n  {type(error).__name__}: {error}\n  seed {self.seed}")
            own[case.words.partition("(")[0]] += 1
        with self.lock:
            self.calls += own


@dataclass
class Sample:
    at: float  # seconds
    resident: int  # bytes
    files: int
    threads: int


def sample(started: float) -> Sample:
    """Of the process between two generations, when nothing is kept for calls to come."""
    features, scores = torch.ones(1, 9, 4), torch.ones(1, 9)
    for _ in range(FORGOTTEN):
        ck.condense(features, scores, keep=3, grid=(3, 3))
    gc.collect()
    LIBC.malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return Sample(time.monotonic() - started, resident, files, threads)


def growth(values: list[float]) -> float:
    """From the median of the first third to that of the last, as a share."""
    third = max(1, len(values) // 3)
    first, last = median(values[:third]), median(values[-third:])
    return (last - first) / first


def warm(samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if s.at >= WARM_UP * samples[-1].at]


def judge(samples: list[Sample]) -> list[str]:
    """What has grown."""
    limits = {"resident": GROWTH, "files": 0.0, "threads": 0.0}
    grown = {name: growth([getattr(s, name) for s in warm(samples)]) for name in limits}
    return [
        f"{name}: grew by {grown[name]:.1%}, allowed {limits[name]:.0%}"
        for name in limits
        if grown[name] > limits[name]
    ]


def watch(soak: Soak, count: int, started: float, samples: list[Sample], console: Console) -> None:
    """One generation of threads after the other, and what is left of each."""
    columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, born = progress.add_task("", total=soak.ends - started), 0
        while not soak.is_over:
            alive = [threading.Thread(target=soak.work, args=(born + i,), daemon=True) for i in range(count)]
            born += count
            for thread in alive:
                thread.start()
            for thread in alive:
                thread.join()
            samples.append(sample(started))
            words = f"{samples[-1].resident / 2**20:.0f} MiB, {sum(soak.calls.values())} calls"
            progress.update(task, completed=samples[-1].at, description=words)


def report(soak: Soak, samples: list[Sample], problems: list[str]) -> None:
    table = Table(title=f"{samples[-1].at:.0f} s, seed {soak.seed}", title_justify="left")
    for name in ("", "first", "last", "growth"):
        table.add_column(name, justify="left" if not name else "right")
    third = max(1, len(warm(samples)) // 3)
    for name, unit in (("resident", 2**20), ("files", 1), ("threads", 1)):
        values = [getattr(s, name) / unit for s in warm(samples)]
        first, last = median(values[:third]), median(values[-third:])
        table.add_row(f"{name}{' [MiB]' if unit > 1 else ''}", f"{first:.0f}", f"{last:.0f}", f"{growth(values):+.2%}")
    Console(width=100 if not sys.stdout.isatty() else None, highlight=False).print(table)
    print(", ".join(f"{name} {count}" for name, count in sorted(soak.calls.items())))
    for words in (*soak.failures[:5], *problems):
        print("FAILED", words)
    print(f"{sum(soak.calls.values())} calls, {len(soak.failures)} results differ, seed {soak.seed}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="how long (3600)")
    parser.add_argument("--threads", type=int, default=8, help="of Python (8)")
    parser.add_argument("--cases", type=int, default=400, help="how many different calls are drawn (400)")
    parser.add_argument("--seed", type=int, help="repeats the draw; the time without it, printed")
    options = parser.parse_args(argv)
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}, {options.threads} threads, {options.seconds:.0f} s", flush=True)
    # Else there is a heap for each thread, which grows to its own peak for hours, and leaves holes that hide a leak.
    LIBC.mallopt(*ONE_HEAP)
    LIBC.mallopt(*MAPPED)
    cases = cases_of(seed, options.cases)
    started = time.monotonic()
    soak = Soak(seed, cases, started + options.seconds)
    samples = [sample(started)]
    try:
        watch(soak, options.threads, started, samples, Console(stderr=True))
    except KeyboardInterrupt:
        soak.ends, soak.interrupted = 0.0, True
        print("interrupted: what follows is of the time until then")
    problems = [] if soak.interrupted else judge(samples)  # of a part of the time nothing is promised
    report(soak, samples, problems)
    return 130 if soak.interrupted else int(bool(soak.failures or problems))


if __name__ == "__main__":
    sys.exit(main())
