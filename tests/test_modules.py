"""Condense, the layer; gather_tokens, unmerge and sizes; varlen_budget; nested tensors."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nested import nested_tensor_from_jagged

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits, make_inputs

INPUTS = make_inputs("random", batch=2, num_tokens=12, channels=5)
RESULT = ck.select_and_merge(INPUTS.features, INPUTS.scores, 3, 2, grid=(3, 4))
BUDGET = ck.varlen_budget([10, 0, 2, 18], keep=0.3)
KEPT = BUDGET.cu_anchors + BUDGET.cu_background
T = 30
F, S, P = torch.rand(T, 4), torch.rand(T), torch.rand(T, 2)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (ck.Condense(48, 16), "Condense(num_anchors=48, num_background=16)"),
        (ck.Condense(3, 0, grid=[3, 4]), "Condense(num_anchors=3, num_background=0, grid=(3, 4))"),
        (
            ck.Condense(0, 2, suppression=0.5, background_suppression=0.0, backend="cpp"),
            "Condense(num_anchors=0, num_background=2, suppression=0.5, background_suppression=0.0, backend='cpp')",
        ),
    ],
)
def test_repr_says_what_differs_from_the_defaults(layer, text):
    assert repr(layer) == text
    assert repr(torch.nn.Sequential(layer)) == f"Sequential(\n  (0): {text}\n)"


def test_the_layer_is_the_function():
    options = {"suppression": 0.7, "spatial_weight": 0.4, "background_suppression": 0.0}
    layer = ck.Condense(3, 2, grid=(3, 4), **options)
    call = lambda **where: ck.select_and_merge(*INPUTS.args[:2], 3, 2, **options, **where)  # noqa: E731
    assert_same_bits(layer(INPUTS.features, INPUTS.scores), call(grid=(3, 4)))
    assert_same_bits(layer(INPUTS.features, INPUTS.scores, grid=(4, 3)), call(grid=(4, 3)))
    where = {"positions": P[:12], "keys": INPUTS.features[..., :2], "mask": INPUTS.scores > 0.1}
    assert_same_bits(layer(INPUTS.features, INPUTS.scores, **where), call(**where))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 0), {}, "num_anchors + num_background: expected 1 <= K"),
        ((-1, 2), {}, "num_anchors: expected 0 <= num_anchors"),
        ((2.0, 2), {}, "num_anchors: expected an int, got float"),
        ((2, 2), {"suppression": -1.0}, "suppression: expected a finite number >= 0"),
        ((2, 2), {"background_suppression": -1.0}, "background_suppression: expected a finite number >= 0"),
        ((2, 2), {"scale_prior": 0}, "scale_prior: expected True or False, got int: 0"),
        ((2, 2), {"spatial_weight": "1"}, "spatial_weight: expected a number, got str"),
        ((2, 2), {"grid": 24}, "grid: expected (H, W) or (T, H, W) as ints, got 24"),
        ((2, 2), {"grid": (24,)}, "grid: expected (H, W) or (T, H, W), got (24,)"),
        ((2, 2), {"backend": "gpu"}, "backend: expected one of 'auto', 'cpp', 'triton', 'reference', got 'gpu'"),
    ],
)
def test_a_wrong_layer_is_refused_when_it_is_made(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        ck.Condense(*arguments, **options)


def test_gather_tokens():
    """Several planes at once, of any dtype and rank; one alone comes alone."""
    labels = torch.arange(24).view(2, 12)
    features, scores, kept = ck.gather_tokens(RESULT.indices, INPUTS.features, INPUTS.scores, labels)
    for b in range(2):
        assert torch.equal(features[b], INPUTS.features[b, RESULT.indices[b]])
        assert torch.equal(scores[b], INPUTS.scores[b, RESULT.indices[b]])
        assert torch.equal(kept[b], RESULT.indices[b] + 12 * b)
    assert torch.equal(ck.gather_tokens(RESULT.indices, labels), kept)


@pytest.mark.parametrize("axes", [1, 2, 3, 5])
def test_position_ids_of_several_axes(axes):
    """[P, B, N], as those of M-RoPE, also where P is B, and [P, B, N, C]; there and back."""
    ids = torch.arange(axes * 24).view(axes, 2, 12)
    expected = torch.stack([ck.gather_tokens(RESULT.indices, plane) for plane in ids])
    for dim in (2, -1):
        assert torch.equal(ck.gather_tokens(RESULT.indices, ids, dim=dim), expected)
    phases = torch.stack([ids, -ids], dim=-1)
    assert torch.equal(ck.gather_tokens(RESULT.indices, phases, dim=2), torch.stack([expected, -expected], dim=-1))
    back = ck.unmerge(expected, RESULT.assignment, dim=-1)
    assert torch.equal(back, torch.stack([ck.unmerge(plane, RESULT.assignment) for plane in expected]))
    flat, kept = ids.flatten(1)[:, :20].contiguous(), torch.tensor([1, 0, 8])
    offsets = {"cu_seqlens": torch.tensor([0, 9, 20]), "cu_kept": torch.tensor([0, 1, 3])}
    rows = ck.gather_tokens(kept, flat, dim=-1, **offsets)
    assert torch.equal(rows, flat[:, [1, 9, 17]])
    assignment = torch.tensor([0] * 9 + [1] * 11)
    assert torch.equal(ck.unmerge(rows, assignment, dim=1, **offsets), rows[:, [0] * 9 + [2] * 11])


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("kept", [1, 2, 3, 6])
def test_position_ids_are_never_gathered_along_another_axis(images, axes, kept):
    """Without dim=, even where each index would be one of an image."""
    indices = torch.arange(kept).expand(images, kept)
    with pytest.raises(ValueError, match=r"^tensors\[0\]: expected .*Remedy: dim="):
        ck.gather_tokens(indices, torch.zeros(axes, images, 12))
    with pytest.raises(ValueError, match=r"^merged: expected .*Remedy: dim="):
        ck.unmerge(torch.zeros(axes, images, kept), indices)


def test_unmerge_gives_every_token_its_row():
    back = ck.unmerge(RESULT.merged, RESULT.assignment)
    assert back.shape == INPUTS.features.shape
    for b in range(2):
        assert torch.equal(back[b], RESULT.merged[b, RESULT.assignment[b]])
    assert torch.equal(ck.unmerge(RESULT.mass, RESULT.assignment)[0], RESULT.mass[0, RESULT.assignment[0]])
    assert torch.equal(ck.gather_tokens(RESULT.indices, back), RESULT.merged)  # a kept token is in its own row


def test_nothing_is_zeros_and_has_zero_gradients():
    """Index -1 and assignment -1, where row 0 holds NaN."""
    features = INPUTS.features.clone()
    features[0, 0] = float("nan")
    features.requires_grad_()
    rows = ck.gather_tokens(torch.tensor([[-1, 3], [-1, -1]]), features)
    tokens = ck.unmerge(features, torch.tensor([[-1, 3], [-1, -1]]))
    for taken in (rows, tokens):
        assert torch.equal(taken[0, 1], features[0, 3])
        assert (taken[0, 0] == 0).all() and (taken[1] == 0).all()
    (rows.sum() + tokens.sum()).backward()
    assert features.grad[0, 3].eq(2).all() and features.grad.sum() == 2 * 5
    assert ck.gather_tokens(torch.full((2, 3), -1), features[:, :0]).shape == (2, 3, 5)


def counted(assignment: torch.Tensor, rows: int) -> list[int]:
    """Of one image."""
    return [sum(to == row for to in assignment.tolist()) for row in range(rows)]


def test_sizes():
    """Of a masked token that had to fill a row it is 0."""
    mask = INPUTS.scores > INPUTS.scores.sort().values[:, 8:9]  # of 12 tokens three
    masked = ck.select_and_merge(INPUTS.features, INPUTS.scores, 3, 2, mask=mask, spatial_weight=0.0)
    for out, tokens in ((RESULT, 12), (masked, 3)):
        sizes = ck.sizes(out.assignment, out.indices)
        assert sizes.tolist() == [counted(image, 5) for image in out.assignment]
        assert sizes.dtype == torch.int64 and sizes.sum(1).tolist() == [tokens] * 2
    assert ck.sizes(masked.assignment, masked.indices).eq(0).sum(1).tolist() == [2, 2]
    assert ck.sizes(torch.tensor([[2, -1, 2, -5]]), torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[0, 0, 2, 0]]


def test_packed_sizes():
    """Of an empty segment there are none; segments that keep nothing have tokens that go nowhere."""
    result = ck.select_and_merge_varlen(F, S, *BUDGET, positions=P)
    sizes = ck.sizes(result.assignment, result.indices, cu_seqlens=BUDGET.cu_seqlens, cu_kept=KEPT)
    images = [result.assignment[slice(*BUDGET.cu_seqlens[s : s + 2])] for s in range(4)]
    expected = [count for s, image in enumerate(images) for count in counted(image, int(KEPT[s + 1] - KEPT[s]))]
    assert sizes.tolist() == expected and sizes.sum() == T and sizes.dtype == torch.int64
    nothing = torch.zeros(3, dtype=torch.int32)
    offsets = {"cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32), "cu_kept": nothing}
    assert ck.sizes(torch.full((3,), -1), torch.zeros(0, dtype=torch.int64), **offsets).shape == (0,)


def test_sizes_mapped_and_without_values():
    assignment = torch.randint(-1, 4, (3, 2, 9))
    indices = torch.zeros(3, 2, 4, dtype=torch.int64)
    expected = torch.stack([ck.sizes(*pair) for pair in zip(assignment, indices, strict=True)])
    assert torch.equal(torch.vmap(ck.sizes)(assignment, indices), expected)
    assert torch.equal(torch.vmap(ck.sizes, in_dims=(2, None))(assignment.movedim(0, 2), indices[0]), expected)
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            given = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
            assert ck.sizes(*given).shape == (3, 4)


@pytest.mark.parametrize("call", [ck.gather_tokens, lambda rows, merged: ck.unmerge(merged, rows)])
def test_beyond_the_last_token_there_is_nothing_to_take(call):
    """Of another image's results, say. torch.take_along_dim would count modulo N, in silence."""
    with pytest.raises(RuntimeError, match="index 12 is out of bounds"):
        call(torch.tensor([[12], [0]]), INPUTS.features)


