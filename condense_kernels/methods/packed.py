"""Methods on images of several sizes."""

from collections.abc import Sequence
from typing import Any

import torch

from ..ops.select_and_merge import Condensed
from .registry import Method
from .results import Grid


def packed(
    call: Method,
    features: torch.Tensor,  # [T, D]
    scores: torch.Tensor | None,  # [T]
    keep: Sequence[int],
    lengths: Sequence[int],
    *,
    grids: Sequence[Grid] | None = None,
    keys: torch.Tensor | None = None,  # [T, Dk]
    **options: Any,
) -> Condensed:
    """Any method on images of several sizes, one behind the other: each image's result is the one it has alone.

    Images of one size, one budget and one grid, wherever they stand, are one call. What else a method takes by image
    or by token is not packed: of those call it image by image.

    Args:
        call: a function of this package.
        features, scores, keys: [T, D], [T], [T, Dk], T the sum of ``lengths``.
        keep, lengths: ints on the host, one an image; a grid an image.

    Returns:
        Condensed: merged [sum of keep, D], indices [sum of keep] and assignment [T] within each image, mass.
    """
    lengths, keep = list(lengths), list(keep)
    on = [None] * len(lengths) if grids is None else [tuple(grid) for grid in grids]
    if not len(lengths) == len(keep) == len(on):
        raise ValueError(
            f"keep: expected one entry for each of {len(lengths)} images, got {len(keep)}, and {len(on)} grids."
        )
    if sum(lengths) != len(features):
        raise ValueError(f"lengths: expected a sum of {len(features)}, the tokens of features, got {sum(lengths)}.")
    parts = [None if x is None else x.split(lengths) for x in (features, scores, keys)]
    shapes = list(zip(lengths, keep, on, strict=True))
    found: dict[int, Condensed] = {}
    for shape in dict.fromkeys(shapes):
        images, (_, k, grid) = [i for i, other in enumerate(shapes) if other == shape], shape
        x, a, z = (None if part is None else torch.stack([part[i] for i in images]) for part in parts)
        result = call(x, a, k, grid=grid, keys=z, **options)  # type: ignore[arg-type]  # features are there
        found.update(zip(images, map(Condensed._make, zip(*result, strict=True)), strict=True))
    return Condensed._make(torch.cat(column) for column in zip(*map(found.__getitem__, sorted(found)), strict=True))
