"""The Triton kernels of packed batches: on a GPU, or else in Triton's interpreter.

A segment has the bits that the dense kernels give it alone. Offsets that are wrong lead nowhere outside the tensors.
"""

import contextlib
import dataclasses
import itertools
import math
import signal
from types import SimpleNamespace

import pytest
import torch

from condense_kernels import Condensed
from condense_kernels._dispatch import backends
from condense_kernels._triton.launcher import Packed
from condense_kernels._triton.tables import (
    AssignConfig,
    FusedConfig,
    Grouping,
    SelectConfig,
    StreamConfig,
    trying,
)
from condense_kernels.ops.greedy_select.turns import launch_turns
from condense_kernels.ops.merge.kernel import merge_backward
from condense_kernels.ops.select_and_merge.kernel import select_and_merge
from condense_kernels.ops.select_and_merge.streamed import pieces_of
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen
from condense_kernels.ops.select_and_merge_varlen.reference import for_each_segment, segments_of
from condense_kernels.testing import KINDS, Inputs, PackedInputs, assert_same_bits, make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's; they are meant to be
INTERPRETED = backends.triton_interprets()
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOAT16S = (torch.float16, torch.bfloat16)
NAN = float("nan")
# What is launched is the same for all of them.
PACKED_KINDS = [kind for kind in KINDS if kind not in ("masked", "positions", "video")]

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter does")


def offsets(counts) -> torch.Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()


class Batch(PackedInputs):
    """A call of the launcher itself, which takes meta tensors as well."""

    def run(self) -> Condensed:
        return Condensed(*select_and_merge_varlen(**vars(self)))

    def segment_by_segment(self) -> Condensed:
        """The reference's way through the offsets, with the dense kernels for each segment."""
        return Condensed(*for_each_segment(select_and_merge)(**vars(self)))


def batch_of(lengths, anchors, background, inputs: Inputs | None = None) -> Batch:
    tokens = sum(lengths)
    if inputs is None:
        inputs = make_inputs("clustered", batch=1, num_tokens=max(tokens, 1), channels=8)
    inputs = inputs.to(DEVICE)
    generator = torch.Generator().manual_seed(tokens)
    kept, longest = sum(anchors) + sum(background), max(lengths, default=0)
    return Batch(
        inputs.features[0, :tokens], inputs.scores[0, :tokens],
        offsets(lengths), offsets(anchors), offsets(background), kept, longest,
        keys=None if inputs.keys is None else inputs.keys[0, :tokens],
        positions=None if inputs.grid is None else torch.rand(tokens, 2, generator=generator).to(DEVICE),
        suppression=inputs.suppression, spatial_weight=inputs.spatial_weight,
        background_suppression=inputs.background_suppression,
        scale_prior=inputs.scale_prior,
    )  # fmt: skip


def streamed(batch: Batch, spare_turns: int = StreamConfig.spare_turns) -> Condensed:
    with trying(FusedConfig, store_s=False), trying(StreamConfig, spare_turns=spare_turns):
        return batch.run()


DTYPES = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize(("kind", "dtype"), list(zip(PACKED_KINDS, DTYPES, strict=False)), ids=str)
def test_every_kind_of_input(kind, dtype):
    """Two blocks, one, none: an empty segment, one that keeps nothing, one that keeps all."""
    inputs = make_inputs(kind, batch=1, num_tokens=82, channels=12, dtype=dtype)
    batch = batch_of([9, 0, 66, 4, 3], [3, 0, 5, 0, 2], [1, 0, 3, 0, 1], inputs)
    assert_same_bits(batch.run(), batch.segment_by_segment())


@pytest.mark.parametrize(
    ("lengths", "anchors", "background"),
    [
        ([], [], []),
        ([0], [0], [0]),
        ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
        ([7, 5], [0, 0], [0, 0]),
        ([1], [1], [0]),
        ([1, 1, 1], [0, 1, 0], [1, 0, 0]),
        ([64, 64], [2, 0], [0, 2]),  # whole blocks
        ([65, 63, 1], [2, 2, 1], [1, 1, 0]),
        ([0, 0, 30, 0], [0, 0, 20, 0], [0, 0, 10, 0]),
        ([1, 2] * 4 + [130] + [3, 0] * 4, [1] * 8 + [5] + [1, 0] * 4, [0, 1] * 4 + [2] + [1, 0] * 4),  # one giant
    ],
    ids=lambda counts: "-".join(map(str, counts)) or "none",
)
def test_sizes(lengths, anchors, background):
    batch = batch_of(lengths, anchors, background)
    assert_same_bits(batch.run(), batch.segment_by_segment())


