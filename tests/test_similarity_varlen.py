"""similarity_varlen: each segment gets the bits of the dense operator, and wrong offsets harm nothing."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from condense_kernels import greedy_select, greedy_select_varlen, similarity, similarity_varlen
from condense_kernels.testing import assert_same_bits, make_inputs

METRICS = ["cosine", "neg_l2"]
LOWEST = torch.finfo(torch.float32).min
any_metric = pytest.mark.parametrize("metric", METRICS)


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def segment_by_segment(keys, lengths, max_seqlen, *, scores=None, mask=None, metric, backend) -> tuple:
    """The dense operator, and what the page says of the rest."""
    total = keys.shape[0]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    s, g = torch.zeros(total, max_seqlen, dtype=dtype), torch.zeros(total, dtype=dtype)
    sbar, tier = torch.zeros(len(lengths), dtype=dtype), torch.full((total,), 2, dtype=torch.int8)
    nearest = torch.full((total,), torch.finfo(dtype).min, dtype=dtype)
    start = 0
    for number, n in enumerate(lengths):
        own = slice(start, start + n)
        start += n
        if 0 < n <= max_seqlen:
            alone = [None if t is None else t[None, own] for t in (keys, scores, mask)]
            of = similarity(*alone, metric=metric, nearest=True, backend=backend)
            s[own, :n], sbar[number] = of[0][0], of[1][0]
            g[own], tier[own], nearest[own] = (t[0] for t in of[2:])
    return s, sbar, g, tier, nearest


def check(keys, lengths, max_seqlen, backend, metric, **options) -> tuple:
    found = similarity_varlen(keys, offsets(lengths), max_seqlen, metric=metric, backend=backend, **options)
    expected = segment_by_segment(keys, lengths, max_seqlen, metric=metric, backend=backend, **options)
    assert_same_bits(found, expected, f"{metric} {lengths} {max_seqlen}")
    return found


@any_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype(metric, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton takes no fp64")
    keys = make_inputs("clustered", batch=1, num_tokens=36, channels=9, dtype=dtype).features[0]
    check(keys, (12, 1, 0, 20, 3), 20, backend, metric)


@any_metric
def test_segments_of_several_tiles(metric, backend):
    keys = torch.randn(150, 5)
    keys[100:103] = keys[2]
    check(keys, (3, 70, 65, 12), 77, backend, metric)  # rows that are longer than any segment


@any_metric
def test_scores_mask_and_what_is_not_finite(metric, backend):
    keys, scores, mask = torch.randn(30, 4), torch.rand(30), torch.rand(30) > 0.3
    keys[4, 1] = scores[11] = float("nan")
    keys[20, 0] = float("inf")
    mask[22:] = False
    found = check(keys, (7, 8, 7, 8), 8, backend, metric, scores=scores, mask=mask)
    assert (found[3][22:] == 2).all() and (found[0][22:] == 0).all() and (found[4][22:] == LOWEST).all()
    check(keys, (7, 8, 7, 8), 8, backend, metric, scores=scores)
    check(keys.T.contiguous().T, (7, 8, 7, 8), 8, backend, metric, mask=mask)


@any_metric
@pytest.mark.parametrize(
    ("lengths", "tokens", "max_seqlen"),
    [((), 0, 0), ((), 4, 3), ((0, 0), 0, 5), ((4,), 4, 0), ((3, 5), 8, 3), ((5,), 5, 4), ((2, 2), 9, 4), ((1,), 1, 40)],
)
def test_few_segments_and_few_tokens(metric, lengths, tokens, max_seqlen, backend):
    """Among them segments that are too long, and tokens behind the last one."""
    check(torch.randn(tokens, 3), lengths, max_seqlen, backend, metric)


WRONG = {
    "decreasing": (0, 9, 4, 12),
    "below 0": (-5, 3, -2, 12),
    "beyond": (0, 6, 2_000_000_000, 12),
    "all beyond": (100, 200, 300, 400),
    "lowest and highest": (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1),
    "not from 0": (5, 8, 12, 12),
    "backwards": (12, 8, 4, 0),
}


@any_metric
@pytest.mark.parametrize("cu", WRONG.values(), ids=WRONG)
def test_wrong_offsets_are_harmless(metric, cu, backend, bounded):
    """The interpreter looks at every address here; what is not where a segment ends is finite in any case."""
    keys = torch.randn(12, 3)
    found = similarity_varlen(keys, torch.tensor(cu).int(), 12, metric=metric, backend=backend)
    assert [tuple(t.shape) for t in found] == [(12, 12), (3,), (12,), (12,), (12,)]
    assert set(found[3].tolist()) <= {0, 2}


@any_metric
def test_offsets_that_begin_late(metric, backend):
    """Tokens of no segment have zeros; those of the others are as ever."""
    keys = torch.randn(12, 3)
    s, sbar, g, tier, nearest = similarity_varlen(
        keys, torch.tensor([5, 8, 11]).int(), 6, metric=metric, backend=backend
    )
    assert tier.tolist() == [2] * 5 + [0] * 6 + [2]
    nobody = [0, 1, 2, 3, 4, 11]
    assert (s[nobody] == 0).all() and (g[nobody] == 0).all() and (nearest[nobody] == LOWEST).all()
    alone = similarity(keys[None, 5:8], metric=metric, nearest=True, backend=backend)
    assert torch.equal(s[5:8, :3], alone[0][0]) and (s[5:8, 3:] == 0).all() and sbar[0] == alone[1][0]


@any_metric
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 9), max_size=5), spare=st.integers(0, 2), cut=st.integers(0, 3))
def test_any_lengths(metric, backend, lengths, spare, cut):
    keys = torch.randn(sum(lengths) + spare, 2)
    check(keys, lengths, max(max(lengths, default=0) - cut, 0), backend, metric)


@any_metric
def test_any_number_of_threads(metric, cpp):
    keys, lengths = torch.randn(700, 64), (300, 1, 0, 250, 149)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(similarity_varlen(keys, offsets(lengths), 300, metric=metric, backend=cpp))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0], "threads")


@any_metric
def test_what_comes_next_takes_it(metric, backend):
    lengths, kept = (9, 14, 5), (3, 4, 2)
    keys, scores = torch.randn(28, 6), torch.rand(28)
    s, sbar, _, tier, nearest = similarity_varlen(keys, offsets(lengths), 14, metric=metric, backend=backend)
    options = {"suppression": 0.7, "backend": backend}
    order = greedy_select_varlen(
        s, scores, offsets(lengths), offsets(kept), 9, 14, sbar=sbar, tier=tier, first=-nearest, **options
    )
    start, row = 0, 0
    for n, k in zip(lengths, kept, strict=True):
        own = similarity(keys[None, start : start + n], metric=metric, nearest=True, backend=backend)
        alone = greedy_select(
            own[0], scores[None, start : start + n], k, sbar=own[1], tier=own[3], first=-own[4], **options
        )
        assert torch.equal(order[row : row + k], alone[0])
        start, row = start + n, row + k


def test_wrong_arguments():
    keys, cu = torch.rand(4, 2), offsets((4,))
    with pytest.raises(ValueError, match=r"^metric: expected 'cosine' or 'neg_l2', got 'dot'"):
        similarity_varlen(keys, cu, 4, metric="dot")
    with pytest.raises(TypeError, match=r"^cu_seqlens: expected dtype int32, got"):
        similarity_varlen(keys, cu.long(), 4)
    with pytest.raises(ValueError, match=r"^keys: expected 2 axes \[T Dk\], got 3"):
        similarity_varlen(keys[None], cu, 4)
    with pytest.raises(ValueError, match=r"max_seqlen"):
        similarity_varlen(keys, cu, -1)
    with pytest.raises(RuntimeError, match=r"metric: expected 'cosine' or 'neg_l2', got 'dot'"):
        torch.ops.condense.similarity_varlen(keys, cu, 4, metric="dot")
