"""What generate counts, and gives back: callers think of the prompt that they gave, the model sees a shorter one."""

from typing import Any

import torch

from .families import Inputs


def from_configs(model: Any, given: Inputs, name: str) -> Any:
    """A generation parameter, from where generate takes it: the call, its config, the model's config."""
    configs = given.get("generation_config"), model.generation_config
    values = given.get(name), *(getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def mask_of(model: Any, given: Inputs) -> torch.Tensor:
    """The mask that generate supposes where none is given."""
    ids, pad, end = (given["input_ids"], *(from_configs(model, given, f"{name}_token_id") for name in ("pad", "eos")))
    ends = end.flatten().tolist() if isinstance(end, torch.Tensor) else [end] if isinstance(end, int) else end or []
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def with_lengths(model: Any, given: Inputs, removed: int) -> Inputs:
    """max_length and min_length count the prompt; the caller's count has the dropped tokens in it."""
    lengths = {}
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = from_configs(model, given, name)
        if length and from_configs(model, given, new) is None:
            lengths[name] = max(length - removed, 0)
    return {**given, **lengths}


def with_prompt(result: Any, prompt_ids: torch.Tensor, short: int) -> Any:
    """Callers slice by the length of the prompt that they gave."""
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    front = prompt_ids.to(sequences.device).repeat_interleave(len(sequences) // len(prompt_ids), dim=0)
    whole = torch.cat([front, sequences[:, short:]], dim=1)
    if isinstance(result, torch.Tensor):
        return whole
    result.sequences = whole
    return result
