"""The mean similarity given, wherever the flagship goes: its picks, Eq. 3 by itself, and the estimate of E|S|."""

import dataclasses
import functools
import math

import pytest
import torch

import condense_kernels as ck
from condense_kernels import Condensed, budget
from condense_kernels._dispatch.library import SCHEMAS
from condense_kernels.ops.similarity import reference
from condense_kernels.ops.similarity.mean import step_of
from condense_kernels.testing import (
    KINDS,
    Inputs,
    assert_matches_reference,
    assert_same_bits,
    make_inputs,
    similarity_bound,
)


def given(inputs: Inputs, mean: float | None = None) -> Inputs:
    """With a mean for each image: the reference's, or one of its own."""
    keys = inputs.features if inputs.keys is None else inputs.keys
    sbar = reference.similarity(keys, inputs.scores, inputs.mask)[1]
    means = sbar.float() if mean is None else torch.full_like(sbar, mean)
    return dataclasses.replace(inputs, mean_similarity=means)


# Picks


INTERPRETED = [("clustered", torch.bfloat16)]  # of Triton, beside these kinds in fp32
INTERPRETED += [
    (kind, torch.float32) for kind in ("random", "ties", "nan", "masked", "keys", "two_factors", "unscaled")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input(kind, dtype, fast):
    if fast == "triton" and (kind, dtype) not in INTERPRETED:
        return
    inputs = given(make_inputs(kind, num_tokens=30, dtype=dtype))
    assert_matches_reference(inputs.run(fast), inputs, backend=fast)


LONG = {  # tokens, anchors, background: what is computed of s
    "rows": (700, 30, 10),
    "rows, one loop": (650, 40, 0),
    "all of it": (200, 120, 60),
    "rows, the other loop": (500, 0, 20),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["clustered", "ties", "duplicates", "negative", "nan", "masked", "top_k", "unscaled"])
@pytest.mark.parametrize("of", LONG)
def test_the_flagship_is_its_stages_in_a_row(of, kind, dtype, cpp):
    tokens, anchors, background = LONG[of]
    counts = {"num_anchors": anchors, "num_background": background}
    inputs = given(make_inputs(kind, num_tokens=tokens, channels=20, dtype=dtype, **counts))
    assert_same_bits(inputs.run(cpp), inputs.run_stages(cpp).condensed)


def nested_clusters(groups: int, size: int, levels: int, num_anchors: int, num_background: int) -> Inputs:
    """Groups of tokens, their halves, quarters, ...: the longer two are together, the more alike they are. The tokens
    that come next are all of a few clusters, and most of them fall behind once one of theirs is picked."""
    token = torch.arange(groups * size)
    group, within = token // size, token % size
    cells = [group * 2**level + within * 2**level // size for level in range(levels)]
    keys = torch.cat([torch.nn.functional.one_hot(cell).float() for cell in cells], dim=1)
    scores, features = 1 - group / (64 * groups), torch.rand(1, len(token), 8)
    options = {"keys": keys[None], "grid": (groups, size), "mean_similarity": torch.ones(1)}
    return Inputs(features, scores[None], num_anchors, num_background, **options)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("counts", [(64, 4), (60, 0), (4, 60), (0, 64)], ids=str)
@pytest.mark.parametrize("shape", [(4, 112, 5), (3, 144, 5), (4, 108, 7), (3, 149, 5)], ids=str)
def test_where_rounds_end_early(shape, counts, threads, cpp):
    """Then s is computed after all, for the rest of the anchors or of the background; the last fills no cache lines."""
    inputs = nested_clusters(*shape, *counts)
    expected = inputs.run_stages(cpp).condensed
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_bits(inputs.run(cpp), expected)
        workspace = torch.empty(ck.workspace_bytes(*inputs.args, **inputs.options), dtype=torch.uint8)
        assert_same_bits(ck.select_and_merge(*inputs.args, **inputs.options, workspace=workspace), expected)
    finally:
        torch.set_num_threads(before)


def test_fewer_valid_tokens_than_are_kept(cpp):
    """The others have no similarities, whatever the memory held where their rows are kept."""
    inputs = given(make_inputs("positions", batch=1, num_tokens=600, num_anchors=30, num_background=10), 0.1)
    inputs.features[0, 20:, 0] = math.nan
    workspace = torch.full((ck.workspace_bytes(*inputs.args, **inputs.options),), 0x7F, dtype=torch.uint8)
    result = ck.select_and_merge(*inputs.args, **inputs.options, workspace=workspace)
    assert_same_bits(result, inputs.run_stages(cpp).condensed)


@pytest.mark.parametrize("kind", ["random", "clustered", "masked", "positions", "keys", "two_factors"])
def test_the_exact_mean_gives_the_exact_picks(kind, fast):
    inputs = make_inputs(kind, num_tokens=40, channels=24)
    assert_same_bits(given(inputs).run(fast), inputs.run(fast))


def test_another_mean_gives_other_picks(backend):
    inputs = make_inputs("clustered", num_tokens=30, channels=8)
    assert not torch.equal(given(inputs, 0.01).run(backend).indices, given(inputs, 10.0).run(backend).indices)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, 3e38, -0.5, math.inf, -math.inf, math.nan])
