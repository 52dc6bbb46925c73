"""The Triton kernel of merge's gradient: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import MergeBackwardConfig
from condense_kernels.ops.merge import reference
from condense_kernels.ops.merge.kernel import merge, merge_backward
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen
from condense_kernels.testing import make_inputs, unit_roundoff

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's; they are meant to be
INTERPRETED = backends.triton_interprets()
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOAT16S = (torch.float16, torch.bfloat16)
NAN = float("nan")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter does")


def clusters(dtype=torch.float32, channels: int = 20, tokens: int = 30) -> list[torch.Tensor]:
    """Two images: [B, K, D], [B, K], [B, N, D], [B, N], [B, K, D], [B, K], [B, K], [B, N] as merge_backward takes them.

    Row 1 of the first image has members and no mass, row 2 of both does not exist, row 4 of the second has no member.
    """
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(2, tokens, channels, generator=generator).to(dtype)
    scores = torch.rand(2, tokens, generator=generator).to(dtype)
    indices = torch.tensor([[0, 7, -1, 9, 12], [3, 4, -1, 20, 21]])
    assignment = torch.randint(-1, 5, (2, tokens), generator=generator)
    assignment[0, [0, 7, 9, 12]] = torch.tensor([0, 1, 3, 4])
    scores[0][assignment[0] == 1] = 0
    assignment[1][assignment[1] == 4] = 3
    merged, mass = merge(*(t.to(DEVICE) for t in (features, scores, indices, assignment)))
    grad_merged = torch.randn(merged.shape, generator=generator).to(dtype)
    grad_mass = torch.randn(mass.shape, generator=generator)
    tensors = grad_merged, grad_mass, features, scores, merged, mass, indices, assignment
    return [t.to(DEVICE) for t in tensors]


def assert_is_gradient(tensors: list[torch.Tensor]) -> None:
    """Against the formulas in fp64, on what the kernel is given.

    grad_features: a quotient, a product, where two gradients meet a sum, and the rounding to the dtype. grad_scores: a
    chain of one fused multiply-add for each block of channels and one sum for each halving of a block; before it a
    difference, behind it a quotient, a sum and the rounding. All are bounded at their largest.
    """
    actual = [t.cpu() for t in merge_backward(*tensors)]
    tensors = [t.cpu() for t in tensors]
    grad_merged, _, features, scores, merged, mass, _, assignment = tensors
    expected = reference.merge_backward(*tensors)
    channels, eps = features.shape[2], unit_roundoff(torch.float32)
    block = MergeBackwardConfig.for_shape(channels).block_d
    terms = reference.merge_backward(grad_merged.abs(), *tensors[1:])[0]
    row = assignment.clamp(min=0)[..., None].expand(features.shape)
    step = (features.double() - merged.double().gather(1, row)).abs() * grad_merged.double().gather(1, row).abs()
    of_row = mass.double().gather(1, assignment.clamp(min=0))
    steps = torch.where(of_row > 0, step.sum(dim=-1) / of_row, 0.0)
    chain = -(-channels // block) + block.bit_length() + 3
    bounds = (4 * eps * terms, 1.01 * chain * eps * steps + 2 * eps * expected[1].abs())
    for a, e, bound in zip(actual, expected, bounds, strict=True):
        error = (a.double() - e).abs()
        bound = bound + 1.01 * unit_roundoff(a.dtype) * e.abs() + torch.finfo(a.dtype).smallest_normal * eps
        bound = bound + (2.0**-25 if a.dtype == torch.float16 else 0)  # fp16 is subnormal early
        assert (error <= bound).all(), (float((error - bound).max()), a.dtype)
    assert [t.dtype for t in actual] == [features.dtype, scores.dtype]


@pytest.mark.parametrize("channels", [1, 20, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, *FLOAT16S], ids=str)
def test_gradients(channels, dtype):
    assert_is_gradient(clusters(dtype, channels))


def test_gradients_of_many_tokens():
    """Several blocks of tokens an image."""
    assert_is_gradient(clusters(channels=250, tokens=41))


def test_gradients_of_rows_without_mass():
    """Their kept token alone gets one, also where it went elsewhere or nowhere; and the others' scores as well."""
    tensors = clusters()
    grad_merged, grad_mass, _, _, _, mass, _, assignment = tensors
    assert mass[0, 1] == 0 and mass[1, 4] == 0 and not assignment[1].eq(4).any()
    assignment[1, 21] = -1
    grad_features, grad_scores = merge_backward(*tensors)
    members = assignment[0].eq(1).nonzero().flatten().tolist()
    assert len(members) > 1
    for i in members:
        assert torch.equal(grad_features[0, i], grad_merged[0, 1] if i == 7 else torch.zeros_like(grad_merged[0, 1]))
        assert grad_scores[0, i] == grad_mass[0, 1]
    assert torch.equal(grad_features[1, 21], grad_merged[1, 4]) and grad_scores[1, 21] == 0
    assert_is_gradient(tensors)
    assignment[1, 21] = 0  # a gradient from each of two rows
    assert_is_gradient(tensors)


