"""What the stages say alike about a packed batch: its arguments, its segments, its offsets under the debug switch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .checks import FLOATS, INTEGERS, MAX_TOKENS, check_count, check_not_empty, check_tensor
from .debug import refuse

NO_SHARDS = "its offsets count the tokens of all images, and a shard holds only some of them"
REMEDY = "Remedy: varlen_budget, or torch.cumsum of the lengths."


def check_segments(cu_seqlens: Any, max_seqlen: Any, sizes: dict[str, int], like: torch.Tensor) -> None:
    """cu_seqlens [S + 1] int32 beside ``like``; max_seqlen an int."""
    check_tensor("cu_seqlens", cu_seqlens, "S+1", sizes, (torch.int32,), like)
    check_not_empty("cu_seqlens", cu_seqlens, 0, "offset")
    check_count("max_seqlen", max_seqlen, 0, MAX_TOKENS, "tokens of one image")


def check_rows(cu_kept: Any, total_keep: Any, sizes: dict[str, int], like: torch.Tensor) -> None:
    """cu_kept [S + 1] int32 beside ``like``; total_keep an int up to T. After check_segments."""
    check_tensor("cu_kept", cu_kept, "S+1", sizes, (torch.int32,), like)
    check_count("total_keep", total_keep, 0, sizes["T"], f"T = {sizes['T']} tokens")


def check_places(positions: Any, spatial_weight: float, sizes: dict[str, int], like: torch.Tensor) -> None:
    """positions [T, P] beside ``like``, unless the distance term is off; there is no grid."""
    if positions is not None:
        check_tensor("positions", positions, "T P", sizes, FLOATS + INTEGERS, like)
        check_not_empty("positions", positions, 1, "coordinate")
    elif spatial_weight != 0:
        raise ValueError(
            "positions: expected a tensor [T, P], as spatial_weight is not 0, got None. Remedy: "
            "spatial_weight=0 for assignment by similarity alone."
        )


class Part(NamedTuple):
    """A segment of a packed batch, cut to what exists."""

    number: int
    tokens: slice  # of [T], at least one
    rows: slice  # of [total_keep]

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def parts_of(
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor | None,  # [S + 1]; None: no rows
    num_tokens: int,
    total_keep: int,
    max_seqlen: int,
) -> Iterator[Part]:
    """The segments that have a token. One that is longer than max_seqlen counts as empty. Reads the offsets."""
    offsets = cu_seqlens.tolist()
    rows = [0] * len(offsets) if cu_kept is None else cu_kept.tolist()
    for s in range(len(offsets) - 1):
        start, stop = (min(max(offset, 0), num_tokens) for offset in offsets[s : s + 2])
        first, last = (min(max(row, 0), total_keep) for row in rows[s : s + 2])
        if 0 < stop - start <= max_seqlen:
            yield Part(s, slice(start, stop), slice(first, first + min(max(last - first, 0), stop - start)))


def look_at_segments(cu_seqlens: torch.Tensor, max_seqlen: int | None, num_tokens: int) -> torch.Tensor:
    """The segments' lengths, once the offsets are running sums from 0 to T."""
    lengths = cu_seqlens.diff()
    refuse("cu_seqlens", cu_seqlens[1:], lengths < 0, "running sums", (lambda s: f"offset {s + 1}",), REMEDY)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens:
        ends_at = f"{cu_seqlens[0].item()} ... {cu_seqlens[-1].item()}"
        raise ValueError(f"cu_seqlens: expected running sums from 0 up to T = {num_tokens}, got {ends_at}. {REMEDY}")
    if max_seqlen is not None:
        refuse("cu_seqlens", lengths, lengths > max_seqlen, f"at most max_seqlen = {max_seqlen}", ("image",), REMEDY)
    return lengths


def look_at_rows(cu_kept: torch.Tensor, lengths: torch.Tensor, total_keep: int) -> torch.Tensor:
    """The segments' rows, once they are running sums from 0 to total_keep and no segment keeps more than it has."""
    kept = cu_kept.diff()
    refuse("cu_kept", cu_kept[1:], kept < 0, "running sums", (lambda s: f"offset {s + 1}",), REMEDY)
    refuse("cu_kept", kept, kept > lengths, "at most the tokens of a segment", ("image",), REMEDY)
    if cu_kept[0] != 0 or cu_kept[-1] != total_keep:
        ends_at = f"{cu_kept[0].item()} ... {cu_kept[-1].item()}"
        expected = f"running sums from 0 up to total_keep = {total_keep}"
        raise ValueError(f"cu_kept: expected {expected}, got {ends_at}. {REMEDY}")
    return kept
