"""Pictures of a file of results: speed_n.png, speed_k.png, speed_b.png and roofline.png.

python benchmarks/plot.py FILE.csv FOLDER
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rows import Row, read_path
from shapes import SWEEPS

INK, GRID = "#333333", "#dddddd"
# Okabe and Ito's colours, which colour-blind readers tell apart; the markers differ too.
STYLES = {
    "ours fp32": ("#d55e00", "o", 2.6),
    "ours bf16": ("#e69f00", "o", 2.0),
    "matmul": ("#000000", "s", 1.6),
    "plain loop": ("#0072b2", "^", 1.3),
    "CDPruner": ("#cc79a7", "v", 1.3),
    "DivPrune": ("#56b4e9", "D", 1.3),
    "VisionZip": ("#009e73", "P", 1.3),
    "top-k": ("#777777", "X", 1.3),
}
NAMES = {"matmul": "S alone (matmul)", "top-k": "top-k + gather"}
AXES = {"N": "tokens N (a ninth is kept)", "K": "kept tokens K (N = 576)", "B": "images B (N = 576, K = 64)"}
LEFT, RIGHT = {"xytext": (-9, -4), "ha": "right"}, {"xytext": (9, -4), "ha": "left"}
# What the roofline shows: operator, shape, side, label and where that stands.
ROOFLINE = (
    ("similarity", "llava15-192", "matmul", "matmul of S", {"xytext": (9, -15), "ha": "left"}),
    ("similarity", "llava15-192", "ours fp32", "similarity", LEFT),
    ("select_and_merge", "llava15-192", "ours fp32", "select_and_merge", {"xytext": (0, -20), "ha": "right"}),
    ("select_and_merge", "llava15-192", "ours bf16", "the same, bf16", RIGHT),
    ("greedy_select", "llava15-192", "ours", "greedy_select", RIGHT),
    ("assign", "llava15-192", "ours", "assign", RIGHT),
    ("merge", "llava15-192", "ours fp32", "merge", LEFT),
    ("merge", "llava15-192", "ours bf16", "merge, bf16", {"xytext": (2, 9), "ha": "left"}),
)


def short(value: float) -> str:
    return f"{value:g}" if value < 1e4 else f"{value / 1000:g}k"


def figure(title: str, subtitle: str) -> tuple[plt.Figure, Axes]:
    """At the width of a page, with letters that can be read there."""
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK})
    made, axes = plt.subplots(figsize=(8.4, 4.8), dpi=110, layout="constrained")
    axes.set_title(f"{title}\n", loc="left", fontweight="bold", fontsize=13)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color="#666666", fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return made, axes


def apart(heights: list[float], gap: float) -> list[float]:
    """Heights in rising order, moved as little as needed for neighbours to be ``gap`` apart."""
    groups: list[tuple[float, int]] = []  # (centre, how many)
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1:
            (low, m), (high, n) = groups[-2:]
            if high - low >= gap * (m + n) / 2:
                break
            groups[-2:] = [((low * m + high * n) / (m + n), m + n)]
    return [centre + gap * (i - (n - 1) / 2) for centre, n in groups for i in range(n)]


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]], room: float = 0.055) -> None:
    """Each curve's name beside its last point, none over another; axes are logarithmic."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    sides = sorted(ends, key=lambda side: ends[side][1])
    heights = apart([math.log10(ends[side][1]) for side in sides], room * (high - low))
    for side, height in zip(sides, heights, strict=True):
        axes.annotate(
            NAMES.get(side, side),
            (ends[side][0], 10**height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=STYLES[side][0],
            fontweight="bold" if side.startswith("ours") else "normal",
            annotation_clip=False,
        )


def origin(row: Row) -> str:
    threads = "" if row.mode != "call" else f", {row.threads} threads"
    return f"{row.device.split(',')[0]}{threads}, torch {row.torch}, commit {row.commit}, {row.date}"


def fastest_mode(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    """By operator, shape and side: a graph's replay where there is one."""
    return {row.key[:3]: row for row in sorted(rows, key=lambda row: row.mode == "graph")}


def speed(by_key: dict, letter: str, path: Path) -> None:
    names = list(SWEEPS[letter])
    curves = {}
    for side in STYLES:
        found = [by_key[key] for name in names if (key := ("select_and_merge", name, side)) in by_key]
        if found:
            curves[side] = [(getattr(row, letter), row.median_ms / row.B) for row in found], found[0]
    if not curves:
        return
    what = "milliseconds an image" if letter == "B" else "milliseconds"
    made, axes = figure(f"Time of select_and_merge against {letter}", origin(next(iter(curves.values()))[1]))
    for side, (points, _) in curves.items():
        colour, marker, width = STYLES[side]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=width, markersize=5.5)
    axes.set(xscale="log", yscale="log", xlabel=AXES[letter], ylabel=what)
    ticks = sorted({x for points, _ in curves.values() for x, _ in points})
    axes.set_xticks(ticks, [short(x) for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    axes.set_ylim(top=1.5 * axes.get_ylim()[1])  # room for the labels
    label_ends(axes, {side: points[-1] for side, (points, _) in curves.items()})
    made.savefig(path)
    plt.close(made)


def height(row: Row) -> float:
    """Of the roof; a file may be older than the peak, and AMX has none."""
    return max(row.peak_gflops or 0, row.ceiling_gflops)


def ceilings(axes: Axes, rows: dict[str, Row], gbs: float, right: float) -> None:
    """Of each kind the processor's peak and the large product below it, from where memory no longer limits."""
    lines = [
        (level, f"{name}, {kind}: {level:,.0f} GFLOP/s", style, colour)
        for kind, row in rows.items()
        for name, level, style, colour in (
            ("large matmul", row.ceiling_gflops, "--", "#777777"),
            ("peak", row.peak_gflops, "-", INK),
        )
        if level
    ]
    lines.sort(key=lambda line: line[0])
    places = apart([math.log10(level) for level, *_ in lines], 0.13)
    for (level, label, style, colour), place in zip(lines, places, strict=True):
        axes.plot([level / gbs, right], [level, level], style, color=colour, linewidth=1.6)
        axes.annotate(
            label, (level / gbs, 10**place), xytext=(-12, 0), textcoords="offset points", ha="right", va="center",
            color=colour, fontsize=9.5,
        )  # fmt: skip


def roofline(by_key: dict, path: Path) -> None:
    points = [(by_key[key[:3]], *key[3:]) for key in ROOFLINE if key[:3] in by_key]
    if not points:
        return
    wide = max((row for row, *_ in points if "bf16" not in row.side), key=height)
    half = max((row for row, *_ in points), key=height)
    made, axes = figure("Arithmetic and memory: how near the machine's ceilings", origin(wide))
    xs = [row.gflop / row.mbyte * 1e3 for row, *_ in points]
    left, right = min(xs) / 6, max(xs) * 12
    axes.plot(
        [left, height(half) / wide.ceiling_gbs], [left * wide.ceiling_gbs, height(half)], color=INK, linewidth=1.6
    )
    # 16 bits have ceilings of their own where the machine has instructions for them.
    kinds = {"fp32": wide} | ({"bf16": half} if height(half) > 1.1 * height(wide) else {})
    ceilings(axes, kinds, wide.ceiling_gbs, right)
    middle = height(wide) / wide.ceiling_gbs / 8
    axes.annotate(
        f"large copy: {wide.ceiling_gbs:,.0f} GB/s", (middle, middle * wide.ceiling_gbs), xytext=(-8, 4),
        textcoords="offset points", ha="right", fontsize=9.5,
    )  # fmt: skip
    for (row, label, place), x in zip(points, xs, strict=True):
        colour, marker, _ = STYLES.get(row.side, STYLES["ours fp32"])
        axes.plot(x, row.gflops, marker=marker, color=colour, markersize=8)
        axes.annotate(label, (x, row.gflops), textcoords="offset points", color=colour, **place)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte that the task needs", ylabel="GFLOP/s", xlim=(left, right)
    )
    axes.set_ylim(top=2.5 * height(half))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    made.savefig(path)
    plt.close(made)


def draw(rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    by_key = fastest_mode(rows)
    for letter in SWEEPS:
        speed(by_key, letter, folder / f"speed_{letter.lower()}.png")
    roofline(by_key, folder / "roofline.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    draw(read_path(arguments.csv), arguments.folder)
