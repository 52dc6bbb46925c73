"""Looks for cliffs on the CPU: sizes whose time sticks out of what their neighbours predict.

    python benchmarks/scan.py [--quick] [--only TEXT] [--factor 1.3]

One size varies along a line: N around powers of two and the edges of tiles, D, K or B, for a thread or two, a layout
and a dtype. A time divided by the work that is counted for its size is compared with that of the nearest four on its
line, fitted in log space. What is more than 1.3 times that is measured again, three times, in turn with its neighbours,
and listed if it sticks out by its least time of all. Times of one thread are processor time, of more wall time.

Results above 32 MiB, s of 2897 tokens, are new pages of the system's on every call, whatever operator of torch returns
them, unless malloc is told to keep them; here it is.
"""

import argparse
import ctypes
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

TILE = 48  # tokens of a side of csrc/rowops.h's tiles
AGAIN, TURNS = 3, 5
LEAST = 2e-6  # seconds: a difference below is of no interest


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    N: int = 576
    D: int = 256
    K: int = 64
    B: int = 1
    threads: int = 1
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.B} x {self.N} x {self.D}, K = {self.K}, {dtype}, {self.layout}, {self.threads} threads"

    @property
    def work(self) -> float:
        """In multiply-adds, more or less: whole tiles, passes over rows, and what any call and image costs."""
        width, per_element = math.ceil(self.N / TILE) * TILE, 32
        tiles = width * (width + TILE) / 2 * self.D
        passes = per_element * self.N * self.D
        picks = per_element * self.N * self.K
        own = {
            "similarity": tiles + passes + per_element / 4 * width * width,
            "greedy_select": picks,
            "assign": picks,
            "merge": passes + per_element * self.K * self.D,
            "select_and_merge": tiles + 2 * passes + 2 * picks + per_element / 4 * width * width,
        }[self.op]
        call, image, worth = 8 * 2**17, 4 * 2**17, 12 * 2**17
        threads = max(1, min(self.threads, int(self.B * (image + own) / worth)))  # a thread more costs some 15 us
        return call + max(math.ceil(self.B / threads), self.B / threads) * (image + own)


def powers(most: int) -> list[int]:
    """Sizes from 1 on: around powers of two, and some between them."""
    found = {1, 2, 3}
    for power in range(2, most.bit_length()):
        found |= {2**power - 1, 2**power, 2**power + 1, round(2**power * 1.25), round(2**power * 1.5)}
    return sorted(n for n in found if n <= most)


def tokens(most: int) -> list[int]:
    edges = {TILE * panels + off for panels in (1, 2, 4, 8, 12, 16, 24, 60) for off in (-1, 0, 1)}
    return sorted({*powers(most), *(n for n in edges | {most} if n <= most)})


Line = tuple[str, list[Case]]


