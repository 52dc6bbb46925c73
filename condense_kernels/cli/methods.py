"""Four ways to condense the same picture to the same budget, and how they are measured."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from .. import assign, merge, metrics
from ..metrics import SIMILAR as SIMILAR
from ..testing import Inputs, Stages
from .patches import side_of

RANDOM_SEEDS = 20
METHOD_STEPS = 3 + RANDOM_SEEDS  # calls of ``step`` in compare_methods


class Result(NamedTuple):
    merged: torch.Tensor  # [K, D]
    assignment: torch.Tensor  # [N]
    anchors: list[int]  # kept for their score
    background: list[int]
    kept: list[int]  # kept by a method that has no such division
    keys: torch.Tensor  # [K, D], of the kept tokens
    blocks: tuple[int, int] | None = None  # of pooling

    @property
    def size(self) -> int:
        return len(self.merged)


class Quality(NamedTuple):
    """NaN stands for "undefined" (redundancy of a single token), infinity for an exact copy."""

    redundancy: float  # share of pairs of kept tokens whose keys have cosine >= SIMILAR
    rmse: float  # between the picture and the rebuilt one, pixels in [0, 1]
    psnr: float  # dB
    detail: float  # PSNR over the quarter of the patches with the highest scores, dB


class Row(NamedTuple):
    title: str
    result: Result
    quality: Any  # of the result that is drawn: Quality, or what ``judge`` of compare_methods returns
    spread: Sequence[Any] = ()  # of all seeds, where the choice is random


def pooling_blocks(keep: int, side: int) -> tuple[int, int]:
    """Rows and columns of blocks: as many as ``keep`` allows with columns <= 2 * rows, the squarest of those."""
    splits = [(a, b) for a in range(1, side + 1) for b in range(a, min(2 * a, side) + 1) if a * b <= keep]
    return max(splits, key=lambda split: (split[0] * split[1], split[0]))


def all_keys(inputs: Inputs) -> torch.Tensor:
    return cast(torch.Tensor, inputs.keys)[0]  # a picture's patches have some


def run_ours(inputs: Inputs, stages: Stages, backend: str) -> Result:
    """The flagship; as it returns the kept tokens in picture order, its stages tell which are anchors."""
    whole = inputs.run(backend)
    anchors, background = stages.anchors[0].tolist(), stages.background[0].tolist()
    return Result(whole.merged[0], whole.assignment[0], anchors, background, [], all_keys(inputs)[whole.indices[0]])


def run_selected(inputs: Inputs, s: torch.Tensor, kept: torch.Tensor, backend: str) -> Result:
    """Another choice of tokens, then the same assignment and merge as ours: only the selection differs."""
    indices = kept.sort().values[None]
    assignment = assign(s, indices, grid=inputs.grid, backend=backend)
    merged, _ = merge(inputs.features, inputs.scores, indices, assignment, backend=backend)
    return Result(merged[0], assignment[0], [], [], indices[0].tolist(), all_keys(inputs)[indices[0]])


def run_pooling(inputs: Inputs, keep: int) -> Result:
    side = side_of(inputs)
    rows, columns = pooling_blocks(keep, side)
    at = torch.arange(side, dtype=torch.int64, device=inputs.features.device)
    block = ((at * rows // side)[:, None] * columns + at * columns // side).flatten()  # [N]

    def means(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[block == k].double().mean(dim=0) for k in range(rows * columns)]).to(x.dtype)

    return Result(means(inputs.features[0]), block, [], [], [], means(all_keys(inputs)), (rows, columns))


def random_choice(scores: torch.Tensor, keep: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(scores.shape[1], generator=generator, dtype=torch.int64, device="cpu")
    return order[:keep].to(scores.device)


def redundancy(keys: torch.Tensor) -> float:
    return float(metrics.redundancy(keys.double()[None], SIMILAR))


def psnr(rmse: float) -> float:
    return math.inf if rmse == 0 else -20 * math.log10(rmse)


def measure(result: Result, inputs: Inputs) -> Quality:
    error = (result.merged[result.assignment] - inputs.features[0]).double().square().mean(dim=1)  # [N]
    detail = inputs.scores[0].topk(max(1, len(error) // 4)).indices
    rmse = float(error.mean().sqrt())
    return Quality(redundancy(result.keys), rmse, psnr(rmse), psnr(float(error[detail].mean().sqrt())))


def compare_methods(
    inputs: Inputs,
    backend: str,
    step: Callable[[str], None],
    judge: Callable[[Result, Inputs], Any] = measure,
    headline: str = "psnr",
) -> list[Row]:
    """Ours, then the three others at the same budget. ``step`` is told what is about to happen.

    Of the random choices, that in the middle by ``headline``, a field of what ``judge`` returns, is drawn.
    """
    keep = inputs.num_anchors + inputs.num_background
    step("select_and_merge")
    stages = inputs.run_stages(backend)
    ours = run_ours(inputs, stages, backend)
    step("top-k by score")
    top = run_selected(inputs, stages.s, inputs.scores[0].topk(keep).indices, backend)
    step("pooling")
    pooled = run_pooling(inputs, keep)
    drawn = []
    for seed in range(RANDOM_SEEDS):
        step(f"random tokens, {seed + 1} of {RANDOM_SEEDS}")
        drawn.append(run_selected(inputs, stages.s, random_choice(inputs.scores, keep, seed), backend))
    spread = [judge(result, inputs) for result in drawn]
    by_headline = sorted(range(RANDOM_SEEDS), key=lambda seed: getattr(spread[seed], headline))
    middle = by_headline[RANDOM_SEEDS // 2]  # neither luck is drawn
    rows, columns = pooling_blocks(keep, side_of(inputs))
    return [
        Row("select_and_merge", ours, judge(ours, inputs)),
        Row("top-k by score", top, judge(top, inputs)),
        Row(f"pooling, {rows} x {columns}", pooled, judge(pooled, inputs)),
        Row(f"random (median of {RANDOM_SEEDS})", drawn[middle], spread[middle], spread),
    ]
