"""The host's side of a launch: the launch, which device, which strides, and what a packed batch hands to a kernel."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from . import prepared, traced
from .tables import ALL_BLOCKS, UNIT, Grouping

# Arguments of kernels that change with the image. Triton would compile a kernel again where one is 1, and where one is
# a multiple of 16. Strides of keys, features and s, WIDTH among them, are such multiples for all images or none, and
# have to be known as such: else a row of s is loaded a number at a time.
VARYING = (
    "N", "K", "M", "R", "num_anchors", "num_blocks", "num_tiles", "num_parts", "turns_left", "group", "LOW", "ROW",
    "HEIGHT", "GRID_WIDTH", "stride_score_b", "stride_score_h", "stride_mask_b", "stride_mass_b",
    "stride_grad_mass_b", "stride_index_b", "stride_assignment_b", "stride_tier_b", "stride_source_b",
    "stride_prior_b", "stride_where_b", "stride_row_b", "stride_lse_b", "stride_lse_h", "stride_first_b",
    "stride_candidate_b", "stride_quality_b", "stride_sbar_b", "K_NN", "stride_neighbour_b", "stride_neighbour_k",
    "stride_weight_b", "stride_weight_k",
)  # fmt: skip


_collect: ContextVar[Callable[[Any, tuple, dict], None] | None] = ContextVar("collect", default=None)


@contextlib.contextmanager
def collecting(collect: Callable[[Any, tuple, dict], None]) -> Iterator[None]:
    """Within, this thread makes no launch: ``collect`` gets its kernel, arguments and options."""
    token = _collect.set(collect)
    try:
        yield
    finally:
        _collect.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """A kernel of Triton on a grid of programs. Every launch of the package goes this way."""
    if (collect := _collect.get()) is not None:
        return collect(kernel, args, options)
    if traced.is_on():
        return traced.launch(kernel, grid, args, options)
    compiled = kernel[grid](*args, **options)
    if (recording := prepared.recording()) is not None:
        recording.launched(kernel, compiled, grid, args, options)


def new(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, fill: int | None = None):
    """A tensor on the device of ``like``, in its dtype unless another is given; not initialised unless to ``fill``."""
    made = like.new_empty(shape, dtype=dtype) if fill is None else like.new_full(shape, fill, dtype=dtype)
    if (recording := prepared.recording()) is not None:
        recording.made(made, fill)
    return made


def zero(tensor: torch.Tensor) -> None:
    """Fill a piece of a workspace with zeros."""
    tensor.zero_()
    if (recording := prepared.recording()) is not None:
        recording.zeroed(tensor)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's. In the interpreter there is nothing to switch."""
    return contextlib.nullcontext() if traced.is_on() else on_device(tensor.device)  # in a graph, Inductor sees to it


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def as_fp32(number: float) -> float:
    """Rounded, as a GPU's argument is. The interpreter would go on with more bits, and not take 1e-60 for 0."""
    return ctypes.c_float(number).value


def reject_float64(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(
                f"{name}: expected fp32, fp16 or bf16 on the Triton kernels, got float64. "
                f"Remedy: {name}.float(), or CPU tensors, which are computed in fp64."
            )


def strides_of(tensor: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """Of a packed tensor, which has no batch axis: the tokens' stride for that as well, see image_tokens.

    Zeros for an argument that was left out; its pointer is then any tensor's, and never read.
    """
    return (0,) * axes if tensor is None else tensor.stride()[:1] * (axes - tensor.dim()) + tensor.stride()


class Packed(NamedTuple):
    """A packed batch as an argument of a kernel; None in its place is a dense one.

    The sizes x come as 2 x + 1, and none of them as 0: for a multiple of 16, or for 1, Triton would compile every
    kernel again.
    """

    cu_seqlens: torch.Tensor  # [S + 1]
    cu_anchors: torch.Tensor  # [S + 1]; cu_seqlens, never read, where nothing is kept: Triton 3.6 takes no None here
    cu_background: torch.Tensor  # [S + 1], likewise
    odd_segments: int
    odd_tokens: int
    odd_keep: int
    odd_seqlen: int
    odd_end: int  # the number behind the blocks of the group of segments that a launch is for
    odd_blocks: int  # how many numbers a group has
    odd_reserved: int  # how many numbers each segment has; 1: those that its tokens need

    @classmethod
    def of(cls, cu_seqlens, cu_anchors, cu_background, num_tokens: int, total_keep: int, max_seqlen: int) -> "Packed":
        offsets = (cu_seqlens if cu is None else cu for cu in (cu_seqlens, cu_anchors, cu_background))
        sizes = (cu_seqlens.shape[0] - 1, num_tokens, total_keep, max_seqlen, ALL_BLOCKS, ALL_BLOCKS, 1)
        return cls(*(cu.contiguous() for cu in offsets), *(2 * size + 1 for size in sizes))

    @classmethod
    def kept(cls, cu_seqlens, cu_kept, num_tokens: int, total_keep: int, max_seqlen: int) -> "Packed":
        """Of a stage, whose rows are of one kind; cu_kept None: it has none."""
        zeros = None if cu_kept is None else new(cu_kept, cu_kept.shape, fill=0)
        return cls.of(cu_seqlens, cu_kept, zeros, num_tokens, total_keep, max_seqlen)

    def groups(self, grouping: Grouping | None) -> "Iterator[Packed]":
        """The whole batch, or one group of its segments after the other."""
        if grouping is None:
            yield self
            return
        odd_blocks, odd_reserved = 2 * grouping.blocks + 1, 2 * grouping.reserved + 1
        for end in grouping.ends(self.num_tokens, self.num_segments):
            yield self._replace(odd_end=2 * end + 1, odd_blocks=odd_blocks, odd_reserved=odd_reserved)

    @property
    def num_tokens(self) -> int:
        return self.odd_tokens // 2

    @property
    def num_segments(self) -> int:
        return self.odd_segments // 2

    @property
    def max_seqlen(self) -> int:
        return self.odd_seqlen // 2

    @property
    def max_keep(self) -> int:
        """At most so many rows has a segment."""
        return min(self.odd_keep, self.odd_seqlen) // 2

    def num_slots(self, block: int) -> int:
        """How many programs reach every block of tokens of every segment of a group, see first_block_of."""
        grouping = Grouping(self.odd_blocks // 2, self.odd_reserved // 2)
        if grouping.blocks == ALL_BLOCKS:
            numbers = grouping.numbers(self.num_tokens, self.num_segments)
        else:
            numbers = grouping.last + -(-self.max_seqlen // UNIT)
        return numbers * (UNIT // block)
