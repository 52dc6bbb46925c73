"""What an operator says about itself, in its op.py. Whatever goes through all operators reads it from here: backends,
derivatives, vmap, shards, the debug switch, the flop counter, and the tests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Example(NamedTuple):
    """Arguments of a call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Derivatives:
    function: type[torch.autograd.Function]
    of: int  # the first so many arguments, if they are floating
    backward: str = ""  # the operator that its backward runs, on the same backend; itself where there is none


@dataclass(frozen=True)
class Operator:
    name: str
    check: Callable[..., None]  # metadata alone, so once for all calls alike; raises TypeError or ValueError
    reference: Callable[..., Any]
    triton: Callable[..., Any]
    fake: Callable[..., Any] | None  # None: returns no tensor, so there is nothing to trace
    flops: Callable[..., int]  # additions, products and comparisons; of the arguments, with shapes for tensors
    examples: Callable[[int], list[Example]]  # of so many images; they cover all arguments and all outcomes of check
    check_memory: Callable[..., None] | None = None  # where tensors lie; raises ValueError
    look: Callable[..., None] | None = None  # at the values, under the debug switch; raises ValueError
    derivatives: Derivatives | None = None
    no_derivatives: str | None = None  # why, where one would be expected
    shared: Mapping[str, int] = field(default_factory=dict)  # arguments that all images may share, and their axes then
    looped: bool = False  # under vmap, where there is no batch axis to fold the mapped one into
    no_vmap: str | None = None  # the remedy
    no_shards: str | None = None  # why
    is_traced: Callable[..., bool] | None = None  # whether Inductor sees the kernels of a call on a GPU; None: of none
    as_operator: Mapping[str, Any] = field(default_factory=dict)  # with these, the Python function returns its result


OPERATORS: dict[str, Operator] = {}


def always(*args: Any, **options: Any) -> bool:
    return True


def random(*shape: int) -> torch.Tensor:
    """In [0, 1), whatever the default dtype and device are: for examples."""
    return torch.rand(shape, dtype=torch.float32, device="cpu")
