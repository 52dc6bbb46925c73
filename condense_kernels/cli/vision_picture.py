"""The figures of the demo with real attention: one picture in full, and a contact sheet of several."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .dinov2 import Tokens
from .methods import Result, Row
from .patches import PATCH, cut, put_together
from .picture import (
    ANCHOR,
    BACKGROUND,
    KEPT,
    LARGE,
    LONGEST_NAME,
    SMALL,
    draw_boundaries,
    draw_kept,
    percent,
    show,
)
from .vision import Quality, Seen

HEAT = "inferno"
NUMBERS = "[CLS], tokens: cosine to the model's output on all tokens, with proportional attention"
SHOWN_ON_SHEET = 6  # pictures, so that one is large enough to be seen


class Colours(NamedTuple):
    """Three main directions of an output's tokens as red, green and blue: what is alike gets like colours."""

    mean: torch.Tensor  # [D]
    axes: torch.Tensor  # [D, 3]
    low: torch.Tensor  # [3]
    high: torch.Tensor  # [3]


def principal_colours(tokens: Tokens) -> Colours:
    patches = tokens.final[1:].double()
    mean = patches.mean(dim=0)
    _, axes = torch.linalg.eigh((patches - mean).T @ (patches - mean))
    axes = axes[:, -3:].flip(1)
    axes = axes * (tokens.scores[0].double() @ (patches - mean) @ axes).sign()  # bright is what [CLS] looks at
    levels = (patches - mean) @ axes
    return Colours(mean, axes, levels.quantile(0.02, dim=0), levels.quantile(0.98, dim=0))


def coloured(tokens: torch.Tensor, colours: Colours) -> torch.Tensor:  # [N, D] -> [N, 3]
    levels = (tokens.double() - colours.mean) @ colours.axes
    return ((levels - colours.low) / (colours.high - colours.low)).clamp(0, 1)


def as_picture(colour: torch.Tensor, side: int) -> torch.Tensor:  # [N, 3] -> [H, W, 3]
    return put_together(colour.repeat(1, PATCH * PATCH), side)


def cluster_colours(picture: torch.Tensor, result: Result) -> torch.Tensor:  # [N, 3]
    """The mean colour of the pixels of a patch's cluster."""
    patches = cut(picture).reshape(len(result.assignment), -1, 3).mean(dim=1)
    sums = patches.new_zeros(result.size, 3).index_add(0, result.assignment, patches)
    return (sums / result.assignment.bincount(minlength=result.size)[:, None])[result.assignment]


def show_heat(axes: Any, seen: Seen, below: str = "") -> None:
    from matplotlib.colors import PowerNorm

    side = math.isqrt(seen.tokens.scores.shape[1])
    heat = seen.tokens.scores.reshape(side, side).cpu().numpy()
    axes.imshow(heat, cmap=HEAT, norm=PowerNorm(0.6), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(below, fontsize=SMALL, labelpad=6)
    axes.spines[:].set_visible(False)


def cosines(quality: Quality) -> str:
    return f"[CLS] {quality.cls_prop:.3f}, tokens {quality.tokens_prop:.2f}"


def legend(figure: Any, seen: Seen, rest: str) -> None:
    from matplotlib.patches import Patch

    entries = (
        (ANCHOR, f"anchor ({seen.inputs.num_anchors})"),
        (BACKGROUND, f"background ({seen.inputs.num_background})"),
        (KEPT, rest),
    )
    handles = [Patch(facecolor="none", edgecolor=colour, linewidth=2.5, label=label) for colour, label in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False,
                  handlelength=1.2, handleheight=1.2, title=NUMBERS, title_fontsize=SMALL - 1)  # fmt: skip


def draw_method(column: Any, row: Row, output: torch.Tensor, seen: Seen, colours: Colours) -> None:
    kept, clusters, finished = column
    result, side = row.result, math.isqrt(len(row.result.assignment))
    draw_kept(kept, seen.picture, result, side)
    ours = bool(result.anchors or result.background)
    kept.set_title(row.title, fontsize=LARGE, pad=7, fontweight="bold" if ours else "normal")
    kept.set_xlabel(f"redundancy {percent(row.quality.redundancy)}", fontsize=SMALL, labelpad=6)
    draw_clusters(clusters, seen, result, 0.9)
    clusters.set_xlabel(f"{result.size} clusters, mean colours", fontsize=SMALL, labelpad=6)
    show(finished, as_picture(coloured(output[1:], colours)[result.assignment], side), below=cosines(row.quality))
    best = max(one.quality.cls_prop for one in seen.rows)
    finished.xaxis.label.set_fontweight("bold" if row.quality.cls_prop == best else "normal")


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=92, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """With a palette of 256 colours: a third of the bytes."""
    import numpy
    from PIL import Image

    figure.canvas.draw()
    image = Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(palette=image.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    colours = numpy.reshape(image.getpalette() or [], (-1, 3))
    colours[image.getpixel((0, 0))] = 255  # the page's white, which comes out nearly so
    image.putpalette(colours.flatten().tolist())
    image.save(path, format="PNG", optimize=True)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def draw(path: Path, seen: Seen) -> None:
    figure = new_figure(14.4, 10.2)
    panels = figure.subplots(3, 1 + len(seen.rows))
    n = seen.tokens.scores.shape[1]
    side = math.isqrt(n)
    colours = principal_colours(seen.tokens)
    show(panels[0, 0], seen.picture, shortened(seen.name), f"{n} tokens → {seen.rows[0].result.size}")
    show_heat(panels[1, 0], seen, "attention of [CLS]")
    show(panels[2, 0], as_picture(coloured(seen.tokens.final[1:], colours), side), below=f"the model on all {n}")
    for column, row, output in zip(panels.T[1:], seen.rows, seen.outputs, strict=True):
        draw_method(column, row, output, seen, colours)
    for i, label in enumerate(("1. kept tokens", "2. clusters", "3. the model's output")):
        panels[i, 1].set_ylabel(label, fontsize=SMALL + 1, labelpad=8)
    legend(figure, seen, "kept, or a block of pooling")
    save(figure, path)


def draw_clusters(axes: Any, seen: Seen, result: Result, width: float) -> None:
    side = math.isqrt(len(result.assignment))
    show(axes, as_picture(cluster_colours(seen.picture, result), side))
    draw_boundaries(axes, result.assignment, side, "white", width)


def draw_sheet(path: Path, seen: list[Seen]) -> None:
    """A column a picture, in the order that they were given."""
    seen = seen[:SHOWN_ON_SHEET]
    figure = new_figure(2.3 * len(seen) + 0.6, 14.6)
    panels = figure.subplots(6, len(seen), squeeze=False)
    for column, one in zip(panels.T, seen, strict=True):
        side = math.isqrt(one.tokens.scores.shape[1])
        show(column[0], one.picture, shortened(one.name, 19))
        show_heat(column[1], one)
        ours, top, _, random = one.rows
        for axes, row in ((column[2], ours), (column[4], top), (column[5], random)):
            draw_kept(axes, one.picture, row.result, side, width=1.5)
            axes.set_xlabel(cosines(row.quality), fontsize=SMALL - 1, labelpad=4)
        draw_clusters(column[3], one, ours.result, 0.6)
    labels = ("photograph", "attention of [CLS]", "condense", "its clusters", "top-k", "random")
    for axes, label in zip(panels[:, 0], labels, strict=True):
        axes.set_ylabel(label, fontsize=LARGE, labelpad=8, fontweight="bold" if label == "condense" else "normal")
    legend(figure, seen[0], "kept")
    save(figure, path)