@pytest.mark.parametrize("kind", ["nan", "ties", "two_factors"])
def test_without_s_stored(kind):
    batch = batch_of([5, 0, 70, 3, 2], [2, 0, 4, 0, 2], [0, 0, 2, 0, 0], make_inputs(kind, batch=1, num_tokens=80))
    expected = batch.run()
    assert_same_bits(streamed(batch), expected)
    assert_same_bits(streamed(batch, spare_turns=0), expected)


def test_without_s_stored_batches_of_one_pick():
    """Three clusters of more equal tokens than there are candidates: every turn is needed, or rounds of candidates."""
    inputs = Inputs(
        torch.eye(3).repeat_interleave(70, dim=0)[None], torch.linspace(1.0, 0.9, 3).repeat_interleave(70)[None],
        0, 0, grid=(1, 210),
    )  # fmt: skip
    batch = batch_of([205, 5], [3, 0], [0, 0], inputs)
    expected = batch.run()
    assert_same_bits(streamed(batch), expected)
    assert_same_bits(streamed(batch, spare_turns=0), expected)


GROUPINGS = [Grouping(1, 1), Grouping(2, 1), Grouping(3, 3), Grouping(6, 3)]


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: f"{grouping.blocks} of {grouping.reserved}")
@pytest.mark.parametrize(
    ("lengths", "anchors", "background"),
    [
        ([9, 0, 66, 4, 3, 64], [3, 0, 5, 0, 2, 4], [1, 0, 3, 0, 1, 0]),
        ([1, 2, 130, 3, 0], [1, 1, 5, 1, 0], [0, 1, 2, 1, 0]),  # one giant
        ([0, 0, 0], [0, 0, 0], [0, 0, 0]),
        ([70, 5], [0, 0], [0, 0]),
    ],
    ids=["mixed", "one giant", "empty", "nothing kept"],
)
def test_in_groups(lengths, anchors, background, grouping):
    """s is stored for some segments at a time, in the same place."""
    batch = batch_of(lengths, anchors, background)
    with trying(FusedConfig, grouping=grouping):
        assert_same_bits(batch.run(), batch.segment_by_segment())


def test_in_groups_without_a_row_to_spare():
    """Segments of whole blocks, as long as the longest: each row of s ends where the next segment's begins."""
    batch = batch_of([128, 128, 5], [90, 30, 1], [0, 2, 0])
    with trying(FusedConfig, grouping=Grouping(4, 2)):
        assert_same_bits(batch.run(), batch.segment_by_segment())


def test_in_groups_on_every_path():
    batch = batch_of([16, 17, 1, 64, 65, 0, 15], [5, 4, 1, 6, 7, 0, 3], [2, 2, 0, 3, 2, 0, 1])
    expected = batch.segment_by_segment()
    with trying(FusedConfig, grouping=Grouping(2, 1), assign_in_select=True):
        assert_same_bits(batch.run(), expected)
    with trying(FusedConfig, grouping=Grouping(4, 2)), trying(AssignConfig, block_n=16):
        assert_same_bits(batch.run(), expected)


def groups_of(num_segments: int, num_tokens: int, max_seqlen: int) -> int:
    """How many groups of segments store s; 0: none does."""
    config = FusedConfig.for_packed(num_tokens, num_segments, max_seqlen)
    if not config.store_s:
        return 0
    if config.grouping is None:
        return 1
    assert config.grouping.rows(max_seqlen) * config.width * 4 <= 2**31
    return len(config.grouping.ends(num_tokens, num_segments))


def test_too_much_to_store_at_once():
    """Rows of s are as long as the longest segment's, so a long one makes many short ones expensive."""
    assert groups_of(64, 64 * 2880, 2880) == 1
    assert groups_of(65, 65 * 2880, 2880) == 2
    assert groups_of(5, 5 * 16384, 16384) == 3  # of two
    assert groups_of(4096, 4096 * 100, 10_000) == 16
    assert groups_of(65_536, 10_000 + 65_536, 10_000) == 0  # 96: one selection after the other
    assert groups_of(2, 16_385 + 64, 16_385) == 0


