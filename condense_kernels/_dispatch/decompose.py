"""Inductor sees the Triton kernels of an operator on GPU tensors, as of one made by torch.library.triton_op.

Nothing of it is on the way of a call that is not traced: the rule is asked for where AOTAutograd makes a graph
functional. torch.export keeps the operator whole, to be taken apart once what was exported is compiled.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._library.simple_registry import find_torch_dispatch_rule
from torch._library.triton import triton_ops_to_kernels
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from .._triton import traced
from . import library
from .declaration import Operator

OLDEST_TORCH = (2, 13)  # whose Inductor has been seen to compile the kernels as they are launched
KNOWN = (torch.Tensor, FakeTensor, FunctionalTensor)


def is_wanted() -> bool:
    """By torch's own switch, which torch.export turns off: what it writes down shall be the operator."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= OLDEST_TORCH and torch._functorch.config.decompose_custom_triton_ops


class Choices:
    """What was made to depend on open sizes. A graph of torch.compile is used where it holds; in a package of
    AOTInductor nobody asks any more, and other sizes would be computed by launches that are not theirs."""

    def __init__(self, values: Iterable[Any]) -> None:
        sizes = (size for value in values for size in (value.shape if isinstance(value, torch.Tensor) else [value]))
        self.env = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
        self.ranges = dict(self.env.var_to_range) if self.env else {}  # before any condition narrows them
        self.found: list[str] = []

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        start = len(self.env.guards) if self.env else 0
        yield
        if self.env:
            conditions = [guard.expr for guard in self.env.guards[start:]]
            self.found += [str(condition) for condition in conditions if not self.is_of_no_rows(condition)]

    def is_of_no_rows(self, condition: Any) -> bool:
        """Whether it is about sizes of 0 alone, of which nothing is launched."""
        from torch.utils._sympy.numbers import int_oo  # sympy is slow to import, and here where there are open sizes
        from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

        ranges = {s: self.ranges[s] for s in condition.free_symbols}
        return bool(bound_sympy(condition, {s: r & ValueRanges(1, int_oo) for s, r in ranges.items()}).lower)

    def refuse_in_package(self, op: str) -> None:
        inductor = sys.modules.get("torch._inductor.virtualized")
        if self.found and inductor is not None and inductor.V.aot_compilation:
            raise RuntimeError(
                f"{op}: expected sizes that one choice of launches serves, as a package holds one, got sizes that are "
                f"open beyond it: {', '.join(self.found)}. Remedy: Dim(..., min=, max=) within that, and a package for "
                "each choice."
            )


def register(operator: Operator) -> None:
    """From here on, its kernels are what is traced of the calls that it says can be."""
    from . import backends  # which registers it

    def rule(mode, overload, types, args, kwargs):
        kwargs = kwargs or {}
        if any(not issubclass(kind, KNOWN) for kind in types):
            return NotImplemented
        if not (is_wanted() and backends.compiles_for(args[0].device)):
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        choices = Choices((*args, *kwargs.values()))
        with choices.made():
            is_traced = operator.is_traced is not None and operator.is_traced(*args, **kwargs)
        if not is_traced:
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        try:
            with mode, traced.on():
                operator.check(*args, **kwargs)
                with choices.made():
                    results = operator.triton(*args, **kwargs)
            choices.refuse_in_package(operator.name)
            return results
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from error

    name = f"{library.NAMESPACE}::{operator.name}"
    overload = getattr(library.OPS, operator.name).default
    if find_torch_dispatch_rule(overload, FunctionalTensorMode) is None:
        torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library.registry)
        kernels = operator.check.__module__.rpartition(".")[0] + ".kernel"
        triton_ops_to_kernels[name] = traced.Kernels(kernels)  # type: ignore[assignment]  # it is iterated over, and no more