def test_gradients_that_are_not():
    """No row, no gradient: index -1, assignment -1, and on a GPU, which does not look, whatever is out of range."""
    tensors = clusters()
    *_, indices, assignment = tensors
    expected = [t.clone() for t in merge_backward(*tensors)]
    nowhere = assignment.eq(-1) | assignment.eq(2)
    assert nowhere.any(dim=1).all()
    assert all(t[nowhere].eq(0).all() for t in expected)
    indices[:, 2] = torch.tensor([10**12, -9], device=DEVICE)
    assignment[assignment.eq(-1)] = 2**40
    for actual, same in zip(merge_backward(*tensors), expected, strict=True):
        assert torch.equal(actual, same)
    indices[:] = 7  # repeated, of which there is no right result
    assert all(t.isfinite().all() for t in merge_backward(*tensors))


def test_a_gradient_that_is_nan_stays_in_its_row():
    tensors = clusters()
    grad_merged, *_, assignment = tensors
    grad_merged[0, 1] = NAN  # no mass: its kept token's
    grad_merged[0, 2] = NAN  # no row
    grad_merged[1, 3, 5] = NAN
    grad_features, grad_scores = merge_backward(*tensors)
    broken = torch.zeros_like(assignment, dtype=torch.bool)
    broken[0, 7], broken[1] = True, assignment[1] == 3
    assert torch.equal(grad_features.isnan().any(dim=-1), broken)
    broken[0, 7] = False
    assert torch.equal(grad_scores.isnan(), broken)


def test_gradients_of_any_strides():
    """Expanded ones among them, as sum().backward() makes them; and the bits do not follow the layout."""
    tensors = clusters(channels=300)
    tensors[0], tensors[1] = torch.ones_like(tensors[0]), torch.ones_like(tensors[1])
    expected = merge_backward(*tensors)
    one = torch.ones((), device=DEVICE)
    expanded = [one.expand(tensors[0].shape), one.expand(tensors[1].shape), *tensors[2:]]
    permuted = [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in tensors]
    for variant in (expanded, permuted):
        for actual, same in zip(merge_backward(*variant), expected, strict=True):
            assert torch.equal(actual, same)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=["B=0", "N=0", "K=0"])
def test_no_gradients(shape):
    b, n, k = shape
    x = torch.rand(b, n, 4, device=DEVICE)
    rows, mass = torch.rand(b, k, 4, device=DEVICE), torch.rand(b, k, device=DEVICE)
    indices = torch.zeros(b, k, dtype=torch.int64, device=DEVICE)
    assignment = torch.zeros(b, n, dtype=torch.int64, device=DEVICE)
    grad_features, grad_scores = merge_backward(rows, mass, x, x[..., 0], rows, mass, indices, assignment)
    assert grad_features.shape == x.shape and grad_features.eq(0).all() and grad_scores.eq(0).all()


@only_interpreted
def test_gradients_stay_inside(bounded):
    tensors = clusters(channels=20)
    tensors[-2][0, 1], tensors[-1][0, 3:6] = 2**40, torch.tensor([-(2**40), 5, 2**62])
    merge_backward(*tensors)


@pytest.mark.parametrize("argument", ["features", "scores"])
def test_float64_is_refused_with_the_remedy(argument):
    inputs = make_inputs(num_tokens=4, batch=1)
    tensors = {"features": inputs.features, "scores": inputs.scores}
    tensors[argument] = tensors[argument].double()
    features, scores = tensors.values()
    rows, mass, indices = features[:, :1], scores[:, :1].float(), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{argument}: .*float64.*Remedy"):
        merge_backward(rows, mass, features, scores, rows, mass, indices, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{argument}: .*float64.*Remedy"):
        select_and_merge_varlen(features[0], scores[0], *[torch.tensor([0, 4]).int()] * 3, 1, 4, spatial_weight=0)
