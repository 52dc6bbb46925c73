"""UniPruneBench (VLMUniPruneBench), methods/: a function for @register_prune("..._pre_llm") of prune_registry.py."""

from collections.abc import Callable
from typing import Any

import torch

from ..methods.registry import Method
from .common import count_of


def pre_llm(
    method: Method, keep_ratio: float | Callable[[], float], **options: Any
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A method as ``prune(selected bool [L], vit_embeds [P, n, D]) -> (selected, embeds [K, D])``.

    As in methods/DivPrune_PreLLM.py, the first of several tiles is one set and all others are another, each with
    round(keep_ratio * its tokens), one at least. ``selected`` keeps the first K of its True, as InternVL's generate
    wants it (custom_internvl.py), in a tensor of its own: the host's writes into the argument. Scores are none: the
    interface has no attention. What differs from the loop there: K distinct tokens also where some are equal or zero
    (of a zero vector its cosines are NaN), ties to the lowest index, bf16 computed as fp32.

    Args:
        method: of condense_kernels.methods, of those that need no scores; ``options`` go to it.
        keep_ratio: a share, or a function that returns it: the host reads its variable KEEP_RATIO, 0.5 where unset.

    Raises (the function):
        ValueError: wrong ranks, no tile, placeholders that are not as many as tokens, a share outside (0, 1].
    """

    def prune(selected: torch.Tensor, vit_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if vit_embeds.dim() != 3 or vit_embeds.shape[0] * vit_embeds.shape[1] == 0:
            raise ValueError(f"vit_embeds: expected [tiles, tokens, D], some of both, got {list(vit_embeds.shape)}.")
        tiles, n, d = vit_embeds.shape
        if selected.dim() != 1 or int(selected.sum()) != tiles * n:
            raise ValueError(f"selected: expected bool [L] with {tiles * n} True, a token each, got {selected.shape}.")
        share = keep_ratio() if callable(keep_ratio) else keep_ratio
        sets = [vit_embeds[:1], vit_embeds[1:].reshape(1, -1, d)] if tiles > 1 else [vit_embeds]
        kept = [method(x, None, count_of(x.shape[1], share, "keep_ratio"), **options).merged[0] for x in sets]
        embeds = torch.cat(kept)
        return selected & (selected.cumsum(0) <= len(embeds)), embeds

    return prune
