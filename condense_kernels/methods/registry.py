"""What every method of this package has in common: its card, its checks, rows in picture order."""

import ast
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from .._dispatch.checks import FLOATS, as_count, check_not_empty, check_num_tokens, check_tensor, is_int, shown
from ..ops.select_and_merge import Condensed
from .results import Grid, in_picture_order

CLS, TEXT, NONE = "[CLS] attention", "text-to-image attention", "none"
REMEDIES = {"grid": "grid=(rows, columns)", "keys": "keys=, [B, N, Dk]", "generator": "generator=torch.Generator()"}


class Method(Protocol):
    def __call__(
        self,
        features: torch.Tensor,  # [B, N, D]
        scores: torch.Tensor | None,  # [B, N]
        keep: int,
        *,
        grid: Grid | None = None,
        keys: torch.Tensor | None = None,  # [B, N, Dk]
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Condensed: ...


SHARED = {  # by all methods
    name: parameter
    for name, parameter in inspect.signature(Method.__call__).parameters.items()
    if name not in ("self", "options")
}


@dataclass(frozen=True)
class Card:
    """A row of docs/methods.md."""

    name: str
    title: str
    source: str  # who, when, and which equation or algorithm
    primitive: str  # the operators that it is built on
    scores: str  # what ``scores`` are: CLS, TEXT, or NONE where any will do
    cost: str  # beyond reading the features, in multiply-adds of an image
    call: Method
    training_free: bool = True
    needs: tuple[str, ...] = ()  # keyword arguments that it cannot do without

    @property
    def options(self) -> tuple[str, ...]:
        """The keyword arguments that only this method has."""
        return tuple(name for name in inspect.signature(self.call).parameters if name not in SHARED)

    @property
    def lines(self) -> int:
        """Of its body's code."""
        return body_lines(inspect.getsource(inspect.unwrap(self.call)))


def body_lines(source: str) -> int:
    function = cast(ast.FunctionDef, ast.parse(source).body[0])
    first = function.body[1 if ast.get_docstring(function) else 0]
    return sum(bool(line.strip()) for line in source.splitlines()[first.lineno - 1 :])


METHODS: dict[str, Card] = {}


def method(
    title: str,
    source: str,
    *,
    primitive: str,
    scores: str,
    cost: str,
    needs: Iterable[str] = (),
    training_free: bool = True,
    data_dependent: str = "",
) -> Callable[[Callable[..., Condensed]], Method]:
    """Register a function under its name. Around it arguments are checked, and rows put into picture order.

    data_dependent: what to say to who wants the published rule that lets the data choose K.
    """

    def register(function: Callable[..., Condensed]) -> Method:
        own = inspect.signature(function).parameters
        unused = {"grid", "keys", "generator"} - own.keys()

        @functools.wraps(function)
        def call(
            features: torch.Tensor,
            scores: torch.Tensor | None,
            keep: int,
            *,
            grid: Grid | None = None,
            keys: torch.Tensor | None = None,
            generator: torch.Generator | None = None,
            **options: Any,
        ) -> Condensed:
            scores, keep = checked(card, data_dependent, features, scores, keep, grid, keys)
            check_numbers(own, options)
            options |= {"grid": grid, "keys": keys, "generator": generator}
            for argument in card.needs:
                if options.get(argument) is None:
                    remedy = REMEDIES.get(argument, f"help(condense_kernels.methods.{card.name}) says what it is")
                    raise ValueError(f"{argument}: {card.name} cannot do without it, got None. Remedy: {remedy}.")
            for argument in unused:
                del options[argument]
            return in_picture_order(function(features, scores, keep, **options))

        more = [parameter for name, parameter in own.items() if name not in SHARED]
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*SHARED.values(), *more], return_annotation=Condensed
        )
        card = Card(function.__name__, title, source, primitive, scores, cost, call, training_free, tuple(needs))
        METHODS[card.name] = card
        return call

    return register


def check_numbers(own: Mapping[str, inspect.Parameter], options: dict[str, Any]) -> None:
    """An option whose default is a number is one, and finite; in which range is the method's to say."""
    for name, value in options.items():
        default = own[name].default if name in own else None
        if isinstance(default, bool) or not isinstance(default, (int, float)):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, as its default {default} is, got {shown(value)}.")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}. Remedy: its default, {default}.")


def checked(
    card: Card,
    data_dependent: str,
    features: torch.Tensor,
    scores: torch.Tensor | None,
    keep: int,
    grid: Grid | None,
    keys: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """The scores, ones where a method needs none, and the budget."""
    sizes: dict[str, int] = {}
    check_tensor("features", features, "B N D", sizes, FLOATS)
    check_not_empty("features", features, 1, "token")
    check_num_tokens("features", features)
    if scores is None and card.scores == NONE:
        scores = features.new_ones(features.shape[:2], dtype=torch.float32)
    if scores is None:
        raise TypeError(f"scores: {card.name} reads {card.scores} [B, N], got None. Remedy: see help({card.name}).")
    check_tensor("scores", scores, "B N", sizes, FLOATS, like=features)
    if keys is not None:
        check_tensor("keys", keys, "B N Dk", sizes, FLOATS, like=features)
    n, keep = sizes["N"], as_count("keep", keep)
    if not is_int(keep):
        published = f" {data_dependent}" if data_dependent else ""
        raise TypeError(
            f"keep: expected an int, the same for every image, got {shown(keep)}.{published} Remedy: a count; "
            f"round(ratio * {n}) is one."
        )
    if not 1 <= keep <= n:
        raise ValueError(f"keep: expected 1 <= keep <= {n}, the tokens of an image, got {shown(keep)}.")
    if grid is not None:
        product = 1
        for side in grid:
            product *= side
        if product != n:
            raise ValueError(f"grid: expected sides whose product is {n}, the tokens of an image, got {tuple(grid)}.")
    return scores, keep
