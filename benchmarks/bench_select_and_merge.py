"""select_and_merge against what it replaces and against the matrix product that everyone pays.

    python benchmarks/bench_select_and_merge.py            the sides interleaved in one run, with ratios
    make bench                                             the same sides under pytest-benchmark

No time is taken before the results agree.
"""

import argparse
import csv
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import plain_torch
import pytest
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import SHAPES, Shape, make

import condense_kernels as ck
from condense_kernels.cli.env import processor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def providers(shape: Shape, device: str = DEVICE) -> dict[str, Callable]:
    """The first is the measure of the ratios; what a side leaves out is said in its name."""
    features, scores = make(shape, device=device)
    half = features.bfloat16(), scores.bfloat16()
    z = torch.nn.functional.normalize(features, dim=-1)
    counts, grid = (shape.num_anchors, shape.num_background), shape.grid
    kept = sum(counts)

    def plain(loop):
        return plain_torch.select_and_merge(features, scores, *counts, grid, loop)

    def top_k():
        indices = scores.topk(kept, dim=1).indices.sort(dim=1).values
        return features.gather(1, indices[..., None].expand(-1, -1, shape.channels))

    return {
        "matmul of S alone, fp32": lambda: torch.matmul(z, z.transpose(1, 2)),
        "condense, fp32": lambda: torch.ops.condense.select_and_merge(features, scores, *counts, grid=grid),
        "condense, bf16": lambda: torch.ops.condense.select_and_merge(*half, *counts, grid=grid),
        "plain torch, Eq. 2 as printed": lambda: plain(plain_torch.greedy_as_printed),
        "plain torch, running maximum": lambda: plain(plain_torch.greedy_running_maximum),
        "top-k + sort + gather, no merge": top_k,
    }


def check(shape: Shape, device: str = DEVICE) -> None:
    """The plain loop and the kernel agree, or nothing is timed."""
    features, scores = make(shape, device=device)
    counts = (shape.num_anchors, shape.num_background)
    ours = ck.select_and_merge(features, scores, *counts, grid=shape.grid)
    for loop in (plain_torch.greedy_as_printed, plain_torch.greedy_running_maximum):
        plain = plain_torch.select_and_merge(features, scores, *counts, shape.grid, loop)
        for name, a, b in zip(ours._fields, ours, plain, strict=True):
            rtol, atol = (1e-4, 1e-5) if a.is_floating_point() else (0, 0)
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def seconds(call: Callable) -> float:
    """One call: by the host's clock on CPU, between two events on a GPU."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def interleaved(sides: dict[str, Callable], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each side, one call of each in turn, so that a drifting machine harms all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for _ in track(range(rounds), title, transient=True):
        for name, call in sides.items():
            times[name].append(seconds(call))
    return times


def provenance() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else ", ".join(processor())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit,
    }


def rows_of(name: str, times: dict[str, list[float]]) -> list[dict[str, str]]:
    base = statistics.median(next(iter(times.values())))
    rows = []
    for side, measured in times.items():
        p20, median, p80 = torch.tensor(measured).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        ms = {"median ms": median, "p20 ms": p20, "p80 ms": p80}
        rows.append(
            {"shape": name, "side": side, **{key: f"{t * 1e3:.3f}" for key, t in ms.items()}}
            | {"x matmul": f"{median / base:.2f}"}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path, help="write the rows, with device, versions and commit")
    arguments = parser.parse_args()
    origin, rows = provenance(), []
    print(", ".join(f"{key} {value}" for key, value in origin.items()))
    for name in arguments.shapes:
        check(SHAPES[name])
        measured = rows_of(name, interleaved(providers(SHAPES[name]), arguments.rounds, name))
        table = Table(*list(measured[0])[1:], title=f"{name}: {SHAPES[name]}", title_justify="left")
        for row in measured:
            table.add_row(*list(row.values())[1:])
        Console().print(table)
        rows += measured
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *origin])
            writer.writeheader()
            writer.writerows(row | origin for row in rows)


@pytest.mark.parametrize("name", ["llava15-192", "llava15-64-batch8"])
@pytest.mark.parametrize("side", list(providers(Shape(1, (1, 2), 2, 1, 0), "cpu")))
def test_select_and_merge(name, side, benchmark):
    check(SHAPES[name])
    benchmark.group = name
    benchmark(seconds, providers(SHAPES[name])[side])


if __name__ == "__main__":
    main()
