"""For callers who think in a budget: how many tokens to keep, of which a share is background."""

import math
from collections.abc import Sequence

import torch

from .op import Condensed, select_and_merge

DEFAULT_BACKGROUND_RATIO = 0.25


def split_budget(
    num_tokens: int, keep: int | float, background_ratio: float = DEFAULT_BACKGROUND_RATIO
) -> tuple[int, int]:
    """Return (num_anchors, num_background) for a budget, without any tensor: serving engines size buffers with it.

    ``keep`` is a count (int, 1 <= keep <= num_tokens) or a ratio (float in (0, 1)); a ratio keeps
    ``floor(num_tokens * keep + 0.5)`` tokens, at least one. Of those, ``floor(kept * background_ratio + 0.5)`` are
    background (1 - alpha in the paper's terms), the rest anchors. Halves round up in both.
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens: expected an int >= 1, got {num_tokens!r}.")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep: expected an int count or a float ratio, got {type(keep).__name__}: {keep!r}.")
    if isinstance(keep, float):
        if not 0 < keep < 1:
            raise ValueError(f"keep: expected a ratio in (0, 1), got {keep}. Remedy: an int is a count of tokens.")
        keep = max(1, math.floor(num_tokens * keep + 0.5))
    if not 1 <= keep <= num_tokens:
        raise ValueError(f"keep: expected 1 <= keep <= {num_tokens} tokens, got {keep}.")
    if isinstance(background_ratio, bool) or not isinstance(background_ratio, (int, float)):
        raise TypeError(f"background_ratio: expected a number, got {type(background_ratio).__name__}.")
    if not 0 <= background_ratio <= 1:
        raise ValueError(f"background_ratio: expected a share in [0, 1], got {background_ratio}.")
    num_background = math.floor(keep * background_ratio + 0.5)
    return keep - num_background, num_background


def condense(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int | float = 64,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    grid: Sequence[int] | None = None,
    **options,
) -> Condensed:
    """Condense every image to a budget: ``condense(features, scores, keep=64, grid=(24, 24)).merged``.

    Args:
        features: [B, N, D]; scores: [B, N]; grid and further options as in :func:`select_and_merge`.
        keep: a count of tokens, or a ratio in (0, 1); rounded as :func:`split_budget` says.
        background_ratio: the share of background tokens among the kept, in [0, 1].
    """
    if not isinstance(features, torch.Tensor) or features.dim() != 3:
        got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"features: expected a tensor [B N D], got {got}.")
    num_anchors, num_background = split_budget(features.shape[1], keep, background_ratio)
    return select_and_merge(features, scores, num_anchors, num_background, grid=grid, **options)
