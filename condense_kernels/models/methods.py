"""What becomes of the features of each image: the methods by name, and any callable."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..budget import DEFAULT_BACKGROUND_RATIO, condense, varlen_budget
from ..methods import ALIASES
from ..methods import METHODS as PUBLISHED
from ..methods.registry import CLS, NONE
from ..methods.registry import Method as PublishedMethod
from ..methods.results import in_picture_order as in_picture_order
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from ..ops.select_and_merge_varlen import select_and_merge_varlen
from .families import Grid

Method = Callable[[torch.Tensor, torch.Tensor, int, Grid], Condensed]  # features [B, N, D], scores [B, N], keep, grid


def on_grid(published: PublishedMethod) -> Method:
    return lambda features, scores, keep, grid: published(features, scores, keep, grid=grid)


# The other methods whose scores are what apply_condense has, and the names that they had here first.
BASELINES: dict[str, Method] = {
    name: on_grid(card.call)
    for name, card in {
        **{name: PUBLISHED[method] for name, method in ALIASES.items()},
        **PUBLISHED,
    }.items()
    if name != "condensevlm" and card.scores in (CLS, NONE) and set(card.needs) <= {"grid"}
}
METHODS = ("condensevlm", *BASELINES)


@dataclass(frozen=True)
class Condenser:
    """A method and its options, for images of any size."""

    method: str | Method
    background_ratio: float = DEFAULT_BACKGROUND_RATIO
    suppression: float = 1.0
    spatial_weight: float = 1.0
    background_suppression: float | None = None
    scale_prior: bool = True
    backend: str = "auto"

    def __call__(
        self,
        features: Sequence[torch.Tensor],  # [N, D] of each image
        scores: Sequence[torch.Tensor],  # [N]
        keeps: Sequence[int],
        grids: Sequence[Grid],
    ) -> list[Condensed]:  # of each image, without the batch axis
        """Images of one size go as one batch; the paper's method takes images of several sizes packed."""
        shapes = list(zip(map(len, features), keeps, grids, strict=True))
        if self.method == "condensevlm" and len(set(shapes)) > 1:
            return self.packed(features, scores, keeps, grids)
        found: list[Condensed] = []
        for (_, keep, grid), images in itertools.groupby(range(len(shapes)), shapes.__getitem__):
            batch = list(images)
            stacked = torch.stack([features[i] for i in batch]), torch.stack([scores[i] for i in batch])
            found += map(Condensed._make, zip(*self.batch(*stacked, keep, grid), strict=True))
        return found

    def batch(self, features: torch.Tensor, scores: torch.Tensor, keep: int, grid: Grid) -> Condensed:
        if self.method == "condensevlm":
            return condense(
                features,
                scores,
                keep,
                self.background_ratio,
                grid,
                suppression=self.suppression,
                spatial_weight=self.spatial_weight,
                background_suppression=self.background_suppression,
                scale_prior=self.scale_prior,
                backend=self.backend,
            )
        method = BASELINES[self.method] if isinstance(self.method, str) else self.method
        result = method(features, scores, keep, grid)
        check_result(result, features, keep)
        return in_picture_order(Condensed(*result))

    def packed(
        self,
        features: Sequence[torch.Tensor],
        scores: Sequence[torch.Tensor],
        keeps: Sequence[int],
        grids: Sequence[Grid],
    ) -> list[Condensed]:
        lengths, device = [len(x) for x in features], features[0].device
        axes = max(map(len, grids))
        at = [positions_on((1,) * (axes - len(grid)) + tuple(grid), device) for grid in grids]
        packed = select_and_merge_varlen(
            torch.cat(list(features)),
            torch.cat(list(scores)),
            *varlen_budget(lengths, list(keeps), self.background_ratio, device),
            positions=torch.cat(at),
            suppression=self.suppression,
            spatial_weight=self.spatial_weight,
            background_suppression=self.background_suppression,
            scale_prior=self.scale_prior,
            backend=self.backend,
        )
        by_row, by_token = list(keeps), lengths
        sizes = by_row, by_row, by_token, by_row
        parts = [result.split(size) for result, size in zip(packed, sizes, strict=True)]
        return list(map(Condensed._make, zip(*parts, strict=True)))


def positions_on(grid: Grid, device: torch.device) -> torch.Tensor:
    """[N, P] int64, row-major."""
    axes = [torch.arange(side, dtype=torch.int64, device=device) for side in grid]
    return torch.cartesian_prod(*axes).view(-1, len(grid))


def check_result(result: Any, features: torch.Tensor, keep: int) -> None:
    """Of a callable: the placeholders of the prompt are counted by it."""
    b, _, d = features.shape
    if not isinstance(result, tuple) or len(result) != len(Condensed._fields):
        raise TypeError(
            "method: expected it to return Condensed(merged, indices, assignment, mass), got "
            f"{type(result).__name__}. Remedy: condense_kernels.condense returns one."
        )
    expected = {"merged": (b, keep, d), "indices": (b, keep), "assignment": tuple(features.shape[:2])}
    for name, shape in expected.items():
        tensor = Condensed(*result)._asdict()[name]
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"method: expected {name} {list(shape)} of keep = {keep} tokens of each image, got {got}. Remedy: "
                "as many rows as the argument keep says; the prompt has that many placeholders for them."
            )


def merged_plane(plane: torch.Tensor, scores: torch.Tensor, condensed: Condensed) -> torch.Tensor:
    """[N, D'] of another plane of one image's tokens -> [K, D'], with the same weights and the same assignment."""
    merged, _ = merge(plane[None], scores[None], condensed.indices[None], condensed.assignment[None])
    return merged[0]
