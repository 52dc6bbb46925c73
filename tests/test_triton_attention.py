"""The Triton kernels of attention scores, dense and packed: on a GPU, or else in Triton's interpreter.

A segment has the bits that the dense kernels give it alone. Rows and offsets that are wrong lead nowhere outside the
tensors.
"""

import itertools
import math

import pytest
import torch

import condense_kernels
from condense_kernels._dispatch import backends
from condense_kernels.ops.attention_scores import reference
from condense_kernels.ops.attention_scores.kernel import attention_scores
from condense_kernels.ops.attention_scores_varlen.kernel import attention_scores_varlen
from condense_kernels.testing import unit_roundoff

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's; they are meant to be
INTERPRETED = backends.triton_interprets()
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter does")


def heads_of(b: int, hq: int, hkv: int, m: int, n: int, d: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries and keys whose attention is neither flat nor on one key."""
    queries, keys = torch.randn(b, hq, m, d), torch.randn(b, hkv, n, d) + torch.randn(b, hkv, 1, d)
    return queries.to(DEVICE, dtype), keys.to(DEVICE, dtype)


def lse_of(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    heads = queries.shape[1] // keys.shape[1]
    logits = scale * queries.double() @ keys.double().repeat_interleave(heads, dim=1).mT
    return logits.logsumexp(dim=-1).float()


def assert_close(actual: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, **options) -> None:
    """To the reference, within what rounding can do.

    The exponent is off by the roundings of a logit and of the normaliser, each d + 4 of them at most, of numbers no
    larger than the logits' parts, or lse; 2**-21 is for exp2 and log2 of the hardware; sums are as long as a tile's.
    """
    cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    queries, keys = queries.cpu(), keys.cpu()
    expected = reference.attention_scores(queries, keys, **cpu)
    d, eps = queries.shape[-1], unit_roundoff(torch.float32)
    scale = options.get("scale") or 1 / math.sqrt(d)
    heads = queries.shape[1] // keys.shape[1]
    largest = scale * (queries.double().abs() @ keys.double().abs().repeat_interleave(heads, dim=1).mT).max()
    largest = max(float(largest), float(cpu["lse"].abs().max()) if "lse" in cpu else 0.0)
    tiles = -(-max(queries.shape[2], keys.shape[2], options["rows"].shape[-1] if "rows" in options else 0) // 64)
    bound = 2 * (d + 4) * eps * (largest + math.log(keys.shape[2])) + 2.0**-21 + 2 * (tiles + 8) * eps
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    error = (actual.cpu().double() - expected).abs()
    assert (error <= bound * expected + 1e-37).all(), (float((error / (expected + 1e-37)).max()), bound)
    assert bound < 1e-3


SHAPES = {  # B, Hq, Hkv, M, N, d
    "one": (1, 1, 1, 1, 1, 1),
    "grouped": (2, 4, 2, 70, 131, 20),
    "tiles": (1, 2, 2, 64, 128, 64),
    "more queries": (2, 3, 1, 130, 30, 72),
    "one query": (1, 2, 1, 1, 65, 16),
    "long channels": (1, 1, 1, 66, 50, 150),
}
OPTIONS = {
    "plain": lambda b, m, n: {},
    "causal": lambda b, m, n: {"causal": True},
    "mask": lambda b, m, n: {"mask": torch.rand(b, n) < 0.6},
    "rows": lambda b, m, n: {"rows": torch.randint(-1, m, (7,))},
    "many rows": lambda b, m, n: {"rows": torch.randint(-1, m, (b, 70)), "scale": 0.15},
    "everything": lambda b, m, n: {
        "rows": torch.randint(-1, m, (b, 9)),
        "mask": torch.rand(b, n) < 0.6,
        "causal": True,
    },
}


def options_of(name: str, b: int, m: int, n: int) -> dict:
    options = OPTIONS[name](b, m, n)
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in options.items()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_the_reference(shape, option, dtype):
    b, _, _, m, n, d = SHAPES[shape]
    queries, keys = heads_of(*SHAPES[shape], dtype)
    options = options_of(option, b, m, n)
    assert_close(attention_scores(queries, keys, **options), queries, keys, **options)
    lse = lse_of(queries, keys, options.get("scale", 1 / math.sqrt(d)))
    for outside in (lse + 1, lse.double()):  # of more keys than are here; in either dtype
        given = {"lse": outside, **options}
        assert_close(attention_scores(queries, keys, **given), queries, keys, **given)


def test_every_row_sums_to_one():
    queries, keys = heads_of(2, 2, 1, 70, 90, 16)
    torch.testing.assert_close(attention_scores(queries, keys).sum(dim=-1), torch.ones(2, 2, device=DEVICE))


def test_the_only_key_gets_all():
    """Exactly 1, however large the logit: both launches round it alike."""
    queries, keys = heads_of(1, 2, 1, 5, 70, 33)
    mask = torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    mask[0, 66] = True
    scores = attention_scores(queries * 100, keys * 100, mask=mask)
    assert torch.equal(scores, mask[:, None].float().expand(1, 2, 70))


def layouts(x: torch.Tensor):
    """The same values, strange in memory: [B, M, H, d] as encoders have it, channels far apart, every second row, rows
    of odd length."""
    yield "interleaved heads", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "permuted", x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    yield "every second", x.repeat_interleave(2, dim=2)[:, :, ::2]
    yield "odd rows", torch.nn.functional.pad(x, (0, 1))[..., :-1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_for_any_strides(dtype):
    queries, keys = heads_of(2, 2, 2, 70, 80, 72, dtype)
    rows, mask = torch.randint(-1, 70, (2, 9), device=DEVICE), torch.rand(2, 80, device=DEVICE) < 0.8
    lse = lse_of(queries, keys, 0.1)

    def every_second(x):
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    for options in ({}, {"rows": rows, "mask": mask, "causal": True}, {"lse": lse, "scale": 0.1}):
        expected = attention_scores(queries, keys, **options)
        strange = {k: every_second(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        for (name, q), (_, k) in zip(layouts(queries), layouts(keys), strict=True):
            assert torch.equal(attention_scores(q, k, **strange), expected), name


def test_an_image_alone_is_the_image_in_a_batch():
    queries, keys = heads_of(3, 4, 2, 66, 70, 24, torch.bfloat16)
    mask, rows = torch.rand(3, 70, device=DEVICE) < 0.8, torch.randint(-1, 66, (3, 65), device=DEVICE)
    together = attention_scores(queries, keys, rows=rows, mask=mask, causal=True)
    for b in range(3):
        q, k = queries[b : b + 1], keys[b : b + 1]
        alone = attention_scores(q, k, rows=rows[b], mask=mask[b : b + 1], causal=True)
        assert torch.equal(alone[0], together[b])
    head = attention_scores(queries[:, 3:], keys[:, 1:], rows=rows, mask=mask, causal=True)
    assert torch.equal(head[:, 0], together[:, 3])


def test_all_rows_chosen_are_all_rows():
    queries, keys = heads_of(1, 2, 1, 70, 66, 8)
    rows = torch.arange(70, device=DEVICE)
    for causal in (False, True):
        expected = attention_scores(queries, keys, causal=causal)
        assert torch.equal(attention_scores(queries, keys, rows=rows, causal=causal), expected)


def test_a_row_counts_as_often_as_it_occurs():
    queries, keys = heads_of(1, 1, 1, 4, 9, 8)
    once = [attention_scores(queries, keys, rows=torch.tensor([row], device=DEVICE)) for row in range(4)]
    scores = attention_scores(queries, keys, rows=torch.tensor([2, -1, 0, 2, -1], device=DEVICE))
    torch.testing.assert_close(scores, (2 * once[2] + once[0]) / 3)


def test_no_rows_no_scores():
    queries, keys = heads_of(2, 2, 1, 3, 70, 8)
    rows = torch.tensor([[-1, -1], [-1, 1]], device=DEVICE)
    scores = attention_scores(queries, keys, rows=rows)
    assert scores[0].eq(0).all() and scores[1].gt(0).all()


def test_a_row_that_sees_no_key_counts():
    queries, keys = heads_of(1, 1, 1, 5, 3, 8)  # causal: the first two see none
    expected = attention_scores(queries[:, :, 2:], keys, causal=True)
    torch.testing.assert_close(attention_scores(queries, keys, causal=True), expected * 3 / 5)
    nothing = attention_scores(queries, keys, mask=torch.zeros(1, 3, dtype=torch.bool, device=DEVICE))
    assert nothing.eq(0).all()


@pytest.mark.parametrize("infinite", [INF, -INF])
def test_an_infinite_lse_is_of_a_row_that_saw_no_key(infinite):
    queries, keys = heads_of(1, 2, 1, 6, 70, 8)
    lse = lse_of(queries, keys, 8**-0.5)
    lse[:, :, 4] = infinite
    expected = attention_scores(queries, keys, lse=lse, rows=torch.tensor([0, 1, 2, 3, 5], device=DEVICE))
    queries[:, :, 4] = NAN
    torch.testing.assert_close(attention_scores(queries, keys, lse=lse), expected * 5 / 6)


def test_wrong_rows_are_none(request):
    """On a GPU values are not inspected: whatever they are, nothing outside the tensors is touched."""
    if INTERPRETED:
        request.getfixturevalue("bounded")
    queries, keys = heads_of(1, 2, 1, 6, 9, 8)
    rows = torch.tensor([3, 6, -2, 2**31, -(2**31), 2**32, 2**32 + 1, -(2**63), 2**63 - 1, 0], device=DEVICE)
    right = torch.tensor([3, -1, -1, -1, -1, -1, -1, -1, -1, 0], device=DEVICE)
    for options in ({}, {"causal": True}, {"lse": torch.ones(1, 2, 6, device=DEVICE)}):
        expected = attention_scores(queries, keys, rows=right, **options)
        assert torch.equal(attention_scores(queries, keys, rows=rows, **options), expected)


def test_nan_is_where_it_may_be_seen():
    queries, keys = heads_of(1, 1, 1, 70, 70, 8)
    expected = attention_scores(queries, keys, causal=True)
    broken = queries.clone()
    broken[0, 0, 5, 3] = NAN
    scores = attention_scores(broken, keys, causal=True)
    assert scores[..., :6].isnan().all() and torch.equal(scores[..., 6:], expected[..., 6:])
    rows = torch.tensor([1, 4, 6, -1], device=DEVICE)
    assert torch.equal(attention_scores(broken, keys, rows=rows), attention_scores(queries, keys, rows=rows))

    mask = torch.ones(1, 70, dtype=torch.bool, device=DEVICE)
    mask[0, 66] = False
    expected = attention_scores(queries, keys, mask=mask)
    keys[0, 0, 66] = NAN
    assert torch.equal(attention_scores(queries, keys, mask=mask), expected)
    scores = attention_scores(queries, keys, causal=True)  # the rows from 66 on see it, and every key before
    assert scores[..., :67].isnan().all()
    assert attention_scores(queries, keys, rows=rows, causal=True).isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_infinite_logits(causal):
    """As softmax has them: NaN where the largest is infinite, nothing for one of -infinity."""
    queries, keys = torch.ones(1, 1, 3, 1, device=DEVICE), torch.zeros(1, 1, 70, 1, device=DEVICE)
    keys[0, 0, 68] = -INF
    scores = attention_scores(queries, keys, causal=causal)
    assert scores[..., 68].eq(0).all() and scores.isfinite().all()
    keys[0, 0, 68] = INF
    assert attention_scores(queries, keys).isnan().all()
    assert attention_scores(queries, keys[:, :, :1] - INF).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["B=0", "M=0", "N=0"])
def test_empty(shape):
    b, m, n = shape
    queries, keys = heads_of(b, 2, 1, m, n, 5)
    for options in ({}, {"rows": torch.zeros(0, dtype=torch.int64, device=DEVICE)}):
        scores = attention_scores(queries, keys, **options)
        assert scores.shape == (b, 2, n) and scores.eq(0).all()


@pytest.mark.parametrize("name", ["queries", "keys"])
def test_float64_is_refused_with_the_remedy(name):
    tensors = dict(zip(("queries", "keys"), heads_of(1, 1, 1, 2, 3, 4), strict=True))
    tensors[name] = tensors[name].double()
    with pytest.raises(ValueError, match=rf"{name}: .*float64.*Remedy"):
        attention_scores(**tensors)
    packed = {key: value[0].transpose(0, 1) for key, value in tensors.items()}
    with pytest.raises(ValueError, match=rf"{name}: .*float64.*Remedy"):
        attention_scores_varlen(**packed, cu_seqlens=torch.tensor([0, 2]).int(), max_seqlen=2)


@pytest.mark.parametrize("heads", [None, "max"])
def test_the_public_functions_run_them(heads):
    """And the gradient, which is plain torch, comes through."""
    queries, keys = heads_of(2, 4, 2, 9, 70, 8)

    def expected(scores, over):
        return scores if heads is None else scores.amax(dim=over)

    options = {"heads": heads, "backend": "triton"}
    rows = torch.tensor([0, 3, -1], device=DEVICE)
    scores = condense_kernels.attention_scores(queries, keys, rows=rows, causal=True, **options)
    assert torch.equal(scores, expected(attention_scores(queries, keys, rows=rows, causal=True), 1))
    q, k, cu_seqlens = *packed_heads(9), offsets([4, 5])
    scores = condense_kernels.attention_scores_varlen(q, k, cu_seqlens, 5, **options)
    assert torch.equal(scores, expected(attention_scores_varlen(q, k, cu_seqlens, 5), 0))
    scores = condense_kernels.attention_scores(queries.requires_grad_(), keys, **options)
    (grad,) = torch.autograd.grad(scores.square().sum(), queries)
    assert grad.shape == queries.shape and grad.isfinite().all() and grad.ne(0).any()


# Packed batches


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def segment_by_segment(queries, keys, cu_seqlens, max_seqlen, lse=None, **options) -> torch.Tensor:
    """The dense kernels on what the reference takes for a segment."""
    num_tokens = len(keys)
    scores = torch.zeros(queries.shape[1], num_tokens, device=DEVICE)
    cut = cu_seqlens.clamp(0, num_tokens).tolist()
    for start, stop in itertools.pairwise(cut):
        if 0 < stop - start <= max_seqlen:
            q, k = (x[start:stop].transpose(0, 1)[None] for x in (queries, keys))
            outside = None if lse is None else lse[None, :, start:stop]
            scores[:, start:stop] = attention_scores(q, k, lse=outside, **options)[0]
    return scores


def packed_heads(tokens: int, dtype=torch.float32, d: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(x[0].transpose(0, 1).contiguous() for x in heads_of(1, 4, 2, tokens, tokens, d, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[], [0], [0, 0], [1], [64], [65, 63], [5, 0, 130, 1, 3], [1] * 9],
    ids=lambda lengths: "-".join(map(str, lengths)) or "none",
)
def test_segments_are_images(lengths, causal, dtype):
    queries, keys = packed_heads(sum(lengths), dtype)
    arguments = queries, keys, offsets(lengths), max(lengths, default=0)
    expected = segment_by_segment(*arguments, causal=causal)
    assert torch.equal(attention_scores_varlen(*arguments, causal=causal), expected)
    lse = torch.rand(4, sum(lengths), device=DEVICE) + 3
    expected = segment_by_segment(*arguments, lse=lse, scale=0.3, causal=causal)
    assert torch.equal(attention_scores_varlen(*arguments, lse=lse, scale=0.3, causal=causal), expected)
    strange = torch.nn.functional.pad(lse, (0, 1)).mT.contiguous().mT[:, :-1]
    again = attention_scores_varlen(queries, keys, *arguments[2:], lse=strange, scale=0.3, causal=causal)
    assert torch.equal(again, expected)


TOP, LOW = 2**31 - 1, -(2**31)
CUT = {  # wrong, but cut to what exists they still make sense: what comes out is known
    "beyond T": ([0, 30, 90, TOP], 80),
    "negative": ([LOW, -5, 66, 80], 80),
    "from the middle on": ([40, 50, 60, 70], 80),
    "none": ([TOP] * 4, 80),
    "more than max_seqlen": ([0, 9, 75, 80], 40),
    "no length": ([0, 9, 75, 80], 0),
}
TANGLED = {  # segments that overlap: nothing but to stay inside
    "decreasing": [0, 70, 20, 80],
    "backwards": [80, 50, 20, 0],
    "there and back": [0, 80, 0, 80],
    "extremes": [TOP, LOW, TOP, LOW],
}


@only_interpreted
@pytest.mark.parametrize("name", CUT)
def test_wrong_offsets_are_cut_to_what_exists(name, bounded):
    cu_seqlens, max_seqlen = torch.tensor(CUT[name][0]).int(), CUT[name][1]
    arguments = *packed_heads(80), cu_seqlens, max_seqlen
    assert torch.equal(attention_scores_varlen(*arguments), segment_by_segment(*arguments))


@only_interpreted
@pytest.mark.parametrize("name", TANGLED)
def test_wrong_offsets_lead_nowhere(name, bounded):
    queries, keys = packed_heads(80)
    for options in ({}, {"causal": True}, {"lse": torch.full((4, 80), 5.0)}):
        scores = attention_scores_varlen(queries, keys, torch.tensor(TANGLED[name]).int(), 80, **options)
        assert scores.shape == (4, 80)


@only_interpreted
def test_bounds_are_looked_at(bounded):
    queries, keys = packed_heads(80)
    with pytest.raises(Exception, match="outside of the tensors"):  # the operator refuses fewer keys than queries
        attention_scores_varlen(queries, keys[:70], offsets([80]), 80)


# Launches


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Tensors without values do: whatever would wait for a device raises."""
    from triton.runtime import interpreter

    names: list[str] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: names.append(self.fn.__name__))
    return names


