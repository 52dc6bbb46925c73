"""One block of device memory, cut into the tensors that the launches of a call hand to each other."""

import math
from types import SimpleNamespace

import torch

from . import prepared, traced

ALIGNMENT = 256  # bytes: of every piece, counted from the start
START = 16  # bytes: of the start, for the widest load

Pieces = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


def bytes_of(pieces: Pieces) -> int:
    return sum(_padded(*piece) for piece in pieces.values())


def carve(pieces: Pieces, workspace: torch.Tensor | None, device: torch.device) -> SimpleNamespace:
    """The pieces as tensors in ``workspace``, or in one allocation where it is None. Nothing is initialised."""
    if workspace is None and traced.is_on():  # a graph has no views that kernels write through; Inductor plans memory
        made = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in pieces.items()}
        return SimpleNamespace(**made)
    needed = bytes_of(pieces)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        if (recording := prepared.recording()) is not None:
            recording.made(workspace, None)
    else:
        _check(workspace, needed, device)
    tensors, start = {}, 0
    for name, (shape, dtype) in pieces.items():
        size = math.prod(shape) * dtype.itemsize
        tensors[name] = workspace[start : start + size].view(dtype).view(shape)
        start += _padded(shape, dtype)
    if (recording := prepared.recording()) is not None:
        recording.cut(workspace, tensors.values())
    return SimpleNamespace(**tensors)


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _check(workspace: torch.Tensor, needed: int, device: torch.device) -> None:
    if workspace.dim() != 1 or workspace.dtype != torch.uint8 or not workspace.is_contiguous():
        raise ValueError(
            f"workspace: expected a contiguous 1-D uint8 tensor, got {workspace.dtype} of shape "
            f"{tuple(workspace.shape)} with strides {tuple(workspace.stride())}. "
            f"Remedy: torch.empty({needed}, dtype=torch.uint8, device={str(device)!r})."
        )
    if workspace.device != device:
        raise ValueError(
            f"workspace: expected a tensor on {device}, like features, got one on {workspace.device}. "
            f"Remedy: device={str(device)!r}."
        )
    if workspace.numel() < needed:
        raise ValueError(
            f"workspace: expected at least {needed} bytes, got {workspace.numel()}. "
            "Remedy: ask workspace_bytes for these sizes."
        )
    if workspace.data_ptr() % START:
        raise ValueError(
            f"workspace: expected a start aligned to {START} bytes, got one {workspace.data_ptr() % START} past. "
            f"Remedy: slice it at multiples of {ALIGNMENT}."
        )
