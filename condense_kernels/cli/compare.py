"""compare methods of pruning and merging on two models: quality, redundancy, coverage, position bias and time

On DINOv2 (the extra "vision") with real attention of [CLS] on photographs, where quality is how near the model's output
on K tokens comes to that on all; and on the answers of the tiny LLaVA that comes with the package, where it is % right.
Random, Pooling and Uniform grid are always among the methods, and where they are at least as good, a line below the
table says so. An error (±) is one standard error over pictures.

    python -m condense_kernels compare --csv compare.csv --figure compare.png
    python -m condense_kernels compare my.jpg --on dinov2 --keep 64 --methods condensevlm fastervlm divprune

How to read it, and what came out here: docs/comparison.md.
"""

import argparse
from pathlib import Path
from typing import Any

from . import (
    CommandError,
    MissingPackage,
    check_output,
    checkpoint,
    make_console,
    make_progress,
    need,
    print_table,
    waiting,
)
from .arguments import whole
from .compared import HEADLINES, entries, lines
from .patches import check_pictures

TOKENS = 576  # of DINOv2's picture; the tiny LLaVA has a quarter
OF_TINY = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="pictures for DINOv2 (default: eight "
                        "photographs that come with the extra)")  # fmt: skip
    parser.add_argument("--keep", type=whole(1, TOKENS), nargs="+", default=[64, 128, 192], metavar="K", help="tokens "
                        f"of DINOv2's {TOKENS} (default: 64 128 192); the tiny LLaVA keeps a quarter")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=[], metavar="M", help="by name, with options as "
                        "condensevlm:background_ratio=0.5 (default: all of condense_kernels.methods)")  # fmt: skip
    parser.add_argument("--on", nargs="+", choices=tuple(HEADLINES), default=list(HEADLINES), metavar="MODEL",
                        help="dinov2, tiny, or both (default)")  # fmt: skip
    parser.add_argument("--pictures", type=whole(2), default=200, metavar="P", help="of the tiny LLaVA, six questions "
                        "each (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--seeds", type=whole(1), default=3, metavar="S", help="of random choices (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=whole(1), default=7, metavar="R", help="of the times (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw quality against time")


def check_arguments(arguments: argparse.Namespace) -> None:
    if "tiny" in arguments.on and min(arguments.keep) < OF_TINY:
        raise CommandError(f"--keep: expected at least {OF_TINY}, as the tiny LLaVA keeps a quarter of it, got "
                           f"{min(arguments.keep)}")  # fmt: skip
    check_output("--csv", arguments.csv)
    check_output("--figure", arguments.figure, ".png")
    if arguments.images and "dinov2" not in arguments.on:
        raise CommandError("--on: expected dinov2, as pictures are given; the tiny LLaVA has its own")
    check_pictures(arguments.images)


def run(arguments: argparse.Namespace) -> int:
    packages = ("numpy", "PIL", "rich", "transformers", *(["matplotlib"] if arguments.figure else []))
    need(*packages, remedy="pip install 'condense-kernels[cli,models]'")
    check_arguments(arguments)
    methods = entries(arguments.methods)
    rows, left_out = measured(arguments, methods)
    from .compare_table import NOTES, budgets_of, table, words

    console = make_console()
    flat = lines(rows)
    for on, reasons in left_out.items():
        for keep in budgets_of(flat, on):
            print_table(console, table(flat, on, keep))
            console.print(words(flat, on, keep), markup=False, soft_wrap=True)
        for reason in dict.fromkeys(reasons.values()):
            titles = ", ".join(title for title, other in reasons.items() if other == reason)
            console.print(f"left out here: {titles}: {reason}", markup=False, soft_wrap=True)
    console.print(NOTES, style="dim", markup=False, soft_wrap=True)
    for path, write in ((arguments.csv, write_csv), (arguments.figure, drawn)):
        if path is not None:
            written(path, write, flat, console)
    return 0


def measured(arguments: argparse.Namespace, methods: list[Any]) -> tuple[list[Any], dict[str, dict[str, str]]]:
    """Rows, and by model which methods are left out, and why."""
    ready: dict[str, Any] = {}
    if "dinov2" in arguments.on:  # first: what is missing is said at once
        from . import dinov2
        from .photographs import PHOTOGRAPHS

        try:
            model = dinov2.load_model()
        except MissingPackage as error:
            raise MissingPackage(*error.packages, remedy=f"{dinov2.EXTRA}; --on tiny does without") from None
        ready["dinov2"] = model, arguments.images or [photograph.path for photograph in PHOTOGRAPHS]
    if "tiny" in arguments.on:
        ready["tiny"] = checkpoint.load(checkpoint.TINY)[0].float().cpu(), arguments.pictures
    rows, left_out = [], {}
    with make_progress() as progress:
        steps = 1 + len(methods) * (len(arguments.keep) * (1 + arguments.rounds)) + arguments.rounds
        task = progress.add_task("", total=len(ready) * steps)

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        for on, (model, pictures) in ready.items():
            if on == "dinov2":
                from .compared_dinov2 import compared as compared_on

                budgets = list(dict.fromkeys(arguments.keep))
            else:
                from .compared_tiny import compared as compared_on  # type: ignore[assignment]

                budgets = list(dict.fromkeys(round(keep / OF_TINY) for keep in arguments.keep))
            found, left_out[on] = compared_on(
                model, pictures, methods, budgets, arguments.seeds, arguments.rounds, tick
            )
            rows += found
    return rows, left_out


def columns_of(flat: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in flat for name in line))


def write_csv(path: Path, flat: list[dict[str, Any]]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(flat))
        writer.writeheader()
        for line in flat:
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in line.items()})


def read_csv(path: Path) -> list[dict[str, Any]]:
    """What write_csv wrote; empty cells are left out."""
    import csv

    def number(text: str) -> Any:
        for form in (int, float):
            try:
                return form(text)
            except ValueError:
                continue
        return text

    with path.open(newline="", encoding="utf-8") as file:
        return [{name: number(x) for name, x in line.items() if x != ""} for line in csv.DictReader(file)]


def drawn(path: Path, flat: list[dict[str, Any]]) -> None:
    from .compare_figure import draw

    draw(path, flat)


def written(path: Path, write: Any, flat: list[dict[str, Any]], console: Any) -> None:
    try:
        with waiting(f"writing {path.name}"):
            write(path, flat)
    except OSError as error:
        raise CommandError(f"{path} can't be written: {error.strerror or error}") from None
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
