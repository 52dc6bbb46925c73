"""Each backend against the whole map in fp64, the forms around it, and what does not change a bit.

Gradients: test_attention_gradients.py; packed batches: test_attention_scores_varlen.py."""

import os
import re
import subprocess
import sys

import pytest
import torch

import condense_kernels as ck
from condense_kernels._dispatch import backends
from condense_kernels.ops.attention_scores import reference
from condense_kernels.testing import assert_same_bits, exact_attention, unit_roundoff

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = ("rows", "mask", "lse", "scale", "causal")


def heads_of(*shape: int, key_heads: int | None = None, num_keys: int | None = None, dtype=torch.float32) -> tuple:
    """Queries [B, H, M, d] and keys that make a few probabilities large."""
    b, h, m, d = shape
    return (2 * torch.randn(shape)).to(dtype), torch.randn(b, key_heads or h, num_keys or m, d).to(dtype)


def run(backend: str, queries, keys, **options) -> torch.Tensor:
    """The operator itself, on a backend."""
    return backends.run("attention_scores", backend, (queries, keys), options)


def assert_is_exact(scores: torch.Tensor, queries, keys, **options) -> None:
    exact = exact_attention(queries, keys, **options)
    assert scores.dtype == (torch.float64 if queries.dtype == torch.float64 else torch.float32)
    assert scores.is_contiguous()
    error = (scores.double() - exact.scores).abs()
    assert (error <= exact.bound).all(), f"{float((error / exact.bound).nan_to_num(nan=torch.inf).amax())} of the bound"


def options_of(queries: torch.Tensor, keys: torch.Tensor) -> dict[str, dict]:
    """Every argument alone, and some together."""
    (b, h, m, _), n = queries.shape, keys.shape[2]
    mask = torch.rand(b, n) < 0.7
    listed = torch.randint(-1, m, (b, 7))
    lse = torch.randn(b, h, m) + 5
    lse[:, :, ::3] = torch.inf
    return {
        "nothing": {},
        "rows": {"rows": torch.tensor([m - 1, 0, -1, m - 1])},
        "rows of each": {"rows": listed},
        "mask": {"mask": mask},
        "lse": {"lse": lse},
        "scale": {"scale": 0.05},
        "causal": {"causal": True},
        "all but lse": {"rows": listed, "mask": mask, "scale": 0.3, "causal": True},
        "all": {"rows": listed, "mask": mask, "lse": lse, "scale": 0.3, "causal": True},
    }


# Against the definition


