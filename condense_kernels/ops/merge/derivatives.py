"""Derivatives of the merge, Eq. 8, for merge and for select_and_merge dense and packed: selection and assignment are
constants.

The backward is the operator merge_backward. That has derivatives too, written in plain torch, so that all orders work.
A packed batch is one image here, with rows and tokens counted over all segments.
"""

from collections.abc import Callable, Sequence

import torch

from ..._dispatch.autograd import Call, Function, call_of, differentiate, outer_tangents
from ..._dispatch.declaration import Derivatives
from ..._dispatch.library import schema_of
from ...tokens import over_all_segments, take_rows

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


class Merge(Function):
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
        grads: tuple[torch.Tensor, ...] = grad_merged, torch.zeros_like(mass) if grad_mass is None else grad_mass
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
    if features is not None and merged is not None:  # both or neither
        apart = torch.where(weighted[..., None], (features - take_rows(merged, assignment)).to(dtype), 0)
        grad_scores = (apart * gradient).sum(dim=-1) * inverse + grad_scores
    itself = torch.where(((mass == 0) & (indices >= 0))[..., None], grad_merged.to(dtype), 0)
    place = indices.clamp(min=0)[..., None].expand_as(itself)
    return grad_features.scatter_add(1, place, itself).to(grad_merged.dtype), grad_scores.to(scores.dtype)


class MergeBackward(Function):
    NUM_DIFFERENTIABLE = 6  # grad_merged, grad_mass, features, scores, merged, mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def pullback(saved: Sequence[torch.Tensor | None]) -> Callable:
        """From slopes of the two results to those of the arguments that were given."""
        given = MergeBackward.given(saved)

        def of_given(*primals):
            arguments = dict(enumerate(saved)) | dict(zip(given, primals, strict=True))
            return token_gradients(*arguments.values())

        return torch.func.vjp(of_given, *given.values())[1]

    @staticmethod
    def given(saved: Sequence[torch.Tensor | None]) -> dict[int, torch.Tensor]:
        """The arguments that are differentiable, by their place, less those that are None."""
        return {i: t for i, t in enumerate(saved[: MergeBackward.NUM_DIFFERENTIABLE]) if t is not None}

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
            tangents = tuple(torch.zeros_like(t) if tangents[i] is None else tangents[i] for i, t in given.items())
            grad_merged, scores = given[0], given[3]
            *_, assignment = (t for t in saved if t is not None)  # features and merged alone may be None
            zeros = torch.zeros_like(take_rows(grad_merged, assignment)), torch.zeros_like(scores)
            return torch.func.vjp(MergeBackward.pullback(saved), zeros)[1](tangents)[0]


OF_MERGE = Derivatives(Merge, of=2, backward="merge_backward")
OF_MERGE_BACKWARD = Derivatives(MergeBackward, of=MergeBackward.NUM_DIFFERENTIABLE)
