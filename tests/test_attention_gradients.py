"""Derivatives of the attention scores, dense and packed: backward, forward mode, torch.func, vmap, and strips.

The whole map in torch is what torch differentiates by itself.
"""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

import condense_kernels as ck
from condense_kernels.ops.attention_scores import gradients
from condense_kernels.ops.attention_scores_varlen import gradients as packed_gradients
from condense_kernels.testing import assert_same_bits

B, HQ, HKV, M, N, D = 2, 4, 2, 5, 7, 3
Q = torch.randn(B, HQ, M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
K = torch.randn(B, HKV, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[True] * 7, [True, False, True, True, False, True, True]])
LISTED = torch.tensor([[4, 0, -1, 4], [-1, 1, 1, 1]])
OPTIONS = {
    "nothing": {},
    "rows": {"rows": LISTED},
    "the same rows": {"rows": LISTED[0], "scale": 0.7},
    "mask": {"mask": MASK},
    "causal": {"causal": True},
    "all": {"rows": LISTED, "mask": MASK, "scale": 0.7, "causal": True},
}
CU = torch.tensor([0, 4, 4, 5, 12], dtype=torch.int32)
QT, KT = (torch.randn(12, h, D, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (HQ, HKV))
BATCHED = {"check_batched_grad": True, "check_batched_forward_grad": True}


def plain(queries, keys, rows=None, mask=None, scale=None, causal=False):
    """The map, which torch differentiates."""
    k = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    s = queries @ k.mT * (D**-0.5 if scale is None else scale)
    seen = torch.ones_like(s, dtype=torch.bool)
    if causal:
        seen = seen.tril(s.shape[3] - s.shape[2])
    if mask is not None:
        seen = seen & mask[:, None, None]
    p = s.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    if rows is None:
        return p.mean(dim=2)
    one_hot = (rows[..., None] == torch.arange(s.shape[2])).double().expand(len(s), -1, -1).sum(dim=1)  # [B, M]
    return torch.einsum("bhmn,bm->bhn", p, one_hot) / one_hot.sum(dim=1)[:, None, None]


def raw(queries, keys, **options):
    return torch.ops.condense.attention_scores(queries, keys, **options)


def public(queries, keys, **options):
    return ck.attention_scores(queries, keys, heads=None, **options)


def packed(queries, keys, **options):
    return ck.attention_scores_varlen(queries, keys, CU, 7, heads=None, **options)


def packed_raw(queries, keys, **options):
    return torch.ops.condense.attention_scores_varlen(queries, keys, CU, 7, **options)


def leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("what", OPTIONS)
def test_is_what_autograd_makes_of_the_map(what):
    slopes = torch.randn(B, HQ, N, dtype=torch.float64)
    inputs, others = leaves(Q, K), leaves(Q, K)
    expected = torch.autograd.grad(plain(*inputs, **OPTIONS[what]), inputs, slopes)
    found = torch.autograd.grad(public(*others, **OPTIONS[what]), others, slopes)
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("what", ["nothing", "all"])
@pytest.mark.parametrize("call", [raw, public])
def test_gradcheck(call, what):
    """All orders of derivatives that are in use, batched ones included."""
    run = lambda q, k: call(q, k, **OPTIONS[what])  # noqa: E731
    assert gradcheck(run, leaves(Q, K), check_forward_ad=True, **BATCHED)
    assert gradgradcheck(run, leaves(Q, K), check_fwd_over_rev=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("call", [packed, packed_raw])
def test_gradcheck_packed(call, causal):
    run = lambda q, k: call(q, k, causal=causal)  # noqa: E731
    assert gradcheck(run, leaves(QT, KT), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, leaves(QT, KT))


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 2},
        {"rows": torch.tensor([[3], [-1]]), "mask": MASK, "causal": True},
        {"over_rows": "mean_query", "rows": LISTED},
        {"heads": "max"},
        {"heads": torch.tensor([0.5, 0.0, -1.0, 2.0])},
        {"over_rows": "sum", "rows": LISTED, "columns": (1, None), "pool": (1, 3), "grid": (2, 3)},
    ],
    ids=str,
)
def test_gradcheck_of_the_forms(options):
    assert gradcheck(lambda q, k: ck.attention_scores(q, k, **options), leaves(Q, K))


