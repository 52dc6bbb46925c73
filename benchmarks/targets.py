"""What was promised, as data, and what a run says to it: python benchmarks/targets.py FILE.csv prints the verdicts."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import console
from rich.table import Table
from rows import Row, number, read_path


class Target(NamedTuple):
    """Something measured has to be at most ``goal``; a share of the peak, at least."""

    case: str
    op: str
    shape: str
    side: str
    goal: float
    over: str = ""  # the side that it is divided by; none: the value itself, in ``unit``
    unit: str = "ms"  # or "us", or "MB", the peak of extra memory, or "us a pick", or "of peak", of the tiles of S
    less: str = ""  # the shape with fewer picks: what the others cost
    reason: Callable[["Measured"], str] | None = None  # why it cannot be met, where it cannot
    needs: str = ""  # an instruction set without which the target does not apply
    without: str = ""  # an instruction set with which it does not apply
    mode: str = "call"


class Measured(NamedTuple):
    target: Target
    row: Row
    over: Row | None
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.target.goal if self.target.unit == SHARE else self.value <= self.target.goal


SHARE = "of peak"


def shown(measured: Measured) -> tuple[str, str]:
    """The value and the goal."""
    value, goal = measured.value, measured.target.goal
    if measured.target.unit == SHARE:
        return f"{value:.0%} {SHARE}", f"at least {goal:.0%}"
    unit = "" if measured.over else f" {measured.target.unit}"
    return number(value) + unit, f"at most {number(goal)}{unit}"


def floor_ms(row: Row) -> float | None:
    """The multiply-adds of the upper half of S at the processor's peak, nothing else; none where that is unknown."""
    return row.peak_gflops and row.B * row.N * (row.N + 1) * row.D / row.peak_gflops * 1e-6


def tiles_alone(measured: Measured, instructions: int = 1) -> str:
    """The roofline argument: what the target leaves for everything, against the tiles of S at the processor's peak.

    instructions: those of a pair of numbers.
    """
    row, over = measured.row, measured.over
    floor, allowed = floor_ms(row), measured.target.goal * over.median_ms
    if floor is None:
        return "no peak was measured"
    floor *= instructions
    text = (
        f"the upper half of S alone takes {floor:.2f} ms at the processor's peak of {row.peak_gflops:.0f} GFLOP/s, "
        f"{floor / over.median_ms:.2f} of {over.side}"
    )
    if floor > allowed:
        return f"{text}: more than the {allowed:.2f} ms allowed, so it cannot be met"
    reached = f"{row.median_ms:.2f} ms taken, {floor / row.median_ms:.0%} of peak"
    return f"{text}; {allowed:.2f} ms are allowed, {reached}"


def differences_alone(measured: Measured) -> str:
    """Distances are sums of squared differences, as products would cancel: two instructions where a product has one."""
    return tiles_alone(measured, instructions=2)


def around_the_products(measured: Measured) -> str:
    return (
        "the products of tiles run at 97 % of it; the rest is measuring lengths before any key can be scaled, packing, "
        "the lower halves of blocks on the diagonal, finishing tiles, and keys and results that are not in the caches "
        "(docs/design/cpu.md, The tiles, by parts)"
    )


def rows_from_memory(measured: Measured) -> str:
    pick = 1e3 * measured.row.median_ms / measured.row.K
    return (
        f"{pick:.2f} us a pick, of which 0.15 with s in the cache (docs/design/greedy.md): it waits for the rows of s"
    )


def ratio(case: str, shape: str, side: str, over: str, goal: float, op: str = "select_and_merge", **options) -> Target:
    return Target(case, op, shape, side, goal, over, **options)


def whole_calls(
    case: str, op: str, ours: str, theirs: str, at_576: int, at_2880: int, reason=tiles_alone
) -> list[Target]:
    """From features on, beside the published loop: so many times faster at K = 192 and at K = 320."""
    sizes = (("576", "llava15-192", at_576), ("2880", "llava-next-global", at_2880))
    return [
        ratio(f"{case}, {n} / published", shape, ours, theirs, 1 / goal, op, reason=reason) for n, shape, goal in sizes
    ]


def of_peak(case: str, shape: str, side: str) -> Target:
    return Target(f"similarity, {case}", "similarity", shape, side, 0.85, unit=SHARE, reason=around_the_products)


