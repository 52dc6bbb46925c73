"""What each call of the language model has to know of a condensed prompt. It comes with the images' features, through
generate, and goes on with the cache: any number of prompts, and of threads, have each their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .checks import CACHES
from .families import Inputs

CARRIED = "condense_carried"  # the attribute of the images' features, and of a cache


@dataclass(frozen=True)
class Carried:
    positions: torch.Tensor  # [B, L'] of the condensed prompt

    def added_to(self, inputs: Inputs) -> Inputs:
        if inputs.get("position_ids") is not None:  # generate counts on by itself
            return inputs
        rows, count = rows_and_length(inputs)
        cache = cache_of(inputs)
        past = 0 if cache is None else cache.get_seq_length()  # of a static cache it is a tensor, which is not read
        return {**inputs, "position_ids": repeated(self.positions_from(past, count), rows)}

    def positions_from(self, past: Any, count: int) -> torch.Tensor:  # [B, count]
        """Behind the prompt they go on after its last one, and not after its length."""
        prompt, length = self.positions, self.positions.shape[1]
        place = torch.arange(count, dtype=torch.int64, device=prompt.device) + past
        behind = prompt.amax(dim=1, keepdim=True) + 1 + place - length
        return torch.where(place < length, prompt[:, place.clamp(max=length - 1)], behind)


def repeated(prompts: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, ...] for each sequence of a prompt: [rows, ...]."""
    return prompts.repeat_interleave(rows // len(prompts), dim=0)


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
    output = stock(**carried.added_to(inputs))
    values = output.values() if isinstance(output, dict) else output
    for cache in values:
        if isinstance(cache, Cache):
            setattr(cache, CARRIED, carried)
    return output
