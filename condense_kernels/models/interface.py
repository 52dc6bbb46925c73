"""transformers' attention interface: a module names in its config the function that attends for it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def goes_by_interface(module: torch.nn.Module) -> bool:
    """Whether the forward of its class, or of one that it is derived from, asks for the function by name."""
    forwards = (vars(kind).get("forward") for kind in type(module).__mro__)
    return any("ALL_ATTENTION_FUNCTIONS" in names_in(forward) for forward in forwards)


def names_in(function: Any) -> tuple[str, ...]:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(getattr(function, "__code__", None), "co_names", ())


def attention_named(module: torch.nn.Module, config: Any) -> Callable:
    """The function that ``config`` names. Of eager attention each file of models has one of its own."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    eager = next(
        (vars(file)["eager_attention_forward"] for file in files if hasattr(file, "eager_attention_forward")), None
    )
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
