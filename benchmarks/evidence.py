"""Writes the tables of docs/evidence.md: answers of the tiny LLaVA on fewer tokens, method by method, of several seeds.

python benchmarks/evidence.py --page docs/evidence.md --csv benchmarks/results/evidence.csv
"""

import argparse
import csv
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import fidelity
import torch
from report import markdown
from rows import ROOT, commit

from condense_kernels.cli import checkpoint
from condense_kernels.tiny_llava import answers, table
from condense_kernels.tiny_llava.answers import ABLATIONS, BUDGETS, COUNT, METHODS, OURS, Results, Share
from condense_kernels.tiny_llava.questions import KINDS

BEGIN = "<!-- results: written by benchmarks/evidence.py -->"
# The one that comes with the package, and another of the same recipe and another seed.
MODELS = {"seed 1": checkpoint.TINY, "seed 0": str(ROOT / "benchmarks" / "results" / "tiny_llava_seed_0")}


class Found(NamedTuple):
    everything: torch.Tensor  # [1, P, kinds]
    results: Results


def measure(name: str, pictures: int, seeds: int) -> Found:
    model = checkpoint.load(name)[0].float().cpu()
    exam = answers.Exam.of(model, pictures)
    everything = answers.right(model, exam, None)[None]
    return Found(everything, answers.compare(model, exam, {**METHODS, **ABLATIONS}, BUDGETS, seeds))


def means(found: Found, without: Sequence[int] = ()) -> str:
    """A row a method, a column a budget; what stands behind a number is ours minus it, paired."""
    lines = [
        ["all tokens", *[f"{Share.of(answers.mean_of_kinds(found.everything, without)).value:.1f}"] * len(BUDGETS)]
    ]
    for name in (*METHODS, *ABLATIONS):
        cells = []
        for keep in BUDGETS:
            runs = found.results[name, keep]
            cell = f"{Share.of(answers.mean_of_kinds(runs, without)).value:.1f}"
            if name != OURS:
                cell += f" ({table.written(answers.difference(found.results[OURS, keep], runs, without), '+.1f')})"
            cells.append(cell)
        lines.append([f"**{name}**" if name == OURS else name, *cells])
    return markdown(["", *(f"K = {keep}" for keep in BUDGETS)], lines)


def kinds(found: Found, keep: int) -> str:
    rows = {"all tokens": found.everything, **{name: found.results[name, keep] for name in METHODS}}
    lines = [[name, *(f"{value:.1f}" for value in table.kinds_of(runs))] for name, runs in rows.items()]
    return markdown([f"K = {keep}", *KINDS], lines)


def words(found: Found) -> str:
    return "\n".join(f"- K = {keep}. " + table.in_words(found.results, keep).replace("\n", " ") for keep in BUDGETS)


def section(name: str, found: Found) -> str:
    return "\n\n".join(
        [
            f"## {name[0].upper()}{name[1:]}",
            "Mean of the six kinds, %; in brackets CondenseVLM minus it, in points, ± one standard error.",
            means(found),
            "The same without the count question.",
            means(found, (COUNT,)),
            words(found),
            *(kinds(found, keep) for keep in BUDGETS),
        ]
    )


def report(found: dict[str, Found], pictures: int, seeds: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    error = max(Share.of(answers.mean_of_kinds(runs)).error for one in found.values() for runs in one.results.values())
    origin = (
        f"{packages}; commit {commit()}; {time.strftime('%Y-%m-%d')}. {pictures} pictures with {len(KINDS)} questions "
        f"each; {seeds} seeds of random choices. One standard error of a mean is at most {error:.1f} points, of a cell "
        f"of one kind at most {50 / pictures**0.5:.1f}."
    )
    return "\n\n".join([origin, *(section(name, one) for name, one in found.items())])


def write_csv(path: Path, found: dict[str, Found]) -> None:
    lines = [{"model": name, **row} for name, one in found.items() for row in table.rows(one.everything, one.results)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[-1]))
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=answers.PICTURES)
    parser.add_argument("--seeds", type=int, default=answers.SEEDS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--page", type=Path, help="written between its markers (default: printed)")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    found = {name: measure(MODELS[name], arguments.pictures, arguments.seeds) for name in arguments.models}
    text = report(found, arguments.pictures, arguments.seeds)
    if arguments.page is None:
        print(text)
    else:
        arguments.page.write_text(fidelity.replaced(arguments.page.read_text(), text, BEGIN))
    if arguments.csv is not None:
        write_csv(arguments.csv, found)


if __name__ == "__main__":
    main()
