"""torch.nested: jagged tensors are packed batches that carry their offsets."""

from typing import TYPE_CHECKING, Any

import torch

from ..select_and_merge import Condensed

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.nested._internal.nested_tensor import NestedTensor


def is_nested(value: object) -> "TypeGuard[NestedTensor]":
    return isinstance(value, torch.Tensor) and value.is_nested


def unfit(value) -> str | None:
    """What is wrong with a nested tensor: its values have to be the packed batch [T, ...]."""
    if not is_nested(value):
        return type(value).__name__
    if value.layout != torch.jagged:
        return f"layout {value.layout}"
    if value.lengths() is not None:
        return "one with holes"
    if value._ragged_idx != 1:
        return f"one whose axis {value._ragged_idx} is jagged"
    return None


def unpack(
    features: "NestedTensor",  # [S, j, D] jagged
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    **others: torch.Tensor | None,  # [S, j, ...] jagged each
) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor, int]:
    """The values [T, ...] of features and of the others, cu_seqlens [S + 1] int32 and max_seqlen."""
    nested: dict[str, Any] = {"features": features, **others}
    for name, value in nested.items():
        if value is None:
            continue
        found = unfit(value)
        if found is not None:
            raise TypeError(
                f"{name}: expected a contiguous jagged nested tensor, as features is nested, got {found}. "
                "Remedy: torch.nested.nested_tensor_from_jagged(values, features.offsets())."
            )
        if value.offsets() is not features.offsets() and value.shape[1] != features.shape[1]:
            raise ValueError(
                f"{name}: expected the offsets of features, got others. "
                "Remedy: torch.nested.nested_tensor_from_jagged(values, features.offsets())."
            )
    if cu_seqlens is None:
        cu_seqlens = features.offsets().to(torch.int32)
    if max_seqlen is None:
        max_seqlen = features._get_max_seqlen()
    values = {name: None if value is None else value.values() for name, value in others.items()}
    return features.values(), values, cu_seqlens, max_seqlen


def pack(results: Condensed, like: "NestedTensor", cu_kept: torch.Tensor) -> Condensed:
    """assignment with the offsets of the tokens, the others with those of the kept ones."""
    offsets = cu_kept.to(like.offsets().dtype)
    rows = [torch.nested.nested_tensor_from_jagged(t, offsets) for t in (results.merged, results.indices, results.mass)]
    merged, indices, mass = rows
    return Condensed(merged, indices, torch.nested.nested_tensor_from_jagged(results.assignment, like.offsets()), mass)
