"""What is done with the results: other planes of the kept tokens, the way back to all tokens, sizes of clusters."""

from collections.abc import Sequence
from typing import overload

import torch

from ._dispatch import tracing
from ._dispatch.checks import as_count, check_not_empty, check_tensor

INTEGER = (torch.int64,)


@overload
def gather_tokens(
    indices: torch.Tensor,
    tensor: torch.Tensor,
    /,
    *,
    dim: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_kept: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def gather_tokens(
    indices: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    /,
    *others: torch.Tensor,
    dim: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]: ...


@tracing.leaf()
def gather_tokens(
    indices: torch.Tensor,  # [B, K]
    *tensors: torch.Tensor,  # [B, N, ...] each
    dim: int | None = None,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The kept tokens' rows of other planes: positions, rotary phases, labels, another encoder's features.

    Args:
        indices: [B, K] int64, as :func:`select_and_merge` returns them; a row with index -1, or another
            negative one, gets zeros.
        tensors: [B, N, ...] each, any dtype. Where all images share one plane: ``plane.expand(B, *plane.shape)``.
        dim: the axis of the tokens in tensors, 1 by default, 0 of a packed batch; the images are the axis before it.
            Position ids [P, B, N], or [P, T], have theirs last: ``dim=-1``.
        cu_seqlens, cu_kept: both for a packed batch, indices [total_keep] and tensors [T, ...]: the offsets [S + 1]
            int32 of :func:`select_and_merge_varlen`, cu_kept being cu_anchors + cu_background.

    Returns:
        [B, K, ...] (packed: [total_keep, ...]) for each tensor, its axes where they were; a tuple where there are
        several. Differentiable.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, device, dim or size, with the argument's name; fewer tokens than
            are kept; without dim, [B, B, ...] of up to 4 images, which may be positions along B axes.
        RuntimeError: on CPU, an index beyond the last token. In a packed batch such a row gets zeros.
    """
    axes = tracing.unrecorded(check_gather, indices, tensors, dim, cu_seqlens, cu_kept)
    if cu_seqlens is not None and cu_kept is not None:
        indices = over_all_segments(indices, cu_kept, cu_seqlens, tensors[0].shape[axes[0]] if tensors else 0)
    rows = tuple(take_along(tensor, indices, axis) for tensor, axis in zip(tensors, axes, strict=True))
    return rows[0] if len(rows) == 1 else rows


@tracing.leaf()
def unmerge(
    merged: torch.Tensor,  # [B, K, ...]
    assignment: torch.Tensor,  # [B, N]
    *,
    dim: int | None = None,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
) -> torch.Tensor:
    """Every token gets its row back: the way from K kept tokens to N, for dense prediction and for pictures.

    Args:
        merged: [B, K, ...], any dtype: rows, as merged or as a model has changed them since.
        assignment: [B, N] int64, as :func:`select_and_merge` returns it; a token with -1, or another
            negative value, gets zeros.
        dim: the axis of the rows in merged, as in :func:`gather_tokens`.
        cu_seqlens, cu_kept: both for a packed batch, merged [total_keep, ...] and assignment [T], as in
            :func:`gather_tokens`.

    Returns:
        [B, N, ...] (packed: [T, ...]). Differentiable.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, device, dim or batch size, with the argument's name; without dim,
            [B, B, ...] as in :func:`gather_tokens`.
        RuntimeError: on CPU, an assignment beyond the last row. In a packed batch such a token gets zeros.
    """
    axis = tracing.unrecorded(check_unmerge, merged, assignment, dim, cu_seqlens, cu_kept)
    if cu_seqlens is not None and cu_kept is not None:
        assignment = over_all_segments(assignment, cu_seqlens, cu_kept, merged.shape[axis])
    return take_along(merged, assignment, axis)


@tracing.leaf()
def sizes(
    assignment: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K]
    *,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
) -> torch.Tensor:
    """How many tokens went into each row, its own among them: the weights of ToMe's proportional attention.

    Args:
        assignment: [B, N] int64, as :func:`select_and_merge` returns it; a token with -1, or another negative value,
            is counted nowhere.
        indices: [B, K] int64, as of the same call: its shape says how many rows there are. Its values are not read.
        cu_seqlens, cu_kept: both for a packed batch, assignment [T] and indices [total_keep], as in
            :func:`gather_tokens`.

    Returns:
        [B, K] (packed: [total_keep]) int64. They sum to the number of tokens that have a row; 0 of a row that a masked
        token had to fill.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, device or batch size, with the argument's name.
        RuntimeError: on CPU, an assignment beyond the last row. In a packed batch such a token is counted nowhere.
    """
    tracing.unrecorded(check_sizes, assignment, indices, cu_seqlens, cu_kept)
    if cu_seqlens is not None and cu_kept is not None:
        assignment = over_all_segments(assignment, cu_seqlens, cu_kept, indices.shape[0])
    row = (assignment + 1).clamp(min=0)  # the first is of those that have none
    counts = assignment.new_zeros(*indices.shape[:-1], indices.shape[-1] + 1)
    return counts.scatter_add(-1, row, torch.ones_like(row))[..., 1:]


def take_along(tensor: torch.Tensor, rows: torch.Tensor, axis: int) -> torch.Tensor:
    """take_rows of tensor [..., B, N, ...], N at ``axis``, at rows [B, K]; or of [..., N, ...] at rows [K]."""
    if rows.dim() == 1:
        return take_rows(tensor.movedim(axis, 0)[None], rows[None])[0].movedim(0, axis)
    where = axis - 1, axis
    return take_rows(tensor.movedim(where, (0, 1)), rows).movedim((0, 1), where)


def take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """tensor [B, N, ...] at rows [B, K]: [B, K, ...], zeros where a row is negative."""
    at = rows.reshape(*rows.shape, *[1] * (tensor.dim() - 2))
    if not torch.jit.is_tracing() and tensor.shape[1] == 0:  # then every row is negative
        return tensor.new_zeros(*rows.shape, *tensor.shape[2:])
    taken = tensor.gather(1, at.clamp(min=0).expand(*rows.shape, *tensor.shape[2:]))
    return torch.where(at >= 0, taken, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def over_all_segments(
    within: torch.Tensor,  # [T] or [total_keep]: counted from where each segment begins
    cu_own: torch.Tensor,  # [S + 1]: where the segments of `within` begin
    cu_other: torch.Tensor,  # [S + 1]: where those begin that its values count in
    limit: int,
) -> torch.Tensor:
    """The same counted over all segments, -1 where there is none. The host reads no value."""
    place = torch.arange(within.shape[0], dtype=cu_own.dtype, device=within.device)
    segment = torch.bucketize(place, cu_own.clamp(0, within.shape[0]), right=True).sub(1).clamp(min=0)
    total = within + cu_other.clamp(0, limit)[segment]
    return torch.where((within >= 0) & (total < limit), total, -1)


def check_gather(
    indices: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    dim: int | None,
    cu_seqlens: torch.Tensor | None,
    cu_kept: torch.Tensor | None,
) -> list[int]:
    """The tokens' axis of each tensor."""
    packed = check_offsets(cu_seqlens, cu_kept, indices)
    check_tensor("indices", indices, "total_keep" if packed else "B K", {}, INTEGER)
    letters = "T" if packed else "B N"
    axes: list[int] = []
    for number, tensor in enumerate(tensors):
        name = f"tensors[{number}]"
        axes.append(check_plane(name, tensor, indices, packed, letters, dim))
        limit, got = tensors[0].shape[axes[0]], list(tensor.shape)
        if tensor.shape[axes[-1]] != limit:
            raise ValueError(
                f"{name}: expected [{letters} ...] with {letters[-1]} = {limit}, as tensors[0], got {got}."
            )
        if known(limit > 0) and known(limit < indices.shape[-1]):  # kept tokens are distinct
            raise ValueError(
                f"{name}: expected [{letters} ...] with {letters[-1]} >= {indices.shape[-1]}, the kept tokens, got "
                f"{got} with {limit} at axis {axes[-1]}. {OTHER_AXIS}"
            )
    return axes


def check_unmerge(
    merged: torch.Tensor,
    assignment: torch.Tensor,
    dim: int | None,
    cu_seqlens: torch.Tensor | None,
    cu_kept: torch.Tensor | None,
) -> int:
    """The axis of the rows."""
    packed = check_offsets(cu_seqlens, cu_kept, assignment)
    check_tensor("assignment", assignment, "T" if packed else "B N", {}, INTEGER)
    return check_plane("merged", merged, assignment, packed, "total_keep" if packed else "B K", dim)


def check_sizes(
    assignment: torch.Tensor, indices: torch.Tensor, cu_seqlens: torch.Tensor | None, cu_kept: torch.Tensor | None
) -> None:
    packed = check_offsets(cu_seqlens, cu_kept, assignment)
    bound: dict[str, int] = {}
    check_tensor("assignment", assignment, "T" if packed else "B N", bound, INTEGER)
    check_tensor("indices", indices, "total_keep" if packed else "B K", bound, INTEGER, assignment)


def check_offsets(cu_seqlens: torch.Tensor | None, cu_kept: torch.Tensor | None, like: torch.Tensor) -> bool:
    """Whether the batch is packed."""
    if cu_seqlens is None and cu_kept is None:
        return False
    if cu_seqlens is None or cu_kept is None:
        missing = "cu_seqlens" if cu_seqlens is None else "cu_kept"
        raise ValueError(
            f"{missing}: expected a tensor [S+1], as its companion was given, got None. Remedy: give both."
        )
    sizes: dict[str, int] = {}
    check_tensor("cu_seqlens", cu_seqlens, "S+1", sizes, (torch.int32, torch.int64), like)
    check_not_empty("cu_seqlens", cu_seqlens, 0, "offset")
    check_tensor("cu_kept", cu_kept, "S+1", sizes, (torch.int32, torch.int64), like)
    return True


OTHER_AXIS = "Remedy: dim=, the axis of the tokens: -1 of positions [P B N] or [P T]."
MAX_POSITION_AXES = 4  # time, height, width, and one more


def check_plane(
    name: str, tensor: torch.Tensor, index: torch.Tensor, packed: bool, letters: str, dim: int | None
) -> int:
    """The axis of its tokens."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [{letters} ...], got {type(tensor).__name__}.")
    first = 0 if packed else 1
    axis = first if dim is None else as_count("dim", dim)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"dim: expected an int, got {type(axis).__name__}: {axis!r}. Remedy: int(dim).")
    axis += tensor.dim() if axis < 0 else 0
    if not first <= axis < tensor.dim() or (not packed and tensor.shape[axis - 1] != index.shape[0]):
        batch = "" if packed else f" with B = {index.shape[0]}"
        expected = f"[{letters} ...]{batch}" if dim is None else f"[... {letters} ...]{batch} and dim = {dim}"
        raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}. {OTHER_AXIS}")
    if dim is None and not packed and tensor.dim() > 2 and may_be_positions(tensor):
        raise ValueError(
            f"{name}: expected dim=, as {list(tensor.shape)} may be [{letters} ...] or positions [P {letters}]. "
            "Remedy: dim=1 for the one, dim=2 for the other."
        )
    if tensor.device != index.device:
        raise ValueError(f"{name}: expected device {index.device}, as of the indices, got {tensor.device}.")
    return axis


def may_be_positions(tensor: torch.Tensor) -> bool:
    """Of a tensor [B, N, ...], whether it could as well be [P, B, N, ...]: P = B = N, and not too many."""
    return known(tensor.shape[0] == tensor.shape[1]) and known(tensor.shape[0] <= MAX_POSITION_AXES)


def known(condition: bool) -> bool:
    """Whether it holds; of sizes that a graph leaves open, whether it always does, so that they stay open."""
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)
    return condition
