"""A factor of its own for the background (Eq. 4), wherever the flagship takes the anchors' (Eq. 2)."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nested import nested_tensor_from_jagged

import condense_kernels as ck
from condense_kernels import Condensed
from condense_kernels._dispatch.library import SCHEMAS
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.cli.check import count_other_picks
from condense_kernels.testing import KINDS, Inputs, assert_same_bits, exact_similarity, make_inputs

PAIRS = [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0), (2.0, 0.5), (3e38, 0.5), (0.5, 3e38), (2.0, None), (0.0, None)]
MAKE = functools.partial(make_inputs, num_tokens=30, channels=8, num_anchors=7, num_background=6)


def in_a_row(inputs: Inputs, of_anchors: float, of_background: float, backend: str = "auto") -> Condensed:
    """The operators of the stages, each greedy with its factor."""
    where = {"grid": inputs.grid, "positions": inputs.positions, "spatial_weight": inputs.spatial_weight}
    keys = inputs.features if inputs.keys is None else inputs.keys
    s, sbar, g, tier = ck.similarity(keys, inputs.scores, inputs.mask, backend=backend)
    pick = functools.partial(ck.greedy_select, sbar=sbar if inputs.scale_prior else None, backend=backend)
    anchors = pick(s, inputs.scores, inputs.num_anchors, tier=tier, suppression=of_anchors)
    rest = tier.scatter(1, anchors, 3)
    background = pick(s, g, inputs.num_background, tier=rest, suppression=of_background)
    indices = torch.cat([anchors, background], dim=1).sort(dim=1).values
    assignment = ck.assign(s, indices, tier=tier, **where, backend=backend)
    merged, mass = ck.merge(inputs.features, inputs.scores, indices, assignment, backend=backend)
    return Condensed(merged, indices, assignment, mass)


def test_these_inputs_tell_the_factors_apart():
    """Else the tests below could not see one in the other's place."""
    for kind in ("clustered", "random"):
        kept = [in_a_row(MAKE(kind), a, a if b is None else b).indices for a, b in PAIRS]
        assert len({tuple(indices.flatten().tolist()) for indices in kept}) == len(PAIRS), kind


@pytest.mark.parametrize("kind", ["clustered", "random", "masked", "nan"])
@pytest.mark.parametrize(("of_anchors", "of_background"), PAIRS)
def test_the_flagship_is_its_stages_in_a_row(of_anchors, of_background, kind, backend):
    inputs = MAKE(kind, suppression=of_anchors, background_suppression=of_background)
    expected = in_a_row(inputs, of_anchors, of_anchors if of_background is None else of_background, backend)
    result = inputs.run(backend)
    assert_same_bits(result, expected)
    assert_same_bits(inputs.run_stages(backend).condensed, expected)
    into = Condensed(*map(torch.empty_like, result))
    needed = ck.workspace_bytes(*inputs.args, **inputs.options, backend=backend)
    workspace = torch.empty(needed, dtype=torch.uint8)
    ck.select_and_merge(*inputs.args, **inputs.options, out=into, workspace=workspace, backend=backend)
    assert_same_bits(into, expected)


@pytest.mark.parametrize(("of_anchors", "of_background"), PAIRS)
def test_packed(of_anchors, of_background, backend):
    """Two images of one size, between them an empty segment; and the same as nested tensors."""
    images = MAKE("clustered", suppression=of_anchors, background_suppression=of_background)
    expected = in_a_row(images, of_anchors, of_anchors if of_background is None else of_background, backend)
    expected = Condensed(*(x.flatten(0, 1) for x in expected))
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in ([0, 30, 30, 60], [0, 7, 7, 14], [0, 6, 6, 12])]
    features, scores = images.features.flatten(0, 1), images.scores.flatten()
    positions = torch.cartesian_prod(*map(torch.arange, images.grid)).repeat(2, 1)
    options = {"suppression": of_anchors, "background_suppression": of_background, "backend": backend}
    packed = ck.select_and_merge_varlen(features, scores, *offsets, 26, 30, positions=positions, **options)
    assert_same_bits(packed, expected)
    starts = offsets[0].long()
    features, scores, positions = (nested_tensor_from_jagged(x, starts) for x in (features, scores, positions))
    nested = ck.select_and_merge_varlen(features, scores, None, *offsets[1:], 26, 30, positions=positions, **options)
    assert_same_bits([part.values() for part in nested], expected)