@only_interpreted
def test_the_host_reads_nothing_and_a_given_lse_spares_a_launch(launched):
    both = ["attention_lse_kernel", "attention_columns_kernel"]
    queries, keys = (torch.empty(2, heads, 70, 8, device="meta") for heads in (4, 2))
    rows, mask = torch.empty(3, dtype=torch.int64, device="meta"), torch.empty(2, 70, dtype=torch.bool, device="meta")
    assert attention_scores(queries, keys, rows=rows, mask=mask, causal=True).shape == (2, 4, 70)
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    q, k = (x[0].transpose(0, 1) for x in (queries, keys))
    assert attention_scores_varlen(q, k, cu_seqlens, 40).shape == (4, 70)
    assert launched == 2 * both
    attention_scores(queries, keys, lse=torch.empty(2, 4, 70, device="meta"))
    attention_scores_varlen(q, k, cu_seqlens, 40, lse=torch.empty(4, 70, device="meta"))
    assert launched == 2 * both + 2 * both[1:]


@only_interpreted
def test_memory_grows_with_the_tokens(launched, monkeypatch):
    """A number for each query and head, one for each key and head, and no map."""
    allocated, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, size, **o: allocated.append(math.prod(size)) or empty(self, size, **o)
    )
    queries, keys = torch.empty(1, 4, 5000, 8, device="meta"), torch.empty(1, 4, 7000, 8, device="meta")
    attention_scores(queries, keys)
    assert launched and sum(allocated) == 4 * (5000 + 7000)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 16, 16, 577, 577, 64), (1, 16, 16, 729, 729, 72), (1, 28, 4, 40, 2304, 128), (1, 8, 8, 90, 300, 256)]
)
def test_sizes_of_real_models(shape, dtype):
    """Against all of it in fp64, on the GPU."""
    queries, keys = heads_of(*shape, dtype)
    logits = queries.double() @ keys.double().repeat_interleave(shape[1] // shape[2], dim=1).mT / math.sqrt(shape[-1])
    expected = logits.softmax(dim=-1).mean(dim=2)
    first = attention_scores(queries, keys)
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-9)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(attention_scores(queries, keys), first)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU")
def test_nothing_waits_for_the_device_and_a_graph_replays_it():
    (queries, keys), (q, k) = heads_of(2, 4, 2, 70, 131, 64, torch.bfloat16), packed_heads(80)
    rows, cu_seqlens = torch.randint(-1, 70, (2, 9), device=DEVICE), offsets([9, 66, 5])

    def run():
        return attention_scores(queries, keys, rows=rows), attention_scores_varlen(q, k, cu_seqlens, 66)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