def test_beyond_the_last_row_there_is_nothing_to_count():
    with pytest.raises(RuntimeError, match="index 3 is out of bounds"):
        ck.sizes(torch.tensor([[0, 2]]), torch.tensor([[0, 1]]))


def test_packed_planes():
    result = ck.select_and_merge_varlen(F, S, *BUDGET, positions=P)
    offsets = {"cu_seqlens": BUDGET.cu_seqlens, "cu_kept": KEPT}
    features, places = ck.gather_tokens(result.indices, F, P, **offsets)
    back = ck.unmerge(result.merged, result.assignment, **offsets)
    for s in range(4):
        tokens, rows = slice(*BUDGET.cu_seqlens[s : s + 2]), slice(*KEPT[s : s + 2])
        assert torch.equal(features[rows], F[tokens][result.indices[rows]])
        assert torch.equal(places[rows], P[tokens][result.indices[rows]])
        assert torch.equal(back[tokens], result.merged[rows][result.assignment[tokens]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ck.gather_tokens(RESULT.indices.int(), F[None]), "indices: expected dtype int64, got int32"),
        (lambda: ck.gather_tokens(RESULT.indices[0], F[None]), "indices: expected 2 axes [B K], got 1"),
        (lambda: ck.gather_tokens(RESULT.indices, P), "tensors[0]: expected [B N ...] with B = 2, got [30, 2]"),
        (
            lambda: ck.gather_tokens(RESULT.indices, torch.zeros(2, 3, 12)),
            "tensors[0]: expected [B N ...] with N >= 5, the kept tokens, got [2, 3, 12] with 3 at axis 1. Remedy: dim",
        ),
        (
            lambda: ck.gather_tokens(RESULT.indices, F[None].expand(2, 30, 4), INPUTS.scores),
            "tensors[1]: expected [B N ...] with N = 30, as tensors[0], got [2, 12]",
        ),
        (
            lambda: ck.gather_tokens(RESULT.indices[0], P.T, cu_seqlens=KEPT, cu_kept=KEPT),
            "tensors[0]: expected [T ...] with T >= 5, the kept tokens, got [2, 30] with 2 at axis 0. Remedy: dim=",
        ),
        (
            lambda: ck.gather_tokens(RESULT.indices, INPUTS.features, dim=2),
            "tensors[0]: expected [... B N ...] with B = 2 and dim = 2, got [2, 12, 5]. Remedy: dim=",
        ),
        (lambda: ck.gather_tokens(RESULT.indices, INPUTS.features, dim=0), "tensors[0]: expected [... B N ...] with B"),
        (lambda: ck.gather_tokens(RESULT.indices, INPUTS.features, dim=3), "tensors[0]: expected [... B N ...] with B"),
        (lambda: ck.gather_tokens(RESULT.indices, INPUTS.features, dim=True), "dim: expected an int, got bool"),
        (lambda: ck.gather_tokens(RESULT.indices, [1]), "tensors[0]: expected a torch.Tensor [B N ...], got list"),
        (lambda: ck.unmerge(RESULT.merged[:1], RESULT.assignment), "merged: expected [B K ...] with B = 2, got [1, "),
        (lambda: ck.unmerge(F, RESULT.assignment[0], cu_kept=KEPT), "cu_seqlens: expected a tensor [S+1]"),
        (
            lambda: ck.gather_tokens(RESULT.indices[0], F, S[:9], cu_seqlens=KEPT, cu_kept=KEPT),
            "tensors[1]: expected [T ...] with T = 30, as tensors[0], got [9]",
        ),
        (
            lambda: ck.gather_tokens(RESULT.indices[0], F, cu_seqlens=KEPT[:0], cu_kept=KEPT[:0]),
            "cu_seqlens: expected at least one offset",
        ),
        (lambda: ck.unmerge(F, S, cu_seqlens=KEPT, cu_kept=KEPT), "assignment: expected dtype int64"),
        (lambda: ck.sizes(RESULT.assignment.int(), RESULT.indices), "assignment: expected dtype int64, got int32"),
        (lambda: ck.sizes(RESULT.assignment[0], RESULT.indices), "assignment: expected 2 axes [B N], got 1"),
        (
            lambda: ck.sizes(RESULT.assignment, RESULT.indices[:1]),
            "indices: expected shape [B K] = [2, K], as the arguments before it have, got [1, 5]",
        ),
        (lambda: ck.sizes(RESULT.assignment, 5), "indices: expected a torch.Tensor [B K], got int"),
        (lambda: ck.sizes(*RESULT[1:3], cu_kept=KEPT), "cu_seqlens: expected a tensor [S+1]"),
        (
            lambda: ck.sizes(*RESULT[1:3], cu_seqlens=KEPT, cu_kept=KEPT),
            "assignment: expected 1 axes [T], got 2",
        ),
    ],
)
def test_wrong_planes_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        call()


