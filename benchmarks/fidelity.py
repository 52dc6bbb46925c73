"""How near DINOv2-small comes to its own output on 576 tokens when it goes on with fewer: writes docs/fidelity.md.

python benchmarks/fidelity.py [--seeds 10] [--page PAGE] [IMAGE ...]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import markdown
from rows import commit

import condense_kernels as ck
from condense_kernels.cli.dinov2 import BEFORE, BLOCKS, PACKAGE, Tokens, encode, follow, load_model
from condense_kernels.cli.methods import pooling_blocks, random_choice
from condense_kernels.cli.patches import PATCH, open_picture
from condense_kernels.cli.photographs import PHOTOGRAPHS

BEGIN, END = "<!-- results: written by benchmarks/fidelity.py -->", "<!-- end of results -->"
SIDE, BUDGETS, CLOSER = 24, (192, 128, 64), 64  # the budget of the second table
PATCHES = slice(1, None)  # queries whose attention makes the column mean


class Choice(NamedTuple):
    merged: torch.Tensor  # [K, D]
    assignment: torch.Tensor  # [N]
    kept: torch.Tensor | None  # [K]; pooling keeps none


class Numbers(NamedTuple):
    cls: float
    tokens: float
    cls_prop: float
    tokens_prop: float
    coverage: float | None = None


HEADER = ("[CLS]", "tokens", "[CLS] prop.", "tokens prop.", "coverage")


class Picture(NamedTuple):
    name: str
    tokens: Tokens
    column_mean: torch.Tensor  # [1, N]
    s: torch.Tensor  # [1, N, N]

    @classmethod
    def read(cls, model, path: Path) -> "Picture":
        picture = open_picture(path, SIDE * PATCH)
        tokens = encode(model, picture)
        s, *_ = ck.similarity(tokens.patches, tokens.scores)
        return cls(path.name, tokens, encode(model, picture, PATCHES).scores, s)


def condensed(picture: Picture, scores: torch.Tensor, keep: int, background: float, **options: Any) -> Choice:
    out = ck.condense(picture.tokens.patches, scores, keep, background, (SIDE, SIDE), **options)
    return Choice(out.merged[0], out.assignment[0], out.indices[0])


def selected(picture: Picture, kept: torch.Tensor, weights: torch.Tensor | None = None) -> Choice:
    """These tokens as they are, or merged with these weights; assigned as ours are, so that each token has a row."""
    indices = kept.sort().values[None]
    assignment = ck.assign(picture.s, indices, grid=(SIDE, SIDE))
    merged = picture.tokens.patches[:, indices[0]]
    if weights is not None:
        merged, _ = ck.merge(picture.tokens.patches, weights, indices, assignment)
    return Choice(merged[0], assignment[0], indices[0])


def pooled(picture: Picture, keep: int) -> Choice:
    rows, columns = pooling_blocks(keep, SIDE)
    at = torch.arange(SIDE)
    block = ((at * rows // SIDE)[:, None] * columns + at * columns // SIDE).flatten()
    means = torch.stack([picture.tokens.patches[0, block == k].mean(dim=0) for k in range(rows * columns)])
    return Choice(means, block, None)


def uniform(picture: Picture) -> torch.Tensor:
    return torch.ones_like(picture.tokens.scores)


def top(picture: Picture, keep: int) -> torch.Tensor:
    return picture.tokens.scores[0].topk(keep).indices


def drawn(picture: Picture, keep: int, seed: int) -> torch.Tensor:
    return random_choice(picture.tokens.scores, keep, seed)


OURS, RANDOM, RANDOM_MERGED = "condense, 25 % background", "random", "random + mean merge"
# Each takes the picture, the budget and a seed.
METHODS: dict[str, Callable[[Picture, int, int], Choice]] = {
    OURS: lambda p, k, _: condensed(p, p.tokens.scores, k, 0.25),
    "condense, 50 % background": lambda p, k, _: condensed(p, p.tokens.scores, k, 0.5),
    "condense, column-mean scores": lambda p, k, _: condensed(p, p.column_mean, k, 0.25),
    "condense, uniform scores": lambda p, k, _: condensed(p, uniform(p), k, 0.25),
    "top-k [CLS]": lambda p, k, _: selected(p, top(p, k)),
    "top-k [CLS] + merge": lambda p, k, _: selected(p, top(p, k), p.tokens.scores),
    RANDOM: lambda p, k, seed: selected(p, drawn(p, k, seed)),
    RANDOM_MERGED: lambda p, k, seed: selected(p, drawn(p, k, seed), uniform(p)),
    "pooling": lambda p, k, _: pooled(p, k),
}
SEEDED = (RANDOM, RANDOM_MERGED)


def measure(model, picture: Picture, choice: Choice) -> Numbers:
    found = [follow(model, picture.tokens, choice.merged, choice.assignment, prop)[1] for prop in (False, True)]
    coverage = None if choice.kept is None else float(picture.s[0, :, choice.kept].amax(dim=1).mean())
    return Numbers(*found[0], *found[1], coverage)


def mean(numbers: Sequence[Numbers]) -> Numbers:
    columns = zip(*numbers, strict=True)
    return Numbers(*(None if None in column else statistics.fmean(column) for column in columns))


Results = dict[tuple[int, str], list[list[Numbers]]]  # by budget and method: [seed][picture]


def measure_all(model, pictures: Sequence[Picture], seeds: int) -> Results:
    return {
        (keep, name): [
            [measure(model, picture, run(picture, keep, seed)) for picture in pictures]
            for seed in range(seeds if name in SEEDED else 1)
        ]
        for keep in BUDGETS
        for name, run in METHODS.items()
    }


def cell(values: Sequence[float | None]) -> str:
    """The mean, and where there are several seeds their standard deviation."""
    if values[0] is None:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def table(results: Results, keep: int) -> str:
    """Of each column, the best is bold."""
    means = {name: [mean(pictures) for pictures in results[keep, name]] for name in METHODS}
    best = [max(row[i] for row in map(mean, means.values()) if row[i] is not None) for i in range(len(HEADER))]
    lines = []
    for name, seeds in means.items():
        cells = [cell(column) for column in zip(*seeds, strict=True)]
        marks = ["**" if value == top else "" for value, top in zip(mean(seeds), best, strict=True)]
        lines.append([name, *(f"{mark}{text}{mark}" for mark, text in zip(marks, cells, strict=True))])
    return markdown([f"K = {keep}", *HEADER], lines)


def losses(results: Results, keep: int) -> str:
    """In which columns tokens drawn at random do better than ours, said in words."""
    parts = []
    for name in SEEDED:
        ours, other = (mean([mean(pictures) for pictures in results[keep, method]]) for method in (OURS, name))
        better = [title for title, a, b in zip(HEADER, ours, other, strict=True) if b > a]
        parts.append(f"`{name}` beats `{OURS}` on {', '.join(better) if better else 'nothing'}")
    return f"- K = {keep}: {'; '.join(parts)}."


def by_picture(results: Results, pictures: Sequence[Picture]) -> str:
    names = {"condense": OURS, "top-k": "top-k [CLS] + merge", "random": RANDOM_MERGED}
    lines = []
    for i, picture in enumerate(pictures):
        cells = []
        for name in names.values():
            found = mean([seed[i] for seed in results[CLOSER, name]])
            cells += [f"{found.cls_prop:.4f}", f"{found.tokens_prop:.4f}"]
        lines.append([picture.name, *cells])
    return markdown([f"K = {CLOSER}", *(f"{name}: {what}" for name in names for what in HEADER[2:4])], lines)


def report(results: Results, pictures: Sequence[Picture], seeds: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", PACKAGE))
    origin = (
        f"{packages}; commit {commit()}; {time.strftime('%Y-%m-%d')}. {len(pictures)} pictures: "
        f"{', '.join(picture.name for picture in pictures)}. Condensed after block {BEFORE} of {BLOCKS}. Means over "
        f"the pictures; of random choices, mean ± standard deviation over {seeds} seeds. The best of a column is bold."
    )
    tables = "\n\n".join(table(results, keep) for keep in BUDGETS)
    beaten = "\n".join(losses(results, keep) for keep in BUDGETS)
    return f"{origin}\n\n{tables}\n\n{beaten}\n\n{by_picture(results, pictures)}"


def replaced(page: str, text: str, begin: str = BEGIN) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="pictures (default: the demo's eight)")
    parser.add_argument("--seeds", type=int, default=10, help="of the random choices (default: %(default)s)")
    parser.add_argument("--page", type=Path, help="written between its markers (default: printed)")
    arguments = parser.parse_args()
    model = load_model()
    paths = arguments.images or [photograph.path for photograph in PHOTOGRAPHS]
    pictures = [Picture.read(model, path) for path in paths]
    text = report(measure_all(model, pictures, arguments.seeds), pictures, arguments.seeds)
    if arguments.page is None:
        print(text)
    else:
        arguments.page.write_text(replaced(arguments.page.read_text(), text))


if __name__ == "__main__":
    main()