factors = st.sampled_from([0.0, 0.5, 1.0, 3.0, 3e38]) | st.floats(0, 2.0**100, width=32)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(list(KINDS)),
    n=st.integers(1, 60),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    of_anchors=factors,
    of_background=st.none() | factors,
    seed=st.integers(0, 9),
)
def test_any_two_factors(kind, n, share, of_anchors, of_background, seed):
    k = max(1, round(share[0] * n))
    num_anchors = round(share[1] * k)
    inputs = make_inputs(
        kind, num_tokens=n, channels=6, num_anchors=num_anchors, num_background=k - num_anchors, seed=seed,
        suppression=of_anchors, background_suppression=of_background,
    )  # fmt: skip
    for backend in ("auto", "reference"):
        expected = in_a_row(inputs, of_anchors, of_anchors if of_background is None else of_background, backend)
        assert_same_bits(inputs.run(backend), expected, backend)


def test_each_factor_of_0_is_top_k_of_its_own_prior(backend):
    """By hand: two directions, of which only the greedy that suppresses takes turns between."""
    features = torch.eye(2).repeat_interleave(4, dim=0)[None]  # g is 4 for all, so by index
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]])

    def kept(**factors) -> list[int]:
        out = ck.select_and_merge(features, scores, 2, 2, spatial_weight=0.0, **factors, backend=backend)
        return out.indices[0].tolist()

    many = 100.0
    assert kept(suppression=0.0) == [0, 1, 2, 3]
    assert kept(suppression=0.0, background_suppression=many) == [0, 1, 2, 4]
    assert kept(suppression=many, background_suppression=0.0) == [0, 1, 2, 4]
    assert kept(suppression=many) == [0, 1, 4, 5]


def test_zero_keys_scale_no_prior_whose_factor_is_0(backend):
    """E|S| is 0, and scaled with it all scores tie. The background's factor has no say in that, nor its 0."""
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.5, 0.0, 0.7, 0.2]])
    options = {"keys": torch.zeros(1, 8, 4), "spatial_weight": 0.0, "backend": backend}
    call = functools.partial(ck.select_and_merge, torch.rand(1, 8, 4), scores, 3, 2, **options)
    assert call(suppression=0.0, background_suppression=1.0).indices.tolist() == [[0, 1, 2, 3, 6]]
    assert call(suppression=1.0, background_suppression=0.0).indices.tolist() == [[0, 1, 2, 3, 4]]


def neighbours() -> Inputs:
    """Seven tokens with g = 7 + i * 2^-21, next to each other in fp32, and two anchors that have all the score."""
    keys = torch.zeros(1, 9, 3)
    keys[0, :7, 0], keys[0, :7, 1] = 1.0, 2.0**-21 * torch.arange(7)
    keys[0, 7:, 1:] = torch.eye(2)
    scores = torch.tensor([[0.0] * 7 + [1.0, 2.0]])
    return Inputs(keys, scores, num_anchors=2, num_background=2, spatial_weight=0.0)


PATHS = [{}, {"assign_in_select": True}, {"store_s": False}]  # the Triton kernels'


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("of_anchors", [0.0, 1.0])
def test_g_is_not_scaled_where_its_own_factor_is_0(of_anchors, path, backend):
    """Scaled, some of them are equal, and the lowest index is kept."""
    with trying(FusedConfig, **path):
        unscaled, scaled = (
            dataclasses.replace(neighbours(), suppression=of_anchors, background_suppression=factor).run(backend)
            for factor in (0.0, 1e-30)  # which is too small to suppress anything here
        )
    assert unscaled.indices.tolist() == [[5, 6, 7, 8]]
    assert scaled.indices.tolist() != unscaled.indices.tolist()


@pytest.mark.parametrize("path", PATHS[1:], ids=str)
@pytest.mark.parametrize(("of_anchors", "of_background"), PAIRS)
def test_on_every_path_of_the_triton_kernels(of_anchors, of_background, path):
    inputs = MAKE("clustered", suppression=of_anchors, background_suppression=of_background)
    with trying(FusedConfig, **path):
        result = inputs.run("triton")
    expected = in_a_row(inputs, of_anchors, of_anchors if of_background is None else of_background, "triton")
    assert_same_bits(result, expected)


@pytest.mark.parametrize("suppression", [0.0, 0.5, 1.0])
def test_none_is_as_suppression(suppression, backend):
    inputs = MAKE("clustered", suppression=suppression)
    left_out = {name: value for name, value in inputs.options.items() if name != "background_suppression"}
    expected = ck.select_and_merge(*inputs.args, **left_out, backend=backend)
    for same in (None, suppression):
        options = {**left_out, "background_suppression": same}
        assert_same_bits(ck.select_and_merge(*inputs.args, **options, backend=backend), expected)


