"""scale_prior=False, wherever the flagship goes: priors are utilities as they are. So it is AngelSlim's IDPruner."""

import functools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import condense_kernels as ck
from condense_kernels import Condensed
from condense_kernels._dispatch import backends
from condense_kernels._dispatch.library import SCHEMAS
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.cli.check import count_other_picks
from condense_kernels.models.methods import Condenser
from condense_kernels.testing import KINDS, Inputs, assert_same_bits, exact_similarity, make_inputs

MAKE = functools.partial(make_inputs, num_tokens=30, channels=8, num_anchors=7, num_background=6, scale_prior=False)
FAST = [b for b in ("cpp", "triton") if backends.unavailable(b, torch.device("cpu")) is None]
PATHS = [{}, {"assign_in_select": True}, {"store_s": False}]  # the Triton kernels'


def in_a_row(inputs: Inputs, backend: str = "auto") -> Condensed:
    """The operators of the stages, with no sbar."""
    where = {"grid": inputs.grid, "positions": inputs.positions, "spatial_weight": inputs.spatial_weight}
    keys = inputs.features if inputs.keys is None else inputs.keys
    of_anchors, of_background = inputs.suppressions
    s, _, g, tier = ck.similarity(keys, inputs.scores, inputs.mask, backend=backend)
    pick = functools.partial(ck.greedy_select, s, backend=backend)
    anchors = pick(inputs.scores, inputs.num_anchors, tier=tier, suppression=of_anchors)
    rest = tier.scatter(1, anchors, 3)
    background = pick(g, inputs.num_background, tier=rest, suppression=of_background)
    indices = torch.cat([anchors, background], dim=1).sort(dim=1).values
    assignment = ck.assign(s, indices, tier=tier, **where, backend=backend)
    merged, mass = ck.merge(inputs.features, inputs.scores, indices, assignment, backend=backend)
    return Condensed(merged, indices, assignment, mass)


def test_these_inputs_tell_it_apart():
    for kind in ("clustered", "random", "masked", "nan"):
        scaled = MAKE(kind, scale_prior=True)
        assert not torch.equal(scaled.run().indices, MAKE(kind).run().indices), kind


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["clustered", "random", "masked", "nan", "zero_keys"])
@pytest.mark.parametrize("factors", [(1.0, None), (0.25, 2.0), (0.0, 1.0)], ids=str)
def test_the_flagship_is_its_stages_in_a_row(kind, factors, path, fast):
    if path and fast != "triton":
        return
    inputs = MAKE(kind, suppression=factors[0], background_suppression=factors[1])
    with trying(FusedConfig, **path):
        assert_same_bits(inputs.run(fast), in_a_row(inputs, fast))


@settings(max_examples=40)
@given(
    kind=st.sampled_from(list(KINDS)),
    n=st.integers(1, 60),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    suppression=st.sampled_from([0.0, 0.5, 1.0, 3.0, 3e38]),
    seed=st.integers(0, 9),
)
def test_of_any_kind(kind, n, share, suppression, seed):
    k = max(1, round(share[0] * n))
    anchors = round(share[1] * k)
    inputs = make_inputs(
        kind, num_tokens=n, channels=6, num_anchors=anchors, num_background=k - anchors, seed=seed,
        suppression=suppression, scale_prior=False,
    )  # fmt: skip
    for backend in ("auto", "reference"):
        assert_same_bits(inputs.run(backend), in_a_row(inputs, backend), backend)


