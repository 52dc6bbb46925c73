"""Writes the table of docs/methods.md from the cards of condense_kernels.methods: python benchmarks/methods_page.py"""

import inspect
from pathlib import Path

from condense_kernels.methods import ALIASES, METHODS, Card
from condense_kernels.methods.registry import NONE, SHARED

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
COMMAND = "python benchmarks/methods_page.py"
BEGIN, END = "<!-- table: written by benchmarks/methods_page.py -->", "<!-- end of table -->"
HEADER = ("method", "source", "built on", "scores", "options", "training-free", "cost", "our call", "lines")


def of_its_own(card: Card) -> dict[str, inspect.Parameter]:
    """The keyword arguments that its function names, those that all take among them where it reads them."""
    parameters = inspect.signature(inspect.unwrap(card.call)).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def option(name: str, parameter: inspect.Parameter) -> str:
    told = name in SHARED or parameter.default in (None, parameter.empty)
    return f"`{name}`" if told else f"`{name}={parameter.default!r}`"


def row(card: Card) -> list[str]:
    file = Path(inspect.getsourcefile(inspect.unwrap(card.call)) or "").name
    options = of_its_own(card)
    needs = [name for name in options if name in card.needs]
    known_as = [f"`{alias}`" for alias, name in ALIASES.items() if name == card.name]
    scores = "None" if card.scores == NONE else "a"
    call = ", ".join(["x", scores, "k", *(f"{name}={name}" for name in needs)])
    return [
        f"[{card.title}](../condense_kernels/methods/{file})" + "".join(f", {alias}" for alias in known_as),
        card.source,
        card.primitive.replace("|", "\\|") if card.primitive != "-" else "",
        card.scores if card.scores != NONE else "",
        ", ".join(option(name, parameter) for name, parameter in options.items() if name not in needs),
        "yes" if card.training_free else "no",
        card.cost if card.cost != "-" else "",
        f"`{card.name}({call})`",
        str(card.lines),
    ]


def table() -> str:
    rows = [list(HEADER), ["---"] * len(HEADER), *map(row, METHODS.values())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def written(page: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
