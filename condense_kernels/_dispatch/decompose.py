"""Inductor sees the Triton kernels of an operator on GPU tensors, as of one made by torch.library.triton_op.

Nothing of it is on the way of a call that is not traced: the rule is asked for where AOTAutograd makes a graph functional.
torch.export keeps the operator whole, to be taken apart once what was exported is compiled.
"""

import functools
import importlib
from collections.abc import Callable

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


def register(operator: Operator, can_run: Callable[[torch.device], bool]) -> None:
    """``can_run``: whether compiled Triton kernels run tensors of a device."""

    def rule(mode, overload, types, args, kwargs):
        kwargs = kwargs or {}
        if any(not issubclass(kind, KNOWN) for kind in types):
            return NotImplemented
        if not (is_wanted() and can_run(args[0].device) and operator.is_traced(*args, **kwargs)):
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        try:
            with mode, traced.on():
                operator.check(*args, **kwargs)
                return operator.triton(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from error

    name = f"{library.NAMESPACE}::{operator.name}"
    overload = getattr(torch.ops.condense, operator.name).default
    if find_torch_dispatch_rule(overload, FunctionalTensorMode) is None:
        torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library.registry)
        kernels = operator.check.__module__.rpartition(".")[0] + ".kernel"
        triton_ops_to_kernels[name] = traced.Kernels(functools.partial(importlib.import_module, kernels))
