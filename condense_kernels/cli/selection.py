"""One picture's tokens as a model has them, and what each method keeps of them: what ``show`` draws."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..budget import split_budget
from ..methods import METHODS as PUBLISHED
from ..methods.results import in_picture_order
from ..models.families import Grid
from ..models.methods import BASELINES
from ..ops.select_and_merge import Condensed
from ..testing import Inputs, Stages

OURS = "condensevlm"
TITLES = {name: card.title for name, card in PUBLISHED.items()} | {
    OURS: "CondenseVLM",
    "topk": "top-k",
    "topk_merge": "top-k, merged",
    "maxmin": "max-min",
    "random": "random",
    "random_merge": "random, merged",
    "uniform": "coarser grid",
    "pooling": "pooling",
}
PAGE = (1 / 36, 1 / 18, 1 / 12, 1 / 9, 1 / 6, 2 / 9, 5 / 18, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)  # budgets, of all tokens
IN_BLOCKS = ("pooling", "uniform")  # whose K is a product


class Seen(NamedTuple):
    name: str
    picture: torch.Tensor  # [H, W, 3] in [0, 1], as the encoder saw it
    features: torch.Tensor  # [1, N, D]
    scores: torch.Tensor  # [1, N]
    grid: Grid

    @property
    def tokens(self) -> int:
        return self.scores.shape[1]

    def cosines(self) -> torch.Tensor:  # [N, N] fp64
        return cosines(self.features[0], self.features[0])


class Kept(NamedTuple):
    """What a method keeps of Seen."""

    method: str
    condensed: Condensed  # [1, ...], rows in picture order
    stages: Stages | None = None  # these two of OURS
    inputs: Inputs | None = None

    @property
    def size(self) -> int:
        return self.condensed.indices.shape[1]

    @property
    def indices(self) -> list[int]:
        return self.condensed.indices[0].tolist()

    @property
    def anchors(self) -> list[int]:
        return [] if self.stages is None else self.stages.anchors[0].tolist()

    @property
    def background(self) -> list[int]:
        return [] if self.stages is None else self.stages.background[0].tolist()

    @property
    def merges(self) -> bool:
        return bool((self.condensed.assignment >= 0).all())


def cosines(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # [N, D], [K, D] -> [N, K] fp64
    return F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T


def fitting(method: str, keep: int, grid: Grid) -> int:
    """The largest count up to ``keep`` that the method takes on this grid."""
    if method not in IN_BLOCKS:
        return keep
    rows, columns = grid
    return max(r * c for r in range(1, rows + 1) for c in range(1, columns + 1) if r * c <= keep)


def keep_tokens(method: str, seen: Seen, keep: int, seed: int = 0) -> Kept:
    keep = fitting(method, keep, seen.grid)
    if method == OURS:
        inputs = Inputs(seen.features, seen.scores, *split_budget(seen.tokens, keep), grid=seen.grid)
        stages = inputs.run_stages()
        return Kept(method, stages.condensed, stages, inputs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = BASELINES[method](seen.features, seen.scores, keep, seen.grid)
    return Kept(method, in_picture_order(found))


def similarity_of(kept: Kept, seen: Seen) -> torch.Tensor:  # [K, K] fp64
    """Cosines of the kept tokens as they were before merging; of pooling, of the means."""
    rows = kept.condensed.merged[0] if kept.method == "pooling" else seen.features[0, kept.condensed.indices[0]]
    return cosines(rows, rows)


def beside_alike(s: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # [K, K], [K] -> [K]
    """An order in which groups of like tokens show as squares: from the highest score on, always to the token that is
    most similar to the last one among those that are left."""
    order = [int(scores.argmax())]
    left = torch.ones_like(scores, dtype=torch.bool)
    for _ in range(len(s) - 1):
        left[order[-1]] = False
        order.append(int(s[order[-1]].masked_fill(~left, -torch.inf).argmax()))
    return torch.tensor(order, dtype=torch.int64, device=s.device)


def budgets_of(tokens: int, shares: Sequence[float] = PAGE) -> tuple[int, ...]:
    """Ascending, each once."""
    return tuple(sorted({sum(split_budget(tokens, share)) for share in shares}))


class Cell(NamedTuple):
    kept: Kept
    answer: str | None = None  # on these tokens, where something was asked
