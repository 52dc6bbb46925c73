"""what generate takes on all visual tokens and on fewer, method by method: time, memory, FLOPs, KV cache

The efficiency tables of the papers, for the model at hand. Every prompt is answered by each method at each budget, with
the sides in turn; random tokens and pooling are in every table. Latency counts, and FLOPs do not: where a row is not
faster than all tokens, a line below the table says so.

With --config-only nothing is measured: the papers' formulas alone, for llava-1.5-7b, llava-next-7b or any folder with a
config.json, beside what the papers print. How to read the columns: docs/report.md.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import CommandError, check_output, checkpoint, make_console, make_progress, need, print_table, waiting
from .arguments import check_name, count_or_ratio, meant, whole

ALWAYS = ("random", "pooling")
MOST_THREADS = 1024  # more of them, and OpenMP ends the process
BUDGETS = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576
QUESTION, OF_TINY = "Describe the image.", "what is the background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=checkpoint.TINY, metavar="DIR|tiny", help="a folder of transformers' with a "
                        "model and its processor (default: the tiny LLaVA that comes with the package)")  # fmt: skip
    parser.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE", help="pictures, one a prompt "
                        "(default, of tiny alone: one of its test pictures)")  # fmt: skip
    parser.add_argument("--question", metavar="TEXT", help=f"default: {QUESTION!r}, of tiny {OF_TINY!r}")
    parser.add_argument("--keep", type=count_or_ratio, nargs="+", metavar="K", help="tokens of an image, or of each "
                        "of its crops: counts, or ratios in (0, 1] (default: 1/3, 2/9 and 1/9 of them)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=["condensevlm", "topk"], metavar="M", help="as method= of "
                        "apply_condense (default: condensevlm topk); random and pooling are added")  # fmt: skip
    parser.add_argument("--new-tokens", type=whole(1), default=16, metavar="N", help="of each answer (default: 16)")
    parser.add_argument("--rounds", type=whole(1), default=15, metavar="R", help="of all sides (default: 15)")
    parser.add_argument(
        "--threads", type=whole(1, MOST_THREADS), default=1, metavar="T", help="of torch on CPU (default: 1)"
    )
    parser.add_argument("--clock", choices=("cpu", "wall"), help="cpu: the time of all threads, which what else runs "
                        "on the machine hardly touches (default: cpu on CPU, wall on a GPU)")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw time by budget and method")
    parser.add_argument("--config-only", action="store_true", help="the formulas, without weights and pictures")
    parser.add_argument("--tokens", type=whole(1), metavar="N", help="of an image, with --config-only (default: what "
                        "the config says)")  # fmt: skip


def check_arguments(arguments: argparse.Namespace) -> None:
    check_output("--csv", arguments.csv)
    check_output("--figure", arguments.figure, ".png")
    if arguments.config_only and (arguments.figure is not None or arguments.image):
        raise CommandError("--config-only: expected neither --image nor --figure, as nothing is measured")
    if arguments.tokens is not None and not arguments.config_only:
        raise CommandError("--tokens: expected --config-only beside it; a model says itself how many there are")


def run(arguments: argparse.Namespace) -> int:
    need("rich", "transformers", remedy="pip install 'condense-kernels[cli,models]'")
    check_arguments(arguments)
    return formulas_alone(arguments) if arguments.config_only else measured(arguments)


def measured(arguments: argparse.Namespace) -> int:
    need("PIL", *(["matplotlib"] if arguments.figure else []), remedy="pip install 'condense-kernels[cli,models]'")
    with waiting("importing transformers"):
        from ..models import efficiency
        from .prompts import inputs_of
        from .report_table import notes, provenance, table, title, words, write_csv

        methods = chosen_methods(arguments.methods)
    pictures = [opened(path) for path in arguments.image] or [default_picture(arguments.model)]
    model, processor = checkpoint.load(arguments.model)
    clock = arguments.clock or ("cpu" if model.device.type == "cpu" else "wall")
    if clock == "cpu" and model.device.type != "cpu":
        raise CommandError("--clock: expected wall, as the model is on a GPU, got cpu")
    question = arguments.question or (OF_TINY if arguments.model == checkpoint.TINY else QUESTION)
    with waiting("encoding the pictures"):
        prompts = [inputs_of(arguments.model, model, processor, picture, question) for picture in pictures]
        budgets = checked_budgets(arguments.keep or list(BUDGETS), model, prompts, arguments.model)
    sides = [efficiency.Side(), *(efficiency.Side(method, keep) for keep in budgets for method in methods)]
    with make_progress() as progress, threads_of_torch(arguments.threads):
        task = progress.add_task("", total=len(sides) * (1 + arguments.rounds))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        rows = efficiency.measure(model, prompts, sides, arguments.new_tokens, arguments.rounds, clock, tick)
        about = provenance(arguments, model, len(prompts), question, clock)
    if rows[0].reason or all(row.reason for row in rows[1:]):
        raise CommandError(f"--model {arguments.model}: {next(row.reason for row in rows if row.reason)}")
    console = make_console()
    console.print(title(about), style="bold", markup=False, soft_wrap=True)
    print_table(console, table(rows, model))
    console.print(words(rows), markup=False, soft_wrap=True)
    console.print(notes(about), style="dim", markup=False, soft_wrap=True)
    for path, write in ((arguments.csv, write_csv), (arguments.figure, drawn)):
        if path is not None:
            written(path, lambda path=path, write=write: write(path, rows, about, model), console)
    return 0


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(path: Path, rows: list[Any], about: dict[str, Any], model: Any) -> None:
    from .report_figure import draw

    draw(path, rows, about, model)


def written(path: Path, write: Any, console: Any) -> None:
    try:
        with waiting(f"writing {path.name}"):
            write()
    except OSError as error:
        raise CommandError(f"{path} can't be written: {error.strerror or error}") from None
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def chosen_methods(names: list[str]) -> list[str]:
    from ..models.methods import METHODS

    for name in names:
        check_name("--methods", name, METHODS)
    return list(dict.fromkeys([*names, *ALWAYS]))


def opened(path: Path) -> Any:
    from .patches import read_picture

    try:
        return read_picture(path)
    except CommandError as error:
        raise CommandError(f"--image: {error}") from None


def default_picture(name: str) -> Any:
    if name != checkpoint.TINY:
        checkpoint.folder_of(name)  # a misspelt name is told first
        raise CommandError("--image: expected a picture or several, got none")
    from PIL import Image

    from ..tiny_llava.scenes import Scenes

    return Image.fromarray(Scenes("test", seed=0).scene().pixels)


def checked_budgets(budgets: list[int | float], model: Any, prompts: list[dict], name: str) -> list[int | float]:
    from ..budget import count_of
    from ..models.efficiency import tokens_of

    try:
        tokens = tokens_of(model, prompts)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--model {name}: {error}") from error
    for keep in budgets:
        try:
            count_of("keep", keep, min(tokens))
        except ValueError as error:
            raise CommandError(f"{error} The images, or their crops, have {shown(tokens)}.") from None
    return budgets


def shown(tokens: list[int]) -> str:
    return ", ".join(map(str, sorted(set(tokens))))


def formulas_alone(arguments: argparse.Namespace) -> int:
    from ..budget import count_of
    from ..models.formulas import KNOWN
    from .report_table import formula_table, sizes_of, write_formula_csv

    known = KNOWN.get(arguments.model) or from_config(arguments.model, arguments.tokens)
    tokens = arguments.tokens or known.tokens
    try:
        default = known.budgets if tokens == known.tokens else BUDGETS
        kept = [count_of("keep", keep, tokens) for keep in arguments.keep or default]
    except ValueError as error:
        raise CommandError(str(error)) from None
    console = make_console()
    console.print(f"{known.title}: {sizes_of(known)}", style="bold", markup=False, soft_wrap=True)
    print_table(console, formula_table(known, [tokens, *kept]))
    if arguments.csv is not None:
        written(arguments.csv, lambda: write_formula_csv(arguments.csv, known, [tokens, *kept]), console)
    return 0


def from_config(name: str, tokens: int | None) -> Any:
    """Of "tiny", a folder with config.json, or that file."""
    from transformers import AutoConfig

    from ..models.formulas import KNOWN, Decoder, Known
    from ..tiny_llava import PATH

    path = PATH if name == checkpoint.TINY else Path(name)
    path = path if path.suffix == ".json" else path / "config.json"
    if not path.is_file():
        close = meant(name, [*KNOWN, checkpoint.TINY])
        raise CommandError(f"--model {name}: expected {', '.join(KNOWN)}, tiny, or a folder with config.json{close}")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        decoder = Decoder.of(config)
    except Exception as error:  # as of checkpoint.loaded
        raise CommandError(
            f"--model {name}: expected the config of a model with images: {checkpoint.first_line(error)}"
        ) from error
    found = tokens or visual_tokens(config)
    if found is None:
        raise CommandError(f"--tokens: expected the visual tokens of an image, which the config of {name} does not say")
    dtype = getattr(config, "dtype", None)
    return Known(config.model_type, decoder, found, BUDGETS, itemsize=getattr(dtype, "itemsize", 2))


def visual_tokens(config: Any) -> int | None:
    """Of an image, or of a crop: None where it depends on the image's size."""
    for name in ("image_seq_length", "mm_tokens_per_image"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None
