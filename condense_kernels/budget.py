"""For callers who think in a budget: how many tokens to keep, of which a share is background; dense and packed."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ._dispatch import tracing
from ._dispatch.checks import FLOATS, MAX_TOKENS, check_num_tokens, check_tensor, is_int, shown
from .ops.select_and_merge import Condensed, select_and_merge

DEFAULT_BACKGROUND_RATIO = 0.25
MAX_PACKED = torch.iinfo(torch.int32).max


@tracing.leaf(tuple, 2)
def split_budget(
    num_tokens: int, keep: int | float, background_ratio: float = DEFAULT_BACKGROUND_RATIO
) -> tuple[int, int]:
    """Return (num_anchors, num_background) for a budget, without any tensor: serving engines size buffers with it.

    ``keep`` is a count (int, 1 <= keep <= num_tokens) or a ratio (float in (0, 1)); a ratio keeps
    ``floor(num_tokens * keep + 0.5)`` tokens, at least one. Of those, ``floor(kept * background_ratio + 0.5)`` are
    background (1 - alpha in the paper's terms), the rest anchors. Halves round up in both.
    """
    if not is_int(num_tokens) or num_tokens < 1:
        raise ValueError(f"num_tokens: expected an int >= 1, got {shown(num_tokens)}. Remedy: int(num_tokens).")
    if not torch.compiler.is_compiling() and num_tokens > MAX_TOKENS:  # an open size is left open
        raise ValueError(f"num_tokens: expected at most {MAX_TOKENS} tokens an image, got {shown(num_tokens)}.")
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
        raise ValueError(f"keep: expected 1 <= keep <= {num_tokens} tokens, got {shown(keep)}.")
    if isinstance(background_ratio, bool) or not isinstance(background_ratio, (int, float)):
        raise TypeError(
            f"background_ratio: expected a number, got {type(background_ratio).__name__}: {background_ratio!r}. "
            "Remedy: float(background_ratio)."
        )
    if not 0 <= background_ratio <= 1:
        raise ValueError(f"background_ratio: expected a share in [0, 1], got {shown(background_ratio)}.")
    num_background = rounded(keep * background_ratio)
    return keep - num_background, num_background


def rounded(count: float) -> int:
    """Halves up; count >= 0, so trunc is floor, which torch.export cannot save."""
    return math.trunc(count + 0.5)


@tracing.leaf(Condensed._make, 4)
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
    num_anchors, num_background = tracing.unrecorded(budget_of, features, keep, background_ratio)
    if torch.jit.is_tracing() and isinstance(keep, float):
        raise ValueError(
            f"keep: expected an int, as torch.jit.trace records the count of this size for all sizes, got {keep}. "
            f"Remedy: keep={num_anchors + num_background}, or torch.export, which records the ratio."
        )
    options = {"keys": keys, "grid": grid, "positions": positions, "mask": mask, "backend": backend}
    weights = {"suppression": suppression, "spatial_weight": spatial_weight}
    return select_and_merge(features, scores, num_anchors, num_background, **options, **weights)


def budget_of(features: torch.Tensor, keep: int | float, background_ratio: float) -> tuple[int, int]:
    check_tensor("features", features, "B N D", {}, FLOATS)
    tracing.checked(check_num_tokens, "features", features)
    return split_budget(features.shape[1], keep, background_ratio)


class VarlenBudget(NamedTuple):
    """The arguments of select_and_merge_varlen after features and scores, in its order."""

    cu_seqlens: torch.Tensor  # [S + 1] int32
    cu_anchors: torch.Tensor  # [S + 1] int32
    cu_background: torch.Tensor  # [S + 1] int32
    total_keep: int
    max_seqlen: int


def varlen_budget(
    seqlens: Sequence[int],
    keep: int | float = 64,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    device: torch.device | str | None = None,
) -> VarlenBudget:
    """Offsets for images of these lengths: ``select_and_merge_varlen(features, scores, *varlen_budget([576, 1200]))``.

    Args:
        seqlens: tokens of each image, ints from 0 to 2**19, together below 2**31.
        keep: a count of tokens an image, which a shorter image keeps all of, or a ratio in (0, 1), as
            :func:`split_budget` has it.
        background_ratio: the share of background tokens among the kept, in [0, 1].
        device: where features are; the copy there does not wait. None: torch's default device.

    Raises:
        TypeError, ValueError: as :func:`split_budget`; lengths that are no such numbers.
    """
    seqlens = list(seqlens)  # an iterator would be used up by the check
    for n in seqlens:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"seqlens: expected ints >= 0, got {shown(n)} among them. Remedy: lengths.tolist().")
        if n > MAX_TOKENS:
            raise ValueError(
                f"seqlens: expected at most {MAX_TOKENS} tokens an image, got {shown(n)}. Remedy: condense windows or "
                "frames separately."
            )
    if sum(seqlens) > MAX_PACKED:
        raise ValueError(
            f"seqlens: expected a sum of at most {MAX_PACKED} tokens, as offsets are int32, got {sum(seqlens)}. "
            "Remedy: several batches."
        )
    budgets = [
        split_budget(n, min(keep, n) if isinstance(keep, int) else keep, background_ratio) if n > 0 else (0, 0)
        for n in seqlens
    ]
    anchors, background = [a for a, _ in budgets], [b for _, b in budgets]
    device = torch.get_default_device() if device is None else torch.device(device)

    def running_sums(counts: Sequence[int]) -> torch.Tensor:
        sums = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cpu")
        if device.type == "cuda":
            sums = sums.pin_memory()
        return sums.to(device, non_blocking=True)

    offsets = (running_sums(counts) for counts in (seqlens, anchors, background))
    return VarlenBudget(*offsets, sum(anchors) + sum(background), max(seqlens, default=0))
