"""Derivatives of gather_merge. merged, grad_x and grad_weights are the slopes of one sum,

    sum over k, j and channels of grad_merged_k * weights_kj * x[neighbours_kj],

which is linear in each of the three. So the derivatives of both operators, of any order, are the operators again.
"""

import torch

from ..._dispatch.autograd import Call, Function, call_of, differentiate, outer_tangents
from ..._dispatch.declaration import Derivatives


def merged_of(x, neighbours, weights) -> torch.Tensor:
    return differentiate(call_of("gather_merge"), x, neighbours, weights)


def gradients_of(grad_merged, x, neighbours, weights, sizes) -> tuple[torch.Tensor, torch.Tensor]:
    return differentiate(call_of("gather_merge_backward"), grad_merged, x, neighbours, weights, sizes)


def moved(x, weights, slope_x, neighbours, slope_weights) -> torch.Tensor | None:
    """merged where x and weights move by their slopes, of which None is no move."""
    terms = [None if slope_x is None else merged_of(slope_x, neighbours, weights)]
    terms += [None if slope_weights is None else merged_of(x, neighbours, slope_weights)]
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


class GatherMerge(Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, x, neighbours, weights = inputs
        ctx.save_for_forward(x, neighbours, weights)  # until forward mode has had its turn, which is now
        of_weights = weights is not None and ctx.needs_input_grad[3]  # the gradient of x does not depend on x
        ctx.save_for_backward(x if of_weights else None, neighbours, weights)
        ctx.sizes = list(x.shape[1:])

    @staticmethod
    def backward(ctx, grad_merged):
        x, neighbours, weights = ctx.saved_tensors
        call = Call("gather_merge_backward", ctx.call.backward, ctx.call.backward)
        grad_x, grad_weights = differentiate(call, grad_merged, x, neighbours, weights, ctx.sizes)
        return None, grad_x, None, None if x is None else grad_weights

    @staticmethod
    def jvp(ctx, _, tangent_x, __, tangent_weights):
        with outer_tangents(ctx.saved_tensors) as (x, neighbours, weights):
            return moved(x, weights, tangent_x, neighbours, tangent_weights)


class GatherMergeBackward(Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.sizes = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)  # what has no slope needs no launch

    @staticmethod
    def backward(ctx, slope_x, slope_weights):
        grad_merged, x, neighbours, weights = ctx.saved_tensors
        slope_weights = None if x is None else slope_weights  # of zeros
        of_grad = moved(x, weights, slope_x, neighbours, slope_weights)
        of_x, of_weights = gradients_of(grad_merged, slope_x, neighbours, slope_weights, ctx.sizes)
        has_of_weights = slope_x is not None and weights is not None
        return (
            None,
            of_grad,
            None if slope_weights is None else of_x,
            None,
            of_weights.to(weights.dtype) if has_of_weights else None,
            None,
        )

    @staticmethod
    def jvp(ctx, _, tangent_grad, tangent_x, __, tangent_weights, ___):
        with outer_tangents(ctx.saved_tensors) as (grad_merged, x, neighbours, weights):
            tangent = torch.zeros_like(grad_merged) if tangent_grad is None else tangent_grad  # type: ignore[arg-type]
            of_x, of_weights = gradients_of(tangent, x, neighbours, weights, ctx.sizes)
            more_x, more_weights = gradients_of(grad_merged, tangent_x, neighbours, tangent_weights, ctx.sizes)
            of_x = of_x if tangent_weights is None else of_x + more_x
            return of_x, of_weights if tangent_x is None else of_weights + more_weights.to(of_weights.dtype)


OF_GATHER_MERGE = Derivatives(GatherMerge, of=3, backward="gather_merge_backward")
OF_GATHER_MERGE_BACKWARD = Derivatives(GatherMergeBackward, of=4)
