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
OFFSETS = ("cu_seqlens", "cu_anchors", "cu_background", "cu_kept")


def as_one_image(features, scores, merged, mass, indices, assignment, *offsets) -> tuple[torch.Tensor | None, ...]:
    """features [1, T, D], scores [1, T], merged [1, total_keep, D], ...: no value is read by the host."""
    cu_seqlens, cu_anchors, cu_background = offsets
    cu_kept = cu_anchors.long() + cu_background
    tokens = over_all_segments(indices, cu_kept, cu_seqlens, assignment.shape[0])
    rows = over_all_segments(assignment, cu_seqlens, cu_kept, mass.shape[0])
    return tuple(None if t is None else t[None] for t in (features, scores, merged, mass, tokens, rows))


def stage_as_one_image(max_seqlen, features, scores, merged, mass, indices, assignment, cu_seqlens, cu_kept):
    """The same of merge_varlen, whose indices and assignment are anybody's: what lies outside of its segment is -1."""
    starts = cu_seqlens.long().clamp(0, assignment.shape[0]).cummax(0).values
    firsts = cu_kept.long().clamp(0, mass.shape[0]).cummax(0).values
    zero = starts.new_zeros(1)
    lengths = torch.cat([starts.diff(), zero])
    lengths = torch.where(lengths > max_seqlen, 0, lengths)
    kept = torch.minimum(torch.cat([firsts.diff(), zero]), lengths)

    def over_all(within, own, count, other, limit):
        place = torch.arange(within.shape[0], dtype=own.dtype, device=within.device)
        segment = torch.bucketize(place, own, right=True).sub(1).clamp(min=0)
        is_in = (place >= own[segment]) & (place - own[segment] < count[segment])
        return torch.where(is_in & (within >= 0) & (within < limit[segment]), within + other[segment], -1)

    tokens = over_all(indices, firsts, kept, starts, lengths)
    rows = over_all(assignment, starts, lengths, firsts, kept)
    return tuple(None if t is None else t[None] for t in (features, scores, merged, mass, tokens, rows))