def test_hostile_numbers(value, backend):
    """As greedy_select takes them for sbar, and in their image alone."""
    inputs = given(make_inputs("clustered", num_tokens=24, channels=8))
    inputs.mean_similarity[0] = value
    result = inputs.run(backend)
    assert_same_bits(result, inputs.run_stages(backend).condensed)
    assert all(len(set(image)) == len(image) for image in result.indices.tolist())
    alone = inputs.image(1).run(backend)
    assert_same_bits(Condensed(*(t[1:] for t in result)), alone)


def test_one_number_is_that_of_every_image(backend):
    inputs = make_inputs("random", num_tokens=24)
    expected = given(inputs, 0.25).run(backend)
    for number in (
        0.25,
        torch.full((2,), 0.25),
        torch.full((2,), 0.25, dtype=torch.float64),
        torch.tensor([0.25]).expand(2),
    ):
        result = ck.select_and_merge(*inputs.args, **inputs.options | {"mean_similarity": number}, backend=backend)
        assert_same_bits(result, expected)


@pytest.mark.parametrize("path", ["dense", "packed"])
def test_batch_layout_threads(path, fast):
    """One image among others, in other layouts, on more threads, dense or packed."""
    inputs = given(make_inputs("clustered", batch=3, num_tokens=30 if fast == "triton" else 560, channels=40))
    inputs.mean_similarity[1] *= 2
    inputs = dataclasses.replace(inputs, num_anchors=9, num_background=5)
    expected = inputs.run(fast)
    threads, n = torch.get_num_threads(), inputs.scores.shape[1]
    try:
        for count in (1,) if fast == "triton" else (1, 2, 3):
            torch.set_num_threads(count)
            if path == "dense":
                for b in range(3):
                    assert_same_bits(inputs.image(b).run(fast), Condensed(*(t[b : b + 1] for t in expected)))
                turned = dataclasses.replace(inputs, features=inputs.features.mT.contiguous().mT)
                assert_same_bits(turned.run(fast), expected)
                continue
            offsets = [torch.tensor([0, k, k, 2 * k, 3 * k], dtype=torch.int32) for k in (n, 9, 5)]
            means = inputs.mean_similarity
            packed = ck.select_and_merge_varlen(
                inputs.features.flatten(0, 1), inputs.scores.flatten(), *offsets, 42, n,
                positions=torch.cartesian_prod(*map(torch.arange, inputs.grid)).repeat(3, 1),
                mean_similarity=torch.stack([means[0], means[0] * math.nan, means[1], means[2]]), backend=fast,
            )  # fmt: skip
            assert_same_bits(packed, Condensed(*(t.flatten(0, 1) for t in expected)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("tokens", "most"), [(576, 4), (3000, 40)])
def test_no_more_memory_than_s_takes(tokens, most, cpp):
    """Of s itself nothing is touched, but it is counted: copies of tokens may need it."""
    inputs = given(make_inputs("random", batch=1, num_tokens=tokens, channels=8, num_anchors=9, num_background=5), 0.1)
    exact = dataclasses.replace(inputs, mean_similarity=None)
    needed = [ck.workspace_bytes(*i.args, **i.options) for i in (inputs, exact)]
    assert needed[0] < needed[1] + most * 2**20


def test_long_images_store_nothing(cpp, monkeypatch):
    inputs = given(
        make_inputs("clustered", batch=1, num_tokens=5000, channels=8, num_anchors=30, num_background=10), 0.1
    )
    assert ck.workspace_bytes(*inputs.args, **inputs.options) < 4 * 5000 * (40 + 48 + 128 + 200) + 2**22
    assert_same_bits(inputs.run(cpp), inputs.run_stages(cpp).condensed)


# Global similarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "clustered", "negative", "zero_keys", "nan", "masked", "magnitudes"])
def test_global_similarity_is_the_sum_of_cosines(kind, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is served on CPU by the C++ kernels alone, as the contract says")
    for tokens, channels in ((1, 1), (70, 17)) if backend == "triton" else ((1, 1), (30, 16), (131, 37)):
        inputs = make_inputs(kind, num_tokens=tokens, channels=channels, dtype=dtype)
        keys = inputs.features if inputs.keys is None else inputs.keys
        g, tier = ck.global_similarity(keys, inputs.scores, inputs.mask, backend=backend)
        expected = reference.similarity(keys, inputs.scores, inputs.mask)
        assert torch.equal(tier, expected[3]) and g.dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        bound = tokens * similarity_bound(channels, g.dtype)
        assert (g.double() - expected[2]).abs().max() <= bound
        assert not (g.signbit() & (g == 0)).any()  # -0 is none


def test_global_similarity_of_wide_keys_and_of_equal_ones(backend):
    keys = torch.randn(1, 20, 1500)  # beyond what is converted at a time
    keys[0, 13] = keys[0, 4]
    g, _ = ck.global_similarity(keys, backend=backend)
    assert (g - ck.global_similarity(keys, backend="reference")[0]).abs().max() < 1e-4
    assert g[0, 13] == g[0, 4]


# The estimate


def scene(height: int, width: int, channels: int = 16, seed: int = 0) -> torch.Tensor:
    """Neighbours alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, 5, 5, generator=generator) + 0.3 * torch.randn(
        1, channels, 1, 1, generator=generator
    )
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    noise = torch.randn(1, channels, height, width, generator=generator)
    return (smooth + 0.2 * noise).flatten(2).mT


@pytest.mark.parametrize("size", [(24, 24), (21, 21), (27, 27), (16, 36), (13, 64), (32, 32), (35, 35)], ids=str)
def test_the_estimate_is_near(size):
    errors = []
    for seed in range(6):
        keys = scene(*size, seed=seed)
        exact = ck.similarity(keys)[1]
        errors.append((ck.mean_similarity(keys, grid=size) / exact - 1).abs().item())
    assert max(errors) < 0.05 and sum(errors) / len(errors) < 0.025


@pytest.mark.parametrize("size", [(24, 24), (21, 21), (16, 36), (34, 55), (1, 97), (128, 128), (2, 3, 64)], ids=str)
def test_a_step_meets_all_rows_and_columns(size):
    tokens, width = math.prod(size), size[-1]
    step = step_of(tokens, width, 64)
    assert math.gcd(step, tokens) == 1 == math.gcd(step, width)
    places = [i * step % tokens for i in range(64)]
    assert len({place % width for place in places}) >= min(width, 64) * 2 // 3
    assert len({place // width for place in places}) >= min(tokens // width, 64) * 2 // 3


@pytest.mark.parametrize("tokens", [1, 2, 40, 64])
def test_of_few_tokens_it_is_the_mean(tokens, backend):
    keys, mask = torch.randn(2, tokens, 5), torch.rand(2, tokens) > 0.3
    for valid in (None, mask):
        estimate = ck.mean_similarity(keys, 64, mask=valid, backend=backend)
        assert torch.equal(estimate, ck.similarity(keys, None, valid, backend=backend)[1])


def test_padding_is_not_sampled(backend):
    """Nor looked at; with as many valid tokens as are sampled, or fewer, it is the mean of those."""
    keys = torch.randn(4, 200, 6)
    mask = torch.zeros(4, 200, dtype=torch.bool)
    for image, valid in enumerate((1, 30, 64, 150)):
        mask[image, torch.randperm(200)[:valid]] = True
    keys[2, :9] = 0
    exact = ck.similarity(keys, None, mask, backend=backend)[1]
    keys[~mask] = math.nan
    estimate = ck.mean_similarity(keys, 64, mask=mask, backend=backend)
    assert torch.allclose(estimate[:3], exact[:3], rtol=1e-5)
    assert abs(estimate[3] / exact[3] - 1) < 0.1
    nobody = ck.mean_similarity(keys, 64, mask=torch.zeros_like(mask), backend=backend)
    assert torch.equal(nobody, torch.zeros(4))


def test_an_image_alone_has_the_same_estimate(backend):
    keys, mask = torch.randn(3, 100, 6), torch.rand(3, 100) > 0.2
    together = ck.mean_similarity(keys, 16, mask=mask, backend=backend)
    for b in range(3):
        assert torch.equal(
            ck.mean_similarity(keys[b : b + 1], 16, mask=mask[b : b + 1], backend=backend), together[b : b + 1]
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ck.mean_similarity(keys, 16, mask=mask, backend=backend), together)


def test_broken_and_zero_keys():
    keys = torch.randn(1, 300, 8)
    exact = ck.similarity(keys)[1]
    broken = keys.clone()
    broken[0, ::10] = math.nan
    assert abs(ck.mean_similarity(broken, 128) / exact - 1) < 0.1
    assert ck.mean_similarity(torch.zeros(2, 300, 8), 64).tolist() == [0, 0]
    assert abs(ck.mean_similarity(torch.ones(2, 300, 8), 64) - 1).max() < 1e-6
    assert torch.isfinite(ck.mean_similarity(torch.full((1, 300, 8), math.nan), 64)).all()
    assert ck.mean_similarity(keys.double()).dtype == torch.float64
    assert ck.mean_similarity(keys[:0]).shape == (0,)


# Where it goes


def test_an_estimate_by_itself(cpp, monkeypatch):
    """Where it pays; a third of what the mean is, so that the picks tell."""
    inputs = make_inputs("clustered", num_tokens=1024, num_anchors=192, num_background=64)
    inputs = dataclasses.replace(inputs, mask=torch.rand(2, 1024) > 0.2)
    third = ck.mean_similarity(inputs.features, mask=inputs.mask, grid=inputs.grid) / 3
    asked = []
    monkeypatch.setattr(budget, "estimate", lambda keys, **options: asked.append(options) or third)
    features, scores, grid, mask = inputs.features, inputs.scores, inputs.grid, inputs.mask
    call = functools.partial(ck.condense, features, scores, 256, 0.25, grid, mask=mask)
    expected, exact = dataclasses.replace(inputs, mean_similarity=third).run(cpp), inputs.run(cpp)
    assert not torch.equal(expected.indices, exact.indices)
    assert_same_bits(call(exact=False), expected)
    assert asked == [{"mask": mask, "grid": grid, "backend": "auto"}]
    assert_same_bits(call(), exact)
    assert_same_bits(call(mean_similarity=third), expected)
    given = call(mean_similarity=third / 2, exact=False)
    assert_same_bits(given, dataclasses.replace(inputs, mean_similarity=third / 2).run(cpp))
    for n, kept in ((1024, 257), (1023, 200)):
        ck.condense(features[:, :n], scores[:, :n], kept, mask=mask[:, :n], spatial_weight=0.0, exact=False)
    assert len(asked) == 1


def test_a_layer_takes_it(backend):
    inputs = given(make_inputs("masked", num_tokens=24))
    layer = ck.Condense(inputs.num_anchors, inputs.num_background, grid=inputs.grid, backend=backend)
    result = layer(*inputs.args[:2], mask=inputs.mask, mean_similarity=inputs.mean_similarity)
    assert_same_bits(result, inputs.run(backend))


@pytest.mark.filterwarnings("ignore")
def test_compiled(cpp):
    features, scores = torch.randn(2, 1024, 8), torch.rand(2, 1024)

    def call(features, scores):
        return ck.condense(features, scores, 12, grid=(32, 32), exact=False)

    expected = call(features, scores)
    assert_same_bits(Condensed(*torch.compile(call, backend="aot_eager", fullgraph=True)(features, scores)), expected)
    numbers = torch.func.vmap(lambda f, a: ck.select_and_merge(f, a, 5, 2, grid=(32, 32), mean_similarity=0.25))
    each = [ck.select_and_merge(f, a, 5, 2, grid=(32, 32), mean_similarity=0.25) for f, a in ((features, scores),) * 2]
    mapped = numbers(torch.stack([features] * 2), torch.stack([scores] * 2))
    assert_same_bits(Condensed(*mapped), Condensed(*map(torch.stack, zip(*each, strict=True))))


WRONG = [
    (-0.5, ValueError, "expected a finite number >= 0, got -0.5"),
    (math.nan, ValueError, "expected a finite number >= 0, got nan"),
    (math.inf, ValueError, "expected a finite number >= 0, got inf"),
    ("much", TypeError, "expected a number, got str"),
    (True, TypeError, "expected a number, got bool"),
    (torch.rand(3), ValueError, r"expected shape \[B\] = \[2\]"),
    (torch.rand(2, 1), ValueError, "expected 1 axes"),
    (torch.rand(2).half(), TypeError, "expected dtype float32, float64, got float16"),
]


@pytest.mark.parametrize(("value", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_numbers(value, error, message):
    inputs = make_inputs("random", num_tokens=24)
    with pytest.raises(error, match=f"mean_similarity: {message}"):
        ck.select_and_merge(*inputs.args, grid=inputs.grid, mean_similarity=value)
    offsets = [torch.tensor([0, k, 2 * k], dtype=torch.int32) for k in (24, 6, 3)]
    with pytest.raises(error, match=f"mean_similarity: {message.replace('B', 'S')}"):
        ck.select_and_merge_varlen(
            inputs.features.flatten(0, 1), inputs.scores.flatten(), *offsets, 18, 24, spatial_weight=0.0,
            mean_similarity=value,
        )  # fmt: skip


def test_wrong_arguments_of_the_estimate():
    keys = torch.rand(2, 24, 4)
    for options, error, message in [
        ({"sample": 1}, ValueError, "sample: expected 2 <= sample"),
        ({"sample": 2.5}, TypeError, "sample: expected an int"),
        ({"grid": (5, 5)}, ValueError, "grid: expected"),
        ({"mask": torch.ones(2, 24)}, TypeError, "mask: expected dtype bool"),
        ({"backend": "cuda"}, ValueError, "backend: expected"),
    ]:
        with pytest.raises(error, match=message):
            ck.mean_similarity(keys, **options)
    with pytest.raises(TypeError, match="exact: expected True or False"):
        ck.condense(keys, torch.rand(2, 24), 6, grid=(4, 6), exact="no")


def test_the_debug_switch_sees_what_is_no_mean():
    inputs = make_inputs("random", num_tokens=24)
    for value in (math.nan, -1.0):
        call = functools.partial(ck.select_and_merge, *inputs.args, grid=inputs.grid)
        call(mean_similarity=torch.tensor([0.5, value]))
        with ck.debug(), pytest.raises(ValueError, match="mean_similarity: expected .* at image 1"):
            call(mean_similarity=torch.tensor([0.5, value]))


def test_what_is_written_is_apart(cpp):
    inputs = given(make_inputs("random", num_tokens=24))
    out = inputs.run(cpp)
    overlapping = dataclasses.replace(inputs, mean_similarity=out.mass.view(-1)[:2])
    with pytest.raises(ValueError, match="out.mass: expected memory apart from that of mean_similarity"):
        ck.select_and_merge(*overlapping.args, **overlapping.options, out=out)
    with pytest.raises(RuntimeError, match="mass: expected memory apart from that of mean_similarity"):
        torch.ops.condense.select_and_merge_out(*overlapping.args, **overlapping.options, **out._asdict())


@pytest.mark.parametrize(
    "op", ["select_and_merge", "select_and_merge_out", "workspace_bytes", "select_and_merge_varlen"]
)
def test_callers_of_the_schema_without_it_need_not_change(op):
    schema = SCHEMAS[op]
    assert schema.count("Tensor? mean_similarity=None") == 1
    before = schema.replace(", Tensor? mean_similarity=None", "")
    old, new = (torch._C.parse_schema(f"condense::{op}{text}") for text in (before, schema))
    assert new.is_backward_compatible_with(old)
    assert new.check_forward_compatible_with(old) == (True, "")
