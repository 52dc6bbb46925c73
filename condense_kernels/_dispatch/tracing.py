"""What the Python functions do while they are recorded: by torch.fx.symbolic_trace, torch.jit.trace, torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.fx import Proxy

if TYPE_CHECKING:  # Python 3.9 lacks it
    from typing import ParamSpec

    P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable)


def leaf(
    pack: Callable[..., Any] | None = None, count: int | Callable[[dict[str, Any]], int] = 1
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: calls of the function are single nodes of what torch.fx.symbolic_trace records, whose Proxies have
    no shapes to check. ``pack`` makes one result of ``count`` Proxies, which cannot be iterated themselves; where their
    number depends on options, of those."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Proxy):
                    node: Any = value.tracer.create_proxy("call_function", called, args, kwargs)
                    number = count(kwargs) if callable(count) else count
                    return node if pack is None else pack(node[i] for i in range(number))
            return function(*args, **kwargs)

        return called

    return decorate


def unrecorded(function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """What ``function`` makes of shapes, unseen by torch.jit.trace, which would warn of each comparison."""
    if not torch.jit.is_tracing():
        return function(*args, **options)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # its stub lacks it
    try:
        return function(*args, **options)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]  # likewise


def checked(check: Callable[P, object], *args: P.args, **options: P.kwargs) -> None:
    """Not while torch.compile or torch.export trace: each question would be one open size less in the graph, and the
    operator asks them when it runs."""
    if not torch.compiler.is_compiling():
        unrecorded(check, *args, **options)


def constant_in_graphs(function: F) -> F:
    """torch.compiler.assume_constant_result, which imports dynamo for that: seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute of dynamo's own
    return function
