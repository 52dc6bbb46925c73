"""Writes the tables of docs/what_works.md: background ratio and suppression, positions and proportional attention, on
the tiny LLaVA (answers) and on DINOv2-small (cosines to the run with all tokens).

    python benchmarks/what_works.py --page docs/what_works.md      # needs the extra vision
"""

import argparse
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fidelity
import torch
from report import markdown
from rows import commit

from condense_kernels.cli import checkpoint
from condense_kernels.cli.dinov2 import load_model
from condense_kernels.cli.photographs import PHOTOGRAPHS
from condense_kernels.tiny_llava import answers, table
from condense_kernels.tiny_llava.answers import BUDGETS, COUNT, Exam, Share, condensing, mean_of_kinds
from condense_kernels.tiny_llava.questions import KINDS

BEGIN = "<!-- results: written by benchmarks/what_works.py -->"
PAPER = {"background_ratio": 0.25, "suppression": 1.0}
RATIOS, FACTORS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 1.0, 2.0)
SWEEPS: dict[str, list[dict[str, float]]] = {
    "background_ratio": [{**PAPER, "background_ratio": value} for value in RATIOS],
    "suppression": [{**PAPER, "suppression": value} for value in FACTORS],
    "background_suppression": [{**PAPER, "background_suppression": value} for value in FACTORS],
}
PLACES = ("CondenseVLM", "top-k [CLS]", "max-min", "random + merge", "pooling")
PLACE = KINDS.index("digit at place")
WAYS = {"": (False, False), "original": (True, False), "proportional": (False, True), "both": (True, True)}


def named(name: str, options: dict[str, float]) -> str:
    value = f"{options[name]:g}"
    return f"**{value}**" if options[name] == PAPER.get(name, PAPER["suppression"]) else value


def answers_of(model: Any, exam: Exam, name: str) -> list[list[str]]:
    """A row a value: the mean of the kinds at each budget, then without the count question; in brackets the paper's
    value minus it, paired."""
    found = {
        (row, keep): answers.right(model, exam, condensing(**options)(exam.features, exam.scores, keep))[None]
        for row, options in enumerate(SWEEPS[name])
        for keep in BUDGETS
    }
    paper = next(row for row, options in enumerate(SWEEPS[name]) if named(name, options).startswith("*"))
    lines = []
    for row, options in enumerate(SWEEPS[name]):
        cells = [named(name, options)]
        for without in ((), (COUNT,)):
            for keep in BUDGETS:
                cell = f"{Share.of(mean_of_kinds(found[row, keep], without)).value:.1f}"
                if row != paper:
                    ahead = answers.difference(found[paper, keep], found[row, keep], without)
                    cell += f" ({table.written(ahead, '+.1f')})"
                cells.append(cell)
        lines.append(cells)
    return lines


def cosines_of(model: Any, pictures: Sequence[fidelity.Picture], name: str, keep: int) -> list[list[str]]:
    lines = []
    for options in SWEEPS[name]:
        rest = {key: value for key, value in options.items() if key != "background_ratio"}
        chosen = [fidelity.condensed(p, p.tokens.scores, keep, options["background_ratio"], **rest) for p in pictures]
        numbers = fidelity.mean([fidelity.measure(model, p, c) for p, c in zip(pictures, chosen, strict=True)])
        lines.append([named(name, options), *(f"{number:.4f}" for number in numbers)])
    return lines


def places_of(model: Any, exam: Exam, seeds: int) -> list[list[str]]:
    """A row a method and budget: digit at place, and the mean of the kinds, in each of the four ways."""
    methods = {name: answers.METHODS[name] for name in PLACES}
    found = {way: answers.compare(model, exam, methods, BUDGETS, seeds, *flags) for way, flags in WAYS.items()}
    lines = []
    for keep in BUDGETS:
        for name in PLACES:
            runs = [found[way][name, keep] for way in WAYS]
            place = [f"{100 * float(run[..., PLACE].double().mean()):.1f}" for run in runs]
            means = [f"{Share.of(mean_of_kinds(run)).value:.1f}" for run in runs]
            lines.append([f"{name}, K = {keep}", *place, *means])
    return lines


def of_tiny(exam: Exam, model: Any, seeds: int) -> list[str]:
    by_budget = [f"K = {keep}" for keep in BUDGETS]
    header = [*by_budget, *(f"{column}, without count" for column in by_budget)]
    parts = ["## The tiny LLaVA"]
    for name in SWEEPS:
        parts += [f"`{name}`:", markdown([name, *header], answers_of(model, exam, name))]
    ways = ["compact", *list(WAYS)[1:]]
    header = ["", *(f"place, {way}" for way in ways), *(f"mean, {way}" for way in ways)]
    return [*parts, "`positions` and `proportional`:", markdown(header, places_of(model, exam, seeds))]


def of_dinov2(pictures: Sequence[fidelity.Picture], model: Any) -> list[str]:
    parts = ["## DINOv2-small"]
    for name in SWEEPS:
        for keep in fidelity.BUDGETS:
            lines = cosines_of(model, pictures, name, keep)
            parts.append(markdown([f"{name}, K = {keep}", *fidelity.HEADER], lines))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=answers.PICTURES, help="of the tiny LLaVA")
    parser.add_argument("--seeds", type=int, default=answers.SEEDS, help="of random choices")
    parser.add_argument("--page", type=Path, help="written between its markers (default: printed)")
    arguments = parser.parse_args()
    tiny, dinov2 = checkpoint.load("tiny")[0].float().cpu(), load_model()
    exam = Exam.of(tiny, arguments.pictures)
    pictures = [fidelity.Picture.read(dinov2, photograph.path) for photograph in PHOTOGRAPHS]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    counts = f"{arguments.pictures} pictures, {len(pictures)} photographs"
    origin = f"{packages}; commit {commit()}; {time.strftime('%Y-%m-%d')}. {counts}."
    text = "\n\n".join([origin, *of_tiny(exam, tiny, arguments.seeds), *of_dinov2(pictures, dinov2)])
    if arguments.page is None:
        print(text)
    else:
        arguments.page.write_text(fidelity.replaced(arguments.page.read_text(), text, BEGIN))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
