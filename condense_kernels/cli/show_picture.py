"""The figure of ``show``: a row a method, and for each budget its kept tokens beside their cosines."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .methods import SIMILAR, redundancy
from .picture import ANCHOR, BACKGROUND, KEPT, LARGE, SMALL, faded, percent
from .selection import OURS, TITLES, Cell, Kept, Seen, beside_alike, similarity_of
from .vision_picture import HEAT, new_figure, save, shortened

if TYPE_CHECKING:
    from .show import Answers

COSINES = "viridis"
NOTE = (
    f"matrices: cosines among the kept tokens, each beside the one most like it, so that like tokens form squares; "
    f"similar: pairs with cosine ≥ {SIMILAR}"
)
LONGEST_ANSWER = 14  # characters below a panel


def plain(axes: Any, title: str = "", below: str = "", bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=LARGE, pad=7)
    axes.set_xlabel(below, fontsize=SMALL, labelpad=5, fontweight=weight, parse_math=False)


def show_picture(axes: Any, picture: torch.Tensor, seen: Seen) -> None:
    """In units of patches, row 0 on top."""
    rows, columns = seen.grid
    height, width, _ = picture.shape
    axes.imshow(picture.cpu().numpy(), extent=(0, columns, rows, 0), aspect=height * columns / (width * rows),
                interpolation="nearest")  # fmt: skip


def over_pixels(values: torch.Tensor, seen: Seen) -> torch.Tensor:  # [N] -> [H, W]
    """Each pixel has its patch's."""
    at = (torch.arange(n, dtype=torch.int64, device=values.device) * side // n
          for n, side in zip(seen.picture.shape[:2], seen.grid, strict=True))  # fmt: skip
    y, x = at
    return values.view(*seen.grid)[y][:, x]


def outline(axes: Any, patches: list[int], columns: int, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    for patch in patches:
        corner = (patch % columns + 0.06, patch // columns + 0.06)
        axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=colour, linewidth=width))


def boundaries(axes: Any, label: torch.Tensor, seen: Seen) -> None:
    """A line between neighbouring patches of different blocks."""
    from matplotlib.collections import LineCollection

    grid = label.view(*seen.grid)
    lines = [[(x + 1, y), (x + 1, y + 1)] for y, x in (grid[:, 1:] != grid[:, :-1]).nonzero().tolist()]
    lines += [[(x, y + 1), (x + 1, y + 1)] for y, x in (grid[1:] != grid[:-1]).nonzero().tolist()]
    axes.add_collection(LineCollection(lines, colors=KEPT, linewidths=1.2, capstyle="projecting"))


def draw_kept(axes: Any, kept: Kept, seen: Seen) -> None:
    """Kept tokens in full colour with an outline, the others faded; of pooling the blocks."""
    columns = seen.grid[1]
    width = min(1.8, 26 / columns)
    if kept.method == "pooling":
        show_picture(axes, seen.picture, seen)
        boundaries(axes, kept.condensed.assignment[0].cpu(), seen)
        return
    own = torch.zeros(seen.tokens, dtype=torch.float32, device="cpu").index_fill(0, kept.condensed.indices[0].cpu(), 1)
    window = over_pixels(own, seen)[..., None]
    show_picture(axes, window * seen.picture + (1 - window) * faded(seen.picture), seen)
    outline(axes, kept.anchors, columns, ANCHOR, width)
    outline(axes, kept.background, columns, BACKGROUND, width)
    if kept.stages is None:
        outline(axes, kept.indices, columns, KEPT, width)


def matrix(kept: Kept, seen: Seen) -> torch.Tensor:
    s = similarity_of(kept, seen)
    order = beside_alike(s, seen.scores[0, kept.condensed.indices[0]])
    return s[order][:, order].cpu()


