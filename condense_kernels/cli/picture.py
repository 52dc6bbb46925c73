"""The figure of the demo: one column a method, from the kept patches over the clusters to the rebuilt picture."""

import math
from pathlib import Path

import torch

from ..testing import Inputs
from .methods import Result, Row
from .patches import PATCH, put_together, side_of

# Okabe and Ito's colours, told apart by colour-blind readers too.
ANCHOR, BACKGROUND, KEPT = "#D55E00", "#0072B2", "#CC79A7"
SMALL, LARGE = 12.5, 15
LONGEST_NAME = 21  # characters that fit above a panel


def faded(picture: torch.Tensor) -> torch.Tensor:
    """Grey and light, so that what is laid over it stands out."""
    return 0.45 * picture.mean(dim=2, keepdim=True).expand_as(picture) + 0.5


def show(axes, picture: torch.Tensor, title: str = "", below: str = "") -> None:
    axes.imshow(picture.clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=LARGE, pad=7)
    axes.set_xlabel(below, fontsize=SMALL, labelpad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_boundaries(axes, label: torch.Tensor, side: int, colour: str, width: float) -> None:
    """A line between neighbouring patches of different clusters."""
    from matplotlib.collections import LineCollection

    grid = label.reshape(side, side).cpu()
    lines = []
    for y, x in (grid[:, 1:] != grid[:, :-1]).nonzero().tolist():
        lines.append([((x + 1) * PATCH - 0.5, y * PATCH - 0.5), ((x + 1) * PATCH - 0.5, (y + 1) * PATCH - 0.5)])
    for y, x in (grid[1:] != grid[:-1]).nonzero().tolist():
        lines.append([(x * PATCH - 0.5, (y + 1) * PATCH - 0.5), ((x + 1) * PATCH - 0.5, (y + 1) * PATCH - 0.5)])
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))


def draw_outlines(axes, patches: list[int], side: int, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    for patch in patches:
        corner = (patch % side * PATCH + 0.5, patch // side * PATCH + 0.5)
        axes.add_patch(Rectangle(corner, PATCH - 2, PATCH - 2, fill=False, edgecolor=colour, linewidth=width))


def draw_kept(axes, picture: torch.Tensor, result: Result, side: int, width: float = 2) -> None:
    """Kept patches in full colour with an outline, the others faded; for pooling the blocks."""
    own = torch.zeros(side * side, 1, dtype=picture.dtype, device=picture.device)
    own[result.anchors + result.background + result.kept] = 1
    window = put_together(own.expand(-1, PATCH * PATCH * 3), side)
    show(axes, window * picture + (1 - window) * (picture if result.blocks else faded(picture)))
    if result.blocks:
        draw_boundaries(axes, result.assignment, side, KEPT, 1.5)
    for patches, colour in ((result.anchors, ANCHOR), (result.background, BACKGROUND), (result.kept, KEPT)):
        draw_outlines(axes, patches, side, colour, width)


def mean_colours(result: Result, side: int) -> torch.Tensor:
    """Every cluster in the mean colour of its merged token."""
    colour = result.merged.reshape(result.size, -1, 3).mean(dim=1)  # [K, 3]
    patches = colour[result.assignment].repeat(1, PATCH * PATCH)  # [N, D]
    return put_together(patches, side)


def show_scores(axes, inputs: Inputs) -> None:
    side = side_of(inputs)
    axes.imshow(inputs.scores.reshape(side, side).cpu().numpy(), cmap="cividis", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("score: unlike the mean patch\n(bright is high)", fontsize=SMALL, labelpad=6)


def show_legend(axes, inputs: Inputs) -> None:
    from matplotlib.patches import Patch

    axes.axis("off")
    entries = (
        (ANCHOR, f"anchor ({inputs.num_anchors})"),
        (BACKGROUND, f"background ({inputs.num_background})"),
        (KEPT, "kept, or a block of pooling"),
    )
    handles = [Patch(facecolor="none", edgecolor=colour, linewidth=2.5, label=label) for colour, label in entries]
    axes.legend(handles=handles, loc="upper left", fontsize=SMALL, frameon=False, borderaxespad=0, handlelength=1.2,
                handleheight=1.2)  # fmt: skip
    text = (
        "redundancy: pairs of kept\ntokens with cosine ≥ 0.75\n(less is better)\n\n"
        "PSNR: rebuilt against original\n(more is better); detail: on the\nquarter with the highest scores"
    )
    axes.text(0, 0.6, text, fontsize=SMALL - 1, va="top", transform=axes.transAxes, linespacing=1.3)


def decibels(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def draw_method(column, row: Row, side: int, picture: torch.Tensor, best: bool) -> None:
    kept, clusters, rebuilt = column
    result, quality = row.result, row.quality
    draw_kept(kept, picture, result, side)
    ours = bool(result.anchors or result.background)
    kept.set_title(row.title, fontsize=LARGE, pad=7, fontweight="bold" if ours else "normal")
    kept.set_xlabel(f"redundancy {percent(quality.redundancy)}", fontsize=SMALL, labelpad=6)
    show(clusters, mean_colours(result, side), below=f"{result.size} clusters, mean colours")
    draw_boundaries(clusters, result.assignment, side, "white", 0.9)
    numbers = f"PSNR {decibels(quality.psnr)}, detail {decibels(quality.detail)} dB"
    show(rebuilt, put_together(result.merged[result.assignment], side), below=numbers)
    rebuilt.xaxis.label.set_fontweight("bold" if best else "normal")


def draw(path: Path, name: str, picture: torch.Tensor, inputs: Inputs, rows: list[Row]) -> None:
    """Write the PNG. The picture is [H W 3]; the method with the highest PSNR has its numbers in bold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.4, 9.7), dpi=92, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1 + len(rows))
    side, tokens = side_of(inputs), inputs.num_anchors + inputs.num_background
    title = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    show(panels[0, 0], picture, title, f"{side * side} patches → {tokens} tokens")
    show_scores(panels[1, 0], inputs)
    show_legend(panels[2, 0], inputs)
    best = max(row.quality.psnr for row in rows)
    for i, row in enumerate(rows, start=1):
        draw_method(panels[:, i], row, side, picture, row.quality.psnr == best)
    for i, label in enumerate(("1. kept patches", "2. clusters", "3. rebuilt from tokens")):
        panels[i, 1].set_ylabel(label, fontsize=SMALL + 1, labelpad=8)
    figure.savefig(path, format="png", facecolor="white", pil_kwargs={"optimize": True})
