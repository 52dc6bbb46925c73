"""Derivatives of the operators: backward, forward mode, torch.func, and how they reach torch's dispatcher.

Only the merge has derivatives, as selection and assignment are constants: merge, and select_and_merge dense and
packed, share one autograd.Function, whose backward is the operator merge_backward. That has derivatives too, written
in plain torch, so that all orders work.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from ..tokens import over_all_segments, take_rows
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
    kernel, backward = (getattr(torch.ops.condense, name).default for name in (op, backward_of(op)))
    return Call(op, kernel, backward)


def backward_of(op: str) -> str:
    """The operator that the backward of ``op`` runs."""
    derivatives = OPERATORS[op].derivatives
    return op if derivatives is None or not derivatives.backward else derivatives.backward


def dispatch(op: str, *values):
    """The raw operator with everything that torch's dispatcher adds, derivatives among it."""
    positional, keywords = unflatten(op, values)
    return getattr(torch.ops.condense, op).default(*positional, **keywords)


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


# The merge, Eq. 8. A packed batch is one image here, with rows and tokens counted over all segments.

MERGE = ("features", "scores", "merged", "mass", "indices", "assignment")
OFFSETS = ("cu_seqlens", "cu_anchors", "cu_background")


def as_one_image(features, scores, merged, mass, indices, assignment, *offsets) -> tuple[torch.Tensor | None, ...]:
    """features [1, T, D], scores [1, T], merged [1, total_keep, D], ...: no value is read by the host."""
    cu_seqlens, cu_anchors, cu_background = offsets
    cu_kept = cu_anchors.long() + cu_background
    tokens = over_all_segments(indices, cu_kept, cu_seqlens, scores.shape[0])
    rows = over_all_segments(assignment, cu_seqlens, cu_kept, mass.shape[0])
    return tuple(None if t is None else t[None] for t in (features, scores, merged, mass, tokens, rows))


