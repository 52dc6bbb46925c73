"""Writes the results of a file between the markers of docs/benchmarks.md.

python benchmarks/report.py FILE.csv [PAGE]
"""

import argparse
from pathlib import Path

from rows import ROOT, Row, number, read_path
from shapes import SHAPES
from targets import judge, shown

BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
SIDES = (
    "ours fp32",
    "ours bf16",
    "plain loop",
    "plain loop, compiled",
    "DivPrune",
    "CDPruner",
    "IDPruner",
    "VisionZip",
    "top-k",
)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(rows: list[Row]) -> str:
    """select_and_merge at the named shapes, in milliseconds."""
    by_key = {
        row.key[1:3]: row for row in sorted(rows, key=lambda row: row.mode == "graph") if row.op == "select_and_merge"
    }
    lines = []
    for name, shape in SHAPES.items():
        found = {side: by_key[name, side] for side in ("matmul", "matmul, blocked", *SIDES) if (name, side) in by_key}
        if found:
            base = found.get("matmul") or found.get("matmul, blocked")
            cells = [number(found[side].median_ms) if side in found else "" for side in SIDES]
            lines.append([name, str(shape), number(base.median_ms) if base else "", *cells])
    return markdown(["", "B x N x D", "S alone", *SIDES], lines)


def verdicts(rows: list[Row]) -> str:
    lines = []
    for measured in judge(rows):
        reason = "" if measured.met or measured.target.reason is None else measured.target.reason(measured)
        lines.append([measured.target.case, *shown(measured), "yes" if measured.met else "no", reason])
    return markdown(["target", "measured", "goal", "met", "why not"], lines)


def results(rows: list[Row]) -> str:
    def all_of(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    devices = all_of([f"{row.device}, {row.threads} threads" for row in rows])
    commits, dates = all_of([row.commit for row in rows]), all_of([row.date for row in rows])
    origin = f"{devices}; torch {all_of([row.torch for row in rows])}; commit {commits}; {dates}."
    return f"{origin} Medians, in milliseconds.\n\n{times(rows)}\n\n{verdicts(rows)}"


def replaced(page: str, rows: list[Row]) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{results(rows)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    arguments.page.write_text(replaced(arguments.page.read_text(), read_path(arguments.csv)))
