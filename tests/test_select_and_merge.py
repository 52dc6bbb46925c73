"""The flagship against the reference, and what its callers rely on: same bits whatever is around an image."""

import dataclasses

import pytest
import torch
from shapes import SHAPES as SHAPES_OF_MODELS
from shapes import Shape

from condense_kernels import Condensed, select_and_merge, select_and_merge_varlen
from condense_kernels.testing import KINDS, assert_matches_reference, assert_same_bits, make_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("num_background", [0, 2])
def test_top_k_where_all_keys_are_zero(num_background, backend):
    """No similarity at all: E|S| is 0, and scores would be scaled with it. Background tokens then go by index."""
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.5, 0.0, 0.7, 0.2]])
    options = {"keys": torch.zeros(1, 8, 4), "suppression": 0.0, "spatial_weight": 0.0, "backend": backend}
    out = select_and_merge(torch.rand(1, 8, 4), scores, 4, num_background, **options)
    assert out.indices[0].tolist() == sorted([1, 3, 6, 4, *[0, 2][:num_background]])
    offsets = (torch.tensor([0, n], dtype=torch.int32) for n in (8, 4, num_background))
    packed = select_and_merge_varlen(
        torch.rand(8, 4), scores[0], *offsets, 4 + num_background, 8, **{**options, "keys": options["keys"][0]}
    )
    assert torch.equal(packed.indices, out.indices[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input(kind, dtype, fast):
    if fast == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is served on CPU by the C++ kernels alone, as the contract says")
    inputs = make_inputs(kind, num_tokens=30, dtype=dtype)
    assert_matches_reference(inputs.run(fast), inputs, backend=fast)


SHAPES = [
    # tokens, channels, anchors, background, why
    pytest.param(1, 8, 1, 0, id="one token"),
    pytest.param(1, 1, 0, 1, id="one background token, one channel"),
    pytest.param(2, 3, 1, 1, id="two tokens, all kept"),
    pytest.param(47, 20, 1, 0, id="K = 1, one short of a tile"),
    pytest.param(48, 128, 0, 1, id="a whole tile and chunk"),
    pytest.param(53, 129, 20, 33, id="K = N, prime, one channel past a chunk"),
    pytest.param(64, 16, 64, 0, id="K = N of anchors alone"),
    pytest.param(97, 33, 11, 0, id="only anchors, two tiles and one token"),
    pytest.param(96, 40, 0, 13, id="only background"),
    pytest.param(130, 17, 30, 10, id="past two blocks of 64"),
]


@pytest.mark.parametrize(("tokens", "channels", "anchors", "background"), SHAPES)
def test_shapes(tokens, channels, anchors, background, fast):
    inputs = make_inputs(
        "clustered", num_tokens=tokens, channels=channels, num_anchors=anchors, num_background=background
    )
    assert_matches_reference(inputs.run(fast), inputs, backend=fast)


ODD = {"one anchor": Shape(1, (1, 1153), 64, 1, 0), "nearly all": Shape(1, (1, 601), 64, 500, 101)}


@pytest.mark.parametrize("name", ["llava15-192", "onevision", "llava-next-global", *ODD])
@pytest.mark.parametrize("kind", ["clustered", "duplicates"])
def test_sizes_of_real_models(kind, name, cpp):
    shape = {**SHAPES_OF_MODELS, **ODD}[name]
    counts = {"num_anchors": shape.num_anchors, "num_background": shape.num_background}
    inputs = make_inputs(kind, batch=1, num_tokens=shape.num_tokens, channels=64, grid=shape.grid, **counts, seed=1)
    assert_matches_reference(inputs.run(cpp), inputs, backend=cpp)


@pytest.mark.parametrize("grid", [(1, 24), (24, 1), (4, 6), (2, 3, 4), (24, 1, 1)], ids=str)
def test_grid_equals_its_positions(grid, backend):
    inputs = make_inputs("random", num_tokens=24, grid=grid)
    positions = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    for dtype in (torch.float32, torch.float64, torch.int32):
        placed = dataclasses.replace(inputs, grid=None, positions=positions.to(dtype))
        assert_same_bits(placed.run(backend), inputs.run(backend))


def layouts(x: torch.Tensor):
    """The same values behind other strides."""
    yield "sliced", torch.cat([x, x + 1], dim=-1)[..., : x.shape[-1]]
    yield "stepped", x.repeat_interleave(2, dim=-1)[..., ::2]
    yield "reversed axes", x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    yield "stepped tokens", x.repeat_interleave(3, dim=1)[:, ::3]
    yield "offset", torch.cat([x[:, :1], x], dim=1)[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype, fast):
    inputs = make_inputs("masked", num_tokens=29, channels=19, dtype=dtype, keys=None)
    inputs = dataclasses.replace(
        inputs, keys=torch.randn(2, 29, 7).to(dtype), grid=None, positions=torch.rand(2, 29, 2)
    )
    expected = inputs.run(fast)
    for field in ("features", "scores", "keys", "positions", "mask"):
        value = getattr(inputs, field)
        for name, view in layouts(value.int() if value.dtype == torch.bool else value):
            view = view.bool() if value.dtype == torch.bool else view
            assert torch.equal(view, value)
            strided = dataclasses.replace(inputs, **{field: view})
            assert_same_bits(strided.run(fast), expected, f"{field}, {name}")


def test_expanded_batch(fast):
    inputs = make_inputs("random", batch=1, num_tokens=20)
    thrice = dataclasses.replace(
        inputs, features=inputs.features.expand(3, -1, -1), scores=inputs.scores.expand(3, -1)
    ).run(fast)
    for b in range(3):
        assert_same_bits(Condensed(*(t[b : b + 1] for t in thrice)), inputs.run(fast))


@pytest.mark.parametrize("kind", ["random", "parallel", "masked", "positions"])
@pytest.mark.parametrize(("batch", "tokens", "channels"), [(3, 31, 17), (5, 50, 130)])
def test_an_image_alone_is_the_image_in_a_batch(kind, batch, tokens, channels, backend):
    inputs = make_inputs(kind, batch=batch, num_tokens=tokens, channels=channels)
    together = inputs.run(backend)
    for b in range(batch):
        assert_same_bits(inputs.image(b).run(backend), Condensed(*(t[b : b + 1] for t in together)), f"image {b}")


@pytest.mark.parametrize("batch", [2, 3, 9])
@pytest.mark.parametrize("kind", ["parallel", "random"])
def test_batch_and_threads_at_awkward_sizes(kind, batch, cpp):
    """158 x 952 parallel tokens: there a library's matrix product changes the kept set with batch and threads."""
    inputs = make_inputs(kind, batch=batch, num_tokens=158, channels=952, num_anchors=40, num_background=20)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(inputs.run(cpp))
            assert_same_bits(results[-1], results[0], f"{count} threads")
            for b in range(batch):
                alone = inputs.image(b).run(cpp)
                assert_same_bits(alone, Condensed(*(t[b : b + 1] for t in results[0])), f"image {b}, {count} threads")
    finally:
        torch.set_num_threads(threads)


def test_threads_share_one_large_image(cpp):
    """Above 576 tokens the tiles are cut into macro-blocks, and a thread's share ends inside one."""
    inputs = make_inputs("clustered", batch=1, num_tokens=1000, channels=70, num_anchors=60, num_background=30)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = inputs.run(cpp)
        for count in (2, 5, 7):
            torch.set_num_threads(count)
            assert_same_bits(inputs.run(cpp), expected, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


def test_permuting_tokens_permutes_the_result(fast):
    """Where there are no ties: random features, and positions that go along."""
    inputs = make_inputs("positions", batch=1, num_tokens=40, channels=24)
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(
        inputs,
        features=inputs.features[:, permutation],
        scores=inputs.scores[:, permutation],
        positions=inputs.positions[:, permutation],
    )
    plain, mixed = inputs.run(fast), shuffled.run(fast)
    back = permutation[mixed.indices[0]]  # original positions, in the shuffled order of rows
    assert torch.equal(back.sort().values, plain.indices[0])
    row = torch.searchsorted(plain.indices[0], back)  # row of the shuffled result -> row of the plain one
    assert torch.equal(row[mixed.assignment[0]], plain.assignment[0][permutation])
    assert torch.allclose(mixed.merged[0], plain.merged[0][row], rtol=0, atol=1e-6)
    assert torch.allclose(mixed.mass[0], plain.mass[0][row], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["clustered", "negative"])
def test_surroundings_do_not_matter(kind, fast):
    inputs = make_inputs(kind, num_tokens=40, channels=64)
    expected = inputs.run(fast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(inputs.run(fast), expected, "autocast")
    with torch.inference_mode():
        assert_same_bits(inputs.run(fast), expected, "inference mode")
    precision = torch.get_float32_matmul_precision()
    try:
        for setting in ("high", "medium"):
            torch.set_float32_matmul_precision(setting)
            assert_same_bits(inputs.run(fast), expected, f"matmul precision {setting}")
    finally:
        torch.set_float32_matmul_precision(precision)


def test_subnormal_numbers_count_on_every_thread(cpp):
    """torch.set_flush_denormal acts on the calling thread alone; the result must not depend on who computes it."""
    inputs = make_inputs("random", batch=1, num_tokens=500, channels=40)
    inputs = dataclasses.replace(inputs, features=inputs.features * 1e-39, grid=(20, 25))
    expected, threads = inputs.run(cpp), torch.get_num_threads()
    try:
        for flush in (True, False):
            torch.set_flush_denormal(flush)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert_same_bits(inputs.run(cpp), expected, f"flush {flush}, {count} threads")
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_scores_scale_out(fast):
    """Scores enter through scores / mean: a power of two changes nothing but the mass, down to subnormals."""
    inputs = make_inputs("random", num_tokens=24)
    expected = inputs.run(fast)
    for exponent in (-100, 60):
        scaled = dataclasses.replace(inputs, scores=inputs.scores * 2.0**exponent).run(fast)
        assert_same_bits(scaled[:3], expected[:3], f"2^{exponent}")
        assert torch.equal(scaled.mass, expected.mass * 2.0**exponent)


def test_dtypes_may_differ(fast):
    inputs = make_inputs("random", num_tokens=24)
    mixed = dataclasses.replace(
        inputs,
        features=inputs.features.bfloat16(),
        scores=inputs.scores.half(),
        keys=inputs.features.clone(),
    )
    result = mixed.run(fast)
    assert (result.merged.dtype, result.mass.dtype) == (torch.bfloat16, torch.float32)
    assert_matches_reference(result, mixed, backend=fast)


@pytest.mark.parametrize("wide", ["features", "scores", "keys"])
def test_fp64_where_an_input_is_fp64(wide, cpp):
    inputs = make_inputs("keys", num_tokens=24)
    inputs = dataclasses.replace(inputs, **{wide: getattr(inputs, wide).double()})
    result = inputs.run(cpp)
    assert result.mass.dtype == (torch.float32 if wide == "keys" else torch.float64)
    assert_matches_reference(result, inputs, backend=cpp)


def test_empty_batch(backend):
    result = make_inputs("random", batch=0, num_tokens=12, num_anchors=3, num_background=2).run(backend)
    assert [tuple(t.shape) for t in result] == [(0, 5, 16), (0, 5), (0, 12), (0, 5)]
    assert [t.dtype for t in result] == [torch.float32, torch.int64, torch.int64, torch.float32]


def test_masked_tokens_kept_for_want_of_valid_ones(backend):
    inputs = make_inputs("random", batch=1, num_tokens=6, num_anchors=2, num_background=2)
    inputs = dataclasses.replace(inputs, grid=(2, 3), mask=torch.tensor([[False, False, True, False, False, False]]))
    result = inputs.run(backend)
    assert result.indices.tolist() == [[0, 1, 2, 3]]  # the valid one, then by index
    assert result.assignment.tolist() == [[-1, -1, 2, -1, -1, -1]]
    assert torch.equal(result.merged[0], inputs.features[0, :4])
    assert result.mass.tolist() == [[0, 0, inputs.scores[0, 2].item(), 0]]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(1, [9]), (2, [0, 9]), (4, [0, 2, 5, 9]), (7, [0, 2, 5, 7, 8, 9, 10]), (9, [0, 1, 2, 3, 5, 7, 8, 9, 10])],
)
def test_broken_tokens_before_masked_ones_by_index(kept, expected, backend):
    """Token 9 alone is valid; 0, 2, 5, 7, 8, 10 have a NaN in key or score; 1, 3, 4, 6 are masked."""
    inputs = make_inputs("random", batch=1, num_tokens=11, num_anchors=(kept + 1) // 2, num_background=kept // 2)
    features, scores = inputs.features.clone(), inputs.scores.clone()
    features[0, [0, 5, 8], 0] = float("nan")
    scores[0, [2, 7, 10]] = float("inf")
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[0, [1, 3, 4, 6]] = False
    inputs = dataclasses.replace(inputs, features=features, scores=scores, mask=mask)
    assert inputs.run(backend).indices.tolist() == [expected]


def test_first_background_pick_is_the_most_similar_token(backend):
    inputs = make_inputs("random", batch=1, num_tokens=24, num_anchors=0, num_background=1)
    s = torch.nn.functional.cosine_similarity(inputs.features[0][:, None], inputs.features[0][None], dim=-1)
    assert inputs.run(backend).indices.item() == s.sum(dim=1).argmax()


def test_python_call_equals_the_raw_operator(cpp):
    inputs = make_inputs("masked", num_tokens=24)
    raw = torch.ops.condense.select_and_merge(*inputs.args, **inputs.options)
    assert_same_bits(Condensed(*raw), select_and_merge(*inputs.args, **inputs.options))