def row_sums(x: torch.Tensor, indices: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """[B, K, D] sums of x [B, N, D] over each row: the mean of equal weights, times their number."""
    ones = torch.ones_like(x[..., 0])
    mean, count = differentiate(call_of("merge"), x, ones, indices, assignment)
    return torch.where(count[..., None] > 0, mean * count[..., None], 0)


def merge_tangent(
    tangent_features: torch.Tensor | None,  # [B, N, D]
    tangent_scores: torch.Tensor | None,  # [B, N]
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    merged: torch.Tensor,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of merged [B, K, D] and of mass [B, K]."""
    tangent_merged, tangent_mass = torch.zeros_like(merged), torch.zeros_like(mass)
    if tangent_features is not None:
        tangent_merged = differentiate(call_of("merge"), tangent_features, scores, indices, assignment)[0]
    if tangent_scores is not None:
        tangent_scores = tangent_scores.to(mass.dtype)[..., None]
        apart = (features - take_rows(merged, assignment)).to(mass.dtype)
        moved = row_sums(apart * tangent_scores, indices, assignment) / mass[..., None]
        tangent_merged = tangent_merged + torch.where(mass[..., None] == 0, 0, moved).to(merged.dtype)
        tangent_mass = row_sums(tangent_scores, indices, assignment)[..., 0]
    return tangent_merged, tangent_mass


@contextlib.contextmanager
def outer_tangents(saved: Sequence[torch.Tensor | None]) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """For jvp: forward mode is off there by default, and the tangents of tangents would be zeros, in silence. It goes
    on with what was saved, less the tangents of this level."""
    primals = tuple(None if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in saved)
    with forward_ad._set_fwd_grad_enabled(True):
        yield primals


class Operator(torch.autograd.Function):
    """What all operators have in common."""

    @staticmethod
    def forward(call: Call, *values):
        return call(*values)

    @staticmethod
    def vmap(info, in_dims, call: Call, *values):
        axes = [axis if isinstance(v, torch.Tensor) else None for v, axis in zip(values, in_dims[1:], strict=True)]
        results = vmap.mapped(call.op, lambda *v: differentiate(call, *v), values, axes, info.batch_size)
        return library.as_returned(call.op, results), library.as_returned(call.op, (0,) * len(results))


class Constant(Operator):
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


class Merge(Operator):
    @staticmethod
    def setup_context(ctx, inputs, output):
        call, *values = inputs
        named = call.named(values, output)
        ctx.mark_non_differentiable(*(result for result in output if not result.is_floating_point()))
        saved = {name: named[name] for name in (*MERGE, *OFFSETS) if name in named}
        ctx.save_for_forward(*saved.values())  # until forward mode has had its turn, which is now
        if not ctx.needs_input_grad[2]:  # scores: the gradient of features does not depend on features
            saved |= {"features": None, "merged": None}
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)  # torch makes plain zeros of them, also beside DTensors
        ctx.call, ctx.channels, ctx.dtype = call, named["merged"].shape[-1], named["merged"].dtype

    @staticmethod
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors  # once: each time would unpack them, which checkpoints refuse
        packed = len(saved) > len(MERGE)
        features, _, _, mass, *_ = saved
        grad_merged, grad_mass = gradients[0], gradients[-1]  # the other results have none
        if grad_merged is None:
            grad_merged = torch.zeros_like(mass[..., None].expand(*mass.shape, ctx.channels), dtype=ctx.dtype)
        grads = grad_merged, torch.zeros_like(mass) if grad_mass is None else grad_mass
        if packed:
            saved, grads = as_one_image(*saved), tuple(grad[None] for grad in grads)
        grads = differentiate(Call("merge_backward", ctx.call.backward, ctx.call.backward), *grads, *saved)
        if packed:
            grads = tuple(grad[0] for grad in grads)
        rest = [None] * (len(schema_of(ctx.call.op).arguments) - 2)
        return None, grads[0], None if features is None else grads[1], *rest

    @staticmethod
    def jvp(ctx, _, *tangents):
        tangents = tangents[:2]  # of features and scores
        with outer_tangents(ctx.saved_tensors) as saved:
            packed = len(saved) > len(MERGE)
            if packed:
                tangents = tuple(None if tangent is None else tangent[None] for tangent in tangents)
            tangents = merge_tangent(*tangents, *(as_one_image(*saved) if packed else saved))
            if packed:
                tangents = tuple(tangent[0] for tangent in tangents)
        between = [None] * (len(schema_of(ctx.call.op).returns) - 2)
        return tangents[0], *between, tangents[1]


def token_gradients(
    grad_merged: torch.Tensor,  # [B, K, D]
    grad_mass: torch.Tensor,  # [B, K]
    features: torch.Tensor | None,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    merged: torch.Tensor | None,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
) -> tuple[torch.Tensor, torch.Tensor]:
    """merge_backward in plain torch, for its own derivatives."""
    dtype = mass.dtype
    member = (assignment >= 0) & (take_rows(indices, assignment) >= 0)
    total = take_rows(mass, assignment)
    weighted = member & (total != 0)
    inverse = torch.where(weighted, 1 / torch.where(weighted, total, 1), 0)
    gradient = take_rows(grad_merged, assignment).to(dtype)
    grad_features = (scores.to(dtype) * inverse)[..., None] * gradient
    grad_scores = torch.where(member, take_rows(grad_mass, assignment), 0)
    if features is not None:
        apart = torch.where(weighted[..., None], (features - take_rows(merged, assignment)).to(dtype), 0)
        grad_scores = (apart * gradient).sum(dim=-1) * inverse + grad_scores
    itself = torch.where(((mass == 0) & (indices >= 0))[..., None], grad_merged.to(dtype), 0)
    place = indices.clamp(min=0)[..., None].expand_as(itself)
    return grad_features.scatter_add(1, place, itself).to(grad_merged.dtype), grad_scores.to(scores.dtype)


class MergeBackward(Operator):
    NUM_DIFFERENTIABLE = 6  # grad_merged, grad_mass, features, scores, merged, mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def pullback(saved: Sequence[torch.Tensor]) -> Callable:
        """From slopes of the two results to those of the arguments that were given."""
        given = MergeBackward.given(saved)

        def of_given(*primals):
            arguments = dict(enumerate(saved)) | dict(zip(given, primals, strict=True))
            return token_gradients(*arguments.values())

        return torch.func.vjp(of_given, *(saved[i] for i in given))[1]

    @staticmethod
    def given(saved: Sequence[torch.Tensor | None]) -> list[int]:
        return [i for i in range(MergeBackward.NUM_DIFFERENTIABLE) if saved[i] is not None]

    @staticmethod
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors
        slopes = dict(zip(MergeBackward.given(saved), MergeBackward.pullback(saved)(gradients), strict=True))
        return None, *(slopes.get(i) for i in range(len(saved)))

    @staticmethod
    def jvp(ctx, _, *tangents):
        # The pullback is linear, and its transpose is the tangent map: no forward mode inside forward mode.
        with outer_tangents(ctx.saved_tensors) as saved:
            given = MergeBackward.given(saved)
            tangents = tuple(torch.zeros_like(saved[i]) if tangents[i] is None else tangents[i] for i in given)
            grad_merged, scores, assignment = saved[0], saved[3], saved[-1]
            zeros = torch.zeros_like(take_rows(grad_merged, assignment)), torch.zeros_like(scores)
            return torch.func.vjp(MergeBackward.pullback(saved), zeros)[1](tangents)[0]


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
    raise RuntimeError(f"torch.ops.condense.{op} has no derivatives {inside}. Remedy: {remedy}.")


def check_written(tensors: dict[str, torch.Tensor]) -> None:
    """What a caller may not have written into, as with torch's own out=."""
    if needs_derivative(tensors.values()):
        name = next(name for name, tensor in tensors.items() if needs_derivative([tensor]))
        raise ValueError(
            f"{name}: expected a tensor without a gradient to write into, got one that requires grad or has a tangent. "
            f"Remedy: {name}.detach(), or torch.no_grad() around the call."
        )
    for name, tensor in tensors.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
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

    overload = getattr(torch.ops.condense, op).default
    if written_by(op):
        library.register_kernel(op, writing_kernel, "Autograd")
        library.register_kernel(op, writing_kernel, "ADInplaceOrView")
    else:
        library.register_kernel(op, kernel, "Autograd")