def keep_freed_memory() -> None:
    """By glibc's malloc: what it has given once it gives again, of any size."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def lines(quick: bool) -> Iterator[Line]:
    """The size that varies, and the cases."""
    most = 100 if quick else 4200

    def line(size: str, values: list[int], **fixed) -> Line:
        found = [Case(**{**fixed, size: value}) for value in values]
        return size, [dataclasses.replace(case, K=min(case.K, case.N)) for case in found]

    for op in ("select_and_merge",) if quick else ("select_and_merge", "similarity"):
        yield line("N", tokens(most), op=op, D=64)
        yield line("N", tokens(most), op=op, D=64, threads=2)
    yield line("B", powers(9 if quick else 70), op="select_and_merge", N=49, D=64, K=12, threads=2)
    yield line("K", powers(64 if quick else 576), op="greedy_select", N=100 if quick else 576, threads=2)
    if quick:
        return
    for dtype in (torch.bfloat16, torch.float64):
        yield line("N", tokens(most), op="select_and_merge", D=64, dtype=dtype)
    for layout in ("channels-first", "sliced"):
        yield line("N", tokens(1600), op="select_and_merge", layout=layout)
        yield line("D", powers(1100), op="merge", layout=layout)
    for op in ("select_and_merge", "similarity", "merge"):
        yield line("D", powers(2100), op=op)
        yield line("B", powers(20), op=op, N=196, D=64, threads=2)
    for op in ("greedy_select", "assign"):
        yield line("N", tokens(most), op=op)
        yield line("N", tokens(most), op=op, threads=2)
    yield line("K", powers(576), op="select_and_merge")


@functools.cache
def similarities(n: int) -> torch.Tensor:
    return torch.rand(1, n, n, generator=torch.Generator().manual_seed(n))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels-first":
        return x.mT.contiguous().mT
    return torch.cat([x, x], dim=2)[:, :, : x.shape[2]] if layout == "sliced" else x


def call_of(case: Case) -> Callable:
    op, generator = getattr(torch.ops.condense, case.op), torch.Generator().manual_seed(0)
    K = case.K
    if case.op in ("greedy_select", "assign"):
        similarities.cache_clear()
        s = similarities(case.N).expand(case.B, -1, -1)
        kept, prior = torch.arange(K).expand(case.B, -1), torch.rand(case.B, case.N, generator=generator)
        if case.op == "assign":
            return functools.partial(op, s, kept, spatial_weight=0.0)
        return functools.partial(op, s, prior, K)
    x = torch.randn(case.B, case.N, case.D, generator=generator).to(case.dtype)
    x, scores = laid_out(x, case.layout), torch.rand(case.B, case.N, generator=generator)
    if case.op == "similarity":
        return functools.partial(op, x, scores)
    if case.op == "merge":
        kept = torch.arange(K).expand(case.B, -1)
        return functools.partial(op, x, scores, kept, (torch.arange(case.N) % K).expand(case.B, -1))
    return functools.partial(op, x, scores, K - K // 4, K // 4, spatial_weight=0.0)


def seconds(call: Callable, threads: int, budget: float) -> float:
    """The least of a call within `budget` seconds, at least three. One thread's is processor time, which the clock of a
    virtual machine has too short at times, where a call was interrupted: such calls count where there are no others."""
    torch.set_num_threads(threads)
    call()
    least, end, calls = (True, math.inf), time.perf_counter() + budget, 0
    while calls < 3 or time.perf_counter() < end:
        wall, own = time.perf_counter(), time.thread_time()
        call()
        own, wall = time.thread_time() - own, time.perf_counter() - wall
        if threads > 1 or own <= 0:
            own = wall
        least = min(least, (wall > 1.1 * own, own))
        calls += 1
    return least[1]


def neighbours(index: int, count: int) -> list[int]:
    first = min(max(index - 2, 0), max(count - 5, 0))
    return [i for i in range(first, min(first + 5, count)) if i != index]


def predicted(index: int, size: str, cases: list[Case], times: list[float]) -> float:
    """The time of a case by those of its neighbours, each for its work: a straight line in log space."""
    near = neighbours(index, len(cases))
    at = [math.log(getattr(cases[i], size)) for i in near]
    rates = [math.log(times[i] / cases[i].work) for i in near]
    slope, offset = np.polyfit(at, rates, 1)
    rate = offset + slope * math.log(getattr(cases[index], size))
    return math.exp(min(rate, max(rates))) * cases[index].work


def sticks_out(index: int, size: str, cases: list[Case], times: list[float], factor: float) -> bool:
    expected = predicted(index, size, cases, times)
    return times[index] > factor * expected and times[index] - expected > LEAST


def scan(line: Line, factor: float, budget: float, measure: Callable = seconds) -> list[tuple[Case, float, float]]:
    """What sticks out: the case, its time and the predicted one."""
    size, cases = line
    times = [measure(call_of(case), case.threads, budget) for case in cases]
    found = []
    for index, case in enumerate(cases):
        again = [index, *neighbours(index, len(cases))]
        for _ in range(AGAIN):
            if not sticks_out(index, size, cases, times, factor):
                break
            calls = {i: call_of(cases[i]) for i in again}
            for _ in range(TURNS):
                for i, call in calls.items():
                    times[i] = min(times[i], measure(call, case.threads, budget / TURNS))
        else:
            if sticks_out(index, size, cases, times, factor):
                found.append((case, times[index], predicted(index, size, cases, times)))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small sizes, in seconds")
    parser.add_argument("--only", default="", help="lines whose first case has this text in its name")
    parser.add_argument("--factor", type=float, default=1.3, help="what sticks out")
    options = parser.parse_args(arguments)
    import condense_kernels  # noqa: F401  registers the operators

    keep_freed_memory()
    threads = torch.get_num_threads()
    chosen = [line for line in lines(options.quick) if options.only in str(line[1][0])]
    console, found = Console(), []
    try:
        for line in track(chosen, console=Console(stderr=True)):
            found += scan(line, options.factor, 0.002 if options.quick else 0.04)
    finally:
        torch.set_num_threads(threads)
    table = Table("case", "us", "predicted", "times")
    for case, measured, expected in found:
        table.add_row(str(case), f"{measured * 1e6:.1f}", f"{expected * 1e6:.1f}", f"{measured / expected:.2f}")
    console.print(table if found else "Nothing sticks out.")
    console.print(f"{sum(len(cases) for _, cases in chosen)} sizes on {len(chosen)} lines, {len(found)} stick out.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
