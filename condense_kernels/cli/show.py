"""draw which tokens of a picture are kept: the paper's Figure 6, and a page in which to ask why

The kept tokens over the picture with 66.7, 77.8 and 88.9 % pruned, method by method, each beside the cosines of the
kept tokens among themselves. With --question a model's answer on those tokens is below. --html writes one page, which
needs nothing beside it: a slider moves the number of tokens, and each patch says why it was kept or dropped.
docs/show.md tells how to read both.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError, check_output, checkpoint, make_console, make_progress, need, waiting
from .arguments import LARGEST_SEED, check_name, whole

if TYPE_CHECKING:
    from .selection import Kept, Seen
    from .sources import Answering

DINOV2 = "dinov2"
SHARES = (1 / 3, 2 / 9, 1 / 9)  # kept: 66.7, 77.8 and 88.9 % are pruned
DEFAULT = ("condensevlm", "topk", "maxmin", "random", "pooling")
MISSING = "pip install 'condense-kernels[cli,models]'"
SCENE = 8  # of the held-out ones, with four digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=checkpoint.TINY, metavar="DIR|tiny|dinov2", help="a folder of transformers' "
                        "that apply_condense takes, the tiny LLaVA that comes with the package, or DINOv2-small, which "
                        "needs the extra vision (default: %(default)s)")  # fmt: skip
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture (default: of tiny a held-out one of its "
                        "own, of dinov2 a photograph)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("show.png"), metavar="FILE.png",
                        help="the figure (default: %(default)s)")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write the page, too")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT), metavar="METHOD",
                        help=f"of apply_condense's (default: {' '.join(DEFAULT)})")  # fmt: skip
    parser.add_argument("--question", metavar="TEXT", help="also ask the model, on each method's tokens")
    parser.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, metavar="S", help="of the random choices (default: 0)"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    from ..models.methods import METHODS

    check_output("--output", arguments.output, ".png")
    check_output("--html", arguments.html, ".html")
    for method in arguments.methods:
        check_name("--methods", method, METHODS)
    if arguments.question is not None and arguments.model == DINOV2:
        raise CommandError("--question: DINOv2 answers none. Remedy: --model tiny, or a model that generates")
    if arguments.image is None and arguments.model not in (checkpoint.TINY, DINOV2):
        raise CommandError(f"--image: needed with --model {arguments.model}")


def source(arguments: argparse.Namespace) -> "tuple[Seen, Answering | None]":
    from . import sources
    from .patches import read_picture
    from .photographs import PHOTOGRAPHS
    from .prompts import inputs_of

    if arguments.model == DINOV2:
        return sources.seen_by_dinov2(arguments.image or PHOTOGRAPHS[1].path), None
    if arguments.image is not None:
        name, picture = arguments.image.name, read_picture(arguments.image)
    else:
        name, picture = "a held-out scene", sources.scene(SCENE)
    model, processor = checkpoint.load(arguments.model)
    inputs = inputs_of(arguments.model, model, processor, picture, arguments.question or sources.ANY)
    words = sources.OF_TINY if arguments.model == checkpoint.TINY else sources.NEW_TOKENS
    asked = sources.Answering(model, processor, picture, inputs, words)
    try:
        with waiting("encoding the picture"):
            return asked.seen(name), asked
    except (TypeError, ValueError) as error:  # apply_condense, of a model that it does not take
        raise CommandError(f"--model {arguments.model}: {error}") from error


class Answers:
    """What the model says on all tokens and on those that a method keeps; None where nothing was asked."""

    def __init__(self, asked: "Answering | None", question: str | None, seed: int) -> None:
        self.asked, self.question, self.seed = asked if question is not None else None, question, seed
        self.on_all = None
        if self.asked is not None:
            with waiting("answering on all tokens"):
                self.on_all = self.asked.answer()

    def on(self, kept: "Kept") -> str | None:
        return None if self.asked is None else self.asked.answer_on(kept, self.seed)


def run(arguments: argparse.Namespace) -> int:
    need("numpy", "PIL", "rich", "matplotlib", "transformers", remedy=MISSING)
    with waiting("importing transformers"):
        check_arguments(arguments)
        from .selection import TITLES, Cell, budgets_of, keep_tokens
        from .show_page import write_page
        from .show_picture import draw

    seen, asked = source(arguments)
    answers = Answers(asked, arguments.question, arguments.seed)
    drawn = budgets_of(seen.tokens, SHARES)
    budgets = sorted({*drawn, *(budgets_of(seen.tokens) if arguments.html is not None else ())})
    found: dict[str, dict[int, Any]] = {}
    with make_progress() as progress:
        task = progress.add_task("", total=len(arguments.methods) * len(budgets))
        for method in dict.fromkeys(arguments.methods):
            for budget in budgets:
                progress.update(task, advance=1, description=f"{TITLES[method]}, {budget} tokens")
                kept = keep_tokens(method, seen, budget, arguments.seed)
                found.setdefault(method, {})[budget] = Cell(kept, answers.on(kept))
    figure = {method: {budget: cells[budget] for budget in reversed(drawn)} for method, cells in found.items()}
    write("--output", arguments.output, draw, seen, figure, answers)
    if arguments.html is not None:
        write("--html", arguments.html, write_page, seen, found, answers)
    return 0


def write(option: str, path: Path, writer: Callable[..., None], *what: Any) -> None:
    try:
        with waiting(f"writing {path.name}"):
            writer(path, *what)
    except OSError as error:
        raise CommandError(f"{option}: {path} can't be written: {error.strerror or error}") from None
    make_console().print(f"wrote {path}", markup=False, soft_wrap=True)
