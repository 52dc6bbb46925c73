"""How the gradients of gradients.py reach torch, for the dense operator and the packed one.

The backward is an operator. It has derivatives too, through the plain torch that it is, so that all orders work; for
those above the first the maps of all strips are kept.
"""

from collections.abc import Callable

import torch

from ..._dispatch.autograd import Call, Function, differentiate, outer_tangents, unflatten
from ..._dispatch.declaration import Derivatives
from ..._dispatch.library import schema_of

CONSTANT = (
    "lse: expected None where queries or keys require grad: a normaliser from outside is a constant, and the gradient "
    "without its part is another one. Remedy: leave out lse, or pass tensor.detach()."
)


def refuse_lse(lse: torch.Tensor | None) -> None:
    if lse is not None:
        raise ValueError(CONSTANT)


def backward_operands(op: str, values: list, grad_scores: torch.Tensor) -> list:
    """The backward operator's arguments: the gradient, and those of ``op`` less lse."""
    named = dict(zip((a.name for a in schema_of(op).arguments), values, strict=True))
    return [grad_scores, *(value for name, value in named.items() if name != "lse")]


def pullback(gradients: Callable, op: str, operands: list, of: tuple[int, ...]) -> tuple[Callable, list[torch.Tensor]]:
    """The backward operator ``op`` in plain torch, as a function of its operands ``of``, and these; in their dtypes."""

    def run(*primals):
        values = list(operands)
        for i, primal in zip(of, primals, strict=True):
            values[i] = primal
        positional, keywords = unflatten(op, values)
        results = gradients(*positional, **keywords)
        return tuple(result.to(like.dtype) for result, like in zip(results, operands[1:3], strict=True))

    return run, [operands[i] for i in of]


class Saves(Function):
    """Keeps the arguments, tensors apart from the rest."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *values = inputs
        ctx.tensors = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
        ctx.rest = [None if i in ctx.tensors else value for i, value in enumerate(values)]
        ctx.save_for_backward(*(values[i] for i in ctx.tensors))
        ctx.save_for_forward(*(values[i] for i in ctx.tensors))

    @staticmethod
    def values_of(ctx, saved) -> list:
        values = list(ctx.rest)
        for i, tensor in zip(ctx.tensors, saved, strict=True):
            values[i] = tensor
        return values


def derivatives_of(name: str, gradients: Callable) -> tuple[Derivatives, Derivatives]:
    """Of the operator ``name``, and of its backward, which ``gradients`` is in torch."""
    backward_name = f"{name}_backward"

    class Scores(Saves):
        @staticmethod
        def setup_context(ctx, inputs, output):
            named = dict(zip((a.name for a in schema_of(name).arguments), inputs[1:], strict=True))
            if any(ctx.needs_input_grad):
                refuse_lse(named["lse"])
            Saves.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx, grad_scores):
            values = Saves.values_of(ctx, ctx.saved_tensors)
            call = Call(backward_name, ctx.call.backward, ctx.call.backward)
            grads = differentiate(call, *backward_operands(name, values, grad_scores))
            return None, *grads, *[None] * (len(values) - 2)

        @staticmethod
        def jvp(ctx, _, *tangents):
            # The pullback is linear in the slopes, and its transpose is the tangent map.
            with outer_tangents(ctx.saved_tensors) as saved:
                values = Saves.values_of(ctx, saved)
                refuse_lse(dict(zip((a.name for a in schema_of(name).arguments), values, strict=True))["lse"])
                queries, keys = values[:2]
                slopes = scores_like(name, queries, keys)
                run, primals = pullback(gradients, backward_name, backward_operands(name, values, slopes), (0,))
                given = (torch.zeros_like(x) if t is None else t for x, t in zip(values, tangents[:2], strict=False))
                return torch.func.vjp(run, *primals)[1](tuple(given))[0]

    class ScoresBackward(Saves):
        @staticmethod
        def pulled(values: list) -> Callable:
            run, primals = pullback(gradients, backward_name, values, (0, 1, 2))
            return torch.func.vjp(run, *primals)[1]

        @staticmethod
        def backward(ctx, *slopes):
            values = Saves.values_of(ctx, ctx.saved_tensors)
            return None, *ScoresBackward.pulled(values)(slopes), *[None] * (len(values) - 3)

        @staticmethod
        def jvp(ctx, _, *tangents):
            with outer_tangents(ctx.saved_tensors) as saved:
                values = Saves.values_of(ctx, saved)
                given = tuple(
                    torch.zeros_like(x) if t is None else t for x, t in zip(values[:3], tangents[:3], strict=True)
                )
                zeros = torch.zeros_like(values[1]), torch.zeros_like(values[2])
                return torch.func.vjp(ScoresBackward.pulled(values), zeros)[1](given)[0]

    return Derivatives(Scores, of=2, backward=backward_name), Derivatives(ScoresBackward, of=3)


def scores_like(name: str, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape and dtype of the scores."""
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    packed = queries.dim() == 3
    shape = (queries.shape[1], keys.shape[0]) if packed else (*queries.shape[:2], keys.shape[2])
    return queries.new_zeros(shape, dtype=wide)
