"""The page of ``show``: show_page.html with everything that it shows inside it."""

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .reasons import reasons
from .selection import TITLES, Cell, Kept, Seen, budgets_of, cosines

if TYPE_CHECKING:
    from .show import Answers

TEMPLATE = Path(__file__).with_name("show_page.html")
START = 1 / 3  # where the slider stands at first


def data_uri(picture: torch.Tensor) -> str:  # [H, W, 3] in [0, 1]
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray((255 * picture).round().byte().cpu().numpy()).save(content, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def rounded(x: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in x.double().tolist()]


def neighbours(kept: Kept, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] each: the kept token that a token was merged into, or is most like where nothing merges; and the cosine with
    it. Of pooling the middle of its block, and the cosine with the mean."""
    indices, assignment = kept.condensed.indices[0], kept.condensed.assignment[0]
    rows = kept.condensed.merged[0] if kept.method == "pooling" else seen.features[0, indices]
    like = cosines(seen.features[0], rows)  # [N, K]
    row = assignment if kept.merges else like.argmax(dim=1).where(assignment < 0, assignment)
    return indices[row], like.gather(1, row[:, None])[:, 0]


def of_cell(cell: Cell, seen: Seen) -> dict[str, Any]:
    kept = cell.kept
    near, like = neighbours(kept, seen)
    told = {}
    if kept.stages is not None and kept.inputs is not None:
        told = {name: tier.told() for name, tier in reasons(kept.stages, kept.inputs).items()}
    return {
        "size": kept.size,
        "kept": kept.indices,
        "anchors": kept.anchors,  # these two in the order of the picks
        "background": kept.background,
        "near": near.tolist(),
        "like": rounded(like),
        "tiers": {
            name: {what: x.tolist() if what == "suppressor" else rounded(x) for what, x in tier.items()}
            for name, tier in told.items()
        },
        "answer": cell.answer,
    }


def page_data(seen: Seen, found: dict[str, dict[int, Cell]], answers: "Answers") -> dict[str, Any]:
    height, width, _ = seen.picture.shape
    scores = seen.scores[0].double()
    budgets = sorted(next(iter(found.values())))
    return {
        "name": seen.name,
        "grid": list(seen.grid),
        "size": [width, height],
        "picture": data_uri(seen.picture),
        "scores": [float(f"{score:.5g}") for score in scores.tolist()],
        "rank": (scores.argsort(descending=True, stable=True).argsort() + 1).tolist(),
        "first": int(scores.argmax()),
        "start": budgets.index(*budgets_of(seen.tokens, (START,))),
        "question": answers.question,
        "answer": answers.on_all,
        "methods": [
            {
                "name": method,
                "title": TITLES[method],
                "blocks": method == "pooling",
                "merges": next(iter(cells.values())).kept.merges,
                "cells": [of_cell(cells[budget], seen) for budget in budgets],
            }
            for method, cells in found.items()
        ],
    }


def write_page(path: Path, seen: Seen, found: dict[str, dict[int, Cell]], answers: "Answers") -> None:
    """One file that refers to no other, here or anywhere."""
    data = json.dumps(page_data(seen, found, answers), separators=(",", ":"), ensure_ascii=False)
    page = TEMPLATE.read_text(encoding="utf-8")
    path.write_text(page.replace("@DATA@", data.replace("<", r"\u003c")), encoding="utf-8")