@pytest.mark.parametrize("what", options_of(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)))
def test_the_definition_is_the_whole_map(what):
    """The reference against softmax and mean over the map, written apart from it."""
    queries, keys = heads_of(2, 4, 9, 5, key_heads=2, num_keys=11, dtype=torch.float64)
    options = options_of(queries, keys)[what]
    expected = exact_attention(queries, keys, **options).scores
    torch.testing.assert_close(reference.attention_scores(queries, keys, **options), expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("what", options_of(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_in_every_dtype(what, dtype, fast):
    if fast == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is for CPU tensors, as the contract says")
    queries, keys = heads_of(2, 4, 51, 12, key_heads=2, num_keys=67, dtype=dtype)
    options = options_of(queries, keys)[what]
    assert_is_exact(run(fast, queries, keys, **options), queries, keys, **options)


@pytest.mark.parametrize(
    ("shape", "key_heads", "num_keys"),
    [
        pytest.param((1, 1, 1, 1), 1, 1, id="one of each"),
        pytest.param((1, 1, 2, 3), 1, 1, id="one key"),
        pytest.param((3, 2, 47, 64), 2, 48, id="to a tile's edge"),
        pytest.param((1, 3, 49, 72), 1, 97, id="past a tile, one key head for all"),
        pytest.param((1, 2, 5, 130), 2, 33, id="past a chunk of channels"),
        pytest.param((1, 1, 9, 300), 1, 20, id="past a chunk of pairs"),
        pytest.param((2, 8, 3, 8), 2, 150, id="few rows"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(shape, key_heads, num_keys, causal, fast):
    for dtype in (torch.float32, torch.bfloat16):
        queries, keys = heads_of(*shape, key_heads=key_heads, num_keys=num_keys, dtype=dtype)
        assert_is_exact(run(fast, queries, keys, causal=causal), queries, keys, causal=causal)


def test_long(cpp):
    """Sums of a row go on past a block, and over rows past many strips."""
    queries, keys = heads_of(1, 1, 700, 16, num_keys=5000)
    assert_is_exact(run(cpp, queries, keys), queries, keys)


def test_by_hand(backend):
    """Two queries, of which one sees all keys alike and the other the first at 3 to 1."""
    queries = torch.tensor([[[[0.0], [1.0]]]])
    keys = torch.tensor([[[[0.0], [-1.0]]]]) * torch.log(torch.tensor(3.0))
    scores = ck.attention_scores(queries, keys, scale=1.0, backend=backend)
    torch.testing.assert_close(scores, torch.tensor([[(0.5 + 0.75) / 2, (0.5 + 0.25) / 2]]))


@pytest.mark.parametrize("logit", [90.0, -90.0, 1e4, -1e4, 1e30])
def test_large_logits_do_not_overflow(logit, backend):
    """One key ahead of the others by 3, wherever the whole row lies."""
    queries = torch.ones(1, 1, 2, 1)
    ahead = 3.0 if abs(logit) < 1e30 else abs(logit) / 2**20
    keys = torch.tensor([logit, logit, logit + ahead, logit])[None, None, :, None]
    p = torch.tensor([0.0, 0.0, ahead, 0.0]).softmax(dim=0)
    scores = run(backend, queries, keys, scale=1.0)[0, 0]
    torch.testing.assert_close(scores, p, rtol=max(1e-5, 3e-7 * min(abs(logit), 1e5)), atol=0)


def test_what_is_far_below_counts_as_nothing(fast):
    queries, keys = torch.ones(1, 1, 3, 1), torch.tensor([0.0, -80.0, -200.0, -1e30])[None, None, :, None]
    scores = run(fast, queries, keys, scale=1.0)[0, 0]
    assert scores[0] == 1 and scores[2:].tolist() == [0, 0]
    torch.testing.assert_close(scores[1].item(), torch.tensor(-80.0).exp().item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential(dtype, fast):
    """With a normaliser of 1 it is what comes out: to a few roundings, and three more for each unit of its argument."""
    if fast == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is for CPU tensors, as the contract says")
    x = torch.cat([torch.linspace(-2, 2, 4001), torch.linspace(-85, 85, 1001)]).to(dtype)
    ones = torch.ones(1, 1, 1, 1, dtype=dtype)
    p = run(fast, ones, x.reshape(1, 1, -1, 1), scale=1.0, lse=torch.zeros(1, 1, 1))[0, 0]
    error = (p.double() / x.double().exp() - 1).abs()
    assert (error <= unit_roundoff(dtype) * (6 + 3 * x.abs())).all()


def test_a_scale_of_zero_is_attention_to_all_alike(backend):
    queries, keys = heads_of(1, 2, 5, 4, num_keys=8)
    assert run(backend, queries, keys, scale=0.0).eq(0.125).all()


# Rows


def test_a_row_that_comes_twice_counts_twice(backend):
    queries, keys = heads_of(1, 2, 6, 4)
    once = run(backend, queries, keys, rows=torch.tensor([4])), run(backend, queries, keys, rows=torch.tensor([1]))
    both = run(backend, queries, keys, rows=torch.tensor([4, 1, -1, 4]))
    torch.testing.assert_close(both, (2 * once[0] + once[1]) / 3)


def test_no_rows_are_zeros(backend):
    queries, keys = heads_of(2, 2, 6, 4)
    assert run(backend, queries, keys, rows=torch.full((2, 3), -1)).eq(0).all()
    assert run(backend, queries, keys, rows=torch.zeros(0, dtype=torch.int64)).eq(0).all()
    assert run(backend, queries[:, :, :0], keys).eq(0).all()
    one = torch.tensor([[-1, 2, -1], [-1, -1, -1]])
    assert run(backend, queries, keys, rows=one).sum(dim=2).round().tolist() == [[1, 1], [0, 0]]


def test_empty_inputs(backend):
    queries, keys = heads_of(2, 2, 6, 4)
    assert run(backend, queries[:0], keys[:0]).shape == (0, 2, 6)
    assert run(backend, queries, keys[:, :, :0]).shape == (2, 2, 0)


def test_a_row_that_sees_no_key_counts_with_zeros(backend):
    queries, keys = heads_of(2, 2, 6, 4, num_keys=4)
    mask = torch.tensor([[False] * 4, [True] * 4])
    scores = run(backend, queries, keys, mask=mask)
    assert scores[0].eq(0).all()
    assert_same_bits(scores[1:], run(backend, queries[1:], keys[1:]))
    causal = run(backend, queries, keys, causal=True)  # the first two of six queries see none of four keys
    torch.testing.assert_close(causal.sum(dim=2), torch.full((2, 2), 4 / 6))
    infinite = torch.full((2, 2, 6), -torch.inf)
    assert (
        run(backend, queries, keys, lse=infinite).eq(0).all() and run(backend, queries, keys, lse=-infinite).eq(0).all()
    )


@pytest.mark.parametrize("value", [6, -2])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("rows", [[0, 1], [1]], ids=["kernel", "one row"])
def test_rows_out_of_range_on_cpu(value, backend, rows, cpp):
    queries, keys = heads_of(1, 2, 6, 4)
    with pytest.raises(RuntimeError, match=re.escape(f"rows: expected values in [-1, 6), got {value}")):
        ck.attention_scores(queries, keys, rows=torch.tensor([value, *rows[1:]]), backend=backend)


# NaN


def test_nan_of_a_row_shows_where_it_may_see(backend):
    queries, keys = heads_of(1, 2, 50, 4, num_keys=60)
    queries[0, 0, 20, 1] = torch.nan
    mask = torch.arange(60)[None] != 3
    scores = run(backend, queries, keys, mask=mask, causal=True)[0]
    seen = mask[0] & (torch.arange(60) <= 30)
    assert torch.equal(scores[0].isnan(), seen) and scores[1].isfinite().all()
    assert run(backend, queries, keys, rows=torch.tensor([19, 21])).isfinite().all()


def test_nan_of_a_key_shows_in_the_rows_that_see_it(backend):
    queries, keys = heads_of(1, 2, 50, 4, num_keys=60)
    keys[0, 1, 40, 0] = torch.nan
    scores = run(backend, queries, keys, causal=True)[0]
    assert scores[0].isfinite().all() and scores[1].isnan().all()
    rows = torch.tensor([0, 29])  # see the keys up to 39
    assert run(backend, queries, keys, rows=rows, causal=True).isfinite().all()
    clean = keys.clone()
    clean[0, 1, 40, 0] = 0
    mask = torch.arange(60)[None] != 40
    assert_same_bits(run(backend, queries, keys, mask=mask), run(backend, queries, clean, mask=mask))


# The same bits


def views(x: torch.Tensor):
    """The same values behind other strides; the third as an attention layer's projection leaves them."""
    yield "sliced", torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    yield "stepped", x.repeat_interleave(2, dim=-1)[..., ::2]
    yield "[B, N, H, d]", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "expanded", x[:1].expand_as(x) if torch.equal(x, x[:1].expand_as(x)) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype, fast):
    queries, keys = heads_of(2, 2, 19, 20, num_keys=50, dtype=dtype)
    lse, mask, rows = torch.randn(2, 2, 19), torch.rand(2, 50) < 0.8, torch.randint(19, (2, 8))
    expected = run(fast, queries, keys, lse=lse, mask=mask, rows=rows)
    for (name, q), (_, k) in zip(views(queries), views(keys), strict=True):
        strided = {"lse": lse.mT.contiguous().mT, "mask": mask.T.contiguous().T, "rows": rows.T.contiguous().T}
        assert_same_bits(run(fast, q, k, **strided), expected, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_and_place_do_not_matter(dtype, fast):
    queries, keys = heads_of(3, 4, 50, 20, key_heads=2, num_keys=70, dtype=dtype)
    scores = run(fast, queries, keys)
    assert_same_bits(run(fast, queries[1:2], keys[1:2]), scores[1:2])
    assert_same_bits(run(fast, queries[:, 2:], keys[:, 1:]), scores[:, 2:], "the last key head alone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_threads_do_not_matter(batch, dtype, cpp):
    queries, keys = heads_of(batch, 1, 700, 32, num_keys=900, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(cpp, queries, keys, causal=True)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(run(cpp, queries, keys, causal=True), expected, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_matter(causal, cpp):
    """In front of a causal image, behind another, and in between: masked keys are as if they were not there."""
    queries, keys = heads_of(1, 2, 60, 20, num_keys=60)
    expected = run(cpp, queries, keys, causal=causal)
    valid = torch.rand(100) < 0.5
    valid[valid.nonzero().flatten()[60:]] = False
    while valid.sum() < 60:
        valid[(~valid).nonzero()[0]] = True
    padded_q, padded_k = torch.full((1, 2, 100, 20), torch.nan), torch.full((1, 2, 100, 20), torch.nan)
    padded_q[:, :, valid], padded_k[:, :, valid] = queries, keys
    rows = valid.nonzero().flatten()
    scores = run(cpp, padded_q, padded_k, mask=valid[None], rows=rows, causal=causal)
    assert_same_bits(scores[:, :, valid], expected)
    assert scores[:, :, ~valid].eq(0).all()


def test_equal_keys_have_equal_scores_to_the_bit(backend):
    queries, keys = heads_of(1, 2, 30, 21, num_keys=131)
    places = [0, 1, 15, 16, 47, 48, 63, 64, 127, 130]
    keys[:, :, places] = keys[:, :, :1].clone()
    scores = run(backend, queries, keys)[0, :, places]
    assert torch.equal(scores, scores[:, :1].expand_as(scores))


def test_what_surrounds_a_call_does_not_matter(backend):
    """One row, too, which torch multiplies: in fp64, where no setting applies."""
    queries, keys = heads_of(1, 4, 40, 64, num_keys=600)
    for options in ({}, {"rows": 3}, {"over_rows": "mean_query"}):
        call = lambda: ck.attention_scores(queries, keys, **options, backend=backend)  # noqa: B023, E731
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(call(), expected)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            assert_same_bits(call(), expected)
        finally:
            torch.set_float32_matmul_precision(before)
        with torch.inference_mode():
            assert_same_bits(call(), expected)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_instruction_sets(capability, cpp):
    program = (
        "import torch\n"
        "from test_attention_scores import DTYPES, assert_is_exact, heads_of, options_of, run\n"
        "torch.manual_seed(0)\n"
        "for dtype in DTYPES:\n"
        "    queries, keys = heads_of(2, 4, 51, 77, key_heads=2, num_keys=1100, dtype=dtype)\n"
        "    for options in options_of(queries, keys).values():\n"
        "        assert_is_exact(run('cpp', queries, keys, **options), queries, keys, **options)\n"
    )
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    environment = {**os.environ, "PYTHONPATH": path, "CONDENSE_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# A normaliser from outside


def test_lse_of_the_same_keys_changes_nothing(fast):
    queries, keys = heads_of(1, 2, 30, 16, num_keys=40)
    lse = (queries.double() @ keys.double().mT / 4).logsumexp(dim=-1).float()
    torch.testing.assert_close(run(fast, queries, keys, lse=lse), run(fast, queries, keys), rtol=1e-5, atol=1e-8)


def test_lse_over_more_keys_than_are_passed(fast):
    """An LLM's attention ran over text and pixels; only the pixels' keys are wanted."""
    queries, keys = heads_of(1, 2, 30, 16, num_keys=60)
    lse = (queries.double() @ keys.double().mT / 4).logsumexp(dim=-1).float()
    whole = run(fast, queries, keys)
    part = run(fast, queries, keys[:, :, 20:50], lse=lse)
    torch.testing.assert_close(part, whole[:, :, 20:50], rtol=1e-5, atol=1e-8)


# Memory


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_peak_memory_is_linear(cpp):
    """12,000 keys: the map would be 576 MB a head."""
    program = """
import torch, condense_kernels as ck
def peak_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
torch.set_num_threads(2)
queries, keys = torch.randn(2, 1, 2, 12000, 8)
ck.attention_scores(queries[:, :, :100], keys)
open("/proc/self/clear_refs", "w").write("5")
before = peak_bytes()
ck.attention_scores(queries, keys)
print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12e6
