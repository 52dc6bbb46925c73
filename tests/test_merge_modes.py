"""merge beyond the mean of Eq. 8: sums and blends, scores that are sizes or left out, planes of any rank."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import condense_kernels as ck
from condense_kernels import merge
from condense_kernels._dispatch import backends
from condense_kernels.testing import assert_same_bits, unit_roundoff

CPU = torch.device("cpu")
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, CPU) is None]
MODES = ("mean", "sum", "lerp")
KEPT = torch.tensor([[1, 3, 4]])
ROWS = torch.tensor([[0, 0, 0, 1, 2, 2]])
SCORES = {
    "none": lambda n, rng: None,
    "floats": lambda n, rng: torch.from_numpy(rng.choice([0.0, 0.25, 0.7, 1.0, 3.0], n)).float(),
    "bf16": lambda n, rng: torch.from_numpy(rng.random(n)).bfloat16(),
    "bool": lambda n, rng: torch.from_numpy(rng.random(n) < 0.5),
    **{
        str(dtype): lambda n, rng, dtype=dtype: torch.from_numpy(rng.integers(0, 5, n)).to(dtype)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    },
}


def by_hand(x, a, indices, rows, mode, w):
    """One image, in numpy fp64, token by token: merged, mass, and for each number the sum of the magnitudes in it."""
    merged, mass, size = (np.zeros((len(indices), x.shape[1])) for _ in range(3))
    for k, own in enumerate(indices):
        members = [i for i in range(len(rows)) if rows[i] == k] if own >= 0 else []
        for i in members:
            mass[k] += a[i]
            merged[k] += a[i] * x[i]
            size[k] += abs(a[i] * x[i])
        if mode == "sum" or own < 0:
            continue
        if mass[k, 0] == 0 or members == [own]:
            merged[k] = x[own]
            continue
        merged[k] /= mass[k]
        size[k] /= mass[k]
        if mode == "lerp":
            merged[k] = w * x[own] + (1 - w) * merged[k]
            size[k] = w * abs(x[own]) + (1 - w) * size[k]
    return merged, mass[:, 0], size


@st.composite
def problems(draw, most_rows):
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    n, d = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    k = draw(st.integers(0, min(n, most_rows)))
    indices = np.where(rng.random(k) < 0.15, -1, rng.permutation(n)[:k])  # in any order
    rows = rng.integers(-1, max(k, 1), n) if k else np.full(n, -1)
    at_home = (indices >= 0) & (rng.random(k) < 0.8)
    rows[indices[at_home]] = np.flatnonzero(at_home)
    features = torch.from_numpy(rng.standard_normal((n, d))).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    scores = SCORES[draw(st.sampled_from(list(SCORES)))](n, rng)
    weight = draw(st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]))
    return features, scores, torch.from_numpy(indices), torch.from_numpy(rows), draw(st.sampled_from(MODES)), weight


def assert_is_by_hand(problem, backend):
    features, scores, indices, rows, mode, weight = problem
    one = None if scores is None else scores[None]
    merged, mass = merge(
        features[None], one, indices[None], rows[None], mode=mode, centre_weight=weight, backend=backend
    )
    x = features.double().numpy()
    a = np.ones(len(x)) if scores is None else scores.double().numpy()
    expected, total, size = by_hand(x, a, indices.tolist(), rows.tolist(), mode, weight)
    n, eps = len(x), unit_roundoff(torch.float32)
    bound = (2 * n + 8) * eps * size + 1.01 * unit_roundoff(features.dtype) * np.abs(expected)
    assert merged.dtype == features.dtype and mass.dtype == torch.float32
    assert (np.abs(merged[0].double().numpy() - expected) <= bound).all()
    assert (np.abs(mass[0].double().numpy() - total) <= n * eps * total).all()


@settings(max_examples=200)
@given(problems(70))
def test_cpp_and_the_reference_are_what_the_definition_says(problem):
    for backend in {*FAST, "reference"} - {"triton"}:
        assert_is_by_hand(problem, backend)


@pytest.mark.skipif("triton" not in FAST, reason="no Triton on CPU tensors")
@settings(max_examples=25)
@given(problems(6))
def test_triton_is_what_the_definition_says(problem):
    assert_is_by_hand(problem, "triton")


def tokens(dtype=torch.float32, n=6, channels=37):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, n, channels, generator=generator).to(dtype)
    return features, torch.rand(1, n, generator=generator).to(dtype)


def test_by_hand_on_numbers(backend):
    features = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]])
    call = features, torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[1]]), torch.tensor([[0, 0, 0]])
    merged, mass = merge(*call, mode="sum", backend=backend)
    assert merged.tolist() == [[[9.0, 90.0]]] and mass.tolist() == [[4.0]]
    merged, mass = merge(*call, mode="lerp", centre_weight=0.25, backend=backend)  # 2 / 4 + 3 / 4 * 2.25
    assert merged.tolist() == [[[2.1875, 21.875]]] and mass.tolist() == [[4.0]]


def test_without_scores_is_with_ones(backend):
    features, _ = tokens()
    for mode in MODES:
        without = merge(features, None, KEPT, ROWS, mode=mode, backend=backend)
        assert_same_bits(without, merge(features, torch.ones(1, 6), KEPT, ROWS, mode=mode, backend=backend))
        assert without[1].tolist() == [[3.0, 1.0, 2.0]]  # how many tokens went in


@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("none", "floats", "bf16")])
def test_sizes_are_exact(name, backend):
    """As the same numbers in fp32."""
    features, _ = tokens()
    sizes = SCORES[name](6, np.random.default_rng(0))[None]
    for mode in MODES:
        assert_same_bits(
            merge(features, sizes, KEPT, ROWS, mode=mode, backend=backend),
            merge(features, sizes.float(), KEPT, ROWS, mode=mode, backend=backend),
        )


def test_sizes_below_2_to_the_24_are_counted_exactly(backend):
    sizes = torch.tensor([[2**23 - 1, 2**23, 1, 7, 0, 2**24]])
    _, mass = merge(tokens()[0], sizes, torch.tensor([[0, 2, 4]]), torch.tensor([[0, 0, 1, 1, 1, 2]]), backend=backend)
    assert mass.tolist() == [[2.0**24 - 1, 8.0, 2.0**24]] and mass.dtype == torch.float32


def test_a_column_of_sizes_is_taken(backend):
    """ToMe has its sizes as [B, N, 1]. The raw operator takes [B, N] alone."""
    features, scores = tokens()
    assert_same_bits(
        merge(features, scores[..., None], KEPT, ROWS, backend=backend),
        merge(features, scores, KEPT, ROWS, backend=backend),
    )
    with pytest.raises(RuntimeError, match=r"scores: expected 2 axes \[B N\], got 3"):
        torch.ops.condense.merge(features, scores[..., None], KEPT, ROWS)
    with pytest.raises(ValueError, match=r"scores: expected 2 axes \[B N\], got 3"):
        merge(features, scores[..., None].expand(-1, -1, 2), KEPT, ROWS)


def test_a_sum_of_one_token(backend):
    """score * token; without scores its bits, whichever token it is: a NaN's payload, and the sign of zero."""
    features, scores = tokens()
    features.view(torch.int32)[0, 2, :2] = torch.tensor([0x7F800123, -0x80000000])
    rows = torch.tensor([[-1, -1, 0, 1, 2, 2]])  # token 2 alone in the row that is named after token 1
    merged, mass = merge(features, None, KEPT, rows, mode="sum", backend=backend)
    assert torch.equal(merged[0, 0].view(torch.int32), features[0, 2].view(torch.int32)) and mass[0, 0] == 1
    merged, mass = merge(features[..., 2:], scores, KEPT, rows, mode="sum", backend=backend)
    assert torch.equal(merged[0, 0], scores[0, 2] * features[0, 2, 2:]) and mass[0, 0] == scores[0, 2]


