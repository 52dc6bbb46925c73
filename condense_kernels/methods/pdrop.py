"""PyramidDrop (Xing et al. 2024), "Accelerating your large vision-language models via pyramid visual redundancy
reduction"."""

import torch

from ..ops.select_and_merge import Condensed
from .registry import TEXT, method
from .results import best, selected


@method("PyramidDrop", "Xing et al. 2024, arXiv 2410.17247", primitive="top-k", scores=TEXT, cost="-")
def pdrop(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
) -> Condensed:
    """One stage: the K tokens that the last token of the instruction attends to most; nothing is merged.

    The method is its schedule inside the language model: the hidden states behind layers 8, 16 and 24 of 32 go through
    this one after the other, with budgets of ``pdrop_budgets`` and the attention of the layer at hand, its heads
    averaged; each has the tokens that the one before has left. Before the model, as here, a stage is what
    FastV does. Equal scores: the lowest index, where torch.topk promises nothing.
    """
    return selected(features, scores, best(scores, keep))


def pdrop_budgets(num_tokens: int, ratio: float = 0.5, stages: int = 4) -> tuple[int, ...]:
    """The tokens in each stage of PyramidDrop, ``floor(num_tokens * ratio**s)``, at least 1: 576, 288, 144, 72.

    The first stage has all tokens; calls of ``pdrop`` keep the others in turn. Where stages have equally many layers,
    the mean is the budget that tables compare it at: 270 here.

    Raises:
        ValueError: num_tokens or stages below 1, a ratio outside (0, 1].
    """
    if num_tokens < 1 or stages < 1 or not 0 < ratio <= 1:
        raise ValueError(
            "num_tokens, ratio, stages: expected counts >= 1 and a ratio in (0, 1], "
            f"got {num_tokens}, {ratio} and {stages}. Remedy: (576, 0.5, 4)."
        )
    return tuple(max(1, int(num_tokens * ratio**stage)) for stage in range(stages))
