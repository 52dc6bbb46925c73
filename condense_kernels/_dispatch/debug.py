"""The debug switch: while it is on, the Python functions read the values that they are given.

A normal call never does, as reading one waits for the device. What the operators define for such values (a NaN token
is picked last, a wrong offset reads nothing) is for servers that must go on; here it is an error that says where.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

ENVIRONMENT = "CONDENSE_DEBUG"

_debugging: ContextVar[bool] = ContextVar("debugging", default=os.environ.get(ENVIRONMENT) == "1")


@contextlib.contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within, calls of the Python functions in this thread check the values of their tensors, and wait for the device.

    ``CONDENSE_DEBUG=1`` in the environment switches it on for the whole process, ``debug(False)`` off again within.
    Raw operators and compiled code are not checked.

    >>> with condense_kernels.debug():
    ...     condense_kernels.condense(features, scores, keep=64, grid=(24, 24))
    ValueError: scores: expected numbers >= 0, got -0.25 at image 1, token 17. Remedy: ...
    """
    token = _debugging.set(enabled)
    try:
        yield
    finally:
        _debugging.reset(token)


def is_on() -> bool:
    return _debugging.get()


def checked(op: str, kernel: Callable) -> Callable:
    """``kernel``, that looks first: vmap and autograd have unwrapped everything by then."""

    def look_and_run(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if op in CHECKS and all(has_values(tensor) for tensor in tensors):
            CHECKS[op](*args, **kwargs)
        return kernel(*args, **kwargs)

    return look_and_run


def has_values(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


# What is looked for

FINITE = "Remedy: look where it was computed; an fp16 overflow is a common cause."


def refuse(name: str, values: torch.Tensor, wrong: torch.Tensor, expected: str, axes: tuple, remedy: str) -> None:
    """``axes`` name the axes of values, or turn an index into words."""
    if not wrong.any():
        return
    place = wrong.nonzero()[0].tolist()
    words = ", ".join(axis(i) if callable(axis) else f"{axis} {i}" for axis, i in zip(axes, place, strict=True))
    more = int(wrong.sum()) - 1
    also = f" and {more} more" if more else ""
    raise ValueError(f"{name}: expected {expected}, got {values[tuple(place)].item()} at {words}{also}. {remedy}")


def check_finite(name: str, values: torch.Tensor | None, axes: tuple, valid: torch.Tensor | None = None) -> None:
    if values is None or not values.is_floating_point():
        return
    wrong = ~values.isfinite()
    if valid is not None:
        wrong &= valid.reshape(*valid.shape, *[1] * (values.dim() - valid.dim()))
    refuse(name, values, wrong, "finite numbers", axes, FINITE)


def check_scores(scores: torch.Tensor | None, axes: tuple, valid: torch.Tensor | None = None) -> None:
    if scores is None:
        return
    check_finite("scores", scores, axes, valid)
    negative = scores < 0 if valid is None else (scores < 0) & valid
    remedy = "Remedy: scores weigh the merge; shift or clamp what is no attention."
    refuse("scores", scores, negative, "numbers >= 0", axes, remedy)


def check_indices(name: str, indices: torch.Tensor, low: int, limit: int) -> None:
    outside = (indices < low) | (indices >= limit)
    refuse(name, indices, outside, f"values in [{low}, {limit})", ("image", "row"), "Remedy: indices of tokens.")
    sorted_, order = indices.sort(dim=1, stable=True)
    again = torch.zeros_like(outside)
    again[:, 1:] = (sorted_[:, 1:] == sorted_[:, :-1]) & (sorted_[:, 1:] >= 0)
    repeated = torch.zeros_like(outside).scatter(1, order, again)
    if repeated.any():
        image, row = repeated.nonzero()[0].tolist()
        token = indices[image, row].item()
        raise ValueError(
            f"{name}: expected distinct tokens, got token {token} again at image {image}, row {row}. "
            "Remedy: indices.unique(), or those that greedy_select returns."
        )


def check_similarity(keys, scores=None, mask=None) -> None:
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    check_scores(scores, ("image", "token"), mask)


def check_greedy_select(s, prior, k, *, sbar=None, tier=None, suppression=1.0) -> None:
    check_finite("s", s, ("image", "token", "token"))
    check_finite("prior", prior, ("image", "token"), None if tier is None else (tier == 0) | (tier == 3))
    check_finite("sbar", sbar, ("image",))
    apart = (s - s.mT).abs() > 1e-3
    refuse("s", s, apart, "a symmetric matrix", ("image", "token", "token"), "Remedy: condense_kernels.similarity.")
    if tier is not None:
        refuse("tier", tier, (tier < 0) | (tier > 3), "values in [0, 4)", ("image", "token"), "Remedy: see the page.")


def check_assign(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0) -> None:
    check_finite("s", s, ("image", "token", "token"))
    check_indices("indices", indices, -1, s.shape[1])
    check_positions(positions, None if tier is None else tier != 2)


def check_merge(features, scores, indices, assignment) -> None:
    member = assignment >= 0
    check_finite("features", features, ("image", "token", "channel"), member)
    check_scores(scores, ("image", "token"), member)
    check_indices("indices", indices, -1, features.shape[1])
    outside = (assignment < -1) | (assignment >= indices.shape[1])
    expected = f"rows in [-1, {indices.shape[1]})"
    refuse("assignment", assignment, outside, expected, ("image", "token"), "Remedy: what assign returns.")


def check_positions(positions: torch.Tensor | None, valid: torch.Tensor | None) -> None:
    if positions is not None:
        axes = ("image", "token", "axis")[3 - positions.dim() :]
        check_finite("positions", positions, axes, valid if positions.dim() == 3 else None)


def check_select_and_merge(
    features, scores, num_anchors, num_background, *, keys=None, positions=None, mask=None, **_
) -> None:
    check_finite("features", features, ("image", "token", "channel"), mask)
    check_scores(scores, ("image", "token"), mask)
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    check_positions(positions, mask)
    if mask is not None:
        k, count = num_anchors + num_background, mask.sum(dim=1)
        remedy = "Remedy: keep fewer tokens, or let fewer be padding."
        refuse("mask", count, count < k, f"at least K = {k} valid tokens an image", ("image",), remedy)


def check_select_and_merge_varlen(
    features, scores, cu_seqlens, cu_anchors, cu_background, total_keep, max_seqlen, *, keys=None, positions=None, **_
) -> None:
    ends = {"cu_seqlens": (cu_seqlens, features.shape[0], "T"), "cu_anchors": (cu_anchors, None, "")}
    ends |= {"cu_background": (cu_background, None, "")}
    for name, (offsets, last, letter) in ends.items():
        decreasing = torch.nn.functional.pad(offsets.diff() < 0, (1, 0))
        refuse(name, offsets, decreasing, "running sums", ("offset",), "Remedy: torch.cumsum of counts.")
        if offsets[0] != 0 or (last is not None and offsets[-1] != last):
            until = "" if last is None else f" up to {letter} = {last}"
            ends_at = f"{offsets[0].item()} ... {offsets[-1].item()}"
            raise ValueError(f"{name}: expected running sums from 0{until}, got {ends_at}. Remedy: varlen_budget.")
    kept, lengths = (cu_anchors.long() + cu_background).diff(), cu_seqlens.diff()
    remedy = "Remedy: varlen_budget."
    refuse("cu_anchors + cu_background", kept, kept > lengths, "at most the tokens of a segment", ("image",), remedy)
    refuse("cu_seqlens", lengths, lengths > max_seqlen, f"at most max_seqlen = {max_seqlen}", ("image",), remedy)
    if kept.sum() != total_keep:
        raise ValueError(
            f"total_keep: expected {kept.sum().item()}, as the offsets have it, got {total_keep}. {remedy}"
        )

    def token(t: int) -> str:
        segment = int(torch.searchsorted(cu_seqlens, t, right=True)) - 1
        return f"image {segment}, token {t - int(cu_seqlens[segment])}"

    check_finite("features", features, (token, "channel"))
    check_scores(scores, (token,))
    check_finite("keys", keys, (token, "channel"))
    check_finite("positions", positions, (token, "axis"))


def check_out(features, scores, num_anchors, num_background, *, workspace=None, merged, **options) -> None:
    check_select_and_merge(features, scores, num_anchors, num_background, **options)


CHECKS = {
    "similarity": check_similarity,
    "greedy_select": check_greedy_select,
    "assign": check_assign,
    "merge": check_merge,
    "select_and_merge": check_select_and_merge,
    "select_and_merge_out": check_out,
    "select_and_merge_varlen": check_select_and_merge_varlen,
}