@pytest.mark.parametrize("mode", ["mean", "lerp"])
def test_rows_that_are_their_kept_token(mode, backend):
    """Of one token alone, of no mass, of no member: bit for bit."""
    features, scores = tokens()
    features[0, 0] = math.nan  # a member of the row of no mass, without influence
    scores[0, :3] = 0
    rows = torch.tensor([[0, 0, 0, 1, 1, 1]])  # row 1 has others, row 2 nobody
    for a in (scores, scores.bfloat16()):
        merged, mass = merge(features, a, KEPT, rows, mode=mode, backend=backend)
        assert_same_bits(merged[0, [0, 2]], features[0, [1, 4]])
        assert mass[0, 0] == 0 and mass[0, 2] == 0
    alone, _ = merge(features, None, KEPT, ROWS, mode=mode, centre_weight=0.3, backend=backend)
    assert_same_bits(alone[0, 1], features[0, 3])


def test_an_empty_sum_is_zeros(backend):
    features, scores = tokens()
    rows = torch.tensor([[0, 0, 0, 1, 1, 1]])
    for a in (None, scores, torch.zeros(1, 6)):
        merged, mass = merge(features, a, torch.tensor([[1, -1, 4]]), rows, mode="sum", backend=backend)
        assert merged[0, 1:].eq(0).all() and mass[0, 1:].eq(0).all()
    assert merged.eq(0).all()  # a sum of zeros, too


