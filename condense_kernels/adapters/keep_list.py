"""A sorted list of places that stay in a prompt: how DivPrune prunes, and LightCompress' divprune.py after it."""

from typing import Any, NamedTuple

import torch

from ..methods.registry import Method
from ..tokens import gather_tokens


class Kept(NamedTuple):
    indices: torch.Tensor  # [B, L'] int64, ascending: places in the prompt
    inputs_embeds: torch.Tensor  # [B, L', D]
    position_ids: torch.Tensor | None  # [B, L'] or [P, B, L']
    attention_mask: torch.Tensor | None  # [B, L']


def keep_list(
    method: Method,
    inputs_embeds: torch.Tensor,  # [B, L, D]
    start: int,
    length: int,
    keep: int,
    *,
    scores: torch.Tensor | None = None,  # [B, length]
    position_ids: torch.Tensor | None = None,  # [B, L] or [P, B, L]
    attention_mask: torch.Tensor | None = None,  # [B, L]
    **options: Any,
) -> Kept:
    """The prompts with ``keep`` of the ``length`` visual tokens from ``start`` on, and what else is indexed like them.

    L' is L - length + keep. A row into which tokens are merged stands at its token's place. Other tensors, such as
    labels: ``gather_tokens(indices, labels)``. What differs from the host (llmc/compression/token_reduction/
    divprune.py): every prompt of a batch keeps tokens of its own, where the first one's are kept in all; K are
    distinct, ties to the lowest index.

    Raises:
        ValueError: the visual tokens are not within the prompt; what the method raises.
    """
    b, n, _ = inputs_embeds.shape
    if start < 0 or not 0 < length <= n - start:
        raise ValueError(f"start, length: expected tokens within a prompt of {n}, got {start} and {length}.")
    found = method(inputs_embeds[:, start : start + length], scores, keep, **options)
    place = torch.arange(n, dtype=torch.int64, device=inputs_embeds.device).expand(b, n)
    before, behind = place[:, :start], place[:, start + length :]
    indices = torch.cat([before, found.indices + start, behind], dim=1)
    embeds = torch.cat([inputs_embeds[:, :start], found.merged, inputs_embeds[:, start + length :]], dim=1)
    positions = None if position_ids is None else gather_tokens(indices, position_ids, dim=-1)
    mask = None if attention_mask is None else gather_tokens(indices, attention_mask)
    return Kept(indices, embeds, positions, mask)
