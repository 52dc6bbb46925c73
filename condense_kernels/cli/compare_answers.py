"""answer questions about 1000 pictures with the tiny LLaVA on fewer tokens, method by method

Handwritten digits on photographs, none of which was seen in training, and six questions about each, with answers of one
word. Random tokens and pooling are among the methods; where they do better, a line below the table says so. An error
(±) is one standard error over pictures; differences are paired, on the same pictures. What the numbers mean, and what
they do not: docs/evidence.md.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from . import CommandError, check_output, checkpoint, make_console, make_progress, need, print_table
from .arguments import whole

TOKENS = 144


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=checkpoint.TINY, metavar="DIR|tiny", help="a folder that make tiny-llava "
                        "wrote (default: the model that comes with the package)")  # fmt: skip
    parser.add_argument("--pictures", type=whole(2), default=1000, metavar="P", help="how many (default: %(default)s)")
    parser.add_argument("--keep", type=whole(1, TOKENS), nargs="+", default=[48, 32, 16], metavar="K", help="tokens of "
                        "144 (default: 48 32 16, which prunes 66.7, 77.8 and 88.9 %%)")  # fmt: skip
    parser.add_argument(
        "--seeds", type=whole(1), default=5, metavar="S", help="of the random choices (default: %(default)s)"
    )
    parser.add_argument("--ablations", action="store_true", help="the method without its parts, too")
    parser.add_argument("--positions", choices=("compact", "original"), default="compact",
                        help="of the kept tokens in the language model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--proportional", action="store_true", help="add log(cluster size) to the attention logits")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every cell there")


def run(arguments: argparse.Namespace) -> int:
    need("numpy", "PIL", "rich", "transformers", remedy="pip install 'condense-kernels[cli,models]'")
    check_output("--csv", arguments.csv)
    model, _ = checkpoint.load(arguments.model)
    from ..tiny_llava import answers, questions, table

    if model.config.model_type != "llava" or model.config.text_config.vocab_size != len(questions.WORDS):
        raise CommandError(f"--model {arguments.model}: expected a model that knows these questions' words, as make "
                           "tiny-llava writes it")  # fmt: skip
    methods = {**answers.METHODS, **(answers.ABLATIONS if arguments.ablations else {})}
    console = make_console()
    with make_progress() as progress:
        task = progress.add_task("pictures", total=1 + len(methods) * len(arguments.keep))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        model = model.float().cpu()
        exam = answers.Exam.of(model, arguments.pictures)
        everything = answers.right(model, exam, None)[None]
        options = arguments.positions == "original", arguments.proportional
        try:
            found = answers.compare(model, exam, methods, arguments.keep, arguments.seeds, *options, tick)
        except ValueError as error:
            raise CommandError(f"--keep: {str(error).removeprefix('keep: ')}") from None
    for keep in arguments.keep:
        print_table(console, table.of_budget(everything, found, keep))
        console.print(table.in_words(found, keep), markup=False)
    if arguments.csv is not None:
        write_csv(arguments.csv, table.rows(everything, found))
        console.print(f"wrote {arguments.csv}", markup=False, soft_wrap=True)
    return 0


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[-1]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise CommandError(f"--csv: {path} can't be written: {error.strerror or error}") from None