def test_a_centre_of_no_score_is_in_no_mean(backend):
    """HoliTom's way: beta * centre + (1 - beta) * mean of the others; the centre where there are none."""
    features, _ = tokens()
    others = torch.ones(1, 6).scatter(1, KEPT, 0.0)
    merged, mass = merge(features, others, KEPT, ROWS, mode="lerp", centre_weight=0.6, backend=backend)
    expected = 0.6 * features[0, 1] + 0.4 * features[0, [0, 2]].mean(dim=0)
    torch.testing.assert_close(merged[0, 0], expected)
    assert_same_bits(merged[0, 1], features[0, 3])
    assert mass.tolist() == [[2.0, 0.0, 1.0]]


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_row(mode, backend):
    features, scores = tokens()
    clean, _ = merge(features, scores, KEPT, ROWS, mode=mode, backend=backend)
    features[0, 2, 5] = math.nan
    merged, _ = merge(features, scores, KEPT, ROWS, mode=mode, backend=backend)
    assert_same_bits(merged[0, 1:], clean[0, 1:])
    assert merged[0, 0].isnan().tolist() == [c == 5 for c in range(37)]
    scores[0, 2] = math.nan
    merged, mass = merge(features, scores, KEPT, ROWS, mode=mode, backend=backend)
    assert merged[0, 0].isnan().all() and mass[0, 0].isnan() and mass[0, 1:].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_order_of_indices_is_free(mode, backend):
    """Rows come in the order of indices."""
    features, scores = tokens()
    turned = torch.tensor([2, 0, 1])
    merged, mass = merge(features, scores, KEPT, ROWS, mode=mode, backend=backend)
    again = merge(features, scores, KEPT[:, turned], turned.argsort()[ROWS], mode=mode, backend=backend)
    assert_same_bits(again, (merged[:, turned], mass[:, turned]))


def test_repeated_indices_are_found_by_debug():
    """Where the second row has no member it is the token again; the sum is zeros."""
    features, scores = tokens()
    repeated = torch.tensor([[1, 1, 4]])
    with ck.debug(), pytest.raises(ValueError, match="indices: expected distinct tokens, got token 1 again"):
        merge(features, scores, repeated, ROWS)
    merged, mass = merge(features, scores, repeated, torch.tensor([[0, 0, 0, 0, 2, 2]]))
    assert_same_bits(merged[0, 1], features[0, 1])
    assert mass[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["sum", "lerp"])