def test_varlen_budget():
    """A ratio is taken of every image, a count is kept of every image that has so many, an empty one keeps nothing."""
    assert [x.tolist() for x in BUDGET[:3]] == [[0, 10, 10, 12, 30], [0, 2, 2, 3, 7], [0, 1, 1, 1, 2]]
    assert (BUDGET.total_keep, BUDGET.max_seqlen) == (9, 18)
    assert all(cu.dtype == torch.int32 for cu in BUDGET[:3])
    assert ck.varlen_budget([10, 0, 2, 18], keep=4).cu_anchors.tolist() == [0, 3, 3, 4, 7]
    assert ck.varlen_budget([], keep=4)[3:] == (0, 0)
    assert ck.varlen_budget([1, 2], keep=4, background_ratio=0.0).cu_anchors.tolist() == [0, 1, 3]
    assert ck.varlen_budget(iter([10, 0, 2, 18]), keep=0.3)[3:] == (9, 18)
    for wrong in ([3, -1], [3.0], [True], torch.tensor([3.0]), torch.tensor([True])):
        with pytest.raises(ValueError, match="^seqlens: expected ints >= 0"):
            ck.varlen_budget(wrong)


def test_varlen_budget_on_devices():
    """Computed on the host, wherever torch would put tensors by default; that is where they go, unless told."""
    with torch.device("meta"):
        assert ck.varlen_budget([10]).cu_seqlens.device.type == "meta"
        assert ck.varlen_budget([10], keep=4, device="cpu").cu_seqlens.tolist() == [0, 10]


