"""What the Python function makes of the operator: heads, rows, columns, windows, and the row that torch computes."""

import pytest
import torch

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits

B, HQ, HKV, M, N, D = 2, 4, 2, 9, 12, 5
Q, K = torch.randn(B, HQ, M, D), torch.randn(B, HKV, N, D)
MASK = torch.rand(B, N) < 0.8
LISTED = torch.tensor([[2, 0, -1, 8], [-1, -1, 5, 5]])


def whole_map(mask=None, causal=False) -> torch.Tensor:
    """[B, Hq, M, N] fp64."""
    s = Q.double() @ K.double().repeat_interleave(HQ // HKV, dim=1).mT * D**-0.5
    seen = torch.ones_like(s, dtype=torch.bool)
    seen = seen.tril(N - M) if causal else seen
    seen = seen if mask is None else seen & mask[:, None, None]
    return s.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def call(backend="auto", **options) -> torch.Tensor:
    return ck.attention_scores(Q, K, backend=backend, **options)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=3e-6, atol=1e-8)


def test_heads(backend):
    each = whole_map().mean(dim=2)
    close(call(backend), each.mean(dim=1))
    close(call(backend, heads="sum"), each.sum(dim=1))
    close(call(backend, heads="max"), each.amax(dim=1))
    close(call(backend, heads=None), each)
    weights = torch.tensor([2.0, 0.0, -1.0, 0.25])
    close(call(backend, heads=weights), torch.einsum("bhn,h->bn", each, weights.double()))
    close(call(backend, heads=weights.bfloat16()), torch.einsum("bhn,h->bn", each, weights.double()))


@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"causal": True}, {"mask": MASK, "causal": True}], ids=str)
def test_rows(options, backend):
    p = whole_map(**options)
    close(call(backend, rows=[7, 1, 7], **options), p[:, :, [7, 1, 7]].mean(dim=(1, 2)))
    close(call(backend, rows=torch.tensor([7, -1, 1]), **options), p[:, :, [7, 1]].mean(dim=(1, 2)))
    expected = torch.stack([p[0][:, [2, 0, 8]].mean(dim=(0, 1)), p[1][:, 5].mean(dim=0)])
    close(call(backend, rows=LISTED, **options), expected)


@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"causal": True}, {"mask": MASK, "causal": True}], ids=str)
def test_one_row_is_the_row_of_the_map(options, backend):
    p = whole_map(**options)
    for rows in (8, [8], torch.tensor(8), torch.tensor([8]), torch.tensor([[8], [8]])):
        close(call(backend, rows=rows, heads=None, **options), p[:, :, 8])
    several = call(backend, rows=torch.tensor([[3], [-1]]), heads=None, **options)
    close(several[0], p[0, :, 3])
    assert several[1].eq(0).all()
    last = ck.attention_scores(Q[:, :, -1:], K, backend=backend, **options)  # of a decoder that has a cache
    close(last, p[:, :, 8].mean(dim=1))


def test_one_row_with_a_normaliser(backend):
    lse = torch.randn(B, HQ, M) + 3
    lse[0, :2, 4] = torch.tensor([torch.inf, -torch.inf])
    both = call(backend, rows=[4, 4], lse=lse, mask=MASK, heads=None)  # by the kernel
    for rows in (4, torch.tensor([4])):
        close(call(backend, rows=rows, lse=lse, mask=MASK, heads=None), both)


def test_one_row_that_sees_nothing():
    blind = torch.zeros(B, N, dtype=torch.bool)
    assert call(rows=3, mask=blind).eq(0).all()
    assert ck.attention_scores(torch.randn(1, 1, 20, D), K[:1, :1], rows=2, causal=True).eq(0).all()
    queries = Q.clone().requires_grad_()
    ck.attention_scores(queries, K, rows=3, mask=blind).sum().backward()
    assert queries.grad.eq(0).all()


