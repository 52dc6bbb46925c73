"""Every segment of a packed batch gets the picks that greedy_select makes of it alone."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condense_kernels import debug, greedy_select, greedy_select_varlen
from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import SelectConfig, trying

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(backends.unavailable("triton", CPU) is not None, reason="no Triton on CPU tensors")
BACKENDS = [b for b in ("cpp", "triton", "reference") if backends.unavailable(b, CPU) is None]
INT32 = torch.iinfo(torch.int32)


@dataclasses.dataclass
class Batch:
    s: torch.Tensor  # [T, max_seqlen]
    prior: torch.Tensor | None  # [T]
    cu_seqlens: list[int]
    cu_kept: list[int]
    total_keep: int
    max_seqlen: int
    options: dict

    @classmethod
    def of(cls, lengths: list[int], kept: list[int], **options) -> "Batch":
        """What lies behind a segment is NaN, or as large as can be."""
        cu_seqlens, cu_kept = ([sum(sizes[:i]) for i in range(len(sizes) + 1)] for sizes in (lengths, kept))
        t, width = cu_seqlens[-1], max(lengths, default=0)
        s, column, counts = torch.randn(t, width), torch.arange(width), torch.tensor(lengths, dtype=torch.int64)
        behind = column >= counts.repeat_interleave(counts)[:, None]
        s[behind] = torch.where(column % 2 == 0, torch.nan, 3e38).expand(t, width)[behind]
        return cls(s, torch.rand(t), cu_seqlens, cu_kept, cu_kept[-1], width, options)

    def run(self, backend: str) -> torch.Tensor:
        offsets = (torch.tensor(cu, dtype=torch.int32) for cu in (self.cu_seqlens, self.cu_kept))
        sizes = self.total_keep, self.max_seqlen
        return greedy_select_varlen(self.s, self.prior, *offsets, *sizes, **self.options, backend=backend)

    def one_by_one(self) -> torch.Tensor:
        """By the dense operator, of offsets that do not decrease once they are cut to what exists."""
        t, order = len(self.s), torch.full((self.total_keep,), -1)
        cut = lambda cu, most: [min(max(offset, 0), most) for offset in cu]  # noqa: E731
        tokens, rows = cut(self.cu_seqlens, t), cut(self.cu_kept, self.total_keep)
        for i in range(len(tokens) - 1):
            part, n = slice(*tokens[i : i + 2]), tokens[i + 1] - tokens[i]
            k = min(rows[i + 1] - rows[i], n)
            if n > self.max_seqlen or k <= 0:
                continue
            options = {name: self.of_segment(value, i, part) for name, value in self.options.items()}
            prior = None if self.prior is None else self.prior[None, part]
            order[rows[i] : rows[i] + k] = greedy_select(self.s[None, part, :n], prior, k, **options)[0]
        return order

    def of_segment(self, value, i: int, part: slice):
        if not isinstance(value, torch.Tensor):
            return value
        return value[None, part] if value.shape == (len(self.s),) else value[i : i + 1]


LENGTHS, KEPT = [5, 0, 17, 1, 30, 16], [3, 0, 17, 1, 9, 0]
T, COUNT = sum(LENGTHS), len(LENGTHS)


def options_of(name: str) -> dict:
    tier, candidates = torch.randint(0, 4, (T,)).to(torch.int8), torch.rand(T) < 0.7
    return {
        "none": {},
        "scaled": {"sbar": torch.rand(COUNT), "tier": tier, "suppression": 0.7},
        "max_min": {"max_min": True, "tier": tier},
        "max_min of candidates": {"max_min": True, "candidates": candidates},
        "index": {"first": torch.tensor([4, -1, 16, 0, 7, 3]), "combine": "mul", "candidates": candidates},
        "utility": {"first": torch.rand(T).half(), "tier": tier, "candidates": candidates, "suppression": 0.0},
    }[name]


NAMES = ["none", "scaled", "max_min", "max_min of candidates", "index", "utility"]


@pytest.mark.parametrize("name", NAMES)
def test_segments_are_images_of_their_own(name, backend):
    batch = Batch.of(LENGTHS, KEPT, **options_of(name))
    assert torch.equal(batch.run(backend), batch.one_by_one())


def test_without_a_prior_and_in_any_layout(backend):
    batch = Batch.of(LENGTHS, KEPT, max_min=True)
    batch.prior = None
    expected = batch.one_by_one()
    assert torch.equal(batch.run(backend), expected)
    batch.s = torch.nn.functional.pad(batch.s, (1, 2))[:, 1:-2]
    assert torch.equal(batch.run(backend), expected)
    batch.s = batch.s.T.contiguous().T
    assert torch.equal(batch.run(backend), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads, cpp):
    batch = Batch.of([300, 7, 40, 0, 300, 200], [100, 3, 40, 0, 5, 20], max_min=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(batch.run(cpp), batch.one_by_one())
        batch.s = batch.s.double()
        assert torch.equal(batch.run(cpp), batch.one_by_one())
    finally:
        torch.set_num_threads(before)


@needs_triton
@pytest.mark.parametrize("max_min", [False, True])
def test_classes_of_sizes(max_min, monkeypatch, bounded):
    """A launch of the selection for each; a segment belongs to one, at the limits as well."""
    batch = Batch.of([16, 17, 1, 40, 41, 0, 15], [7, 6, 1, 9, 9, 0, 4], max_min=max_min)
    monkeypatch.setattr(SelectConfig, "CLASSES", (16, 40))
    monkeypatch.setattr(SelectConfig, "PACKED_SPANS", (16, 32, 48, 64))
    with trying(SelectConfig, block=16):
        found = [(above, config.low, config.span) for above, config in SelectConfig.for_packed(41)]
        assert found == [(0, 0, 16), (16, 32, 48), (40, 32, 48)]
        assert torch.equal(batch.run("triton"), batch.one_by_one())


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), data=st.data())
def test_any_segmentation(lengths, data):
    kept = [data.draw(st.integers(0, n)) for n in lengths]
    batch = Batch.of(lengths, kept, max_min=data.draw(st.booleans()))
    expected = batch.one_by_one()
    for backend in ("cpp", "reference"):
        if backend in BACKENDS:
            assert torch.equal(batch.run(backend), expected)


# Offsets that nobody has checked

CUT = {  # wrong, but cut to what exists they still make sense: what comes out is known
    "negative": {"cu_seqlens": [-7, 4, 9, 15]},
    "not from 0": {"cu_seqlens": [3, 6, 9, 12], "cu_kept": [2, 3, 4, 6]},
    "beyond the last token": {"cu_seqlens": [0, 4, 9, 99]},
    "extremes": {"cu_seqlens": [INT32.min, 4, 9, INT32.max], "cu_kept": [INT32.min, 2, 3, INT32.max]},
    "more rows than tokens": {"cu_kept": [0, 7, 8, 9], "total_keep": 12},
    "total_keep too small": {"total_keep": 2},
    "total_keep 0": {"total_keep": 0},
    "total_keep too large": {"total_keep": 15},
}
TANGLED = {
    "decrease": {"cu_seqlens": [0, 9, 4, 15]},
    "backwards": {"cu_seqlens": [15, 9, 4, 0]},
    "rows decrease": {"cu_kept": [0, 5, 1, 6]},
    "rows backwards": {"cu_kept": [6, 3, 2, 0]},
}


def wrong(change: dict) -> Batch:
    """4, 5 and 6 tokens, of which 2, 1 and 3 are kept, but for ``change``."""
    return dataclasses.replace(Batch.of([4, 5, 6], [2, 1, 3], max_min=True), **change)


@pytest.mark.parametrize("name", CUT)
def test_wrong_offsets_are_cut_to_what_exists(name, backend, bounded):
    batch = wrong(CUT[name])
    assert torch.equal(batch.run(backend), batch.one_by_one())


@pytest.mark.parametrize("name", TANGLED)
def test_wrong_offsets_lead_nowhere(name, fast, bounded):
    order = wrong(TANGLED[name]).run(fast)
    assert ((order >= -1) & (order < 6)).all()


def test_a_segment_that_is_too_long_has_no_picks(backend):
    batch = Batch.of([4, 7, 5], [2, 1, 3])
    batch.s, batch.max_seqlen = batch.s[:, :6], 6
    order = batch.run(backend)
    assert order[2] == -1 and (order[[0, 1, 3, 4, 5]] >= 0).all()


def test_an_index_of_another_segment_is_refused_on_cpu(cpp):
    for first in ([0, 0, 6], [4, 0, 0], [0, -2, 0]):
        batch = dataclasses.replace(wrong({}), options={"first": torch.tensor(first)})
        for backend in (cpp, "reference"):
            with pytest.raises(RuntimeError, match=r"^first: expected values in \[-1, \d\), got -?\d\.$"):
                batch.run(backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seqlen": 5}, "s: expected shape [T max_seqlen] = [15, 5], got [15, 6]."),
        ({"total_keep": 16}, "total_keep: expected 0 <= total_keep <= 15 (T = 15 tokens), got 16."),
        ({"cu_kept": [0, 1]}, "cu_kept: expected shape [S+1] = [4]"),
        ({"options": {"first": torch.zeros(15).long()}}, "first: expected shape [S] = [3]"),
        ({"options": {"tier": torch.zeros(15, dtype=torch.bool)}}, "tier: expected dtype int8, got bool. Remedy: "),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_refused(change, message, cpp):
    batch = wrong(change)
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        batch.run(cpp)
    offsets = (torch.tensor(cu, dtype=torch.int32) for cu in (batch.cu_seqlens, batch.cu_kept))
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        torch.ops.condense.greedy_select_varlen(
            batch.s, batch.prior, *offsets, batch.total_keep, batch.max_seqlen, **batch.options
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 9, 4, 15]}, "cu_seqlens: expected running sums, got 4 at offset 2"),
        ({"cu_kept": [0, 5, 5, 6]}, "cu_kept: expected at most the tokens of a segment, got 5 at image 0"),
        ({"options": {"first": torch.tensor([0, 5, 5])}}, "first: expected values in [-1, N), got 5 at image 1"),
        (
            {"options": {"first": torch.tensor([0, 4, -1]), "candidates": torch.arange(15) != 8}},
            "first: expected a candidate of tier 0, got 4 at image 1",
        ),
    ],
    ids=["cu_seqlens", "cu_kept", "outside", "no candidate"],
)
def test_the_debug_switch_looks(change, message, cpp):
    with debug(), pytest.raises(ValueError, match="^" + re.escape(message)):
        wrong(change).run(cpp)


def test_the_debug_switch_looks_at_what_is_used(cpp):
    batch = wrong({})
    with debug():
        assert batch.s.isnan().any()
        batch.run(cpp)
        batch.s[5, 4] = torch.inf
        with pytest.raises(ValueError, match="^s: expected finite numbers, got inf at token 5, column 4"):
            batch.run(cpp)
