"""Packed batches: each segment gets the dense operator's bits, and wrong offsets harm nothing."""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import condense_kernels as ck
from condense_kernels import Condensed
from condense_kernels.testing import KINDS, Inputs, PackedInputs, assert_same_bits, make_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
UNMASKED = [kind for kind in KINDS if kind != "masked"]  # a packed batch has no padding


def offsets(counts) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def placed(image: Inputs) -> Inputs:
    """The grid as positions, which is the same bit for bit."""
    if image.grid is None:
        return image
    return dataclasses.replace(image, grid=None, positions=torch.cartesian_prod(*map(torch.arange, image.grid))[None])


def pack(images: list[Inputs]) -> PackedInputs:
    """Images, each a batch of one, one after the other."""
    joined = {
        name: None if getattr(images[0], name) is None else torch.cat([getattr(image, name)[0] for image in images])
        for name in ("features", "scores", "keys", "positions")
    }
    lengths = [image.scores.shape[1] for image in images]
    anchors, background = ([getattr(i, name) for i in images] for name in ("num_anchors", "num_background"))
    return PackedInputs(
        **joined,
        cu_seqlens=offsets(lengths),
        cu_anchors=offsets(anchors),
        cu_background=offsets(background),
        total_keep=sum(anchors) + sum(background),
        max_seqlen=max(lengths),
        suppression=images[0].suppression,
        spatial_weight=images[0].spatial_weight,
        background_suppression=images[0].background_suppression,
        scale_prior=images[0].scale_prior,
    )