def test_one_row_is_no_kernel(backend):
    """Two lines of torch do."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(backend, rows=3)
        call(backend, over_rows="mean_query")
    assert not any("condense" in event.name for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_one_row(dtype):
    scores = ck.attention_scores(Q.to(dtype), K.to(dtype), rows=3)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = ck.attention_scores(Q.to(dtype).double(), K.to(dtype).double(), rows=3)
    torch.testing.assert_close(scores, exact.to(scores.dtype), rtol=1e-6, atol=0)


def test_over_rows(backend):
    p = whole_map(mask=MASK)
    close(call(backend, over_rows="sum", mask=MASK), p.sum(dim=2).mean(dim=1))
    close(call(backend, over_rows="sum", rows=[1, 2], mask=MASK), p[:, :, 1:3].sum(dim=2).mean(dim=1))
    close(call(backend, over_rows="sum", rows=2, mask=MASK), p[:, :, 2].mean(dim=1))
    expected = torch.stack([p[0][:, [2, 0, 8]].sum(dim=1).mean(dim=0), 2 * p[1][:, 5].mean(dim=0)])
    close(call(backend, over_rows="sum", rows=LISTED, mask=MASK), expected)


@pytest.mark.parametrize("rows", [None, [1, 7, 7], torch.tensor([1, -1, 7, 7]), LISTED, 4], ids=str)
def test_mean_query(rows, backend):
    chosen = [range(M)] * B if rows is None else [rows] * B
    if isinstance(rows, torch.Tensor):
        chosen = [[r for r in listed.tolist() if r >= 0] for listed in rows.expand(B, -1)]
    elif rows == 4:
        chosen = [[4]] * B
    expected = []
    for b in range(B):
        query = Q[b, :, list(chosen[b])].double().mean(dim=1, keepdim=True)  # [Hq, 1, d]
        keys = K[b].double().repeat_interleave(HQ // HKV, dim=0)
        s = (query @ keys.mT * D**-0.5)[:, 0].masked_fill(~MASK[b], -torch.inf)
        expected.append(s.softmax(dim=-1).mean(dim=0))
    close(call(backend, over_rows="mean_query", rows=rows, mask=MASK), torch.stack(expected))


def test_mean_query_of_no_rows():
    assert call(over_rows="mean_query", rows=torch.full((B, 2), -1)).eq(0).all()
    assert ck.attention_scores(Q[:, :, :0], K, over_rows="mean_query").eq(0).all()


def test_softmax_over_all_and_over_patches(backend):
    """Without [CLS] in the softmax the rest is larger: the same up to the share that it had."""
    p = whole_map()
    close(call(backend, columns=(1, None), heads=None), p.mean(dim=2)[..., 1:])
    over_patches = ck.attention_scores(Q, K[:, :, 1:], backend=backend, heads=None)
    close(over_patches, (p[..., 1:] / p[..., 1:].sum(dim=-1, keepdim=True)).mean(dim=2))
    close(call(backend, columns=(3, 7), rows=2), p[:, :, 2, 3:7].mean(dim=1))
    assert call(backend, columns=(3, 3)).shape == (B, 0)


def test_windows(backend):
    plain = call(backend)
    grid = plain.view(B, 2, 6)
    expected = torch.stack([grid[:, r : r + 1, c : c + 3].mean(dim=(1, 2)) for r in (0, 1) for c in (0, 3)], dim=1)
    torch.testing.assert_close(call(backend, grid=(2, 6), pool=(1, 3)), expected)
    expected = torch.stack([grid[:, :, c : c + 2].mean(dim=(1, 2)) for c in (0, 2, 4)], dim=1)
    torch.testing.assert_close(call(backend, grid=(2, 6), pool=2), expected)
    frames = plain.view(B, 3, 2, 2).mean(dim=(2, 3))
    torch.testing.assert_close(call(backend, grid=(3, 2, 2), pool=(2, 2)), frames)
    torch.testing.assert_close(
        call(backend, pool=4, heads=None), call(backend, heads=None).view(B, HQ, 3, 4).mean(dim=3)
    )
    assert_same_bits(call(backend, pool=1), plain)


def test_they_feed_the_next_step():
    features = torch.randn(B, N, 8)
    out = ck.select_and_merge(features, call(causal=True), 3, 1, grid=(3, 4))
    assert out.mass.sum(dim=1).allclose(torch.ones(B))  # every row of probabilities has gone somewhere


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 3}, {"rows": [1, 2]}, {"over_rows": "mean_query", "heads": "max"}, {"pool": 2, "columns": (2, None)}],
    ids=str,
)
def test_compiled(options, dynamic, cpp):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: ck.attention_scores(q, k, **options), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for queries, keys in ((Q, K), (Q.repeat(1, 1, 2, 1), K.repeat(1, 1, 3, 1))):
        inputs, others = (tuple(x.clone().requires_grad_() for x in (queries, keys)) for _ in range(2))
        result, expected = compiled(*inputs), ck.attention_scores(*others, **options)
        assert_same_bits(result.detach(), expected.detach())
        slopes = torch.randn_like(expected)
        grads = torch.autograd.grad(result, inputs, slopes), torch.autograd.grad(expected, others, slopes)
        assert_same_bits(*grads)


REFUSED = [
    ({"rows": 9}, ValueError, "rows: expected 0 <= row < M = 9 queries, got 9"),
    ({"rows": -1}, ValueError, r"rows: expected 0 <= row < M = 9 queries, got -1. Remedy: M - 1 is the last row"),
    ({"rows": [1, 9]}, ValueError, "rows: expected 0 <= row < M = 9 queries, got 9"),
    ({"rows": "last"}, TypeError, "rows: expected an int, ints, or a tensor"),
    ({"rows": [1.5, 2]}, TypeError, "rows: expected an int, ints, or a tensor"),
    ({"rows": torch.tensor([1.0, 2.0])}, TypeError, "rows: expected dtype int64, got float32"),
    ({"rows": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"rows: expected shape \[B R\] = \[2, R\]"),
    ({"mask": MASK.float()}, TypeError, "mask: expected dtype bool"),
    ({"mask": MASK[:, :5]}, ValueError, r"mask: expected shape \[B N\] = \[2, 12\]"),
    ({"lse": torch.zeros(B, HQ, N)}, ValueError, r"lse: expected shape \[B Hq M\] = \[2, 4, 9\]"),
    ({"lse": torch.zeros(B, HQ, M).half()}, TypeError, "lse: expected dtype float32, float64"),
    ({"scale": -1.0}, ValueError, "scale: expected a finite number >= 0"),
    ({"causal": 1}, TypeError, "causal: expected True or False, got int"),
    ({"columns": 3}, TypeError, r"columns: expected \(start, stop\) or \(start, None\)"),
    ({"columns": (1, 13)}, ValueError, "columns: expected 0 <= start <= stop <= N = 12 keys"),
    ({"columns": (-3, None)}, ValueError, "columns: expected 0 <= start <= stop <= N = 12 keys"),
    ({"heads": "median"}, ValueError, "heads: expected 'mean', 'sum', 'max', weights"),
    ({"heads": torch.ones(2)}, ValueError, r"heads: expected shape \[Hq\] = \[4\]"),
    ({"heads": torch.ones(4, dtype=torch.int64)}, TypeError, "heads: expected dtype float32"),
    ({"over_rows": "max"}, ValueError, "over_rows: expected one of 'mean', 'sum', 'mean_query'"),
    ({"over_rows": "mean_query", "causal": True}, ValueError, "causal: expected False with over_rows='mean_query'"),
    ({"over_rows": "mean_query", "lse": torch.zeros(B, HQ, M)}, ValueError, "lse: expected None with over_rows="),
    ({"grid": (3, 4)}, ValueError, "grid: expected None without pool"),
    ({"pool": (2, 2)}, ValueError, r"grid: expected \(H, W\) for windows \(2, 2\), got None"),
    ({"pool": 5}, ValueError, "pool: expected a number that divides the 12 tokens, got 5"),
    ({"pool": 0}, ValueError, "pool: expected an int >= 1"),
    ({"pool": (2, 2, 2), "grid": (3, 4)}, ValueError, "pool: expected an int >= 1"),
    ({"pool": 2, "grid": (4, 4)}, ValueError, "grid: expected .* with product N = 12"),
    ({"pool": 2, "grid": (3, 4)}, ValueError, r"grid: expected H and W that the windows \(2, 2\) divide, got \(3, 4\)"),
    ({"backend": "fast"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("options", "error", "match"), REFUSED, ids=[case[2][:50] for case in REFUSED])
def test_refused(options, error, match):
    with pytest.raises(error, match=match):
        ck.attention_scores(Q, K, **options)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="keys: expected a number of heads that divides the Hq = 4 of queries, got 3"):
        ck.attention_scores(Q, torch.randn(B, 3, N, D))
    with pytest.raises(
        RuntimeError, match="keys: expected a number of heads that divides the Hq = 4 of queries, got 3"
    ):
        torch.ops.condense.attention_scores(Q, torch.randn(B, 3, N, D))
    with pytest.raises(TypeError, match="keys: expected dtype float32, got float16"):
        ck.attention_scores(Q, K.half())


@pytest.mark.parametrize("rows", [3, [3, 4]], ids=["torch", "kernel"])
def test_the_debug_switch_looks(rows):
    keys = K.clone()
    keys[1, 0, 2, 1] = torch.nan
    with ck.debug():
        with pytest.raises(
            ValueError, match="^keys: expected finite numbers, got nan at image 1, head 0, token 2, channel 1"
        ):
            ck.attention_scores(Q, keys, rows=rows)
        ck.attention_scores(Q, keys, rows=rows, mask=torch.arange(N).expand(B, N) != 2)
        with pytest.raises(ValueError, match="^lse: expected no NaN, got nan at image 0, head 0, row 0"):
            ck.attention_scores(Q, K, rows=rows, lse=torch.full((B, HQ, M), torch.nan))
    with ck.debug(), pytest.raises(ValueError, match=r"^rows: expected values in \[-1, 9\), got 9 at entry 1"):
        ck.attention_scores(Q, K, rows=torch.tensor([3, 9]))


def test_flops_by_hand():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ck.attention_scores(Q, K, rows=LISTED)
        ck.attention_scores_varlen(Q[0].transpose(0, 1), Q[0].transpose(0, 1), torch.tensor([0, 4, 9]).int(), 5)
    dense, packed = 2 * 4 * 4 * 12 * (2 * 5 + 7), 4 * 2 * 5 * 5 * (2 * 5 + 7)
    assert counter.get_total_flops() == dense + packed
