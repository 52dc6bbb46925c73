"""The tables of compare, of lines as its CSV has them: for a terminal, for a page, and what they say in words."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from .compared import ALWAYS, EVERYTHING, HEADLINES

Line = dict[str, Any]


class Column(NamedTuple):
    header: str
    name: str
    form: str
    with_error: bool = False


MEASURED = (
    Column("redun-\ndancy", "redundancy", ".2f"), Column("cover-\nage", "coverage", ".3f"),
    Column("rebuild\nerror", "reconstruction", ".3f"), Column("bias", "bias", "+.2f"),
    Column("ms", "ms", ".2f"), Column("time\nleft", "time_left", ".2f"),
)  # fmt: skip
COLUMNS = {
    "dinov2": (
        Column("tokens", "tokens", ".3f", True), Column("[CLS]", "cls", ".3f"),
        Column("tokens\nprop.", "tokens_prop", ".3f"), Column("[CLS]\nprop.", "cls_prop", ".3f"), *MEASURED,
    ),
    "tiny": (
        Column("% right", "accuracy", ".1f", True), Column("without\ncount", "without_count", ".1f", True), *MEASURED,
    ),
}  # fmt: skip
NAMES = {"dinov2": "DINOv2-small on photographs", "tiny": "tiny LLaVA, answers"}
HEADLINE = {"tokens": "tokens", "cls": "[CLS]", "accuracy": "% right", "without_count": "% right without count"}
NOTES = """\
tokens      cosine of DINOv2's output at each token to that on all tokens, mean; [CLS] of [CLS]; prop.: with the
            logarithm of the cluster's size on each key's logits. A dropped token counts as the row nearest to it
rows        redundancy is the share of pairs of the K rows whose cosine is >= 0.75; coverage the mean cosine of a
            token to the nearest kept one; rebuild error |X - rows| / |X|; position bias runs from -1, all of the
            picture's first tokens, to 1, all of its last, and 0 is expected of uniform choice
ms          CPU time of one thread for one picture, median, sides in turn; time left: that, the first pass of
            text-guided methods, and the rest of the model on K tokens, over the rest of the model on all tokens"""


def of(flat: Iterable[Line], on: str, keep: int) -> list[Line]:
    """The best first."""
    found = [line for line in flat if line["on"] == on and line["keep"] == keep]
    return sorted(found, key=lambda line: -line[HEADLINES[on][0]])


def budgets_of(flat: Iterable[Line], on: str) -> list[int]:
    return sorted({line["keep"] for line in flat if line["on"] == on and line["keep"] < line["of"]})


def everything(flat: Iterable[Line], on: str) -> Line:
    return next(line for line in flat if line["on"] == on and line["method"] == EVERYTHING)


def cell(line: Line, column: Column) -> str:
    value = line.get(column.name, math.nan)
    if math.isnan(value):
        return ""
    error = line.get(f"{column.name} error", math.nan) if column.with_error else math.nan
    digits = column.form.lstrip("+")
    return f"{value:{column.form}}" + ("" if math.isnan(error) else f" ± {error:{digits}}")


def title(flat: Iterable[Line], on: str, keep: int) -> str:
    whole = everything(flat, on)
    pruned = 100 * (1 - keep / whole["of"])
    first = of(flat, on, keep)[0]
    return (
        f"{NAMES[on]}: K = {keep} of {whole['of']} tokens ({pruned:.1f} % pruned), {first['pictures']} pictures, "
        f"FLOPs left {first['flops_left']:.2f}"
    )


def table(flat: list[Line], on: str, keep: int) -> Any:
    from rich.table import Table

    made = Table(title=title(flat, on, keep), title_justify="left", title_style="bold", padding=(0, 0, 0, 0))
    made.add_column("method", no_wrap=True, max_width=30)
    for column in COLUMNS[on]:
        made.add_column(column.header, justify="right", no_wrap=True)
    for line in [everything(flat, on), *of(flat, on, keep)]:
        style = "bold" if line["method"] in ALWAYS else ""
        made.add_row(line["title"], *(cell(line, column) for column in COLUMNS[on]), style=style)
    return made


def words(flat: list[Line], on: str, keep: int) -> str:
    """Where a simple baseline is at least as good as a method, within one standard error of the paired difference; and
    which methods gave the same."""
    lines, found = of(flat, on, keep), []
    others = [line for line in lines if line["method"] not in ALWAYS]
    for name in HEADLINES[on]:
        for simple in (line for line in lines if line["method"] in ALWAYS):
            beaten = [line["title"] for line in others if not ahead(line, name, simple["method"])]
            if beaten:
                what = "all of them" if len(beaten) == len(others) else "; ".join(beaten)
                found.append(
                    f"K = {keep}, {HEADLINE[name]}: {simple['title']} is at least as good, within one standard error, "
                    f"as {what}."
                )
    if not found:
        found.append(f"K = {keep}: no simple baseline is as good as any of these methods.")
    for group in alike(lines):
        found.append(f"K = {keep}: the same result here: {'; '.join(line['title'] for line in group)}.")
    return "\n".join(found)


def alike(lines: list[Line]) -> list[list[Line]]:
    """Methods that gave the same by all that was measured of their rows, where there are two or more."""
    found: dict[tuple, list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line.get(column.name) for column in MEASURED[:4]), []).append(line)
    return [group for group in found.values() if len(group) > 1]


def ahead(line: Line, name: str, simple: str) -> bool:
    """Whether a method is better than a simple baseline by more than one standard error."""
    gap = line.get(f"{name} minus {simple}", math.nan)
    error = line.get(f"{name} minus {simple} error", math.nan)
    return gap > (0 if math.isnan(error) else error)
