"""The debug switch: while it is on, the Python functions read the values that they are given.

A normal call never does, as reading one waits for the device. What the operators define for such values (a NaN token
is picked last, a wrong offset reads nothing) is for servers that must go on; here it is an error that says where.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from . import environment
from .declaration import OPERATORS

_debugging: ContextVar[bool] = ContextVar("debugging", default=bool(environment.read("CONDENSE_DEBUG")))


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within, calls of the Python functions in this thread check the values of their tensors, and wait for the device.

    ``CONDENSE_DEBUG=1`` in the environment switches it on for the whole process, ``debug(False)`` off again within.
    Raw operators and compiled code are not checked.

    Examples:
        >>> with condense_kernels.debug():
        ...     condense_kernels.condense(features, scores, keep=64, grid=(24, 24))
        ValueError: scores: expected numbers >= 0, got -0.25 at image 1, token 17. Remedy: ...
    """
    token = _debugging.set(enabled)
    try:
        yield
    finally:
        _debugging.reset(token)


def is_on() -> bool:
    return not torch.compiler.is_compiling() and _debugging.get()


def checked(op: str, kernel: Callable) -> Callable:
    """``kernel``, that looks first: vmap and autograd have unwrapped everything by then."""

    look = OPERATORS[op].look

    def look_and_run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if look is not None and all(has_values(tensor) for tensor in tensors):
            look(*args, **kwargs)
        return kernel(*args, **kwargs)

    return look_and_run


def has_values(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


# What is looked for

FINITE = "Remedy: look where it was computed; an fp16 overflow is a common cause."


def refuse(name: str, values: torch.Tensor, wrong: torch.Tensor, expected: str, axes: tuple, remedy: str) -> None:
    """``axes`` name the axes of values, or turn an index into words."""
    if not wrong.any():
        return
    place = wrong.nonzero()[0].tolist()
    words = ", ".join(axis(i) if callable(axis) else f"{axis} {i}" for axis, i in zip(axes, place, strict=True))
    more = int(wrong.sum()) - 1
    also = f" and {more} more" if more else ""
    raise ValueError(f"{name}: expected {expected}, got {values[tuple(place)].item()} at {words}{also}. {remedy}")


def check_finite(name: str, values: torch.Tensor | None, axes: tuple, valid: torch.Tensor | None = None) -> None:
    if values is None or not values.is_floating_point():
        return
    wrong = ~values.isfinite()
    if valid is not None:
        wrong &= valid.reshape(*valid.shape, *[1] * (values.dim() - valid.dim()))
    refuse(name, values, wrong, "finite numbers", axes, FINITE)


def check_scores(scores: torch.Tensor | None, axes: tuple, valid: torch.Tensor | None = None) -> None:
    if scores is None:
        return
    check_finite("scores", scores, axes, valid)
    negative = scores < 0 if valid is None else (scores < 0) & valid
    remedy = "Remedy: scores weigh the merge; shift or clamp what is no attention."
    refuse("scores", scores, negative, "numbers >= 0", axes, remedy)


def check_indices(
    name: str, indices: torch.Tensor, low: int, limit: int, of_image: Callable = "image {}".format
) -> None:
    outside = (indices < low) | (indices >= limit)
    refuse(name, indices, outside, f"values in [{low}, {limit})", (of_image, "row"), "Remedy: indices of tokens.")
    sorted_, order = indices.sort(dim=1, stable=True)
    again = torch.zeros_like(outside)
    again[:, 1:] = (sorted_[:, 1:] == sorted_[:, :-1]) & (sorted_[:, 1:] >= 0)
    repeated = torch.zeros_like(outside).scatter(1, order, again)
    if repeated.any():
        image, row = repeated.nonzero()[0].tolist()
        token = indices[image, row].item()
        raise ValueError(
            f"{name}: expected distinct tokens, got token {token} again at {of_image(image)}, row {row}. "
            "Remedy: indices.unique(), or those that greedy_select returns."
        )


def check_positions(positions: torch.Tensor | None, valid: torch.Tensor | None) -> None:
    if positions is not None:
        axes = ("image", "token", "axis")[3 - positions.dim() :]
        check_finite("positions", positions, axes, valid if positions.dim() == 3 else None)
