"""The demo with real attention: DINOv2's tokens instead of pixels, and what the model makes of those that are kept."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..testing import Inputs
from . import CommandError, make_progress, print_table
from .dinov2 import BEFORE, BLOCKS, PACKAGE, SCORE, VERSION, Tokens, encode, follow, load_model
from .methods import METHOD_STEPS, SIMILAR, Result, Row, compare_methods, redundancy
from .patches import PATCH, open_picture
from .photographs import PHOTOGRAPHS

NOTES = f"""\
model       DINOv2-small, saliency-tuned ({PACKAGE} {VERSION}): {BEFORE} of {BLOCKS} blocks, condense, the other blocks
score       {SCORE}
key         the token after block {BEFORE}; redundancy is the share of pairs of kept tokens whose cosine is >= {SIMILAR}
cosines     of the output to that on all tokens: of [CLS], and of each token to what its cluster became, mean;
            prop.: proportional attention, the logarithm of the cluster's size on each key's logits
baselines   top-k and random tokens go through the same assign and merge: only the selection differs
limits      fidelity to the model on all tokens, and nothing about the accuracy of answers: docs/fidelity.md has more"""


class Quality(NamedTuple):
    """Cosines as in dinov2.Fidelity, without and with proportional attention."""

    redundancy: float
    cls: float
    tokens: float
    cls_prop: float
    tokens_prop: float


class Seen(NamedTuple):
    """A picture, and what came of it."""

    name: str
    picture: torch.Tensor  # [H, W, 3]
    inputs: Inputs
    tokens: Tokens
    rows: list[Row]  # of methods.compare_methods
    outputs: list[torch.Tensor]  # [1 + K, D] of each row, with proportional attention


def make_inputs(tokens: Tokens, budget: tuple[int, int], side: int) -> Inputs:
    return Inputs(tokens.patches, tokens.scores, *budget, keys=tokens.patches, grid=(side, side))


def look(model: Any, path: Path, budget: tuple[int, int], arguments: argparse.Namespace, step: Any) -> Seen:
    picture = open_picture(path, arguments.grid * PATCH).to(arguments.device)
    tokens = encode(model, picture)

    def judge(result: Result, _: Inputs) -> Quality:
        plain, prop = (follow(model, tokens, result.merged, result.assignment, on)[1] for on in (False, True))
        return Quality(redundancy(result.keys), *plain, *prop)

    inputs = make_inputs(tokens, budget, arguments.grid)
    rows = compare_methods(inputs, arguments.backend, step, judge, headline="cls_prop")
    outputs = [follow(model, tokens, row.result.merged, row.result.assignment, True)[0] for row in rows]
    return Seen(path.name, picture, inputs, tokens, rows, outputs)


def sheet_name(output: Path) -> Path:
    return output.with_stem(f"{output.stem}-sheet")


def run(arguments: argparse.Namespace, budget: tuple[int, int], output: Path, console: Any) -> int:
    from .tables import TOKENS, quality_table, verdict
    from .vision_picture import draw, draw_sheet

    model = load_model(arguments.device)
    paths = arguments.images or [photograph.path for photograph in PHOTOGRAPHS]
    seen = []
    with make_progress() as progress:
        task = progress.add_task("", total=len(paths) * METHOD_STEPS)
        for path in paths:

            def step(what: str, name: str = path.name) -> None:
                progress.update(task, advance=1, description=f"{name}: {what}")

            seen.append(look(model, path, budget, arguments, step))
    written = [output] if len(seen) == 1 else [output, sheet_name(output)]
    try:
        draw(output, seen[0])
        if len(seen) > 1:
            draw_sheet(sheet_name(output), seen)
    except OSError as error:
        raise CommandError(f"--output: {output} can't be written: {error.strerror or error}") from None
    for one in seen:
        height, width, _ = one.picture.shape
        console.print(f"{one.name}: cropped and resized to {height} x {width} pixels", style="bold", markup=False)
        print_table(console, quality_table(one.rows, TOKENS, "tokens"))
        console.print(verdict(one.rows, TOKENS), markup=False)
    console.print(NOTES, style="dim", markup=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0