def test_where_it_goes(cpp):
    """out=, packed, a budget, a layer, the models' method, the raw operator; and the check compares with it."""
    inputs = MAKE("clustered", num_anchors=8, num_background=4, suppression=0.5)
    features, scores = inputs.args[:2]
    expected = in_a_row(inputs)
    options = {"suppression": 0.5, "scale_prior": False}
    into = Condensed(*map(torch.empty_like, expected))
    workspace = torch.empty(ck.workspace_bytes(*inputs.args, **inputs.options), dtype=torch.uint8)
    ck.select_and_merge(*inputs.args, **inputs.options, out=into, workspace=workspace)
    assert_same_bits(into, expected)
    assert_same_bits(ck.condense(features, scores, 12, 1 / 3, inputs.grid, **options), expected)
    assert_same_bits(ck.Condense(8, 4, grid=inputs.grid, **options)(features, scores), expected)
    condenser = Condenser("condensevlm", background_ratio=1 / 3, **options)
    assert_same_bits(condenser.batch(features, scores, 12, inputs.grid), expected)
    alone = [list(x) for x in (features, scores)]
    packed = condenser.packed(*alone, [12, 12], [inputs.grid] * 2)
    assert_same_bits(Condensed(*map(torch.stack, zip(*packed, strict=True))), expected)
    raw = torch.ops.condense.select_and_merge(*inputs.args, grid=list(inputs.grid), **options)
    assert_same_bits(Condensed(*raw), expected)
    wide = MAKE("unscaled", dtype=torch.float64)
    assert count_other_picks(wide.run("reference"), wide, exact_similarity(wide)) == 0


def test_packed(backend):
    images = MAKE("clustered", suppression=0.5, background_suppression=2.0)
    expected = Condensed(*(x.flatten(0, 1) for x in in_a_row(images, backend)))
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in ([0, 30, 30, 60], [0, 7, 7, 14], [0, 6, 6, 12])]
    positions = torch.cartesian_prod(*map(torch.arange, images.grid)).repeat(2, 1)
    options = {"suppression": 0.5, "background_suppression": 2.0, "scale_prior": False, "backend": backend}
    tokens = images.features.flatten(0, 1), images.scores.flatten()
    for path in PATHS if backend == "triton" else [{}]:
        with trying(FusedConfig, **path):
            packed = ck.select_and_merge_varlen(*tokens, *offsets, 26, 30, positions=positions, **options)
        assert_same_bits(packed, expected)


@pytest.mark.parametrize(
    "op", ["select_and_merge", "select_and_merge_out", "workspace_bytes", "select_and_merge_varlen"]
)
def test_callers_of_the_schema_without_it_need_not_change(op):
    schema = SCHEMAS[op]
    assert schema.count("bool scale_prior=True") == 1
    before = schema.replace(", bool scale_prior=True, Tensor? mean_similarity=None", "")  # which came later
    old, new = (torch._C.parse_schema(f"condense::{op}{text}") for text in (before, schema))
    assert new.is_backward_compatible_with(old)
    assert new.check_forward_compatible_with(old) == (True, "")


# AngelSlim's IDPruner


def idpruner(features, importance, k, weight) -> list[int]:
    """From its formula, in numpy fp64: weight * importance - (1 - weight) * the largest cosine to what is kept."""
    x = features.astype("float64")
    norm = numpy.sqrt((x**2).sum(axis=1, keepdims=True))
    x = numpy.divide(x, norm, out=numpy.zeros_like(x), where=norm > 0)
    cosine = x @ x.T
    relevance = weight * importance.astype("float64")
    kept = [int(relevance.argmax())]
    nearest = cosine[kept[0]].copy()
    while len(kept) < k:
        score = relevance - (1 - weight) * nearest
        score[kept] = -numpy.inf
        kept.append(int(score.argmax()))
        nearest = numpy.maximum(nearest, cosine[kept[-1]])
    return sorted(kept)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, 1.0])
def test_idpruner(weight, backend):
    """On a grid of importances and clustered tokens, whose margins are far above fp32's rounding."""
    generator = torch.Generator().manual_seed(int(10 * weight))
    centres = torch.randn(6, 16, generator=generator)
    features = centres.repeat_interleave(8, dim=0) + 0.5 * torch.randn(48, 16, generator=generator)
    importance = torch.randperm(48, generator=generator) / 48
    for kind in ("as they are", "equal", "a zero", "bf16"):
        x = features.clone()
        if kind == "equal":
            x[1::2] = x[::2]
        elif kind == "a zero":
            x[5] = 0
        elif kind == "bf16":
            x = x.bfloat16()
        for k in (1, 12, 48):
            out = ck.condense(
                x[None], (weight * importance)[None], k, 0, suppression=1 - weight, scale_prior=False,
                spatial_weight=0.0, backend=backend,
            )  # fmt: skip
            assert out.indices[0].tolist() == idpruner(x.float().numpy(), importance.numpy(), k, weight), (kind, k)
