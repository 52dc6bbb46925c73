"""What the demo prints: the methods' numbers, what they say, and the times."""

import math
import statistics
from typing import Any, NamedTuple

from rich.table import Table

from ..testing import Inputs
from .methods import SIMILAR, Row
from .patches import SCORE
from .timing import Timing


class Column(NamedTuple):
    header: str
    field: str  # of a row's quality
    form: str
    scale: float = 1.0
    claim: str = ""  # what the verdict calls it; nothing where that leaves it out
    less: bool = False  # is better


PIXELS = (
    Column("redundancy %", "redundancy", ".1f", 100, "redundancy", less=True),
    Column("RMSE", "rmse", ".4f"),
    Column("PSNR dB", "psnr", ".2f", claim="PSNR"),
    Column("detail dB", "detail", ".2f", claim="detail PSNR"),
)
TOKENS = (
    Column("redundancy %", "redundancy", ".1f", 100, "redundancy", less=True),
    Column("[CLS]", "cls", ".3f", claim="[CLS]"),
    Column("tokens", "tokens", ".3f", claim="tokens"),
    Column("[CLS] prop.", "cls_prop", ".3f", claim="[CLS] with proportional attention"),
    Column("tokens prop.", "tokens_prop", ".3f", claim="tokens with it"),
)


def written(value: float, form: str, scale: float = 1.0) -> str:
    return "-" if math.isnan(value) else "exact" if math.isinf(value) else format(scale * value, form)


def with_spread(row: Row, column: Column) -> str:
    """The number, or for random tokens mean ± standard deviation over the seeds."""
    _, field, form, scale, *_ = column
    values = [getattr(quality, field) for quality in row.spread]
    if not values or not all(math.isfinite(value) for value in values):
        return written(getattr(row.quality, field), form, scale)
    mean, deviation = scale * statistics.mean(values), scale * statistics.stdev(values)
    return f"{mean:{form}} ± {deviation:{form}}"


def quality_table(rows: list[Row], columns: tuple[Column, ...] = PIXELS, what: str = "patches") -> Table:
    title = f"{len(rows[0].result.assignment)} {what} condensed, four ways; kept are anchors + background"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("method", no_wrap=True)
    for name in ("kept", *(column.header for column in columns)):
        table.add_column(name, justify="right")
    for row in rows:
        result = row.result
        ours = bool(result.anchors or result.background)
        table.add_row(
            row.title.replace("median", "mean") if row.spread else row.title,
            f"{len(result.anchors)} + {len(result.background)}" if ours else str(result.size),
            *(with_spread(row, column) for column in columns),
            style="bold" if ours else "",
        )
    return table


def beats_ours(row: Row, ours: Any, column: Column) -> bool:
    values = [getattr(quality, column.field) for quality in row.spread or [row.quality]]
    value = statistics.mean(values) if all(math.isfinite(v) for v in values) else values[0]
    own = getattr(ours, column.field)
    return value < own if column.less else value > own


def verdict(rows: list[Row], columns: tuple[Column, ...] = PIXELS) -> str:
    """Who beats ours, said in words, so that nobody has to look for it."""
    parts = []
    for column in sorted(filter(lambda column: column.claim, columns), key=lambda column: column.less):
        better = [
            row.title.split(",")[0].split(" (")[0] for row in rows[1:] if beats_ours(row, rows[0].quality, column)
        ]
        if not better:
            parts.append(f"none beats it on {column.claim}")
        else:
            listed = " and ".join(filter(None, [", ".join(better[:-1]), better[-1]]))
            parts.append(f"{listed} {'beats' if len(better) == 1 else 'beat'} it on {column.claim}")
    return "select_and_merge against the others on this picture: " + "; ".join(parts) + "."


NOTES = f"""\
score       {SCORE}
key         patch minus mean patch; redundancy is the share of pairs of kept tokens whose keys have cosine >= {SIMILAR}
            (for pooling: of the pooled patches)
error       between the picture, pixels in [0, 1], and the one in which each patch is replaced with its merged token;
            detail is the quarter of the patches with the highest scores
baselines   top-k and random tokens go through the same assign and merge: only the selection differs. Pooling is the
            plain mean of each block, with as many blocks as the budget allows at no more than 2 columns a row.
limits      raw pixels are harsher on averages than a model's features are: this compares selections on one picture
            and says nothing about a model's accuracy."""


def timing_table(timings: list[Timing], inputs: Inputs) -> Table:
    n, d = inputs.features.shape[1:]
    keep = inputs.num_anchors + inputs.num_background
    title = f"time of select_and_merge, fp32, 1 x {n} x {d}, K = {keep}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("backend")
    table.add_column("device")
    for name in ("median ms", "fastest ms", "runs"):
        table.add_column(name, justify="right")
    table.add_column("")
    for timing in timings:
        numbers = ["-"] * 3
        if timing.runs:
            numbers = [f"{timing.median:.2f}", f"{timing.fastest:.2f}", str(timing.runs)]
        table.add_row(timing.backend, timing.device, *numbers, timing.note)
    return table