def test_transforms_of_torch_func():
    f = lambda q, k: public(q, k, rows=LISTED, causal=True).square().sum()  # noqa: E731
    g = lambda q, k: plain(q, k, rows=LISTED, causal=True).square().sum()  # noqa: E731
    torch.testing.assert_close(grad(f, (0, 1))(Q, K), grad(g, (0, 1))(Q, K))
    torch.testing.assert_close(
        jvp(f, (Q, K), (K[:, :1, :5].expand_as(Q), K)), jvp(g, (Q, K), (K[:, :1, :5].expand_as(Q), K))
    )
    small = Q[:1, :2, :2], K[:1, :1, :3]
    for transform in (jacrev, hessian):
        f, g = lambda q, k: public(q, k).square().sum(), lambda q, k: plain(q, k).square().sum()
        torch.testing.assert_close(transform(f, (0, 1))(*small), transform(g, (0, 1))(*small))


def test_vmap_of_gradients():
    """Each call with rows of its own, and all calls with the same."""
    queries, keys = torch.stack([Q, 2 * Q]), torch.stack([K, -K])
    rows = torch.stack([LISTED, LISTED.flip(1)])
    f = lambda q, k, r: public(q, k, rows=r).square().sum()  # noqa: E731
    for r, axis in ((rows, 0), (LISTED[0], None)):
        mapped = vmap(grad(f, (0, 1)), in_dims=(0, 0, axis))(queries, keys, r)
        alone = [grad(f, (0, 1))(queries[i], keys[i], r if axis is None else r[i]) for i in range(2)]
        for result, expected in zip(mapped, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(result, torch.stack(expected))


def test_forward_mode():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, torch.cos(Q))
        tangent = forward_ad.unpack_dual(public(dual, K, mask=MASK)).tangent
    _, expected = jvp(lambda q: plain(q, K, mask=MASK), (Q,), (torch.cos(Q),))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("elements", [1, 7 * HQ * 2, 1 << 21])
