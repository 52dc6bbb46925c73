"""What a call costs where there is next to nothing to compute: every operator that is declared, on its first example,
by the raw operator and by the Python function."""

import functools
from collections.abc import Callable

import gates
import torch
from harness import Side, main
from shapes import Shape

import condense_kernels as ck
from condense_kernels._dispatch.declaration import OPERATORS, Operator
from condense_kernels._dispatch.library import listed, schema_of

SHAPES = ("overhead",)  # how many calls are timed together; what is called, the operators say


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    found = {}
    for op, operator in OPERATORS.items():
        if not schema_of(op).returns or operator.fake is None:  # no tensor that could be checked
            continue
        found[f"{op}, operator"] = side_of(operator, getattr(torch.ops.condense, op).default, features.device)
        if hasattr(ck, op):
            function = functools.partial(getattr(ck, op), **operator.as_operator)
            found[f"{op}, function"] = side_of(operator, function, features.device)
    return found


def side_of(operator: Operator, call: Callable, device: torch.device) -> Side:
    def moved(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    torch.manual_seed(0)
    example = operator.examples(1)[0]
    expected = listed(operator.reference(*example.args, **example.kwargs))
    args, kwargs = [moved(value) for value in example.args], {name: moved(v) for name, v in example.kwargs.items()}

    def check(results) -> None:
        names = (result.name for result in schema_of(operator.name).returns)
        for name, result, exact in zip(names, listed(results), expected, strict=True):
            result, exact = result.cpu().double(), exact.double()
            off = torch.where(result == exact, 0.0, (result - exact).abs())  # infinities, too
            gates.hold(name, off, 1e-5 * (1 + exact.abs()))

    return Side(lambda: call(*args, **kwargs), check)


def test_calls(shape_name, interleaved):
    interleaved("calls", shape_name, sides)


if __name__ == "__main__":
    main("calls", sides, SHAPES)
