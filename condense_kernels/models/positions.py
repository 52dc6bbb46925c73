"""Which position ids the language model gets: of M-RoPE the places in the picture; of one axis those of the shorter
prompt, or of the prompt as it was given."""

import inspect
from typing import Any

import torch

from .families import Family, Inputs
from .prompt import text_positions

POSITIONS = ("compact", "original")


def has_places(base: Any) -> bool:
    """Whether tokens have a place in the picture (M-RoPE), which stays theirs in any case."""
    return hasattr(base, "get_rope_index")


def check_positions(model: Any, family: Family, positions: Any) -> None:
    if not (isinstance(positions, str) and positions in POSITIONS):
        raise ValueError(
            f"positions: expected 'compact' or 'original', got {positions!r}. Remedy: 'compact', which counts the "
            "tokens that are left."
        )
    if positions == "compact" or has_places(model.base_model):
        return
    if family.crops:
        raise ValueError(
            f"positions: expected 'compact', as the crops of {type(model).__name__} lie in rows of all of them, "
            "where K tokens of a crop have no place, got 'original'. Remedy: leave it out."
        )
    for part in (model, model.base_model, model.base_model.get_decoder()):
        if "position_ids" not in inspect.signature(type(part).forward).parameters:
            raise ValueError(
                f"positions: expected 'compact', as {type(part).__name__} takes no position_ids, got 'original'. "
                "Remedy: leave it out."
            )


def given_positions(base: Any, positions: str, inputs: Inputs) -> torch.Tensor | None:
    """Of the prompt with all tokens: [3, B, L] of M-RoPE, else [B, L], counted as generate does. None: the model
    counts those that are left, or the caller has."""
    if inputs.get("position_ids") is not None:
        return None
    if not has_places(base):
        original = positions == "original"
        return text_positions(inputs.get("attention_mask"), inputs["input_ids"]) if original else None
    if inputs.get("mm_token_type_ids") is None:
        return None
    accepted = inspect.signature(base.get_rope_index).parameters
    return base.get_rope_index(**{name: inputs[name] for name in accepted if inputs.get(name) is not None})[0]


def set_places(base: Any, inputs: Inputs, text_row: bool) -> None:
    """Of M-RoPE: tokens keep their places; the next one comes after the last, however many there are."""
    positions, mask = inputs["position_ids"], inputs.get("attention_mask")
    text = text_positions(mask, inputs["input_ids"])
    real = torch.ones_like(text) if mask is None else mask
    last = positions.amax(dim=0).masked_fill(real == 0, 0).amax(dim=1, keepdim=True)  # [B, 1]
    base.rope_deltas = last + 1 - real.sum(dim=1, keepdim=True)
    if text_row:  # as generate wants them
        inputs["position_ids"] = torch.cat([text[None], positions])