def row_sums(x: torch.Tensor, indices: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """[B, K, D] sums of x [B, N, D] over each row."""
    return differentiate(call_of("merge"), x, None, indices, assignment, "sum", 0.5)[0]


def apart_of(
    features: torch.Tensor,  # [B, N, D]
    merged: torch.Tensor | None,  # [B, K, D]; None for a sum
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
    mode: str,
    centre_weight: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[B, N, D]: what d merged / d scores is, times the mass unless it is a sum."""
    if mode == "sum" or merged is None:
        return features.to(dtype)
    mean = take_rows(merged, assignment)
    if mode == "mean":
        return (features - mean).to(dtype)
    centre = take_rows(take_rows(features, indices), assignment).to(dtype)
    return (1 - centre_weight) * (features.to(dtype) - centre) - (mean.to(dtype) - centre)


def merge_tangent(
    tangent_features: torch.Tensor | None,  # [B, N, D]
    tangent_scores: torch.Tensor | None,  # [B, N]
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    merged: torch.Tensor,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
    mode: str,
    centre_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of merged [B, K, D] and of mass [B, K]."""
    tangent_merged, tangent_mass = torch.zeros_like(merged), torch.zeros_like(mass)
    if tangent_features is not None:
        args = tangent_features, scores, indices, assignment, mode, centre_weight
        tangent_merged = differentiate(call_of("merge"), *args)[0]
    if tangent_scores is not None:
        tangent_scores = tangent_scores.to(mass.dtype)[..., None]
        apart = apart_of(features, merged, indices, assignment, mode, centre_weight, mass.dtype)
        moved = row_sums(apart * tangent_scores, indices, assignment)
        if mode != "sum":
            empty = mass[..., None] == 0  # no 0 / 0, of which the derivative would be NaN
            moved = torch.where(empty, 0, moved / torch.where(empty, 1, mass[..., None]))
        tangent_merged = tangent_merged + moved.to(merged.dtype)
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
        ctx.merging = named.get("mode", "mean"), named.get("centre_weight", 0.5)
        if not ctx.needs_input_grad[2]:  # scores: the gradient of features does not depend on features
            saved |= {"features": None, "merged": None}
        elif ctx.merging[0] == "sum":
            saved["merged"] = None
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)  # torch makes plain zeros of them, also beside DTensors
        ctx.call, ctx.channels, ctx.dtype = call, named["merged"].shape[-1], named["merged"].dtype
        ctx.max_seqlen = named.get("max_seqlen")

    @staticmethod
    def as_images(ctx, saved):
        """saved of a batch as it is, of a packed one as one image; and whether it is that."""
        if len(saved) == len(MERGE):
            return saved, False
        if len(saved) == len(MERGE) + 2:
            return stage_as_one_image(ctx.max_seqlen, *saved), True
        return as_one_image(*saved), True

    @staticmethod
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors  # once: each time would unpack them, which checkpoints refuse
        features, _, _, mass, *_ = saved
        grad_merged, grad_mass = gradients[0], gradients[-1]  # the other results have none
        if grad_merged is None:
            grad_merged = torch.zeros_like(mass[..., None].expand(*mass.shape, ctx.channels), dtype=ctx.dtype)
        grads: tuple[torch.Tensor, ...] = grad_merged, torch.zeros_like(mass) if grad_mass is None else grad_mass
        saved, packed = Merge.as_images(ctx, saved)
        if packed:
            grads = tuple(grad[None] for grad in grads)
        call = Call("merge_backward", ctx.call.backward, ctx.call.backward)
        grads = differentiate(call, *grads, *saved, *ctx.merging)
        if packed:
            grads = tuple(grad[0] for grad in grads)
        rest = [None] * (len(schema_of(ctx.call.op).arguments) - 2)
        return None, grads[0], None if features is None else grads[1], *rest

    @staticmethod
    def jvp(ctx, _, *tangents):
        tangents = tangents[:2]  # of features and scores
        with outer_tangents(ctx.saved_tensors) as saved:
            saved, packed = Merge.as_images(ctx, saved)
            if packed:
                tangents = tuple(None if tangent is None else tangent[None] for tangent in tangents)
            tangents = merge_tangent(*tangents, *saved, *ctx.merging)
            if packed:
                tangents = tuple(tangent[0] for tangent in tangents)
        between = [None] * (len(schema_of(ctx.call.op).returns) - 2)
        return tangents[0], *between, tangents[1]


def token_gradients(
    grad_merged: torch.Tensor,  # [B, K, D]
    grad_mass: torch.Tensor,  # [B, K]
    features: torch.Tensor | None,  # [B, N, D]
    scores: torch.Tensor | None,  # [B, N]
    merged: torch.Tensor | None,  # [B, K, D]
    mass: torch.Tensor,  # [B, K]
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
    mode: str,
    centre_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """merge_backward in plain torch, for its own derivatives."""
    dtype, of_members = mass.dtype, 1 - centre_weight if mode == "lerp" else 1
    member = (assignment >= 0) & (take_rows(indices, assignment) >= 0)
    total = torch.ones_like(assignment, dtype=dtype) if mode == "sum" else take_rows(mass, assignment)
    weighted = member & (total != 0)
    inverse = torch.where(weighted, 1 / torch.where(weighted, total, 1), 0)
    gradient = take_rows(grad_merged, assignment).to(dtype)
    weight = inverse if scores is None else scores.to(dtype) * inverse
    grad_features = (of_members * weight)[..., None] * gradient
    if mode != "sum":
        of_centre = mass.new_full((), centre_weight if mode == "lerp" else 0.0)
        of_centre = torch.where(mass == 0, torch.ones_like(of_centre), of_centre)[..., None]
        centred = (indices >= 0)[..., None] & (of_centre != 0)
        itself = torch.where(centred, of_centre * grad_merged.to(dtype), 0)
        place = indices.clamp(min=0)[..., None].expand_as(itself)
        grad_features = grad_features.scatter_add(1, place, itself)
    grad_features = grad_features.to(grad_merged.dtype)
    if scores is None or not scores.is_floating_point():
        return grad_features, mass.new_zeros((mass.shape[0], 0))
    grad_scores = torch.where(member, take_rows(grad_mass, assignment), 0)
    if features is not None:  # as is merged, where it is needed
        apart = apart_of(features, merged, indices, assignment, mode, centre_weight, dtype)
        apart = torch.where(weighted[..., None], apart, 0)
        grad_scores = (apart * gradient).sum(dim=-1) * inverse + grad_scores
    return grad_features, grad_scores.to(scores.dtype)


class MergeBackward(Function):
    NUM_TENSORS = 8
    NUM_DIFFERENTIABLE = 6  # grad_merged, grad_mass, features, scores, merged, mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors = inputs[1 : 1 + MergeBackward.NUM_TENSORS]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.merging = inputs[1 + MergeBackward.NUM_TENSORS :]

    @staticmethod
    def pullback(saved: Sequence[torch.Tensor | None], merging: tuple) -> Callable:
        """From slopes of the two results to those of the arguments that were given."""
        given = MergeBackward.given(saved)

        def of_given(*primals):
            arguments = dict(enumerate(saved)) | dict(zip(given, primals, strict=True))
            return token_gradients(*arguments.values(), *merging)

        return torch.func.vjp(of_given, *given.values())[1]

    @staticmethod
    def given(saved: Sequence[torch.Tensor | None]) -> dict[int, torch.Tensor]:
        """The arguments that are differentiable, by their place, less those that are None or count."""
        tensors = enumerate(saved[: MergeBackward.NUM_DIFFERENTIABLE])
        return {i: t for i, t in tensors if t is not None and t.is_floating_point()}

    @staticmethod
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors
        pullback = MergeBackward.pullback(saved, ctx.merging)
        slopes = dict(zip(MergeBackward.given(saved), pullback(gradients), strict=True))
        return None, *(slopes.get(i) for i in range(len(saved))), *(None for _ in ctx.merging)

    @staticmethod
    def jvp(ctx, _, *tangents):
        # The pullback is linear, and its transpose is the tangent map: no forward mode inside forward mode.
        with outer_tangents(ctx.saved_tensors) as saved:
            given = MergeBackward.given(saved)
            tangents = tuple(torch.zeros_like(t) if tangents[i] is None else tangents[i] for i, t in given.items())
            grad_merged, mass = given[0], given[5]
            *_, assignment = (t for t in saved if t is not None)  # features, scores and merged alone may be None
            of_scores = torch.zeros_like(given[3]) if 3 in given else mass.new_zeros((mass.shape[0], 0))
            zeros = torch.zeros_like(take_rows(grad_merged, assignment)), of_scores
            return torch.func.vjp(MergeBackward.pullback(saved, ctx.merging), zeros)[1](tangents)[0]


OF_MERGE = Derivatives(Merge, of=2, backward="merge_backward")
OF_MERGE_BACKWARD = Derivatives(MergeBackward, of=MergeBackward.NUM_DIFFERENTIABLE)
