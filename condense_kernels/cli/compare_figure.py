"""The figure of compare: quality against time, a point a method, a panel a model and budget."""

import math
from pathlib import Path
from typing import Any

from ..methods.registry import TEXT
from .compare_table import NAMES, Line, of
from .compared import ALWAYS, EVERYTHING, HEADLINES

# Okabe and Ito's colours, which the colour-blind tell apart.
SIMPLE = {"random": "#D55E00", "pooling": "#0072B2", "uniform": "#009E73"}
OTHER, GUIDED, SMALL = "#444444", "#CC79A7", 9


def draw(path: Path, flat: list[Line]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ons = [on for on in NAMES if any(line["on"] == on for line in flat)]
    budgets = {
        on: sorted({line["keep"] for line in flat if line["on"] == on and line["keep"] < line["of"]}) for on in ons
    }
    across = max(map(len, budgets.values()))
    titles = {line["method"]: line["title"] for line in flat if line["method"] != EVERYTHING}
    numbers = {name: at for at, name in enumerate(sorted(titles, key=lambda n: (n not in ALWAYS, titles[n])), start=1)}
    size = 3.9 * across + 3.4, max(3.9 * len(ons), 0.19 * len(titles) + 1)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ons), across, squeeze=False)
    for down, on in enumerate(ons):
        for right, axes in enumerate(panels[down]):
            axes.set_visible(right < len(budgets[on]))
            if right < len(budgets[on]):
                panel(axes, flat, on, budgets[on][right], numbers)
    legend(figure, titles, numbers, {line["method"] for line in flat if line.get("scores") == TEXT})
    figure.savefig(path)


def panel(axes: Any, flat: list[Line], on: str, keep: int, numbers: dict[str, int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    name = HEADLINES[on][0]
    points = [line for line in of(flat, on, keep) if "ms" in line]
    whole = next(line for line in flat if line["on"] == on and line["method"] == EVERYTHING)
    low, high = limits([line[name] for line in points], [line[name] for line in points if line["method"] in ALWAYS])
    for group in same(points, name):
        mark(axes, group, name, numbers, low, low + 0.04 * (high - low))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(line["ms"] for line in points) / 1.6, max(line["ms"] for line in points) * 1.6)
    axes.set_ylim(low, high)
    axes.set_title(f"{NAMES[on]}, K = {keep} of {whole['of']}", fontsize=SMALL + 1)
    axes.set_xlabel("ms a picture, one thread", fontsize=SMALL)
    axes.set_ylabel({"tokens": "cosine to the output on all tokens", "accuracy": "% right"}[name], fontsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, which="both")


def limits(values: list[float], simple: list[float]) -> tuple[float, float]:
    """Of the qualities shown: what is far below the simple baselines and nearly all others stands at the edge."""
    ordered = sorted(values)
    low, high = min([*simple, ordered[len(ordered) // 8]]), ordered[-1]
    pad = 0.12 * (high - low or 1)
    return low - pad, high + pad


def same(points: list[Line], name: str) -> list[list[Line]]:
    """Methods that gave the same result, together."""
    found: dict[tuple, list[Line]] = {}
    for line in points:
        found.setdefault((line[name], line["reconstruction"], line["coverage"]), []).append(line)
    return list(found.values())


def mark(axes: Any, group: list[Line], name: str, numbers: dict[str, int], low: float, edge: float) -> None:
    """One point, at the middle time of those that gave the same; what is below the axis stands at its edge."""
    line = next((line for line in group if line["method"] in ALWAYS), group[0])
    method, value = line["method"], line[name]
    colour = SIMPLE.get(method, GUIDED if line.get("scores") == TEXT else OTHER)
    ms, at = sorted(line["ms"] for line in group)[len(group) // 2], value if value >= low else edge
    if method in ALWAYS:
        axes.axhline(value, color=SIMPLE[method], linewidth=1, linestyle="--", alpha=0.7, zorder=1)
    error = line.get(f"{name} error", math.nan)
    if not math.isnan(error) and value >= low:
        axes.errorbar(ms, value, yerr=error, color=colour, alpha=0.25, linewidth=1, zorder=2)
    front = 5 if method in ALWAYS else 3
    own = sorted(numbers[line["method"]] for line in group)
    axes.scatter(ms, at, s=130, color=colour, edgecolor="white", linewidth=0.7, zorder=front, clip_on=False)
    axes.text(ms, at, str(own[0]), color="white", fontsize=6.5, fontweight="bold", ha="center",
              va="center_baseline", zorder=front + 0.5)  # fmt: skip
    beside = "".join(f", {number}" for number in own[1:]) + (f"  {value:.3g} ↓" if value < low else "")
    if beside:
        axes.annotate(beside, (ms, at), xytext=(6, 0), textcoords="offset points", fontsize=6.5, color=colour,
                      va="center_baseline", zorder=front)  # fmt: skip


def legend(figure: Any, titles: dict[str, str], numbers: dict[str, int], guided: set[str]) -> None:
    from matplotlib.lines import Line2D

    def entry(colour: str, number: int) -> Any:
        return Line2D(
            [],
            [],
            color=colour,
            marker=f"${number}$",
            linestyle="none",
            markersize=8 if number < 10 else 11,
            markeredgewidth=0.4,
        )

    handles = [entry(SIMPLE.get(name, GUIDED if name in guided else OTHER), numbers[name]) for name in numbers]
    labels = [titles[name] + (" (text)" if name in guided else "") for name in numbers]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=SMALL)
