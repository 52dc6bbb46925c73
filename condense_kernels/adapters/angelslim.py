"""AngelSlim, angelslim/compressor/token_compressor/factory.py: entries of PRUNING_STRATEGIES and MERGING_STRATEGIES.

The host calls ``strategy(context, **params)`` with the params of its configuration, and indexes the prompt's hidden
states by the mask, or multiplies them by the weights. Its prompts are one sequence at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..matrices import merge_matrix
from ..methods.registry import Method
from .common import check_one, count_of, mask_of, merges_by

Context = Any  # the host's PruningContext: inputs_embeds [1, L, D] and what the two functions below read
Segments = tuple[Sequence[int], Sequence[bool]]  # lengths, and which of them are visual
Merging = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]


def pruning_strategy(
    method: Method,
    *,
    visual: Callable[[Context], torch.Tensor],
    scores: Callable[[Context], torch.Tensor] | None = None,
) -> Callable[..., torch.Tensor]:
    """A method as ``strategy(context, *, ratio, **options) -> bool [1, L]``: text, and the visual tokens that stay.

    As in the host's own strategies, all visual tokens of a prompt are one set, and round(n * (1 - ratio)) stay, one
    at least unless ratio is 1. What differs from its loops (algorithm/divprune.py, idpruner.py): ties go to the lowest
    index; bf16 is computed as fp32; no pick waits for the device. A mask hands over no merged rows: of a method that
    merges, its tokens stay as they are. For those :func:`merging_strategy`.

    Args:
        method: of condense_kernels.methods; options of a call go to it.
        visual: bool [L] of a context, in the host
            ``lambda context: _extract_and_validate_vision_token_info(context)[2]``, of algorithm/utils/utils.py.
        scores: [1, n] of a context's n visual tokens, for methods that read them.

    Raises (the strategy):
        ValueError: more than one sequence, ratio outside [0, 1].
    """

    def strategy(context: Context, *, ratio: float, **options: Any) -> torch.Tensor:
        embeds = context.inputs_embeds
        check_one("inputs_embeds", embeds)
        places = visual(context).nonzero()[:, 0]
        n, mask = len(places), torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        keep = count_of(n, 1 - ratio, "1 - ratio")
        if keep == n:
            return mask
        mask[:, places] = False
        if keep > 0:
            found = method(embeds[:, places], None if scores is None else scores(context), keep, **options)
            mask[:, places] = mask_of(found.indices, n)
        return mask

    return strategy


def merging_strategy(
    method: Method,
    *,
    segments: Callable[[Context], Segments],
    scores: Callable[[Context], Sequence[torch.Tensor]] | None = None,
) -> Callable[..., Merging]:
    """A method as ``strategy(context, *, ratio, **options) -> (weights, sizes, is_visual, mask)``.

    weights: W_i [K_i, N_i] of each visual segment, in the dtype of inputs_embeds; the host replaces the segment by
    W_i @ segment (utils/mask_utils.py). sizes [S] int64 and is_visual [S] bool: the segments; mask [L] bool: text,
    and the token that each row stands for. Segments are condensed one by one, K_i = round(N_i * (1 - ratio)).
    What differs from the host's VisionZip (algorithm/visionzip.py): ties; a row of W sums to 1, where it divides by
    the sum + 1e-8; rows of W are in the dtype of the prompt, its sums were in fp32.

    Args:
        method: one that picks, or merges by its scores (condensevlm, topk_merge, random_merge ...): W is
            :func:`merge_matrix` of its assignment. A method that merges in another way raises.
        segments: (lengths, which are visual), in the host ``lambda context: get_dialogue_masks(context)[3:]``, of
            algorithm/utils/merging_utils.py.
        scores: [1, N_i] of each visual segment, in the host ``lambda context:
            _recompute_attention_maps_for_all_images(context.vit_q[layer], context.vit_k[layer], context)[0]``.

    Raises (the strategy):
        ValueError: more than one sequence, segments that are not the prompt, a ratio outside [0, 1) or of no scores
            for a segment, a method that merges in another way.
    """

    def strategy(context: Context, *, ratio: float, **options: Any) -> Merging:
        embeds = context.inputs_embeds
        check_one("inputs_embeds", embeds)
        sizes, is_visual = (list(part) for part in segments(context))
        if sum(sizes) != embeds.shape[1]:
            raise ValueError(f"segments: expected lengths whose sum is {embeds.shape[1]}, got {sum(sizes)}.")
        given: Iterator[torch.Tensor | None] = iter([None] * len(sizes) if scores is None else scores(context))
        weights, masks = [], []
        for part, of_image in zip(embeds.split(sizes, dim=1), is_visual, strict=True):
            n = part.shape[1]
            mask = torch.ones(n, dtype=torch.bool, device=part.device)
            if of_image and n > 0:
                w, indices = weights_of(method, part, next(given), count_of(n, 1 - ratio, "1 - ratio"), options)
                weights.append(w[0])
                mask = mask_of(indices, n)[0]
            masks.append(mask)
        lengths = torch.tensor(sizes, dtype=torch.int64, device=embeds.device)
        flags = torch.tensor(is_visual, dtype=torch.bool, device=embeds.device)
        return weights, lengths, flags, torch.cat(masks)

    return strategy


def weights_of(
    method: Method, features: torch.Tensor, scores: torch.Tensor | None, keep: int, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """W [1, K, N] and indices [1, K]."""
    found = method(features, scores, keep, **options)
    w = merge_matrix(found.assignment, found.indices, scores)
    if not merges_by(found, w, features):
        name = getattr(method, "__name__", method)
        raise ValueError(
            f"method: expected one that picks tokens or means them by their scores, got {name}, whose rows are others. "
            "Remedy: condensevlm, topk_merge, random_merge or a strategy of its own weights."
        )
    return w.to(features.dtype), found.indices
