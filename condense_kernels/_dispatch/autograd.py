"""How the operators' derivatives reach torch: backward, forward mode, torch.func, the dispatcher.

What they are stands beside the operator that has some (ops/merge/derivatives.py), and in its declaration.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from . import library, sharding, vmap
from .declaration import OPERATORS
from .library import schema_of


def flatten(op: str, args: Sequence, kwargs: dict) -> list:
    """All arguments in the schema's order. Callers and the dispatcher leave out those that have their default."""
    rest = schema_of(op).arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]


def unflatten(op: str, values: Sequence) -> tuple[list, dict]:
    """Positional and keyword arguments, of all in the schema's order."""
    arguments = schema_of(op).arguments
    positional = [value for a, value in zip(arguments, values, strict=True) if not a.kwarg_only]
    return positional, {a.name: value for a, value in zip(arguments, values, strict=True) if a.kwarg_only}


@dataclass(frozen=True)
class Call:
    """An operator on one backend: what autograd.Function runs in forward and in backward."""

    op: str
    kernel: Callable
    backward: Callable  # the kernel of backward_of(op)

    def __call__(self, *values):
        positional, keywords = unflatten(self.op, values)
        with below(self.op):
            return self.kernel(*positional, **keywords)

    def named(self, values, results) -> dict:
        schema = schema_of(self.op)
        names = [a.name for a in (*schema.arguments, *schema.returns)]
        return dict(zip(names, (*values, *results), strict=True))


def call_of(op: str) -> Call:
    """The registered operator, by device."""
    kernel, backward = (getattr(library.OPS, name).default for name in (op, backward_of(op)))
    return Call(op, kernel, backward)


def backward_of(op: str) -> str:
    """The operator that the backward of ``op`` runs."""
    derivatives = OPERATORS[op].derivatives
    return op if derivatives is None or not derivatives.backward else derivatives.backward


def dispatch(op: str, *values):
    """The raw operator with everything that torch's dispatcher adds, derivatives among it."""
    positional, keywords = unflatten(op, values)
    return getattr(library.OPS, op).default(*positional, **keywords)


def needs_derivative(tensors: Iterable[torch.Tensor]) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(is_tracked(tensor) or has_tangent(tensor) for tensor in map(without_vmap, tensors))


def without_vmap(tensor: torch.Tensor) -> torch.Tensor:
    """What vmap maps over: of a mapped tensor itself, torch cannot say whether it has a tangent."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_tracked(tensor: torch.Tensor) -> bool:
    """By a transform of torch.func: grad, vjp, jvp."""
    return torch._C._functorch.is_gradtrackingtensor(tensor)


def has_tangent(tensor: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


@contextlib.contextmanager
def outer_tangents(saved: Sequence[torch.Tensor | None]) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """For jvp: forward mode is off there by default, and the tangents of tangents would be zeros, in silence. It goes
    on with what was saved, less the tangents of this level."""
    primals = tuple(None if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in saved)
    with forward_ad._set_fwd_grad_enabled(True):
        yield primals


class Function(torch.autograd.Function):
    """What all operators have in common."""

    @staticmethod
    def forward(call: Call, *values):
        return call(*values)

    @staticmethod
    def vmap(info, in_dims, call: Call, *values):
        axes = [axis if isinstance(v, torch.Tensor) else None for v, axis in zip(values, in_dims[1:], strict=True)]
        results = vmap.mapped(call.op, lambda *v: differentiate(call, *v), values, axes, info.batch_size)
        return library.as_returned(call.op, results), library.as_returned(call.op, (0,) * len(results))


class Constant(Function):
    """An operator without derivatives, whose results are constants."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors = (result for result in library.listed(output) if isinstance(result, torch.Tensor))
        ctx.mark_non_differentiable(*tensors)  # select_and_merge_out and workspace_bytes return none

    @staticmethod
    def backward(ctx, *gradients):
        return None

    @staticmethod
    def jvp(ctx, call, *tangents):
        return None