def test_in_a_budget_as_a_layer_and_mapped(cpp):
    inputs = MAKE("clustered", num_anchors=8, num_background=4)
    factors = {"suppression": 0.5, "background_suppression": 2.0}
    expected = in_a_row(inputs, 0.5, 2.0)
    features, scores = inputs.args[:2]
    assert_same_bits(ck.condense(features, scores, 12, 1 / 3, inputs.grid, **factors), expected)
    assert_same_bits(ck.Condense(8, 4, grid=inputs.grid, **factors)(features, scores), expected)
    raw = torch.ops.condense.select_and_merge(*inputs.args, grid=list(inputs.grid), **factors)
    assert_same_bits(Condensed(*raw), expected)
    mapped = torch.func.vmap(functools.partial(ck.select_and_merge, grid=inputs.grid, **factors), (0, 0, None, None))
    mapped = mapped(features[:, None], scores[:, None], 8, 4)
    assert_same_bits(Condensed(*(x[:, 0] for x in mapped)), expected)


def test_gradients_are_those_of_the_selection(cpp):
    inputs = MAKE("random", dtype=torch.float64)
    expected = in_a_row(inputs, 0.5, 2.0)

    def condensed(features, scores):
        factors = {"suppression": 0.5, "background_suppression": 2.0}
        return ck.select_and_merge(features, scores, 7, 6, grid=inputs.grid, **factors)[::3]

    def merged(features, scores):
        return ck.merge(features, scores, expected.indices, expected.assignment)

    leaves = [x.clone().requires_grad_() for x in inputs.args[:2]]
    found, wanted = (torch.autograd.grad(call(*leaves)[0].square().sum(), leaves) for call in (condensed, merged))
    assert_same_bits(found, wanted)
    assert gradcheck(condensed, leaves, check_forward_ad=True)


def test_compiled_with_the_factors_as_arguments(cpp):
    inputs = MAKE("clustered")

    def call(suppression, background_suppression):
        factors = {"suppression": suppression, "background_suppression": background_suppression}
        return ck.select_and_merge(*inputs.args, grid=inputs.grid, **factors)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for of_anchors, of_background in PAIRS:
        other = of_anchors if of_background is None else of_background
        assert_same_bits(compiled(of_anchors, of_background), in_a_row(inputs, of_anchors, other))


class Exported(torch.nn.Module):
    def forward(self, features, scores):
        factors = {"suppression": 0.5, "background_suppression": 2.0}
        return tuple(ck.select_and_merge(features, scores, 7, 6, grid=(5, 6), **factors))


def test_exported(tmp_path, cpp):
    """And a program that was exported before there was the argument: it runs as ever."""
    inputs = MAKE("clustered")
    program = torch.export.export(Exported(), inputs.args[:2])
    assert_same_bits(program.module()(*inputs.args[:2]), in_a_row(inputs, 0.5, 2.0))
    (node,) = (node for node in program.graph.nodes if "select_and_merge" in str(node.target))
    assert node.kwargs["background_suppression"] == 2.0
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "background_suppression"}
    torch.export.save(program, tmp_path / "older.pt2")
    older = torch.export.load(tmp_path / "older.pt2").module()
    assert_same_bits(older(*inputs.args[:2]), in_a_row(inputs, 0.5, 0.5))


@pytest.mark.parametrize(
    "op", ["select_and_merge", "select_and_merge_out", "workspace_bytes", "select_and_merge_varlen"]
)
def test_callers_of_the_schema_without_it_need_not_change(op):
    """By torch's own rule for schemas, in both directions."""
    schema = SCHEMAS[op]
    assert schema.count("float? background_suppression=None") == 1
    schema = schema.replace(", bool scale_prior=True, Tensor? mean_similarity=None", "")  # which came later
    before = schema.replace(", float? background_suppression=None", "")
    old, new = (torch._C.parse_schema(f"condense::{op}{text}") for text in (before, schema))
    assert new.is_backward_compatible_with(old)
    assert new.check_forward_compatible_with(old) == (True, "")


def test_the_check_compares_with_both():
    """The column "selected" of the command check."""
    for kind in ("two_factors", "clustered"):
        inputs = MAKE(kind, dtype=torch.float64)
        assert count_other_picks(inputs.run("reference"), inputs, exact_similarity(inputs)) == 0