def test_strips_do_not_matter(elements, monkeypatch):
    """A row at a time, two, and all."""
    slopes = torch.randn(B, HQ, N, dtype=torch.float64)
    expected = gradients.attention_scores_backward(slopes, Q, K, **OPTIONS["all"])
    monkeypatch.setattr(gradients, "STRIP", elements)
    monkeypatch.setattr(packed_gradients, "STRIP", elements)
    found = gradients.attention_scores_backward(slopes, Q, K, **OPTIONS["all"])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    slopes = torch.randn(HQ, 12, dtype=torch.float64)
    for causal in (False, True):
        of_segments = [
            gradients.attention_scores_backward(
                slopes[None, :, a:b], QT[a:b].transpose(0, 1)[None], KT[a:b].transpose(0, 1)[None], causal=causal
            )
            for a, b in ((0, 4), (4, 5), (5, 12))
        ]
        alone = (torch.cat([part[0].transpose(0, 1) for part in parts]) for parts in zip(*of_segments, strict=True))
        found = packed_gradients.attention_scores_varlen_backward(slopes, QT, KT, CU, 7, causal=causal)
        torch.testing.assert_close(found, tuple(alone), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_rounded_once(dtype):
    slopes = torch.randn(B, HQ, N)
    queries, keys = Q.to(dtype), K.to(dtype)
    exact = gradients.attention_scores_backward(slopes, queries, keys)
    inputs = leaves(queries, keys)
    for found, expected in zip(torch.autograd.grad(public(*inputs), inputs, slopes), exact, strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        error = (found.double() - expected).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() * (1 + 1e-9) + 1e-38).all()


def test_batch_does_not_matter():
    queries, keys, slopes = torch.randn(3, HQ, 50, 16), torch.randn(3, HKV, 60, 16), torch.randn(3, HQ, 60)
    whole = torch.ops.condense.attention_scores_backward(slopes, queries, keys)
    one = torch.ops.condense.attention_scores_backward(slopes[1:2], queries[1:2], keys[1:2])
    assert_same_bits(tuple(gradient[1:2] for gradient in whole), one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(torch.ops.condense.attention_scores_backward(slopes, queries, keys), whole)


def test_nan_stays_with_those_who_see_it():
    queries, keys = Q.clone(), K.clone()
    keys[0, :, 6] = torch.nan  # row 4 of five sees it, causally
    slopes = torch.ones(B, HQ, N, dtype=torch.float64)
    rows = torch.tensor([0, 1, 3, -1])
    for gradient in gradients.attention_scores_backward(slopes, queries, keys, rows=rows, causal=True):
        assert gradient.isfinite().all()
    mask = torch.arange(N).expand(B, N) != 6
    for gradient in gradients.attention_scores_backward(slopes, queries, keys, mask=mask):
        assert gradient.isfinite().all()
    of_queries, of_keys = gradients.attention_scores_backward(slopes, queries, keys, causal=True)
    assert of_queries[0, :, :4].isfinite().all() and of_queries[0, :, 4].isnan().all()
    assert of_queries[1].isfinite().all() and of_keys[1].isfinite().all()
    broken = QT.clone()
    broken[4] = torch.nan  # a segment of one token
    of_queries, of_keys = packed_gradients.attention_scores_varlen_backward(
        slopes[0, :, :1].expand(-1, 12), broken, KT, CU, 7
    )
    others = torch.arange(12) != 4
    assert of_queries[others].isfinite().all() and of_keys[others].isfinite().all() and of_keys[4].isnan().all()


def test_rows_that_see_nothing_and_no_rows():
    slopes = torch.ones(B, HQ, N, dtype=torch.float64)
    blind = gradients.attention_scores_backward(slopes, Q, K, mask=torch.zeros(B, N, dtype=torch.bool))
    none = gradients.attention_scores_backward(slopes, Q, K, rows=torch.full((3,), -1))
    empty = gradients.attention_scores_backward(slopes, Q[:, :, :0], K)
    assert all(gradient.eq(0).all() for gradient in (*blind, *none, *empty))


def test_wrong_offsets_have_no_gradient_where_they_have_no_scores():
    cu = torch.tensor([-3, 2, 9, 99], dtype=torch.int32)  # of which the second, with 7, is longer than max_seqlen
    queries, keys = leaves(QT, KT)
    scores = ck.attention_scores_varlen(queries, keys, cu, 5, heads=None)
    of_queries, of_keys = torch.autograd.grad(scores, (queries, keys), torch.randn_like(scores))
    assert of_queries[2:9].eq(0).all() and of_keys[2:9].eq(0).all() and scores[:, 2:9].eq(0).all()
    assert of_keys[:2].ne(0).any() and of_keys[9:].ne(0).any()


def test_decreasing_offsets_have_the_gradient_of_what_is_made_of_them(cpp):
    slopes = torch.randn(HQ, 12, dtype=torch.float64)
    found = []
    for offsets in ([0, 9, 4, 12], [0, 9, 9, 12]):
        inputs = leaves(QT, KT)
        scores = ck.attention_scores_varlen(*inputs, torch.tensor(offsets, dtype=torch.int32), 12, heads=None)
        found.append(torch.autograd.grad(scores, inputs, slopes))
    assert_same_bits(*found)


@pytest.mark.parametrize("which", [0, 1], ids=["queries", "keys"])
def test_a_normaliser_from_outside_has_no_gradient(which):
    lse, lse_packed = torch.zeros(B, HQ, M), torch.zeros(HQ, 12)
    dense, tokens = [Q, K], [QT, KT]
    dense[which], tokens[which] = leaves(dense[which], tokens[which])
    match = "^lse: expected None where queries or keys require grad"
    for call, inputs, given in ((public, dense, lse), (packed, tokens, lse_packed)):
        with pytest.raises(ValueError, match=match):
            call(*inputs, lse=given)
        with torch.no_grad():
            call(*inputs, lse=given)
    with pytest.raises(ValueError, match=match):
        public(*dense, rows=1, lse=lse)
    for call, inputs, given in ((raw, dense, lse), (packed_raw, tokens, lse_packed)):
        with pytest.raises(RuntimeError, match=match):
            call(*inputs, lse=given)
    with pytest.raises(ValueError, match=match):
        jvp(lambda q: public(q, K, lse=lse), (Q,), (Q,))
