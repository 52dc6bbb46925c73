"""torch.func.vmap: the mapped axis is folded into the batch, so a mapped call is one call.

torch.library.register_vmap does not take operators with keyword-only tensors; this is what it does, for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from .declaration import OPERATORS
from .library import as_returned, listed, register_kernel, schema_of

BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)

if TYPE_CHECKING:
    Axis = int | None  # where the mapped axis of a tensor is


def mapped(op: str, call: Callable, values: Sequence, axes: Sequence[Axis], size: int) -> tuple[torch.Tensor, ...]:
    """Results with the mapped axis in front; call takes the values in the schema's order."""
    operator = OPERATORS[op]
    if operator.no_vmap:
        raise RuntimeError(f"{op} has no rule for torch.func.vmap. Remedy: {operator.no_vmap}.")
    return (looped if operator.looped else folded)(op, call, values, axes, size)


def folded(op: str, call: Callable, values: Sequence, axes: Sequence[Axis], size: int) -> tuple[torch.Tensor, ...]:
    def fold(name: str, value, axis: Axis):
        if not isinstance(value, torch.Tensor) or (axis is None and shared.get(name) == value.dim()):
            return value  # one for all images
        value = value.expand(size, *value.shape) if axis is None else value.movedim(axis, 0)  # [V, B, ...]
        if name in shared and value.dim() == shared[name] + 1:  # [V, ...]: one for the images of a mapped call
            value = value[:, None].expand(-1, batch, *value.shape[1:])
        return value.flatten(0, 1)

    shared = OPERATORS[op].shared
    batch = values[0].shape[0] if axes[0] is None else values[0].movedim(axes[0], 0).shape[1]  # also of no calls
    names = (argument.name for argument in schema_of(op).arguments)
    results = call(*map(fold, names, values, axes))
    return tuple(result.unflatten(0, (size, batch)) for result in listed(results))


def looped(op: str, call: Callable, values: Sequence, axes: Sequence[Axis], size: int) -> tuple[torch.Tensor, ...]:
    def pick(value, axis: Axis, i: int):
        return value if axis is None else value.select(axis, i)

    if size == 0:
        raise RuntimeError(f"{op}: expected a mapped axis of at least one call, got 0. Remedy: {op} of no segments.")
    results = [
        listed(call(*(pick(value, axis, i) for value, axis in zip(values, axes, strict=True)))) for i in range(size)
    ]
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def register(op: str, call: Callable) -> None:
    """The raw operator under vmap; ``call`` takes its arguments in the schema's order."""

    def kernel(*args, **kwargs):
        interpreter: Any = retrieve_current_functorch_interpreter()  # vmap's, which alone has a batch_size
        level, size = interpreter.level(), interpreter.batch_size()
        values = [*args, *(kwargs.get(a.name, a.default_value) for a in schema_of(op).arguments[len(args) :])]
        pairs = [_unwrap_batched(v, level) if isinstance(v, torch.Tensor) else (v, None) for v in values]
        unwrapped, axes = zip(*pairs, strict=True)
        with torch._C._ExcludeDispatchKeyGuard(BATCHED):  # and not interpreter.lower(), which would hide autograd
            results = mapped(op, call, unwrapped, axes, size)
        return as_returned(op, tuple(_add_batch_dim(result, 0, level) for result in results))

    register_kernel(op, kernel, "FuncTorchBatched")
