"""What each call of the language model has to know of a condensed prompt. It comes with the images' features, through
generate, and goes on with the cache: any number of prompts, and of threads, have each their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .checks import CACHES
from .families import Inputs
from .proportional import BIAS, check_arrived, key_bias

CARRIED = "condense_carried"  # the attribute of the images' features, and of a cache


@dataclass(frozen=True)
class Carried:
    positions: torch.Tensor | None  # [B, L'] of the condensed prompt, where the model does not count them itself
    log_sizes: torch.Tensor | None  # [B, L'] fp32 of its tokens, 0 of text, where attention is proportional

    def added_to(self, inputs: Inputs) -> Inputs:
        """The arguments of forward for the next tokens."""
        rows, count = rows_and_length(inputs)
        cache, added = cache_of(inputs), dict(inputs)
        if self.log_sizes is not None:
            added[BIAS] = key_bias(self.log_sizes, cache, count)
        if self.positions is not None and inputs.get("position_ids") is None:  # generate counts on by itself
            past = 0 if cache is None else cache.get_seq_length()  # of a static cache it is a tensor, which is not read
            added["position_ids"] = positions_from(self.positions, past, count).repeat_interleave(
                rows // len(self.positions), dim=0
            )
        return added


def positions_from(prompt: torch.Tensor, past: Any, count: int) -> torch.Tensor:  # [B, count]
    """Behind the prompt they go on after its last one, and not after its length."""
    length = prompt.shape[1]
    place = torch.arange(count, dtype=torch.int64, device=prompt.device) + past
    behind = prompt.amax(dim=1, keepdim=True) + 1 + place - length
    return torch.where(place < length, prompt[:, place.clamp(max=length - 1)], behind)


def laid_out(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[B, L'], values [n] in the n places of ``where`` [B, L'] and 0 elsewhere."""
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def rows_and_length(inputs: Inputs) -> tuple[int, int]:
    ids = inputs.get("input_ids")
    b, length = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
    return b, length


def cache_of(values: Inputs) -> Cache | None:
    return next((values[name] for name in CACHES if isinstance(values.get(name), Cache)), None)


def carried_by(inputs: Inputs) -> Carried | None:
    """Of a call without pixels."""
    images = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if hasattr(images, CARRIED):
        return getattr(images, CARRIED)
    cache = cache_of(inputs)
    if cache is None or not hasattr(cache, CARRIED):
        return None
    if rows_and_length(inputs)[1] > 1 and not cache.get_seq_length():  # it has been reset since, for another prompt
        delattr(cache, CARRIED)
        return None
    return getattr(cache, CARRIED)


def carrying(stock: Callable, inputs: Inputs) -> Any:
    """The model's own forward, without pixels; what it hands on is known to the next call."""
    carried = carried_by(inputs)
    if carried is None:
        return stock(**inputs)
    given = carried.added_to(inputs)
    output = stock(**given)
    if BIAS in given:
        check_arrived(given[BIAS])
    values = output.values() if isinstance(output, dict) else output
    for cache in values:
        if isinstance(cache, Cache):
            setattr(cache, CARRIED, carried)
    return output