def draw_method(row: Any, cells: list[Cell], seen: Seen, low: float, on_all: str | None) -> Any:
    image = None
    for (pair, similar), cell in zip(zip(row[::2], row[1::2], strict=True), cells, strict=True):
        kept = cell.kept
        draw_kept(pair, kept, seen)
        said = f"{kept.size} tokens" if cell.answer is None else f"“{shortened(cell.answer, LONGEST_ANSWER)}”"
        plain(pair, below=said, bold=cell.answer is not None and cell.answer == on_all)
        image = similar.imshow(matrix(kept, seen).numpy(), cmap=COSINES, vmin=low, vmax=1, interpolation="nearest")
        plain(similar, below=f"similar: {percent(share(kept, seen))}")
    weight = "bold" if cells[0].kept.method == OURS else "normal"
    row[0].set_ylabel(textwrap.fill(TITLES[cells[0].kept.method], 16), fontsize=LARGE, labelpad=8, fontweight=weight)
    return image


def share(kept: Kept, seen: Seen) -> float:
    rows = kept.condensed.merged if kept.method == "pooling" else seen.features[:, kept.condensed.indices[0]]
    return redundancy(rows[0])


def draw_beside(figure: Any, seen: Seen, answers: "Answers", lines: int) -> None:
    picture, heat, *rest = figure.subplots(lines, 1)
    show_picture(picture, seen.picture, seen)
    below = f"{seen.tokens} tokens"
    if answers.question is not None:
        asked = textwrap.fill(shortened(answers.question, 60), 22)
        below += f"\n{asked}\n" + textwrap.fill(f"“{shortened(str(answers.on_all), 40)}”", 22)
    plain(picture, shortened(seen.name), below)
    show_heat(heat, seen.scores.view(*seen.grid).float().cpu(), seen)
    for axes in rest:
        axes.axis("off")


def show_heat(axes: Any, heat: torch.Tensor, seen: Seen) -> None:
    from matplotlib.colors import PowerNorm

    rows, columns = seen.grid
    height, width, _ = seen.picture.shape
    axes.imshow(heat.numpy(), cmap=HEAT, norm=PowerNorm(0.6), interpolation="nearest",
                aspect=height * columns / (width * rows))  # fmt: skip
    plain(axes, below="attention received\n(bright is high)")


def legend(figure: Any, methods: dict[str, Any], bold: bool) -> None:
    from matplotlib.patches import Patch

    entries = [(ANCHOR, "anchor"), (BACKGROUND, "background token")] if OURS in methods else []
    entries += [(KEPT, "kept, or a block of pooling")] if set(methods) - {OURS} else []
    note = NOTE if not bold else f"{NOTE}\nbold: the answer on all tokens"
    handles = [Patch(facecolor="none", edgecolor=colour, linewidth=2.5, label=label) for colour, label in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False,
                  handlelength=1.2, handleheight=1.2, title=note, title_fontsize=SMALL - 1)  # fmt: skip


def draw(path: Path, seen: Seen, found: dict[str, dict[int, Cell]], answers: "Answers") -> None:
    """``found``: of each method a cell a budget, the same budgets of all."""
    budgets = next(iter(found.values()))
    lines = max(2, len(found))
    figure = new_figure(2.7 + 4.1 * len(budgets), 2.35 * lines + 0.9)
    beside, right = figure.subfigures(1, 2, width_ratios=(2.1, 0.6 + 4.1 * len(budgets)))
    draw_beside(beside, seen, answers, lines)
    panels = right.subplots(lines, 2 * len(budgets), squeeze=False)
    cells = [list(of_method.values()) for of_method in found.values()]
    low = min(float(similarity_of(cell.kept, seen).amin()) for of_method in cells for cell in of_method)
    for row, of_method in zip(panels, cells, strict=False):
        image = draw_method(row, of_method, seen, low, answers.on_all)
    for axes in panels[len(cells) :].flat:
        axes.axis("off")
    for axes, budget in zip(panels[0, ::2], budgets, strict=True):
        axes.set_title(
            f"{budget} tokens, {percent(1 - budget / seen.tokens)} pruned", fontsize=LARGE, pad=7, loc="left"
        )
    bar = right.colorbar(image, ax=panels[:, -1].tolist(), shrink=0.5, aspect=30, pad=0.02)
    bar.set_label("cosine", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL - 1)
    legend(right, found, answers.on_all is not None)
    save(figure, path)
