"""select_and_merge against what it replaces and against the matrix product that everyone pays.

    python benchmarks/bench_select_and_merge.py            the sides interleaved in one run, with ratios
    make bench                                             the same sides under pytest-benchmark

No time is taken before the results agree.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import plain_torch
import pytest
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import SHAPES, Shape, make

import condense_kernels as ck


def providers(shape: Shape) -> dict[str, Callable]:
    """The first is the measure of the ratios; what a side leaves out is said in its name."""
    features, scores = make(shape)
    half = features.bfloat16(), scores.bfloat16()
    z = torch.nn.functional.normalize(features, dim=-1)
    counts, grid = (shape.num_anchors, shape.num_background), shape.grid
    kept = sum(counts)

    def top_k():
        indices = scores.topk(kept, dim=1).indices.sort(dim=1).values
        return features.gather(1, indices[..., None].expand(-1, -1, shape.channels))

    return {
        "matmul of S alone": lambda: torch.matmul(z, z.transpose(1, 2)),
        "condense, fp32": lambda: torch.ops.condense.select_and_merge(features, scores, *counts, grid=grid),
        "condense, bf16": lambda: torch.ops.condense.select_and_merge(*half, *counts, grid=grid),
        "plain torch loop": lambda: plain_torch.select_and_merge(features, scores, *counts, grid),
        "top-k + sort + gather, no merge": top_k,
    }


def check(shape: Shape) -> None:
    """The plain loop and the kernel agree, or nothing is timed."""
    features, scores = make(shape)
    counts = (shape.num_anchors, shape.num_background)
    ours = ck.select_and_merge(features, scores, *counts, grid=shape.grid)
    plain = plain_torch.select_and_merge(features, scores, *counts, shape.grid)
    for name, a, b in zip(ours._fields, ours, plain, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def interleaved(sides: dict[str, Callable], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each side, one call of each in turn, so that a drifting machine harms all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for _ in track(range(rounds), title, transient=True):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} interleaved rounds")
    for name in arguments.shapes:
        shape = SHAPES[name]
        check(shape)
        times = interleaved(providers(shape), arguments.rounds, name)
        table = Table("side", "median ms", "p20", "p80", "x matmul", title=f"{name}: {shape}", title_justify="left")
        base = statistics.median(next(iter(times.values())))
        for side, seconds in times.items():
            p20, p80 = (torch.tensor(seconds).quantile(q).item() for q in (0.2, 0.8))
            median = statistics.median(seconds)
            table.add_row(side, *(f"{t * 1e3:.3f}" for t in (median, p20, p80)), f"{median / base:.2f}")
        Console().print(table)


@pytest.mark.parametrize("name", ["llava15-192", "llava15-64-batch8"])
@pytest.mark.parametrize("side", list(providers(Shape(1, (1, 2), 2, 1, 0))))
def test_select_and_merge(name, side, benchmark):
    check(SHAPES[name])
    benchmark.group = name
    benchmark(providers(SHAPES[name])[side])


if __name__ == "__main__":
    main()
