"""How every Triton kernel is launched: the tables, and what each entry rests on.

No entry rests on a GPU time, as none was measured. "Counted" means counted in compiled code by
benchmarks/inspect_kernels.py; benchmarks/variants.py lists what is worth trying instead.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch

MAX_STORED = 16384  # tokens of an image: above, the flagship never stores s, and the stages, which need s, refuse
MAX_STORED_BYTES = 2**31  # of s in a packed batch, whose rows are as long as the longest segment's: above, in groups
MAX_GROUPS = 32  # of segments, whose selections wait for each other: above, a packed batch does not store s either
UNIT = 64  # tokens of a block where the blocks of a packed batch are numbered, see device.first_block_of
ALL_BLOCKS = 2**29  # instead of a group's blocks: more than there are

_tried: ContextVar[Mapping[type, dict]] = ContextVar("tried", default=MappingProxyType({}))


@contextlib.contextmanager
def trying(config: type, **fields) -> Iterator[None]:
    """Within, every launch that asks for this config gets these fields: for benchmarks and tests.

    >>> with trying(SelectConfig, num_warps=2):
    ...     select_and_merge(...)
    """
    token = _tried.set({**_tried.get(), config: {**_tried.get().get(config, {}), **fields}})
    try:
        yield
    finally:
        _tried.reset(token)


def is_trying() -> bool:
    return bool(_tried.get())


def _chosen(config):
    return dataclasses.replace(config, **_tried.get().get(type(config), {}))


def next_power_of_2(x: int, most: int = 1 << 62) -> int:
    """At most ``most``, a power of two. Of an open size each comparison is a condition on torch.compile's graph."""
    power = 1
    while power < most and power < x:
        power *= 2
    return power


@dataclass(frozen=True)
class SimilarityConfig:
    """One tile shape and one order of the channels for all sizes: the bits of s depend on Dk alone."""

    block_d: int
    block: int = 64  # tokens: an int32 holds the sum of 64 cosines as 2**24ths
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def for_shape(cls, dtype: torch.dtype) -> "SimilarityConfig":
        # 128 bytes of a row at a time: counted, every load is 16 bytes wide, no spill on any target.
        return _chosen(cls(block_d=32 if dtype == torch.float32 else 64))


@dataclass(frozen=True)
class UnitSumConfig:
    """Of the launches that add unit keys, and multiply each with the sum; their channels are SimilarityConfig's."""

    block: int = 32  # tokens of a program
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def for_shape(cls) -> "UnitSumConfig":
        return _chosen(cls())


@dataclass(frozen=True)
class DistanceConfig:
    """Of metric "neg_l2". The order of the channels, and so the bits, depend on block_d alone."""

    block: int = 32  # tokens a side of a tile
    block_d: int = 8  # channels a step, a sector of 32 bytes of an fp32 row: 64 accumulators a thread
    num_warps: int = 4
    block_rows: int = 16  # rows of s that a program adds up,
    block_columns: int = 64  # so many columns at a time

    @classmethod
    def for_shape(cls) -> "DistanceConfig":
        return _chosen(cls())