CPU = (
    of_peak("576, fp32", "llava15-192", "ours fp32"),
    of_peak("576, bf16", "llava15-192", "ours bf16"),
    of_peak("2880, fp32", "llava-next-global", "ours fp32"),
    of_peak("2880, bf16", "llava-next-global", "ours bf16"),
    ratio("fp32, 1 x 576, K = 192 / matmul", "llava15-192", "ours fp32", "matmul", 0.70, reason=tiles_alone),
    ratio(
        "bf16 / fp32 matmul, without AMX",
        "llava15-192",
        "ours bf16",
        "matmul",
        0.70,
        reason=tiles_alone,
        without="amx_bf16",
    ),
    ratio("bf16 / fp32 matmul, with AMX", "llava15-192", "ours bf16", "matmul", 0.25, needs="amx_bf16"),
    ratio("8 x 576, K = 64 / bmm", "llava15-64-batch8", "ours fp32", "matmul", 0.68, reason=tiles_alone),
    ratio("2880, K = 320 / matmul", "llava-next-global", "ours fp32", "matmul", 0.65, reason=tiles_alone),
    ratio(
        "greedy_select, N = 576, K = 192 / top-k",
        "llava15-192",
        "ours",
        "top-k",
        0.5,
        op="greedy_select",
        reason=rows_from_memory,
    ),
    ratio("576, K = 192 / plain loop", "llava15-192", "ours fp32", "plain loop", 1 / 6, reason=tiles_alone),
    ratio("576, K = 192 / DivPrune", "llava15-192", "ours fp32", "DivPrune", 1 / 8, reason=tiles_alone),
    ratio("576, K = 192 / CDPruner", "llava15-192", "ours fp32", "CDPruner", 1 / 6, reason=tiles_alone),
    *whole_calls("max-min", "greedy_select", "DivPrune, whole, ours", "DivPrune, as published, whole", 6, 4),
    *whole_calls("IDPruner", "greedy_select", "IDPruner, whole, ours", "IDPruner, as published, whole", 5, 4),
    *whole_calls("DPP", "dpp_select", "whole", "whole, CDPruner", 5, 3),
    *whole_calls("coverage", "coverage_select", "ours from features", "SCOPE from features", 20, 30),
    *whole_calls(
        "DPC-kNN",
        "dpc_knn",
        "ours from features, k_nn = 5",
        "published from features, k_nn = 5",
        3,
        5,
        reason=differences_alone,
    ),
    ratio("16384, K = 640 / blocked matmul", "long-16384", "ours fp32", "matmul, blocked", 0.70, reason=tiles_alone),
    Target("16384, K = 640: peak extra memory", "select_and_merge", "long-16384", "ours fp32", 120, unit="MB"),
    Target("1 x 16 x 16: a call", "select_and_merge", "overhead", "ours fp32", 15, unit="us"),
)
_GPU = {"mode": "graph"}
GPU = (
    Target("1 x 576, K = 64, graph", "select_and_merge", "llava15-64", "ours bf16", 40, unit="us", **_GPU),
    Target("1 x 576, K = 192, graph", "select_and_merge", "llava15-192", "ours bf16", 90, unit="us", **_GPU),
    Target(
        "1 x 576, K = 192 - 64, graph",
        "select_and_merge",
        "llava15-192",
        "ours bf16",
        0.5,
        unit="us a pick",
        less="llava15-64",
        **_GPU,
    ),
    Target("1 x 576, K = 64, eager", "select_and_merge", "llava15-64", "ours bf16", 90, unit="us", mode="plain"),
    ratio("1 x 576, K = 64 / top-k", "llava15-64", "ours bf16", "top-k", 2, **_GPU),
    ratio("1 x 576, K = 192 / top-k", "llava15-192", "ours bf16", "top-k", 4, **_GPU),
    ratio("1 x 576, K = 192 / plain loop, eager", "llava15-192", "ours bf16", "plain loop", 1 / 40, mode="plain"),
    Target("1 x 2880, K = 320", "select_and_merge", "llava-next-global", "ours bf16", 0.300, **_GPU),
    ratio("128 x 576, K = 64 / bf16 bmm", "video-128", "ours bf16", "matmul bf16", 1.3, **_GPU),
)


def judge(rows: list[Row]) -> list[Measured]:
    """The targets whose rows are there."""
    by_key, result = {row.key: row for row in rows}, []
    for target in CPU + GPU:
        row = by_key.get((target.op, target.shape, target.side, target.mode))
        over = by_key.get((target.op, target.shape, target.over, target.mode))
        less = by_key.get((target.op, target.less, target.side, target.mode))
        if row is None or (target.over and over is None) or (target.less and less is None):
            continue
        simd = row.device.split()
        if (target.needs and target.needs not in simd) or (target.without and target.without in simd):
            continue
        absolute = {"ms": row.median_ms, "us": 1e3 * row.median_ms, "MB": row.peak_extra_mb}
        if less:
            absolute["us a pick"] = 1e3 * (row.median_ms - less.median_ms) / (row.K - less.K)
        if row.peak_gflops:
            absolute[SHARE] = floor_ms(row) / row.median_ms
        value = row.median_ms / over.median_ms if over else absolute.get(target.unit)
        if value is not None:
            result.append(Measured(target, row, over, value))
    return result


def verdict_table(rows: list[Row]) -> Table:
    table = Table(title="targets", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("measured", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("met", no_wrap=True)
    table.add_column("why not")
    for measured in judge(rows):
        reason = "" if measured.met or measured.target.reason is None else measured.target.reason(measured)
        table.add_row(
            measured.target.case,
            *shown(measured),
            "yes" if measured.met else "no",
            reason,
            style="" if measured.met else "bold",
        )
    if not table.row_count:
        table.caption = "none of their cases was run"
    return table


if __name__ == "__main__":
    console().print(verdict_table(read_path(Path(sys.argv[1]))))
