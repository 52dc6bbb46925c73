"""Packed attention scores: the bits of the dense operator on each segment, and wrong offsets, which do no harm."""

import pytest
import torch

import condense_kernels as ck
from condense_kernels._dispatch import backends
from condense_kernels.testing import assert_same_bits, exact_attention

LENGTHS = [50, 1, 0, 97, 3]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
T = int(CU[-1])


def tokens(heads=4, key_heads=2, channels=12, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return (2 * torch.randn(T, heads, channels)).to(dtype), torch.randn(T, key_heads, channels).to(dtype)


def run(backend: str, queries, keys, cu_seqlens=CU, max_seqlen=97, **options) -> torch.Tensor:
    args = queries, keys, cu_seqlens, max_seqlen
    return backends.run("attention_scores_varlen", backend, args, options)


def alone(backend: str, queries, keys, s: int, lse=None, **options) -> torch.Tensor:
    """[Hq, n] of segment s by the dense operator."""
    at = slice(CU[s], CU[s + 1])
    q, k = (x[at].transpose(0, 1)[None] for x in (queries, keys))
    outside = None if lse is None else lse[None, :, at]
    return backends.run("attention_scores", backend, (q, k), {"lse": outside, **options})[0]


@pytest.mark.parametrize("what", ["nothing", "causal", "scale", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_the_dense_operator(dtype, what, backend):
    queries, keys = tokens(dtype=dtype)
    options = {
        "nothing": {},
        "causal": {"causal": True},
        "scale": {"scale": 0.2},
        "lse": {"lse": torch.randn(4, T) + 4},
    }
    scores = run(backend, queries, keys, **options[what])
    assert scores.shape == (4, T) and scores.dtype == torch.float32 and scores.is_contiguous()
    for s in range(len(LENGTHS)):
        assert_same_bits(
            scores[:, CU[s] : CU[s + 1]], alone(backend, queries, keys, s, **options[what]), f"segment {s}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_against_the_whole_map(dtype, fast):
    if fast == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is for CPU tensors, as the contract says")
    queries, keys = tokens(dtype=dtype)
    scores = run(fast, queries, keys)
    for s in (0, 1, 3, 4):
        at = slice(CU[s], CU[s + 1])
        exact = exact_attention(*(x[at].transpose(0, 1)[None] for x in (queries, keys)))
        assert ((scores[:, at].double() - exact.scores[0]).abs() <= exact.bound[0]).all()


@pytest.mark.parametrize(
    ("cu_seqlens", "whole"),
    [
        pytest.param([-5, 50, 51, 151], [(0, 50), (50, 51), (51, 151)], id="before the first token"),
        pytest.param([0, 50, 51, 10**9], [(0, 50), (50, 51), (51, 151)], id="behind the last token"),
        pytest.param([7, 50], [(7, 50)], id="not from 0"),
        pytest.param([0], [], id="no segment"),
        pytest.param([0, 50, 150], [(0, 50), (50, 150)], id="tokens that are left over"),
    ],
)
def test_wrong_offsets_are_bounded(cu_seqlens, whole, backend):
    queries, keys = tokens()
    scores = run(backend, queries, keys, torch.tensor(cu_seqlens, dtype=torch.int32), 100)
    expected = torch.zeros(4, T)
    for start, stop in whole:
        q, k = (x[start:stop].transpose(0, 1)[None] for x in (queries, keys))
        expected[:, start:stop] = backends.run("attention_scores", backend, (q, k), {})[0]
    assert_same_bits(scores, expected)


def test_a_segment_longer_than_max_seqlen_counts_as_empty(backend):
    queries, keys = tokens()
    scores, expected = run(backend, queries, keys, max_seqlen=96), run(backend, queries, keys)
    expected[:, CU[3] : CU[4]] = 0
    assert_same_bits(scores, expected)
    assert run(backend, queries, keys, max_seqlen=0).eq(0).all()


@pytest.mark.parametrize("offsets", [[0, 90, 40, 151], [151, 0], [60, 30, 0, -1], [2**31 - 1, -(2**31), 2**31 - 1, 3]])
def test_decreasing_offsets_do_no_harm(offsets, backend):
    queries, keys = tokens()
    scores = run(backend, queries, keys, torch.tensor(offsets, dtype=torch.int32), 151)
    assert scores.isfinite().all() and (scores >= 0).all() and scores.sum() <= 4 * len(offsets) + 1e-3


def test_no_token_belongs_to_two_segments(cpp):
    """Else two threads would write its score."""
    queries, keys = tokens()
    decreasing, apart = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 90, 40, 151], [0, 90, 90, 151]))
    assert_same_bits(run(cpp, queries, keys, decreasing, 151), run(cpp, queries, keys, apart, 151))


def test_nan_stays_in_its_segment(backend):
    queries, keys = tokens()
    expected = run(backend, queries, keys)
    keys[55, 1, 0] = torch.nan
    scores = run(backend, queries, keys)
    broken = torch.zeros(4, T, dtype=torch.bool)
    broken[2:, CU[3] : CU[4]] = True
    assert torch.equal(scores.isnan(), broken)
    assert_same_bits(scores.masked_fill(broken, 0), expected.masked_fill(broken, 0))


def test_layout_does_not_matter(fast):
    """Queries and keys as they lie in a fused projection [T, 3, H, d]."""
    qkv = torch.randn(T, 3, 4, 12)
    queries, keys, _ = qkv.unbind(dim=1)
    lse = torch.randn(T, 4).T
    expected = run(fast, queries.contiguous(), keys.contiguous(), lse=lse.contiguous())
    assert_same_bits(run(fast, queries, keys, lse=lse), expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_threads_do_not_matter(heads, cpp):
    queries, keys = torch.randn(1500, heads, 40), torch.randn(1500, heads, 40)
    cu = torch.tensor([0, 100, 1300, 1500], dtype=torch.int32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(cpp, queries, keys, cu, 1200)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(run(cpp, queries, keys, cu, 1200), expected, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


def test_no_token_and_no_head_too_many(backend):
    queries, keys = tokens()
    assert run(backend, queries[:0], keys[:0], torch.tensor([0, 0], dtype=torch.int32), 0).shape == (4, 0)
    with pytest.raises(ValueError, match="^keys: expected a number of heads that divides the Hq = 4"):
        ck.attention_scores_varlen(queries, keys.repeat(1, 2, 1)[:, :3], CU, 97, backend=backend)


def test_forms_around_it(backend):
    lengths = torch.tensor([8, 4, 12])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    queries, keys = torch.randn(24, 4, 6), torch.randn(24, 4, 6)
    call = lambda **options: ck.attention_scores_varlen(queries, keys, cu, 12, backend=backend, **options)  # noqa: E731
    each = call(heads=None)
    assert_same_bits(call(), each.mean(dim=0))
    assert_same_bits(call(heads="sum"), each.sum(dim=0))
    assert_same_bits(call(heads="max"), each.amax(dim=0))
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5])
    torch.testing.assert_close(call(heads=weights), weights @ each)
    assert_same_bits(call(pool=4), each.mean(dim=0).view(6, 4).mean(dim=1))
    with pytest.raises(ValueError, match="pool: expected a number that divides the 24 tokens, got 5"):
        call(pool=5)
    with ck.debug(), pytest.raises(ValueError, match=r"^cu_seqlens: .* multiple"):
        ck.attention_scores_varlen(queries, keys, torch.tensor([0, 6, 24], dtype=torch.int32), 18, pool=4)


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "match"),
    [
        ([0, 60, 50, T], 97, r"^cu_seqlens: expected running sums, got 50 at offset 2"),
        ([1, 60, T], 97, rf"^cu_seqlens: expected running sums from 0 up to T = {T}, got 1 \.\.\. {T}"),
        ([0, 60, T - 1], 97, r"^cu_seqlens: expected running sums from 0 up to"),
        ([0, 60, T], 90, r"^cu_seqlens: expected at most max_seqlen = 90, got 91 at image 1"),
    ],
)
def test_the_debug_switch_reads_the_offsets(cu_seqlens, max_seqlen, match):
    queries, keys = tokens()
    cu = torch.tensor(cu_seqlens, dtype=torch.int32)
    ck.attention_scores_varlen(queries, keys, cu, max_seqlen)
    with ck.debug(), pytest.raises(ValueError, match=match):
        ck.attention_scores_varlen(queries, keys, cu, max_seqlen)