def tokens(lengths, anchors, background, channels=8, dtype=torch.float32, seed=0) -> PackedInputs:
    """Random tokens at scattered positions."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return PackedInputs(
        torch.randn(total, channels, generator=generator).to(dtype),
        torch.rand(total, generator=generator).to(dtype),
        offsets(lengths),
        offsets(anchors),
        offsets(background),
        sum(anchors) + sum(background),
        max(lengths, default=0),
        positions=torch.rand(total, 2, generator=generator),
    )


def together(results: list[Condensed]) -> Condensed:
    """Dense results, each of one image, as the packed operator lays them out."""
    return Condensed(*(torch.cat([result[field][0] for result in results]) for field in range(4)))


def check_kind(kind: str, dtype: torch.dtype, lengths: tuple, backend: str) -> None:
    images = [
        placed(make_inputs(kind, batch=1, num_tokens=n, channels=9, dtype=dtype, seed=seed))
        for seed, n in enumerate(lengths)
    ]
    packed = pack(images)
    assert_same_bits(packed.run(backend), together([image.run(backend) for image in images]), f"{kind} {dtype}")


@pytest.mark.parametrize("kind", UNMASKED)
def test_every_kind_of_input(kind, backend):
    check_kind(kind, torch.float32, (12, 1, 20), backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_dtype(dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is served on CPU by the C++ kernels alone, as the contract says")
    check_kind("keys", dtype, (12, 20), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_in_every_dtype(dtype, cpp):
    """From one token to past two tiles."""
    for kind in UNMASKED:
        check_kind(kind, dtype, (30, 1, 97, 2, 48, 13), cpp)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scores", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("keys", [torch.float32, torch.float64], ids=str)
def test_mixed_dtypes(features, scores, keys, cpp):
    packed = tokens([9, 17, 30], [3, 2, 8], [1, 2, 3])
    packed = dataclasses.replace(
        packed,
        features=packed.features.to(features),
        scores=packed.scores.to(scores),
        keys=packed.features.cos().to(keys),
        positions=(packed.positions * 9).int(),
    )
    assert_same_bits(packed.run(cpp), packed.segment_by_segment(cpp))


@pytest.mark.parametrize(
    ("lengths", "anchors", "background"),
    [
        pytest.param([0, 5, 0, 0, 7, 0], [0, 2, 0, 0, 1, 0], [0, 0, 0, 0, 3, 0], id="empty first, between and last"),
        pytest.param([5, 6, 7], [0, 2, 0], [0, 1, 0], id="K = 0 first and last"),
        pytest.param([5, 6, 7], [2, 0, 0], [0, 0, 2], id="K = 0 between"),
        pytest.param([5, 1, 7], [5, 0, 3], [0, 1, 4], id="K = N"),
        pytest.param([1, 1, 1], [1, 0, 1], [0, 1, 0], id="one token each"),
        pytest.param([6, 9], [0, 0], [0, 0], id="nothing is kept"),
        pytest.param([0, 0], [0, 0], [0, 0], id="segments without tokens"),
        pytest.param([], [], [], id="no segment"),
    ],
)
def test_segments_that_keep_nothing_or_everything(lengths, anchors, background, backend):
    packed = tokens(lengths, anchors, background)
    result = packed.run(backend)
    assert_same_bits(result, packed.segment_by_segment(backend))
    row, token = 0, 0
    for n, k in zip(lengths, map(sum, zip(anchors, background, strict=True)), strict=True):
        assert (result.assignment[token : token + n] == -1).all() == (k == 0 or n == 0)
        if k == n:
            assert torch.equal(result.merged[row : row + k], packed.features[token : token + n])
        row, token = row + k, token + n


def test_nan_stays_in_its_segment(backend):
    """And there in its row; every other segment has the bits that it had."""
    packed = tokens([6, 9, 5], [2, 2, 1], [0, 1, 1])
    features, scores = packed.features.clone(), packed.scores.clone()
    features[7, 0], scores[9] = torch.nan, torch.inf
    clean, broken = packed.run(backend), dataclasses.replace(packed, features=features, scores=scores).run(backend)
    for outside in (slice(0, 2), slice(5, 7)):
        rows = [
            Condensed(r.merged[outside], r.indices[outside], r.assignment[:6], r.mass[outside]) for r in (clean, broken)
        ]
        assert_same_bits(*rows)
    assert not broken.merged[2:5].isfinite().all()


def views(x: torch.Tensor):
    """The same values behind other strides."""
    yield "stepped tokens", x.repeat_interleave(3, dim=0)[::3]
    yield "offset", torch.cat([x[:1], x])[1:]
    if x.dim() == 2:
        yield "reversed axes", x.T.contiguous().T
        yield "sliced", torch.cat([x, x + 1], dim=1)[:, : x.shape[1]]
        yield "stepped channels", x.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype, fast):
    if fast == "triton" and dtype == torch.bfloat16:
        pytest.skip("ten seconds in the interpreter, and a stride acts on addresses, not on numbers")
    packed = tokens([7, 12, 3], [2, 3, 1], [1, 0, 1], dtype=dtype)
    packed = dataclasses.replace(packed, keys=packed.features[:, :5].cos())
    expected = packed.run(fast)
    for field in ("features", "scores", "keys", "positions", "cu_seqlens", "cu_anchors", "cu_background"):
        for name, view in views(getattr(packed, field)):
            result = dataclasses.replace(packed, **{field: view}).run(fast)
            assert_same_bits(result, expected, f"{field}, {name}")
    one = packed.features[:1].expand_as(packed.features)  # stride 0
    assert_same_bits(
        dataclasses.replace(packed, features=one).run(fast), dataclasses.replace(packed, features=one.clone()).run(fast)
    )


def with_threads(run, counts=(1, 2, 3)) -> list:
    threads = torch.get_num_threads()
    try:
        return [(torch.set_num_threads(count), run())[1] for count in counts]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([3] * 40 + [700] + [5] * 40, id="one giant among tiny ones"),
        pytest.param([300, 310, 320], id="three large ones"),
        pytest.param([64, 1, 200, 3, 90, 17] * 9, id="all sizes"),
        pytest.param([150] * 4, id="as many as threads, or more"),
    ],
)
def test_threads_do_not_matter(lengths, cpp):
    packed = tokens(lengths, [1 + n // 5 for n in lengths], [n // 9 for n in lengths], channels=70)
    expected = packed.segment_by_segment(cpp)
    for count, result in enumerate(with_threads(lambda: packed.run(cpp)), start=1):
        assert_same_bits(result, expected, f"{count} threads")


@pytest.mark.parametrize("length", [1, 7, 16])
def test_4096_segments_are_a_dense_batch(length, cpp):
    keep = min(length, 4)
    packed = tokens([length] * 4096, [keep - keep // 2] * 4096, [keep // 2] * 4096)
    dense = ck.select_and_merge(
        packed.features.view(4096, length, -1),
        packed.scores.view(4096, length),
        keep - keep // 2,
        keep // 2,
        positions=packed.positions.view(4096, length, -1),
        backend=cpp,
    )
    assert_same_bits(packed.run(cpp), Condensed(*(t.flatten(0, 1) for t in dense)))


def python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)]), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_long_segments_are_streamed(cpp):
    """Those above 48 tokens, as the limit is set; the operators of the stages store s at any size."""
    python(
        """
        import torch
        from condense_kernels.testing import assert_same_bits, make_inputs
        from test_select_and_merge_varlen import pack, placed, together, with_threads

        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for kind in ("clustered", "duplicates", "nan"):
                images = [placed(make_inputs(kind, batch=1, num_tokens=n, channels=20, dtype=dtype))
                          for n in (30, 600, 48, 49, 2, 130)]
                expected = together([image.run_stages("cpp").condensed for image in images])
                for count, result in enumerate(with_threads(lambda: pack(images).run("cpp")), start=1):
                    assert_same_bits(result, expected, f"{kind} {dtype}, {count} threads")
        """,
        CONDENSE_STORED_TOKENS="48",
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_peak_memory_is_that_of_one_image_a_thread(cpp):
    """60 segments whose s is 2 MB each, on two threads: 4 MB, and 1 MB beside it."""
    peak = python(
        """
        import ctypes, torch
        from test_select_and_merge_varlen import tokens

        def peak_bytes():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

        torch.set_num_threads(2)
        small, large = (tokens([n] * 60, [20] * 60, [0] * 60) for n in (100, 700))
        small.run("cpp")  # threads, code, allocator
        ctypes.CDLL(None).malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        before = peak_bytes()
        result = large.run("cpp")
        print(peak_bytes() - before - sum(t.numel() * t.element_size() for t in result))
        """
    )
    assert int(peak) <= 2 * 700 * 700 * 4 + 1024 * 1024


INT32 = torch.iinfo(torch.int32)

# What the reference defines: offsets that, cut to what exists, do not decrease.
WRONG = {
    "negative": {"cu_seqlens": [-7, 4, 9, 15]},
    "not from 0": {"cu_seqlens": [3, 6, 9, 12], "cu_anchors": [2, 3, 4, 6]},
    "beyond the last token": {"cu_seqlens": [0, 4, 9, 99]},
    "no token left": {"cu_seqlens": [0, 15, 15, 99]},
    "extremes": {"cu_seqlens": [INT32.min, 4, 9, INT32.max]},
    "sums beyond int32": {"cu_anchors": [0, INT32.max, INT32.max, INT32.max], "cu_background": [0, 1, 1, INT32.max]},
    "sums below int32": {"cu_anchors": [INT32.min, INT32.min, 2, 3], "cu_background": [INT32.min, -1, 1, 4]},
    "more rows than tokens": {"cu_anchors": [0, 7, 8, 9], "total_keep": 12},
    "anchors decrease, rows do not": {"cu_anchors": [0, 3, 1, 2], "cu_background": [0, 0, 4, 5]},
    "more anchors than rows": {"cu_anchors": [0, 4, 5, 6], "cu_background": [0, -2, -1, 0]},
    "longer than max_seqlen": {"max_seqlen": 5},
    "max_seqlen 0": {"max_seqlen": 0},
    "total_keep too small": {"total_keep": 4},
    "total_keep 0": {"total_keep": 0},
    "total_keep too large": {"total_keep": 15},
}


def wrong(**fields) -> PackedInputs:
    """4, 5 and 6 tokens, of which 2, 1 and 3 are kept, but for ``fields``."""
    made = {name: torch.tensor(value).int() if isinstance(value, list) else value for name, value in fields.items()}
    return dataclasses.replace(tokens([4, 5, 6], [1, 1, 2], [1, 0, 1]), **made)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_offsets(case, backend):
    packed = wrong(**WRONG[case])
    result = packed.run(backend)
    assert_same_bits(result, packed.segment_by_segment(backend))
    assert (result.indices[result.mass == 0] == -1).all()  # no score is 0 here
    assert (result.merged[result.indices == -1] == 0).all()


def assert_in_range(result: Condensed, packed: PackedInputs) -> None:
    """Every element is written (outputs start as NaN and the largest integer), with something that can be used."""
    assert result.merged.isfinite().all()
    assert result.mass.isfinite().all()
    assert (result.mass >= 0).all()
    assert ((result.indices >= -1) & (result.indices < max(packed.max_seqlen, 1))).all()
    assert ((result.assignment >= -1) & (result.assignment < max(packed.total_keep, 1))).all()
    assert (result.merged[result.indices == -1] == 0).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"cu_seqlens": [0, 9, 4, 15]},
        {"cu_seqlens": [15, 9, 4, 0]},
        {"cu_seqlens": [INT32.max, INT32.min, INT32.max, INT32.min]},
        {"cu_anchors": [0, 5, 1, 4]},
        {"cu_anchors": [6, 4, 2, 0], "cu_background": [0, 0, 0, 0]},
        {"cu_seqlens": [0, 15, 0, 15], "cu_anchors": [0, 6, 0, 6]},
    ],
    ids=str,
)
def test_offsets_that_decrease(fields, backend):
    packed = wrong(**fields)
    assert_in_range(packed.run(backend), packed)


lengths_of_segments = st.lists(st.integers(0, 60), max_size=12)


@settings(max_examples=60)
@given(data=st.data(), lengths=lengths_of_segments, channels=st.sampled_from([1, 8, 130]))
def test_any_segmentation(data, lengths, channels):
    keep = [data.draw(st.integers(0, n)) for n in lengths]
    anchors = [data.draw(st.integers(0, k)) for k in keep]
    packed = tokens(lengths, anchors, [k - a for k, a in zip(keep, anchors, strict=True)], channels)
    expected = packed.segment_by_segment("cpp")
    for count, result in enumerate(with_threads(lambda: packed.run("cpp"), (1, 2)), start=1):
        assert_same_bits(result, expected, f"{count} threads")


some_offset = st.integers(-3, 20) | st.integers(INT32.min, INT32.max)


@settings(max_examples=150)
@given(
    ascending=st.booleans(),
    columns=st.lists(st.tuples(some_offset, some_offset, some_offset), min_size=1, max_size=8),
    total_keep=st.integers(0, 15),
    max_seqlen=st.integers(0, 20),
)
def test_any_offsets(ascending, columns, total_keep, max_seqlen):
    """Whatever they are, all is in range; and what the reference says where they do not decrease."""
    cu = [sorted(column) if ascending else list(column) for column in zip(*columns, strict=True)]
    names = ("cu_seqlens", "cu_anchors", "cu_background")
    packed = wrong(**dict(zip(names, cu, strict=True)), total_keep=total_keep, max_seqlen=max_seqlen)
    result = packed.run("cpp")
    assert_in_range(result, packed)
    if ascending:
        assert_same_bits(result, packed.segment_by_segment("cpp"))


F, S = torch.rand(6, 4), torch.rand(6)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
GOOD = {
    "features": F,
    "scores": S,
    "cu_seqlens": CU,
    "cu_anchors": CU,
    "cu_background": CU * 0,
    "total_keep": 6,
    "max_seqlen": 4,
    "positions": F[:, :2],
}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"features": F[None]}, ValueError, "features: expected 2 axes [T D], got 3: [1, 6, 4]."),
        ({"features": F.int()}, TypeError, "features: expected dtype float32, float16, bfloat16, float64, got int32."),
        ({"features": F[:, :0]}, ValueError, "features: expected at least one channel, got shape [6, 0]."),
        ({"scores": S[:5]}, ValueError, "scores: expected shape [T] = [6], as the arguments before it have, got [5]."),
        ({"scores": S.int()}, TypeError, "scores: expected dtype float32, float16, bfloat16, float64, got int32."),
        ({"cu_seqlens": CU[None]}, ValueError, "cu_seqlens: expected 1 axes [S+1], got 2: [1, 3]."),
        ({"cu_seqlens": CU.long()}, TypeError, "cu_seqlens: expected dtype int32, got int64."),
        ({"cu_seqlens": CU[:0]}, ValueError, "cu_seqlens: expected at least one offset, got shape [0]."),
        ({"cu_anchors": CU[1:]}, ValueError, "cu_anchors: expected shape [S+1] = [3], as the arguments before it have"),
        ({"cu_anchors": CU.float()}, TypeError, "cu_anchors: expected dtype int32, got float32."),
        ({"cu_background": CU[1:]}, ValueError, "cu_background: expected shape [S+1] = [3], as the arguments before"),
        ({"cu_background": CU.long()}, TypeError, "cu_background: expected dtype int32, got int64."),
        ({"total_keep": -1}, ValueError, "total_keep: expected 0 <= total_keep <= 6 (T = 6 tokens), got -1."),
        ({"total_keep": 7}, ValueError, "total_keep: expected 0 <= total_keep <= 6 (T = 6 tokens), got 7."),
        (
            {"max_seqlen": -1},
            ValueError,
            "max_seqlen: expected 0 <= max_seqlen <= 524288 (tokens of one image), got -1",
        ),
        ({"max_seqlen": 2**19 + 1}, ValueError, "max_seqlen: expected 0 <= max_seqlen <= 524288 (tokens of one image)"),
        ({"keys": F[:5]}, ValueError, "keys: expected shape [T Dk] = [6, "),
        ({"keys": F.bool()}, TypeError, "keys: expected dtype float32, float16, bfloat16, float64, got bool."),
        ({"keys": F[:, :0]}, ValueError, "keys: expected at least one channel, got shape [6, 0]."),
        ({"suppression": -1.0}, ValueError, "suppression: expected a finite number >= 0, got -1"),
        (
            {"background_suppression": -1.0},
            ValueError,
            "background_suppression: expected a finite number >= 0, got -1",
        ),
        ({"spatial_weight": float("inf")}, ValueError, "spatial_weight: expected a finite number >= 0, got inf"),
        ({"positions": None}, ValueError, "positions: expected a tensor [T, P], as spatial_weight is not 0, got None."),
        ({"positions": F[:5]}, ValueError, "positions: expected shape [T P] = [6, "),
        ({"positions": F[:, :0]}, ValueError, "positions: expected at least one coordinate, got shape [6, 0]."),
        ({"positions": F.bool()}, TypeError, "positions: expected dtype "),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refused(fields, error, message, cpp):
    """The raw operator says the same, as a RuntimeError."""
    with pytest.raises(error, match="^" + re.escape(message)):
        ck.select_and_merge_varlen(**{**GOOD, **fields})
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        torch.ops.condense.select_and_merge_varlen(**{**GOOD, **fields})