@pytest.mark.parametrize("max_seqlen", [1, 64, 65, 2880, 9999, 16384])
def test_groups_hold_every_segment_once(max_seqlen):
    """Numbers do not fall, within a group rows of s do not overlap, and the last of them exists."""
    generator = torch.Generator().manual_seed(max_seqlen)
    lengths = torch.randint(0, max_seqlen + 1, (200,), generator=generator) // torch.tensor([1, 50]).repeat(100)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[:-1]
    tokens = int(lengths.sum())
    for rows in (2 * max_seqlen, 5 * max_seqlen + 77):
        for grouping in Grouping.within(rows, max_seqlen):
            number = torch.arange(200) * grouping.reserved + (cu // 64 if grouping.reserved == 1 else 0)
            ends = grouping.ends(tokens, 200)
            group = number // grouping.blocks
            assert len(ends) * grouping.blocks == ends[-1] and group[-1] < len(ends)
            start = number % grouping.blocks * 64
            same = group[1:] == group[:-1]
            assert (start[1:] >= start[:-1] + lengths[:-1])[same].all()
            assert (start + lengths).max() <= grouping.rows(max_seqlen) <= rows


def test_classes_of_sizes(monkeypatch):
    """A launch of the selection for each; a segment belongs to one, at the limits as well."""
    batch = batch_of([16, 17, 1, 64, 65, 0, 15], [5, 4, 1, 6, 7, 0, 3], [2, 2, 0, 3, 2, 0, 1])
    expected = batch.segment_by_segment()
    monkeypatch.setattr(SelectConfig, "CLASSES", (16, 64))
    monkeypatch.setattr(SelectConfig, "PACKED_SPANS", (16, 32, 64, 96))
    with trying(SelectConfig, block=16):
        assert [(above, c.low, c.span) for above, c in SelectConfig.for_packed(80)] == [
            (0, 0, 16), (16, 32, 64), (64, 64, 96)
        ]  # fmt: skip
        assert_same_bits(batch.run(), expected)


def test_assignment_in_the_launch_of_the_selection():
    batch = batch_of([16, 0, 70, 3], [5, 0, 4, 0], [2, 0, 2, 0])
    with trying(FusedConfig, assign_in_select=True):
        assert_same_bits(batch.run(), batch.segment_by_segment())


def test_any_strides():
    batch = batch_of([20, 13], [4, 3], [2, 1], make_inputs("keys", batch=1, num_tokens=33))

    def strange(x):  # the first axis innermost, every second element of it
        return x.movedim(0, -1).repeat_interleave(2, dim=-1)[..., ::2].movedim(-1, 0)

    tensors = {name: strange(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert_same_bits(dataclasses.replace(batch, **tensors).run(), batch.run())


TOP, LOW = 2**31 - 1, -(2**31)
CUT = {  # wrong, but cut to what exists they still make sense: what comes out is known
    "beyond T": {"cu_seqlens": [0, 30, 90, TOP]},
    "negative": {"cu_seqlens": [LOW, -5, 66, 80]},
    "from the middle on": {"cu_seqlens": [40, 50, 60, 70]},
    "none": {"cu_seqlens": [TOP] * 4},
    "too many rows": {"cu_anchors": [0, 40, 41, 2 * 10**9], "cu_background": [0, 1, 2, 2 * 10**9]},
    "rows that overflow": {"cu_anchors": [0, 2, TOP, TOP], "cu_background": [0, 1, TOP, TOP]},
    "negative rows": {"cu_anchors": [LOW, LOW, 3, 5], "cu_background": [LOW, 0, 0, 1]},
    "rows from the middle on": {"cu_anchors": [1, 3, 4, 5], "cu_background": [1, 1, 1, 1]},
    "fewer anchors than none": {"cu_anchors": [0, -3, 2, 3], "cu_background": [0, 6, 7, 9]},
    "more than max_seqlen": {"max_seqlen": 40},
    "too few rows": {"total_keep": 4},
    "nothing": {"total_keep": 0},
    "no length": {"max_seqlen": 0},
}
TANGLED = {  # segments that overlap: nothing but to stay inside
    "decreasing": {"cu_seqlens": [0, 70, 20, 80]},
    "backwards": {"cu_seqlens": [80, 50, 20, 0]},
    "there and back": {"cu_seqlens": [0, 80, 0, 80]},
    "a large budget over a small one": {
        "cu_seqlens": [0, 80, 0, 80],
        "cu_anchors": [0, 5, 5, 6],
        "cu_background": [0, 0, 0, 0],
        "total_keep": 6,
    },
    "extremes": {"cu_seqlens": [TOP, LOW, TOP, LOW]},
    "rows decreasing": {"cu_anchors": [0, 9, 2, 10]},
    "rows backwards": {"cu_anchors": [5, 3, 1, 0], "cu_background": [2, 1, 1, 0]},
    "rows of extremes": {"cu_anchors": [LOW, TOP, LOW, TOP], "cu_background": [LOW, TOP, LOW, TOP]},
    "all": {"cu_seqlens": [0, 80, 0, 80], "cu_anchors": [0, TOP, 0, TOP], "cu_background": [TOP, 0, TOP, 0]},
}


def wrong(change: dict) -> Batch:
    batch = batch_of([9, 66, 5], [2, 2, 1], [1, 1, 0])
    values = {name: torch.tensor(v, device=DEVICE).int() if isinstance(v, list) else v for name, v in change.items()}
    return dataclasses.replace(batch, **values)


WAYS = {
    "stored": {},
    "in groups": {"grouping": Grouping(1, 1)},
    "in groups of as many": {"grouping": Grouping(2, 2)},
    "streamed": {"store_s": False},
}


@only_interpreted
@pytest.mark.parametrize("way", list(WAYS)[:-1])
@pytest.mark.parametrize("name", CUT)
def test_wrong_offsets_are_cut_to_what_exists(name, way, bounded):
    batch = wrong(CUT[name])
    with trying(FusedConfig, **WAYS[way]):
        assert_same_bits(batch.run(), batch.segment_by_segment())


@only_interpreted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TANGLED)
def test_wrong_offsets_lead_nowhere(name, way, bounded):
    with trying(FusedConfig, **WAYS[way]):
        result = wrong({"max_seqlen": 80, **TANGLED[name]}).run()
    assert result.indices.ge(-1).all() and result.indices.lt(80).all()
    assert result.assignment.ge(-1).all() and result.assignment.lt(7).all()


@only_interpreted
@pytest.mark.parametrize(
    ("store_s", "start", "kept", "suppression"),
    [(True, 100, 70, 0.0), (False, 0, 3, 1.0)],  # 0 * infinity: the scores of those without a cosine are NaN
    ids=["stored", "streamed"],
)
def test_what_no_program_computed_leads_nowhere(store_s, start, kept, suppression, bounded):
    """The last blocks of the first segment have numbers from where segment 2 begins, which wrongly is token 0.

    Of the others all is as ever. Then every score is NaN; or a candidate is one that nobody wrote.
    """
    batch = dataclasses.replace(
        batch_of([100, 100], [0, kept], [0, 0], make_inputs("ties", batch=1, num_tokens=200, channels=8)),
        cu_seqlens=torch.tensor([start, 200, 0, 0, 0]).int(),
        cu_anchors=torch.tensor([0, kept, kept, kept, kept]).int(), cu_background=torch.zeros(5).int(),
        max_seqlen=200, suppression=suppression, spatial_weight=0.0,
    )  # fmt: skip
    with trying(FusedConfig, store_s=store_s):
        result = batch.run()
    assert result.indices.lt(200 - start).all() and result.assignment[:start].eq(-1).all()


@contextlib.contextmanager
def at_most(seconds: float):
    """What takes more of the processor's time raises."""

    def stop(*_):
        raise TimeoutError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def anything(dtype: torch.dtype, size: int, draw: str) -> torch.Tensor:
    """What memory may hold: any bits; the same bits everywhere; numbers near those that belong there."""
    bits = torch.randint(-(2**63), 2**63 - 1, (size,), dtype=torch.int64)
    if draw == "near":
        return bits.remainder(150).to(dtype)
    if draw != "any bits":
        bits.fill_({"zeros": 0, "ones": -1, "NaN": 0x7FC00000_7FC00000, "largest": 2**63 - 1}[draw])
    return bits.view(dtype)[:size]


@only_interpreted
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("draw", ["any bits", "near", "zeros", "ones", "NaN", "largest"])
def test_turns_end_whatever_is_in_memory(draw, turns, bounded):
    """Where segments overlap, programs write to each other's tokens at any time. Of two segments, one is empty."""
    batch = batch_of([130, 0], [9, 0], [0, 0], make_inputs("ties", batch=1, num_tokens=130, channels=8))
    packed = Packed.of(batch.cu_seqlens, batch.cu_anchors, batch.cu_background, 130, 9, 130)
    for due in (anything(torch.int32, 2, draw), torch.tensor([2**31 - 1, 2**31 - 1]), torch.tensor([130, 1])):
        pieces = pieces_of(2, 130, packed.num_slots(64))
        w = {name: anything(dtype, math.prod(shape), draw).view(shape) for name, (shape, dtype) in pieces.items()}
        w |= {"scale": torch.ones(130), "inverse": torch.ones(130), "due": due.int()}
        before = w["due"].clone()
        with at_most(20), trying(StreamConfig, spare_turns=turns - 1):
            launch_turns(SimpleNamespace(**w), batch.features, turns + 1, 1.0, packed)
        assert w["fresh"].ge(0).all() and w["fresh"].le(64).all() and w["fresh"][1] == 0
        assert w["due"].le(before).all()


@only_interpreted
def test_bounds_are_looked_at(bounded):
    batch = wrong({})
    batch = dataclasses.replace(batch, scores=batch.scores[:-1])  # which the operator refuses
    with pytest.raises(Exception, match="outside of the tensors"):
        batch.run()


def test_a_batch_that_keeps_nothing_has_no_hole():
    """As attention scores have it: Triton 3.6 does not compile a kernel that is handed None inside a tuple."""
    packed = Packed.of(offsets([9, 3]), None, None, 12, 0, 9)
    assert all(isinstance(field, (torch.Tensor, int)) for field in packed)


def test_enough_programs_for_every_block():
    """However the tokens are divided: numbers of blocks are reserved without having counted them."""
    generator = torch.Generator().manual_seed(0)
    for block in (1, 4, 64):
        for segments in (1, 2, 17):
            lengths = torch.randint(0, 200, (segments,), generator=generator)
            cu = offsets(lengths.tolist()).cpu()
            packed = Packed.of(cu, cu, cu, int(cu[-1]), 1, 200)
            first = (cu[:-1] // 64 + torch.arange(segments)) * (64 // block)
            behind = first + (lengths + block - 1) // block
            assert (behind[:-1] <= first[1:]).all() and behind[-1] <= packed.num_slots(block)


@only_interpreted
@pytest.mark.parametrize("store_s", [True, False], ids=["stored", "streamed"])
def test_the_host_reads_nothing(store_s, monkeypatch):
    """Tensors without values: whatever would wait for a device raises."""
    from triton.runtime import interpreter

    launched = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    batch = batch_of([9, 66, 5], [3, 5, 2], [1, 3, 0])
    on_meta = {name: value.to("meta") for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    batch = dataclasses.replace(batch, **on_meta)
    with trying(FusedConfig, store_s=store_s):
        result = batch.run()
    assert [t.shape for t in result] == [(14, 8), (14,), (80,), (14,)]
    assert launched[0] == "similarity_tile_kernel" and launched[-1] == "merge_kernel"
    rows = [t[None] for t in (result.merged, result.mass, batch.features, batch.scores, result.merged, result.mass)]
    merge_backward(*rows, result.indices[None], result.assignment[None])
    assert launched[-1] == "merge_backward_kernel"
    with pytest.raises((RuntimeError, NotImplementedError)):  # as the reference does
        next(segments_of(batch.cu_seqlens, batch.cu_anchors, batch.cu_background, 80, 14, 66))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_waits_for_the_device():
    batch = batch_of([9, 66, 5], [3, 5, 2], [1, 3, 0])
    expected = batch.run()
    gradients = [expected.merged[None], expected.mass[None]]
    row = [*gradients, batch.features[None], batch.scores[None], *gradients]
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, without = batch.run(), streamed(batch)
        merge_backward(*row, expected.indices[None], expected.assignment[None])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(result, expected)
    assert_same_bits(without, expected)
