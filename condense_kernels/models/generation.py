"""What generate counts, and gives back: callers think of the prompt that they gave, the model sees a shorter one."""

import copy
from typing import Any

import torch
import transformers

from .families import Inputs


def release() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


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


def check_repeated(model: Any, given: Inputs, rewritten: Inputs) -> None:
    """Of several sequences a prompt: transformers 5.18 repeats images A B as A A B B where they are one tensor."""
    pooled = rewritten["mm_encoder_outputs"]["image"].pooler_output
    if release() >= (5, 19) or not isinstance(pooled, torch.Tensor):
        return
    several = bool(((rewritten["input_ids"] == model.config.image_token_id).sum(dim=1) > pooled.shape[1]).any())
    for name in ("num_beams", "num_return_sequences"):
        count = from_configs(model, given, name) or 1
        if several and count > 1:
            raise ValueError(
                f"{name}: expected 1 on transformers {transformers.__version__} where a prompt of "
                f"{type(model).__name__} has several images, as that release then mixes them up, got {count}. Remedy: "
                "transformers >= 5.19."
            )


def with_lengths(model: Any, given: Inputs, removed: int) -> Inputs:
    """max_length and min_length count the prompt; the caller's count has the dropped tokens in it."""
    lengths = {}
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = from_configs(model, given, name)
        if length and from_configs(model, given, new) is None:
            lengths[name] = max(length - removed, 0)
    config = given.get("generation_config")
    if config is None:
        return {**given, **lengths}
    config = copy.deepcopy(config)  # transformers wants all in it, or nothing
    config.update(**lengths)
    return {**{name: value for name, value in given.items() if name not in lengths}, "generation_config": config}


def seen_whole(given: Inputs, prompt_ids: torch.Tensor, short: int) -> Inputs:
    """Stopping criteria and logits processors of the caller get the prompt as it was given, and what follows."""
    result = dict(given)
    for name in ("stopping_criteria", "logits_processor"):
        if given.get(name) is not None:
            result[name] = [OnWhole(function, prompt_ids, short) for function in given[name]]
    allowed = given.get("prefix_allowed_tokens_fn")
    if allowed is not None:

        def on_whole(row: int, ids: torch.Tensor) -> list[int]:
            return allowed(row, whole(ids[None], prompt_ids[row, None], short)[0])

        result["prefix_allowed_tokens_fn"] = on_whole
    return result


class OnWhole:
    """``function`` (input_ids, scores) on the prompt as it was given; in all else it is as that."""

    def __init__(self, function: Any, prompt_ids: torch.Tensor, short: int) -> None:
        self.function, self.prompt_ids, self.short = function, prompt_ids, short

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self.function(whole(input_ids, self.prompt_ids, self.short), scores)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copy and pickle
            raise AttributeError(name)
        return getattr(self.function, name)


def whole(sequences: torch.Tensor, prompt_ids: torch.Tensor, short: int) -> torch.Tensor:
    """[B * returned, L' + new] -> [B * returned, L + new]"""
    front = prompt_ids.to(sequences.device).repeat_interleave(len(sequences) // len(prompt_ids), dim=0)
    return torch.cat([front, sequences[:, short:]], dim=1)


def with_prompt(result: Any, prompt_ids: torch.Tensor, short: int) -> Any:
    """Callers slice by the length of the prompt that they gave."""
    if isinstance(result, torch.Tensor):
        return whole(result, prompt_ids, short)
    result.sequences = whole(result.sequences, prompt_ids, short)
    return result
