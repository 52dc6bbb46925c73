"""The figure of the efficiency table: what fewer tokens save, and how much of what the FLOPs promise."""

from pathlib import Path
from typing import Any

from ..models.efficiency import Row
from .report_table import decoder_of, line, threads_of

# Okabe and Ito's colours, which the colour-blind tell apart; each with a marker of its own.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
          ("#000000", "X"), ("#8C8C00", "*"))  # fmt: skip
GREY, SMALL = "#666666", 9


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows[1:]:
        if not row.reason:
            found.setdefault(row.side.method or "", []).append(row)
    return {name: sorted(of, key=lambda row: row.mean("visual")) for name, of in found.items()}


def draw(path: Path, rows: list[Row], about: dict[str, Any], model: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_formula = decoder_of(model) is not None
    figure = Figure(figsize=(11.5 if with_formula else 7.8, 4.6), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if with_formula else 2)
    methods = by_method(rows)
    for axes, name, title in zip(
        panels, ("total", "first"), ("total time, ms", "time to first token, ms"), strict=False
    ):
        draw_times(axes, rows[0], methods, name, title)
    if with_formula:
        draw_promise(panels[2], rows[0], methods, model)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=SMALL)
    what = (
        f"{about['model']}, {about['new tokens']} new tokens, {about['dtype']}; {about['clock']}, {threads_of(about)}"
    )
    figure.suptitle(what, fontsize=SMALL + 2)
    figure.savefig(path)


def draw_times(axes: Any, everything: Row, methods: dict[str, list[Row]], name: str, title: str) -> None:
    low, high = everything.quartiles(name)
    axes.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    axes.axhline(
        everything.median(name), color=GREY, linestyle="--", label=f"all {everything.mean('visual'):.0f} tokens"
    )
    widest = max(row.mean("visual") for of in methods.values() for row in of)
    for at, ((method, of), (colour, marker)) in enumerate(zip(methods.items(), STYLES, strict=False)):
        aside = 0.012 * widest * (at - (len(methods) - 1) / 2)  # so that bars of one budget stand beside each other
        medians = [row.median(name) for row in of]
        spread = [[abs(row.quartiles(name)[end] - m) for row, m in zip(of, medians, strict=True)] for end in (0, 1)]
        at_tokens = [row.mean("visual") + aside for row in of]
        axes.errorbar(at_tokens, medians, yerr=spread, color=colour, marker=marker, markersize=6, capsize=3,
                      linewidth=1.3, label=method)  # fmt: skip
    axes.set(xlabel="visual tokens in the language model", ylabel=title)
    axes.set_xticks(apart({round(row.mean("visual")) for of in methods.values() for row in of}, widest / 12))
    plain(axes)


def apart(ticks: set[int], least: float) -> list[int]:
    """Those whose numbers do not run into each other, the largest first."""
    shown: list[int] = []
    for tick in sorted(ticks, reverse=True):
        if not shown or shown[-1] - tick >= least:
            shown.append(tick)
    return shown


def draw_promise(axes: Any, everything: Row, methods: dict[str, list[Row]], model: Any) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    axes.axhline(1, color=GREY, linestyle="--")
    for (_, of), (colour, marker) in zip(methods.items(), STYLES, strict=False):
        shares = [line(row, everything, model)["flops_eq9_share"] for row in of]
        times = [row.median("first") / everything.median("first") for row in of]
        axes.plot(shares, times, color=colour, marker=marker, markersize=6, linestyle="none")
    axes.text(0.97, 0.03, "above the line:\ntime falls by less\nthan FLOPs do", color=GREY, fontsize=SMALL, ha="right",
              va="bottom", transform=axes.transAxes)  # fmt: skip
    axes.set(xlabel="FLOPs (Eq. 9), share of all tokens'", ylabel="time to first token, share of all tokens'")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    plain(axes)


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.set_ylim(bottom=0)