def test_batch_layout_and_threads_do_not_matter(mode, dtype, cpp):
    torch.manual_seed(0)
    features, indices = torch.randn(3, 900, 1100).to(dtype), torch.arange(40).expand(3, -1) * 7
    rows = torch.randint(-1, 40, (3, 900))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = merge(features, None, indices, rows, mode=mode)
        torch.set_num_threads(3)
        assert_same_bits(merge(features, None, indices, rows, mode=mode), expected)
    finally:
        torch.set_num_threads(threads)
    alone = merge(features[2:], None, indices[2:], rows[2:], mode=mode)
    assert_same_bits(alone, tuple(t[2:] for t in expected))
    assert_same_bits(merge(features.mT.contiguous().mT, None, indices, rows, mode=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_16_bits_as_the_same_values_in_fp32(mode, backend):
    features, scores = tokens(torch.bfloat16)
    merged, mass = merge(features, scores, KEPT, ROWS, mode=mode, backend=backend)
    wide, same = merge(features.float(), scores, KEPT, ROWS, mode=mode, backend=backend)
    assert_same_bits((merged, mass), (wide.bfloat16(), same))


# Planes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scored", [True, False])
def test_planes_are_merged_one_by_one(mode, scored, backend):
    generator = torch.Generator().manual_seed(0)
    indices, rows = torch.cat([KEPT, KEPT.flip(1)]), torch.cat([ROWS, ROWS.flip(1)])
    scores = torch.rand(2, 6, generator=generator) if scored else None
    cache = torch.randn(2, 3, 6, 8, generator=generator)  # [B, H, N, d]
    of_values = cache.transpose(1, 2).contiguous().transpose(1, 2)  # heads behind the tokens: no view folds them
    alone = [merge(cache[:, h], scores, indices, rows, mode=mode, backend=backend) for h in range(3)]
    expected, expected_mass = torch.stack([merged for merged, _ in alone], dim=1), alone[0][1]
    for planes in (cache, of_values):
        result = merge(planes, scores, indices, rows, mode=mode, backend=backend)
        assert_same_bits(result, (expected, expected_mass))
    twice = cache[:, :, None].expand(-1, -1, 2, -1, -1)
    if backend != "triton":
        merged, mass = merge(twice, scores, indices, rows, mode=mode, backend=backend)
        assert_same_bits((merged, mass), (expected[:, :, None].expand_as(merged), expected_mass))


def test_planes_that_fold_are_not_copied(monkeypatch):
    seen = []
    run = backends.run
    monkeypatch.setattr(
        backends, "run", lambda op, backend, args, options: (seen.append(args), run(op, backend, args, options))[1]
    )
    for planes in (torch.randn(2, 3, 6, 8), torch.randn(1, 6, 3, 8).transpose(1, 2), torch.randn(1, 3, 6, 8)):
        merge(planes, None, KEPT.expand(len(planes), -1), ROWS.expand(len(planes), -1))
        assert seen[-1][0].data_ptr() == planes.data_ptr()
    assert seen[-1][3].stride(0) == 0  # of one image, nor are its clusters


def test_planes_without_an_axis_are_refused():
    with pytest.raises(ValueError, match=r"features: expected 3 axes \[B N D\], got 2"):
        merge(torch.rand(1, 6), None, KEPT, ROWS)
    with pytest.raises(ValueError, match=r"features: expected at least one plane, got shape \[1, 0, 6, 8\]"):
        merge(torch.rand(1, 0, 6, 8), None, KEPT, ROWS)
    with pytest.raises(ValueError, match=r"scores: expected shape \[B N\] = \[1, 6\], as the arguments before it have"):
        merge(torch.rand(1, 2, 6, 8), torch.rand(1, 5), KEPT, ROWS)
    with pytest.raises(RuntimeError, match=r"features: expected 3 axes \[B N D\], got 4"):
        torch.ops.condense.merge(torch.rand(1, 2, 6, 8), None, KEPT, ROWS)


# Errors

WRONG = [
    ({"mode": "average"}, ValueError, "mode: expected one of 'mean', 'sum', 'lerp', got 'average'."),
    ({"mode": ""}, ValueError, "mode: expected one of 'mean', 'sum', 'lerp', got ''."),
    ({"mode": None}, TypeError, "mode: expected a string, got NoneType: None."),
    ({"centre_weight": 1.5}, ValueError, r"centre_weight: expected a number in \[0, 1\], got 1.5."),
    ({"centre_weight": -0.1, "mode": "lerp"}, ValueError, r"centre_weight: expected a number in \[0, 1\], got -0.1."),
    ({"centre_weight": math.nan}, ValueError, r"centre_weight: expected a number in \[0, 1\], got nan."),
    ({"centre_weight": True}, TypeError, "centre_weight: expected a number, got bool: True."),
    ({"centre_weight": "0.5"}, TypeError, "centre_weight: expected a number, got str: '0.5'."),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_wrong_options(options, error, message, backend):
    features, scores = tokens()
    with pytest.raises(error, match=f"^{message}"):
        merge(features, scores, KEPT, ROWS, **options, backend=backend)
    if error is ValueError:
        with pytest.raises(RuntimeError, match=f"^{message}"):
            torch.ops.condense.merge(features, scores, KEPT, ROWS, **options)


def test_scores_that_are_no_numbers_are_refused():
    features, scores = tokens()
    for wrong in (scores.to(torch.complex64), scores.to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="scores: expected dtype float32, .* int64, .* bool, got "):
            merge(features, wrong, KEPT, ROWS)


# What public methods do


def test_tome(backend):
    """merge_wavg: x * size summed over a row, by the sum of sizes; the mass is the new size."""
    torch.manual_seed(0)
    x, size = torch.randn(2, 10, 16), torch.randint(1, 4, (2, 10, 1))
    kept = torch.arange(1, 10, 2).expand(2, -1)  # every other token is a destination
    rows = torch.randint(0, 5, (2, 10)).scatter(1, kept, torch.arange(5).expand(2, -1))
    merged, mass = merge(x, size, kept, rows, backend=backend)
    one_hot = torch.nn.functional.one_hot(rows, 5).mT.float()
    new_size = one_hot @ size.float()
    torch.testing.assert_close(mass[..., None], new_size)
    torch.testing.assert_close(merged, one_hot @ (x * size) / new_size)


@pytest.mark.parametrize("mode", MODES)
def test_in_a_compiled_graph(mode, cpp):
    """One graph, gradients included; of planes and of sizes as well."""
    torch._dynamo.reset()
    planes, sizes = torch.randn(1, 2, 6, 4), torch.tensor([[1, 2, 0, 3, 1, 1]])

    def call(x):
        merged, mass = merge(x, sizes, KEPT, ROWS, mode=mode, centre_weight=0.3)
        return merged.square().sum() + mass.sum(), merged

    x, again = (planes.clone().requires_grad_() for _ in range(2))
    loss, merged = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    expected = call(again)
    assert_same_bits((loss, merged), expected)
    loss.backward()
    expected[0].backward()
    assert_same_bits([x.grad], [again.grad])