def test_nested_tensors(backend):
    """The bits of the packed call, with the offsets on the way in and out; gradients go through."""
    values = F.clone().requires_grad_()
    features = nested_tensor_from_jagged(values, BUDGET.cu_seqlens.long())
    scores, places = (nested_tensor_from_jagged(t, features.offsets()) for t in (S, P))
    rest = BUDGET.cu_anchors, BUDGET.cu_background, BUDGET.total_keep
    nested = ck.select_and_merge_varlen(features, scores, None, *rest, positions=places, backend=backend)
    packed = ck.select_and_merge_varlen(F, S, *BUDGET, positions=P, backend=backend)
    assert_same_bits([part.values() for part in nested], packed)
    assert nested.assignment.offsets() is features.offsets()
    for part in (nested.merged, nested.indices, nested.mass):
        assert torch.equal(part.offsets(), KEPT.long())
    assert [row.shape[0] for row in nested.merged.unbind()] == [3, 0, 1, 5]
    nested.merged.values().sum().backward()
    assert values.grad.sum().isclose(torch.tensor(9.0 * 4))  # the weights of every row sum to one


def test_nested_tensors_whose_values_are_no_packed_batch():
    """Five tokens of five channels: transposed, the values would pass for tokens."""
    features = nested_tensor_from_jagged(torch.rand(5, 5), torch.tensor([0, 2, 5]))
    holes = nested_tensor_from_jagged(torch.rand(5, 5), torch.tensor([0, 2, 5]), lengths=torch.tensor([1, 3]))
    strided = torch.nested.nested_tensor([torch.rand(2, 5), torch.rand(3, 5)], layout=torch.strided)
    scores = nested_tensor_from_jagged(torch.rand(5), features.offsets())
    budget = ck.varlen_budget([2, 3], keep=1)
    for wrong, got in (
        (features.transpose(1, 2), "one whose axis 2 is jagged"),
        (holes, "one with holes"),
        (strided, "layout torch.strided"),
    ):
        with pytest.raises(TypeError, match=f"^features: expected a contiguous jagged nested tensor.*got {got}"):
            ck.select_and_merge_varlen(wrong, scores, None, *budget[1:4], spatial_weight=0.0)


@pytest.mark.parametrize("name", ["scores", "positions"])
def test_nested_and_plain_tensors_do_not_mix(name):
    features = nested_tensor_from_jagged(F, BUDGET.cu_seqlens.long())
    others = {"scores": nested_tensor_from_jagged(S, features.offsets())}
    others["positions"] = nested_tensor_from_jagged(P, features.offsets())
    rest = BUDGET.cu_anchors, BUDGET.cu_background, BUDGET.total_keep

    def call(scores, positions):
        return ck.select_and_merge_varlen(features, scores, None, *rest, positions=positions)

    with pytest.raises(TypeError, match=f"^{name}: expected a contiguous jagged nested tensor.*got Tensor.*Remedy"):
        call(**{**others, name: {"scores": S, "positions": P}[name]})
    other = torch.tensor([0, 9, 9, 12, 30])
    with pytest.raises(ValueError, match=f"^{name}: expected the offsets of features, got others"):
        call(**{**others, name: nested_tensor_from_jagged({"scores": S, "positions": P}[name], other)})
    with pytest.raises(
        TypeError, match=r"^scores: expected a dense tensor, got layout nested. Remedy: scores.values\(\)"
    ):
        ck.select_and_merge_varlen(F, others["scores"], *BUDGET, positions=P)