@dataclass(frozen=True)
class SelectConfig:
    """An image's tokens in chunks of one size; one program an image. All images of a span are launched alike."""

    low: int  # rows of s have more columns than that,
    span: int  # and an image at most so many tokens
    block: int  # tokens of a chunk
    num_warps: int
    ahead: bool = False  # load the row of the likely next pick while one is worked on

    # Each is compiled once, and a pick has the instructions of the whole span: 576, 729 and 2880 are sizes of images of
    # LLaVA. Packed batches, compiled apart, have fewer.
    SPANS: ClassVar = (128, 256, 384, 576, 768, 1024, 2048, 3072, 4096, 6144, 8192, 12288, MAX_STORED)
    PACKED_SPANS: ClassVar = (256, 576, 1024, 2048, 3072, 4096, 6144, MAX_STORED)
    CLASSES: ClassVar = (1024, 4096)  # tokens up to which the segments of a packed batch share a launch

    @classmethod
    def for_shape(cls, n: int, spans: tuple[int, ...] = SPANS) -> "SelectConfig":
        # Counted in sm_90 code, instructions of a pick, none of which touches the stack: docs/design/gpu.md.
        # One warp, which needs no barrier: 171 for 576 tokens. 4 warps: 230 for 3072, 296 for 4096. 16: 302 for 16384.
        low, span = next((low, span) for low, span in zip((0, *spans), spans, strict=False) if n <= span)
        if span <= 1024:
            return _chosen(cls(low, span, block=64, num_warps=1))
        if span <= 4096:
            return _chosen(cls(low, span, block=512, num_warps=4))
        return _chosen(cls(low, span, block=2048, num_warps=16))

    @classmethod
    def for_packed(cls, width: int) -> list[tuple[int, "SelectConfig"]]:
        """(more than so many tokens, config): of a packed batch, the segments of a class share a launch."""
        limits = [*(limit for limit in cls.CLASSES if limit < width), width]
        return [(low, cls.for_shape(n, cls.PACKED_SPANS)) for low, n in zip([0, *limits], limits, strict=False)]

    @property
    def chunks(self) -> dict[str, int]:
        """The sizes that the kernels are compiled for."""
        return {
            "BLOCK": self.block,
            "CHUNKS": -(-self.span // self.block),
            "WHOLE": self.low // self.block,  # of those, within every row
            # tokens at a time outside of the pick loop: as few iterations as spill no register
            "WIDE": 128 if self.span <= 576 else next_power_of_2(self.span) // 4,
            "AHEAD": self.ahead,
        }


@dataclass(frozen=True)
class DppConfig:
    """As SelectConfig, but with more warps: a pick has work with all picks before it."""

    low: int
    span: int
    block: int  # tokens of a chunk
    num_warps: int
    unroll: int = 2  # earlier picks whose loads overlap

    SPANS: ClassVar = (256, 640, 1024, 2048, 3072, 4096, 8192, MAX_STORED)
    CLASSES: ClassVar = (1024, 4096)  # tokens up to which the segments of a packed batch share a launch

    @classmethod
    def for_shape(cls, n: int) -> "DppConfig":
        low, span = next((low, span) for low, span in zip((0, *cls.SPANS), cls.SPANS, strict=False) if n <= span)
        # Counted: no spill with a number a thread and chunk. Above 4096 tokens there are four, and 128 registers.
        if span <= 1024:
            return _chosen(cls(low, span, block=128, num_warps=4))
        if span <= 4096:
            return _chosen(cls(low, span, block=512, num_warps=16))
        return _chosen(cls(low, span, block=2048, num_warps=16, unroll=1))

    @classmethod
    def for_packed(cls, width: int) -> list[tuple[int, "DppConfig"]]:
        """(more than so many tokens, config): of a packed batch, the segments of a class share a launch."""
        limits = [*(limit for limit in cls.CLASSES if limit < width), width]
        return [(low, cls.for_shape(n)) for low, n in zip([0, *limits], limits, strict=False)]

    @property
    def chunks(self) -> dict[str, int]:
        return {"BLOCK": self.block, "CHUNKS": -(-self.span // self.block), "UNROLL": self.unroll}


@dataclass(frozen=True)
class NearestConfig:
    """Of the launch that finds how far each token's nearest neighbour is."""

    block_n: int = 32  # tokens of a program, 128 bytes of a row: N = 576 then has 18 programs
    block_j: int = 64  # rows at a time, so that their loads overlap: 16 numbers a thread; counted, no spill
    num_warps: int = 4

    @classmethod
    def for_shape(cls) -> "NearestConfig":
        return _chosen(cls())


@dataclass(frozen=True)
class CoverageConfig:
    block_n: int  # all tokens of an image, whose scores stay in registers
    num_warps: int
    block_gains: int = 16  # tokens of a program of the first launch: 16 numbers a thread of 128 rows at a time
    rows: int = 8  # times 128 rows of a column that are loaded at once: 1024, so that N = 576 waits once

    @classmethod
    def for_shape(cls, n: int) -> "CoverageConfig":
        block_n = max(next_power_of_2(n), 64)
        # Counted, sm_90: with 4 warps 2880 tokens take 1216 instructions, and spill in a packed batch; with 8, 848.
        return _chosen(cls(block_n, 4 if block_n <= 1024 else 8 if block_n <= 4096 else 16))


@dataclass(frozen=True)
class AssignConfig:
    block_k: int  # rows looked at together, so that their loads overlap
    block_n: int = 32  # tokens of a program
    num_warps: int = 4

    @classmethod
    def for_shape(cls, k: int) -> "AssignConfig":
        return _chosen(cls(block_k=next_power_of_2(k, 32)))  # counted: no spill with positions either


@dataclass(frozen=True)
class DpcConfig:
    block_m: int  # rows of a program
    block_n: int  # their columns, all of them
    num_warps: int

    @classmethod
    def for_shape(cls, n: int) -> "DpcConfig":
        block_n = max(next_power_of_2(n, MAX_STORED), UNIT)
        return _chosen(cls(max(4096 // block_n, 1), block_n, num_warps=max(block_n // 1024, 4)))  # 32 numbers a thread


@dataclass(frozen=True)
class MergeConfig:
    block_d: int  # channels at a time: all of them up to 4096, so that a row's tokens are listed once
    num_warps: int
    block_n: int = 1024  # tokens whose assignment is looked at together

    @classmethod
    def for_shape(cls, d: int) -> "MergeConfig":
        # 8 numbers of a token's features a thread; counted, no spill on any target. 4096 tokens at a time took 1546
        # instructions to list (sm_90), four times 1024 take 868.
        block_d = next_power_of_2(d, 4096)
        return _chosen(cls(block_d, num_warps=max(block_d // 256, 1)))


@dataclass(frozen=True)
class MergeBackwardConfig:
    block_n: int  # tokens of a program
    block_d: int  # channels at a time
    num_warps: int = 4

    @classmethod
    def for_shape(cls, d: int) -> "MergeBackwardConfig":
        # counted: 8 numbers a thread of each of three tensors, loads of 16 bytes, no spill
        block_d = next_power_of_2(d, 256)
        return _chosen(cls(block_n=1024 // block_d, block_d=block_d))


@dataclass(frozen=True)
class GatherMergeConfig:
    block_d: int  # channels of a program: K rows alone would not fill a GPU
    num_warps: int

    @classmethod
    def for_shape(cls, d: int) -> "GatherMergeConfig":
        # 8 numbers of a token a thread, as in MergeConfig; counted: loads of 16 bytes, eight in flight, no spill
        block_d = next_power_of_2(d, 512)
        return _chosen(cls(block_d, num_warps=max(block_d // 256, 1)))


@dataclass(frozen=True)
class GatherMergeBackwardConfig:
    block_d: int  # channels at a time: all of them up to 4096, so that a token's places are listed once
    num_warps: int
    block: int = 1024  # places looked at together

    @classmethod
    def for_shape(cls, d: int) -> "GatherMergeBackwardConfig":
        # counted: 112 registers a thread at most, no spill
        block_d = next_power_of_2(d, 4096)
        return _chosen(cls(block_d, num_warps=max(block_d // 256, 1)))


@dataclass(frozen=True)
class GatherMergeWeightsConfig:
    block_m: int  # neighbours of a program
    block_d: int  # channels at a time
    num_warps: int = 4

    @classmethod
    def for_shape(cls, d: int) -> "GatherMergeWeightsConfig":
        # counted: 8 numbers a thread of each of two tensors, no spill
        block_d = next_power_of_2(d, 256)
        return _chosen(cls(block_m=min(1024 // block_d, 32), block_d=block_d))


class Grouping(NamedTuple):
    """Which segments of a packed batch have their s stored together: those whose first block has one of so many
    numbers. The host knows no length, but from one number to the next it is UNIT tokens at most."""

    blocks: int  # numbers of a group
    reserved: int  # numbers of every segment; 1: those that its tokens need

    @classmethod
    def within(cls, rows: int, max_seqlen: int) -> "list[Grouping]":
        """The largest groups whose s has at most so many rows: for segments of many sizes, and for long ones."""
        first_of_last, longest = (rows - max_seqlen) // UNIT, -(-max_seqlen // UNIT)
        return [cls(first_of_last + 1, 1), cls((first_of_last // longest + 1) * longest, longest)]

    @property
    def last(self) -> int:
        """Where in a group the last segment may begin, in numbers."""
        return (self.blocks - 1) // self.reserved * self.reserved

    def rows(self, max_seqlen: int) -> int:
        return self.last * UNIT + max_seqlen

    def numbers(self, num_tokens: int, num_segments: int) -> int:
        return num_segments * self.reserved + (num_tokens // UNIT if self.reserved == 1 else 0)

    def ends(self, num_tokens: int, num_segments: int) -> range:
        """The number behind each group."""
        return range(self.blocks, self.numbers(num_tokens, num_segments) + self.blocks, self.blocks)


@dataclass(frozen=True)
class FusedConfig:
    """What the flagship decides on top of its stages."""

    store_s: bool
    width: int  # row length of s, padded so that every row starts and ends on 64 bytes
    # Assignment in the launch of the selection, or in one of its own? Counted at N = 576, K = 64: the one warp of the
    # selection would issue some 65,000 instructions for it and spill registers, where a launch spreads them.
    assign_in_select: bool = False
    block_n: int = 64
    block_k: int = 8
    grouping: Grouping | None = None  # of a packed batch whose s is too much to store at once

    @classmethod
    def for_shape(cls, n: int) -> "FusedConfig":
        return _chosen(cls(store_s=n <= MAX_STORED, width=-(-n // 16) * 16))

    @classmethod
    def for_packed(cls, num_tokens: int, num_segments: int, max_seqlen: int) -> "FusedConfig":
        width = -(-max_seqlen // 16) * 16
        rows = MAX_STORED_BYTES // (width * 4)
        if max_seqlen > MAX_STORED:
            return _chosen(cls(store_s=False, width=width))
        if num_tokens <= rows:
            return _chosen(cls(store_s=True, width=width))
        groupings = {len(g.ends(num_tokens, num_segments)): g for g in reversed(Grouping.within(rows, max_seqlen))}
        groups = min(groupings)
        return _chosen(cls(store_s=groups <= MAX_GROUPS, width=width, grouping=groupings[groups]))


@dataclass(frozen=True)
class AttentionConfig:
    """One tile for all numbers of queries and keys: the order of a sum depends on them alone."""

    block_d: int  # channels at a time: all of a head's where it has no more, and then a program reads its own once
    block_m: int = 64  # queries
    block_n: int = 64  # keys
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def for_shape(cls, dtype: torch.dtype, d: int) -> "AttentionConfig":
        # Counted: fp32 spills with 64 channels on sm_80 and sm_90, with 32 on no target. tl.dot takes 16 or more.
        widest = 32 if dtype == torch.float32 else 128
        return _chosen(cls(block_d=max(next_power_of_2(d, widest), 16)))


@dataclass(frozen=True)
class StreamConfig:
    """The launches of the path that never stores s. Its tiles are those of SimilarityConfig."""

    chunk: int = 1024  # tokens that a program of one image looks at together
    num_warps: int = 4  # of those programs
    block_k: int = 8  # rows that the assignment looks at together: counted, 64 of them spill on every target
    # Launches of a loop beyond one for each 64 picks. Simulated (docs/design/gpu.md): with 16 a turn has one round of
    # candidates, but where tokens come in many copies; with none, up to 300.
    spare_turns: int = 16

    @classmethod
    def for_shape(cls) -> "StreamConfig":
        return _chosen(cls())
