"""Writes what python -m condense_kernels compare found between the markers of docs/comparison.md.

python benchmarks/comparison.py FILE.csv [--alpha FILE.csv] [--page PAGE]
"""

import argparse
from pathlib import Path
from typing import Any

from report import markdown
from rows import ROOT, provenance

from condense_kernels.cli.compare import read_csv
from condense_kernels.cli.compare_table import COLUMNS, budgets_of, cell, everything, of, title, words
from condense_kernels.cli.compared import BINS
from condense_kernels.tiny_llava import KINDS

BEGIN, END = "<!-- results: written by benchmarks/comparison.py -->", "<!-- end of results -->"
NAMES = {"dinov2": "DINOv2", "tiny": "The tiny LLaVA"}
SWEPT = "importance_redundancy"

Line = dict[str, Any]


def one_line(text: str) -> str:
    return text.replace("-\n", "").replace("\n", " ")


def table(flat: list[Line], on: str, keep: int) -> str:
    columns = COLUMNS[on]
    body = [
        [line["title"], *(cell(line, column) for column in columns)]
        for line in [everything(flat, on), *of(flat, on, keep)]
    ]
    said = "\n".join(f"- {line}" for line in words(flat, on, keep).splitlines())
    return f"**{title(flat, on, keep)}**\n\n{markdown(['', *(one_line(c.header) for c in columns)], body)}\n\n{said}"


def places(flat: list[Line], on: str) -> str:
    """Percent of the kept tokens in each stretch of the raster order, at the smallest budget."""
    keep = budgets_of(flat, on)[0]
    body = []
    for line in sorted(of(flat, on, keep), key=lambda line: -line["bias"]):
        shares = (100 * line[f"places {at} of {BINS}"] for at in range(1, BINS + 1))
        body.append([line["title"], *(f"{share:.0f}" for share in shares), f"{line['bias']:+.2f}"])
    header = ["K = " + str(keep), "first eighth", *(f"{at}." for at in range(2, BINS)), "last eighth", "bias"]
    return markdown(header, body)


def kinds(flat: list[Line]) -> str:
    keep = budgets_of(flat, "tiny")[0]
    body = [
        [line["title"], *(f"{line[kind]:.0f}" for kind in KINDS)]
        for line in [everything(flat, "tiny"), *of(flat, "tiny", keep)]
    ]
    return markdown([f"K = {keep}", *KINDS], body)


def sweep(flat: list[Line]) -> str:
    lines = [line for line in flat if str(line["method"]).startswith(f"{SWEPT}:")]
    alphas = sorted({line["method"].rpartition("=")[2] for line in lines}, key=float)
    body = []
    for keep in budgets_of(flat, "tiny"):
        by_alpha = {line["method"].rpartition("=")[2]: line for line in of(flat, "tiny", keep) if line in lines}
        for name, what in (("accuracy", "% right"), ("without_count", "without count"), ("redundancy", "redundancy")):
            form = ".2f" if name == "redundancy" else ".1f"
            body.append([f"K = {keep}, {what}", *(f"{by_alpha[alpha][name]:{form}}" for alpha in alphas)])
    return markdown(["alpha of Eq. 6", *alphas], body)


def results(flat: list[Line], alpha: list[Line]) -> str:
    about = provenance("cpu")
    packages = f"torch {about['torch']}; commit {about['commit']}; {about['date']}"
    parts = [f"{about['device']}; {packages}. Times are of one thread."]
    for on, name in NAMES.items():
        if any(line["on"] == on for line in flat):
            parts += [f"### {name}", *(table(flat, on, keep) for keep in budgets_of(flat, on))]
            parts += ["**Where the kept tokens are**, % of them in each eighth of the raster order:", places(flat, on)]
    if any(line["on"] == "tiny" for line in flat):
        parts += ["### By kind of question", kinds(flat)]
    if alpha:
        parts += ["### Importance against redundancy", sweep(alpha)]
    return "\n\n".join(parts)


def replaced(page: str, text: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--alpha", type=Path, help=f"of a run with {SWEPT} at several alphas")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "comparison.md")
    arguments = parser.parse_args()
    alpha = read_csv(arguments.alpha) if arguments.alpha else []
    arguments.page.write_text(replaced(arguments.page.read_text(), results(read_csv(arguments.csv), alpha)))