def differentiate(call: Call, *values):
    """call(*values), all of them in the schema's order, for autograd and the transforms of torch.func."""
    operator = OPERATORS[call.op]
    if operator.no_derivatives and needs_derivative([v for v in values if isinstance(v, torch.Tensor)]):
        raise ValueError(
            f"{call.op} has no derivatives: {operator.no_derivatives}, and an argument requires grad or has a tangent. "
            "Remedy: call it under torch.no_grad(), or pass tensor.detach()."
        )
    function = Constant if operator.derivatives is None else operator.derivatives.function
    return function.apply(call, *values)


def concerned(op: str, values: Sequence) -> bool:
    """Whether a call has to go through autograd: torch itself would drop a gradient or a tangent in silence."""
    operator = OPERATORS[op]
    if operator.derivatives is not None:
        values = values[: operator.derivatives.of]
    elif operator.no_derivatives is None:
        return False
    return needs_derivative([value for value in values if isinstance(value, torch.Tensor)])


def refuse_what_would_get_lost(op: str, args: Sequence) -> None:
    """Torch would drop these derivatives of a raw operator in silence, and a compiled function calls nothing else."""
    compiling = torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active():
        where = "torch.func"
    elif compiling and any(has_tangent(value) for value in args if isinstance(value, torch.Tensor)):
        where = "forward mode"
    else:
        return
    inside = f"inside {where} inside torch.compile" if compiling else "inside the transforms of torch.func"
    remedy = "call it outside of torch.compile" if compiling else f"condense_kernels.{op}, the Python function, has"
    raise RuntimeError(f"torch.ops.{library.NAMESPACE}.{op} has no derivatives {inside}. Remedy: {remedy}.")


def check_written(tensors: dict[str, torch.Tensor]) -> None:
    """What a caller may not have written into, as with torch's own out=."""
    if needs_derivative(tensors.values()):
        name = next(name for name, tensor in tensors.items() if needs_derivative([tensor]))
        raise ValueError(
            f"{name}: expected a tensor without a gradient to write into, got one that requires grad or has a tangent. "
            f"Remedy: {name}.detach(), or torch.no_grad() around the call."
        )
    is_recorded = not torch.is_inference_mode_enabled()
    for name, tensor in tensors.items():
        if is_recorded and tensor.is_inference():
            raise ValueError(
                f"{name}: expected a normal tensor to write into outside of torch.inference_mode(), got an inference "
                f"tensor. Remedy: {name}.clone()."
            )
        if tensor.is_neg():
            raise ValueError(
                f"{name}: expected a tensor to write into as it is in memory, got a view that negates it when it is "
                f"read. Remedy: {name}.resolve_neg()."
            )


def below(op: str) -> contextlib.AbstractContextManager:
    """Where the dispatcher goes on once autograd has had its turn, and, of an operator that writes, the versions."""
    below = torch._C._AutoDispatchBelowADInplaceOrView if written_by(op) else torch._C._AutoDispatchBelowAutograd
    return below()


@functools.cache
def written_by(op: str) -> tuple[str, ...]:
    """The arguments that an operator writes into, all of them keyword-only."""
    return tuple(a.name for a in schema_of(op).arguments if a.alias_info is not None and a.alias_info.is_write)


def register(op: str) -> None:
    """The raw operator at the dispatcher's Autograd key; and where inference mode passes that by, though versions
    count there, too."""

    def kernel(*args, **kwargs):
        sharding.rules()
        if not concerned(op, args):
            with below(op):
                return overload(*args, **kwargs)
        if OPERATORS[op].derivatives is not None:
            refuse_what_would_get_lost(op, args)
        try:
            return differentiate(call_of(op), *flatten(op, args, kwargs))
        except ValueError as error:
            raise RuntimeError(str(error)) from error

    def writing_kernel(*args, **kwargs):
        written = {name: kwargs[name] for name in written_by(op) if kwargs.get(name) is not None}
        try:
            check_written(written)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        results = kernel(*args, **kwargs)
        torch.autograd.graph.increment_version(written.values())
        return results

    overload = getattr(library.OPS, op).default
    if written_by(op):
        library.register_kernel(op, writing_kernel, "Autograd")
        library.register_kernel(op, writing_kernel, "ADInplaceOrView")
    else:
        library.register_kernel(op, kernel, "Autograd")
