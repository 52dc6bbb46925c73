"""What is done with the results: other planes of the kept tokens, and the way back to all tokens."""

import torch

from ._dispatch import tracing
from ._dispatch.checks import check_not_empty, check_tensor

INTEGER = (torch.int64,)


@tracing.leaf()
def gather_tokens(
    indices: torch.Tensor,  # [B, K]
    *tensors: torch.Tensor,  # [B, N, ...] each
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The kept tokens' rows of other planes: positions, rotary phases, labels, another encoder's features.

    Args:
        indices: [B, K] int64, as :func:`select_and_merge` returns them; a row with index -1, or another
            negative one, gets zeros.
        tensors: [B, N, ...] each, any dtype. Where all images share one plane: ``plane.expand(B, *plane.shape)``.
        cu_seqlens, cu_kept: both for a packed batch, indices [total_keep] and tensors [T, ...]: the offsets [S + 1]
            int32 of :func:`select_and_merge_varlen`, cu_kept being cu_anchors + cu_background.

    Returns:
        [B, K, ...] (packed: [total_keep, ...]) for each tensor; a tuple where there are several. Differentiable.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, device or batch size, with the argument's name.
        RuntimeError: on CPU, an index beyond the last token. In a packed batch such a row gets zeros.
    """
    packed = tracing.unrecorded(check_gather, indices, tensors, cu_seqlens, cu_kept)
    if packed:
        limit = tensors[0].shape[0] if tensors else 0
        indices = over_all_segments(indices, cu_kept, cu_seqlens, limit)[None]
        tensors = tuple(tensor[None] for tensor in tensors)
    rows = tuple(take_rows(tensor, indices) for tensor in tensors)
    rows = tuple(row[0] for row in rows) if packed else rows
    return rows[0] if len(rows) == 1 else rows


@tracing.leaf()
def unmerge(
    merged: torch.Tensor,  # [B, K, ...]
    assignment: torch.Tensor,  # [B, N]
    *,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
) -> torch.Tensor:
    """Every token gets its row back: the way from K kept tokens to N, for dense prediction and for pictures.

    Args:
        merged: [B, K, ...], any dtype: rows, as merged or as a model has changed them since.
        assignment: [B, N] int64, as :func:`select_and_merge` returns it; a token with -1, or another
            negative value, gets zeros.
        cu_seqlens, cu_kept: both for a packed batch, merged [total_keep, ...] and assignment [T], as in
            :func:`gather_tokens`.

    Returns:
        [B, N, ...] (packed: [T, ...]). Differentiable.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, device or batch size, with the argument's name.
        RuntimeError: on CPU, an assignment beyond the last row. In a packed batch such a token gets zeros.
    """
    if not tracing.unrecorded(check_unmerge, merged, assignment, cu_seqlens, cu_kept):
        return take_rows(merged, assignment)
    return take_rows(merged[None], over_all_segments(assignment, cu_seqlens, cu_kept, merged.shape[0])[None])[0]


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


def check_gather(indices, tensors, cu_seqlens, cu_kept) -> bool:
    """Whether the batch is packed."""
    packed = check_offsets(cu_seqlens, cu_kept, indices)
    check_tensor("indices", indices, "total_keep" if packed else "B K", {}, INTEGER)
    for number, tensor in enumerate(tensors):
        check_plane(f"tensors[{number}]", tensor, indices, packed, "T" if packed else "B N")
        if packed and tensor.shape[0] != tensors[0].shape[0]:
            limit, got = tensors[0].shape[0], list(tensor.shape)
            raise ValueError(f"tensors[{number}]: expected [T ...] with T = {limit}, as tensors[0], got {got}.")
    return packed


def check_unmerge(merged, assignment, cu_seqlens, cu_kept) -> bool:
    """Whether the batch is packed."""
    packed = check_offsets(cu_seqlens, cu_kept, assignment)
    check_tensor("assignment", assignment, "T" if packed else "B N", {}, INTEGER)
    check_plane("merged", merged, assignment, packed, "total_keep" if packed else "B K")
    return packed


def check_offsets(cu_seqlens, cu_kept, like) -> bool:
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


def check_plane(name: str, tensor, index: torch.Tensor, packed: bool, axes: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [{axes} ...], got {type(tensor).__name__}.")
    if tensor.dim() < len(axes.split()) or (not packed and tensor.shape[0] != index.shape[0]):
        batch = "" if packed else f" with B = {index.shape[0]}"
        raise ValueError(f"{name}: expected [{axes} ...]{batch}, got {list(tensor.shape)}.")
    if tensor.device != index.device:
        raise ValueError(f"{name}: expected device {index.device}, as of the indices, got {tensor.device}.")
