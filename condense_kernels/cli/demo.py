"""condense a picture, print what came out, and draw it

The picture is centre-cropped to a square and cut into 24 x 24 patches of 14 x 14 pixels, the geometry of LLaVA-1.5.
The patches are the tokens, the patch minus the mean patch is the key, and the length of that key is the score: what
is unlike the rest of the picture stands out. No model is involved, so the numbers say what happens to pixels and
nothing about a model's answers. At the same budget it shows top-k by score, uniform pooling and random tokens.

With --score dinov2 (pip install '.[vision]') the tokens are those of DINOv2-small half-way, the score is the attention
of [CLS], and the model finishes with the tokens that are kept: docs/vision.md.
"""

import argparse
from pathlib import Path

import torch

from .. import split_budget
from .._dispatch import backends
from ..budget import DEFAULT_BACKGROUND_RATIO
from . import CommandError, check_output, make_console, make_progress, need, print_table, vision
from .arguments import count_or_ratio, decimal, whole
from .methods import METHOD_STEPS, compare_methods
from .patches import PATCH, check_pictures, make_inputs, open_picture
from .photographs import HOPPER
from .timing import time_backend

SIDE = 24
BACKENDS = ("cpp", "triton", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="pictures (default: a photograph that "
                        "ships with matplotlib; with dinov2 eight, also of scikit-image and scikit-learn)")  # fmt: skip
    parser.add_argument("--keep", type=count_or_ratio, default=64, metavar="K", help="tokens to keep: a count, or a "
                        "ratio in (0, 1] (default: 64)")  # fmt: skip
    parser.add_argument("--background-ratio", type=decimal(0, 1), default=DEFAULT_BACKGROUND_RATIO, metavar="R",
                        help="share of background tokens among the kept, in [0, 1] (default: %(default)s)")  # fmt: skip
    parser.add_argument("--score", choices=("pixels", "dinov2"), default="pixels", help="what says which tokens are "
                        "important; dinov2 needs the extra vision (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="the figure (default: demo.png); of several "
                        "pictures FILE-1.png, FILE-2.png, ...; with dinov2 (default: demo-vision.png) the first "
                        "picture's, and FILE-sheet.png of all")  # fmt: skip
    parser.add_argument("--grid", type=whole(1, 64), default=SIDE, metavar="G", help="cut into G x G patches "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where it runs (default here: %(default)s)")  # fmt: skip
    parser.add_argument("--backend", choices=backends.BACKENDS, default="auto", help="which kernels (default: auto)")


def output_names(output: Path, count: int) -> list[Path]:
    names = [output.with_stem(f"{output.stem}-{i}") for i in range(1, count + 1)] if count > 1 else [output]
    for name in names:
        check_output("--output", name, ".png")
    return names


def check_arguments(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return num_anchors and num_background."""
    try:
        budget = split_budget(arguments.grid**2, arguments.keep, arguments.background_ratio)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if arguments.device.split(":")[0] not in ("cpu", "cuda"):
        raise CommandError(f"--device: expected cpu or cuda, got {arguments.device}")
    try:
        torch.empty(1, dtype=torch.uint8, device=arguments.device).cpu()
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise CommandError(f"--device {arguments.device} is not available here: {first}") from None
    reason = backends.unavailable(arguments.backend, torch.device(arguments.device))
    if reason is not None:
        raise CommandError(f"--backend {arguments.backend} is not available here: {reason}")
    return budget


def run_one(path: Path, output: Path, budget: tuple[int, int], arguments: argparse.Namespace, console) -> bool:
    from .picture import draw  # these two need matplotlib and rich
    from .tables import NOTES, quality_table, timing_table, verdict

    picture = open_picture(path, arguments.grid * PATCH).to(arguments.device)
    inputs = make_inputs(picture, *budget)
    with make_progress() as progress:
        task = progress.add_task("", total=METHOD_STEPS + len(BACKENDS) + 1)

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        rows = compare_methods(inputs, arguments.backend, step)
        timings = []
        for backend in BACKENDS:
            step(f"timing {backend}")
            timings.append(time_backend(backend, inputs))
        step("drawing")
        try:
            draw(output, path.name, picture, inputs, rows)
        except OSError as error:
            raise CommandError(f"--output: {output} can't be written: {error.strerror or error}") from None
    height, width, _ = picture.shape
    console.print(f"{path.name}: cropped and resized to {height} x {width} pixels", style="bold", markup=False)
    print_table(console, quality_table(rows))
    console.print(verdict(rows), markup=False)
    console.print(NOTES, style="dim", markup=False, soft_wrap=True)
    print_table(console, timing_table(timings, inputs))
    console.print(f"wrote {output}", markup=False, soft_wrap=True)
    return not any(timing.wrong for timing in timings)


def run(arguments: argparse.Namespace) -> int:
    need("numpy", "einops", "PIL", "rich", "matplotlib")
    budget = check_arguments(arguments)
    check_pictures(arguments.images)
    console = make_console()
    if arguments.score == "dinov2":
        (output,) = output_names(arguments.output or Path("demo-vision.png"), 1)
        return vision.run(arguments, budget, output, console)
    paths = arguments.images or [HOPPER.path]
    outputs = output_names(arguments.output or Path("demo.png"), len(paths))
    right = [run_one(path, output, budget, arguments, console) for path, output in zip(paths, outputs, strict=True)]
    console.print("With a model's attention on several photographs: --score dinov2", style="dim", soft_wrap=True)
    return 0 if all(right) else 1
