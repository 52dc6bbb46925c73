"""The figure of compare: quality against time, a point a method, a panel a model and budget."""

import math
from pathlib import Path
from typing import Any

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
    legend(figure, titles, numbers, {line["method"] for line in flat if str(line["scores"]).startswith("text")})
    figure.savefig(path)


def panel(axes: Any, flat: list[Line], on: str, keep: int, numbers: dict[str, int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    name = HEADLINES[on][0]
    points = [line for line in of(flat, on, keep) if "ms" in line]
    whole = next(line for line in flat if line["on"] == on and line["method"] == EVERYTHING)
    for line in points:
        method = line["method"]
        if method in ALWAYS:
            axes.axhline(line[name], color=SIMPLE[method], linewidth=1, linestyle="--", alpha=0.7, zorder=1)
        colour = SIMPLE.get(method, GUIDED if str(line["scores"]).startswith("text") else OTHER)
        error = line.get(f"{name} error", math.nan)
        if not math.isnan(error):
            axes.errorbar(line["ms"], line[name], yerr=error, color=colour, alpha=0.25, linewidth=1, zorder=2)
        front = 5 if method in ALWAYS else 3
        axes.scatter(line["ms"], line[name], s=130, color=colour, edgecolor="white", linewidth=0.7, zorder=front)
        axes.text(line["ms"], line[name], str(numbers[method]), color="white", fontsize=6.5, fontweight="bold",
                  ha="center", va="center_baseline", zorder=front + 0.5)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = min(line["ms"] for line in points), max(line["ms"] for line in points)
    axes.set_xlim(low / 1.6, high * 1.6)
    values = [line[name] for line in points]
    pad = 0.12 * (max(values) - min(values) or 1)
    axes.set_ylim(min(values) - pad, max(values) + pad)
    axes.set_title(f"{NAMES[on]}, K = {keep} of {whole['of']}", fontsize=SMALL + 1)
    axes.set_xlabel("ms a picture, one thread", fontsize=SMALL)
    axes.set_ylabel({"tokens": "cosine to the output on all tokens", "accuracy": "% right"}[name], fontsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL, which="both")


def legend(figure: Any, titles: dict[str, str], numbers: dict[str, int], guided: set[str]) -> None:
    from matplotlib.lines import Line2D

    def mark(colour: str, number: int) -> Any:
        return Line2D(
            [],
            [],
            color=colour,
            marker=f"${number}$",
            linestyle="none",
            markersize=8 if number < 10 else 11,
            markeredgewidth=0.4,
        )

    handles = [mark(SIMPLE.get(name, GUIDED if name in guided else OTHER), numbers[name]) for name in numbers]
    labels = [titles[name] + (" (text)" if name in guided else "") for name in numbers]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=SMALL)
