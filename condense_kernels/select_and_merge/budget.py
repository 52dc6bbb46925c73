"""For callers who think in a budget: how many tokens to keep, of which a share is background."""

import math
from collections.abc import Sequence

import torch

from .._checks import FLOATS, check_tensor
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
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, (int, torch.SymInt)) or num_tokens < 1:
        raise ValueError(f"num_tokens: expected an int >= 1, got {num_tokens!r}. Remedy: int(num_tokens).")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(
            f"keep: expected an int count or a float ratio, got {type(keep).__name__}: {keep!r}. "
            "Remedy: int(keep) or float(keep)."
        )
    if isinstance(keep, float):
        if not 0 < keep < 1:
            raise ValueError(f"keep: expected a ratio in (0, 1), got {keep}. Remedy: an int is a count of tokens.")
        keep = torch.sym_max(1, rounded(num_tokens * keep))  # torch.export takes no max() of an open size
    elif not 1 <= keep <= num_tokens:
        raise ValueError(f"keep: expected 1 <= keep <= {num_tokens} tokens, got {keep}.")
    if isinstance(background_ratio, bool) or not isinstance(background_ratio, (int, float)):
        raise TypeError(
            f"background_ratio: expected a number, got {type(background_ratio).__name__}: {background_ratio!r}. "
            "Remedy: float(background_ratio)."
        )
    if not 0 <= background_ratio <= 1:
        raise ValueError(f"background_ratio: expected a share in [0, 1], got {background_ratio}.")
    num_background = rounded(keep * background_ratio)
    return keep - num_background, num_background


def rounded(count: float) -> int:
    """Halves up; count >= 0, so trunc is floor, which torch.export cannot save."""
    return math.trunc(count + 0.5)


def condense(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int | float = 64,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    grid: Sequence[int] | None = None,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    mask: torch.Tensor | None = None,  # [B, N]
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    backend: str = "auto",
) -> Condensed:
    """Condense every image to a budget: ``condense(features, scores, keep=64, grid=(24, 24)).merged``.

    Args:
        features: [B, N, D] fp32, fp16, bf16 or fp64: the tokens that are merged.
        scores: [B, N] floating, >= 0: importance.
        keep: a count of tokens, or a ratio in (0, 1); rounded as :func:`split_budget` says.
        background_ratio: the share of background tokens among the kept, in [0, 1].
        grid: (H, W) or (T, H, W) with product N; this and the further options are those of :func:`select_and_merge`.

    Returns:
        The named tuple (merged [B, K, D], indices [B, K], assignment [B, N], mass [B, K]) of :func:`select_and_merge`.

    Raises:
        TypeError, ValueError: as :func:`select_and_merge` and :func:`split_budget`.
    """
    check_tensor("features", features, "B N D", {}, FLOATS)
    num_anchors, num_background = split_budget(features.shape[1], keep, background_ratio)
    options = {"keys": keys, "grid": grid, "positions": positions, "mask": mask, "backend": backend}
    weights = {"suppression": suppression, "spatial_weight": spatial_weight}
    return select_and_merge(features, scores, num_anchors, num_background, **options, **weights)
