"""The offsets of a packed batch from what a caller knows: how many tokens each image has, and how many to keep."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ..select_and_merge.budget import DEFAULT_BACKGROUND_RATIO, split_budget


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
        seqlens: tokens of each image, ints >= 0.
        keep: a count of tokens an image, which a shorter image keeps all of, or a ratio in (0, 1), as
            :func:`split_budget` has it.
        background_ratio: the share of background tokens among the kept, in [0, 1].
        device: where features are; the copy there does not wait. None: torch's default device.

    Raises:
        TypeError, ValueError: as :func:`split_budget`.
    """
    seqlens = list(seqlens)  # an iterator would be used up by the check
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in seqlens):
        raise ValueError(f"seqlens: expected ints >= 0, got {seqlens}. Remedy: lengths.tolist().")
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
