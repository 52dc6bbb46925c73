"""The gradient of merge: against the reference, and that against torch.autograd."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

from condense_kernels._dispatch import backends
from condense_kernels.ops.merge import reference
from condense_kernels.ops.similarity.op import compute_dtype
from condense_kernels.testing import assert_same_bits, unit_roundoff

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of merge_backward. ``dataclasses.replace(call, mass=...)`` gives a variant."""

    grad_merged: torch.Tensor  # [B, K, D]
    grad_mass: torch.Tensor  # [B, K]
    features: torch.Tensor  # [B, N, D]
    scores: torch.Tensor  # [B, N]
    merged: torch.Tensor  # [B, K, D]
    mass: torch.Tensor  # [B, K]
    indices: torch.Tensor  # [B, K]
    assignment: torch.Tensor  # [B, N]

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return backends.kernel_of("merge_backward", backend, CPU)(*vars(self).values())

    def image(self, b: int) -> "Call":
        return Call(*(t[b : b + 1] for t in vars(self).values()))


def call_of(features, scores, indices, assignment, seed=0) -> Call:
    """The gradient at random slopes."""
    generator = torch.Generator().manual_seed(seed)
    wide = compute_dtype(features, scores)
    merged, mass = reference.merge(features, scores, indices, assignment)
    slopes = torch.randn(merged.shape, generator=generator, dtype=torch.float64)
    slopes_of_mass = torch.randn(mass.shape, generator=generator, dtype=torch.float64)
    merged, mass = reference.rounded_once(merged, features.dtype), mass.to(wide)
    return Call(slopes.to(features.dtype), slopes_of_mass.to(wide), features, scores, merged, mass, indices, assignment)


def make_call(dtype=torch.float32, scores_dtype=None, batch=2, n=23, k=7, channels=37, seed=0) -> Call:
    """Random clusters; with 7 rows also one of zero mass, one that does not exist, one whose masked token had to be
    kept, and tokens of no row."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, n, channels, generator=generator, dtype=torch.float64)
    scores = torch.rand(batch, n, generator=generator, dtype=torch.float64) + 0.1
    indices = torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(batch)])
    assignment = torch.randint(k, (batch, n), generator=generator)
    assignment.scatter_(1, indices, torch.arange(k).expand(batch, k))
    if k == 7:
        assignment[assignment == 6] = -1  # row 6: mass 0, its token masked
        scores[assignment == 2] = 0
        indices[:, 4] = -1
    return call_of(features.to(dtype), scores.to(scores_dtype or dtype), indices, assignment, seed)


def assert_matches_reference(call: Call, backend: str) -> None:
    """Within the roundings that the formulas take, in the working type, and one to the result's."""
    exact = reference.merge_backward(*vars(call).values())
    wide = compute_dtype(call.features, call.scores)
    eps, channels = unit_roundoff(wide), call.features.shape[2]
    # Per token: its row's sum of |features_i - merged_k| * |grad_merged_k| / mass_k, what the dot product rounds.
    row = call.assignment.clamp(min=0)
    difference = call.features.double() - call.merged.double().gather(1, row[..., None].expand(-1, -1, channels))
    slope = call.grad_merged.double().gather(1, row[..., None].expand(-1, -1, channels)).abs()
    mass = call.mass.double().gather(1, row)
    dot = torch.where(mass > 0, (difference.abs() * slope).sum(dim=-1) / mass, 0.0)
    # Where a token is also some row's copy, two terms are added, and may cancel.
    size = reference.merge_backward(call.grad_merged.abs(), *list(vars(call).values())[1:])[0]
    bounds = (
        3 * eps * size,  # a quotient, a product, and that sum
        (channels + 4) * eps * dot + 2 * eps * call.grad_mass.double().gather(1, row).abs(),
    )
    for name, gradient, expected, bound, like in zip(
        ("features", "scores"), call.run(backend), exact, bounds, (call.features, call.scores), strict=True
    ):
        out = torch.finfo(like.dtype)
        bound = bound + out.eps / 2 * expected.abs() + out.smallest_normal * out.eps
        assert gradient.dtype == like.dtype
        assert gradient.shape == like.shape
        assert gradient.is_contiguous()
        error = (gradient.double() - expected).abs()
        assert (error <= bound).all(), f"{name}: {float((error / bound).nan_to_num(nan=torch.inf).amax())} of the bound"


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_without_features_and_merged(dtype, backend):
    """The same bits for features; for scores what mass gives them. Zeroes keep their signs."""
    call = make_call(dtype)
    call.grad_merged[:, :, :3] = torch.tensor([0.0, -0.0, torch.nan], dtype=dtype)
    expected = call.run(backend)[0]
    features, scores = dataclasses.replace(call, features=None, merged=None).run(backend)
    assert_same_bits([features, features.signbit()], [expected, expected.signbit()])
    of_mass = dataclasses.replace(call, grad_merged=torch.zeros_like(call.grad_merged)).run(backend)[1]
    assert torch.equal(scores, of_mass) and of_mass.count_nonzero() > 0


@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, scores_dtype, fast):
    if fast == "triton" and torch.float64 in (dtype, scores_dtype):
        pytest.skip("fp64 is served on CPU by the C++ kernels alone, as the contract says")
    assert_matches_reference(make_call(dtype, scores_dtype), fast)


@pytest.mark.parametrize(
    ("n", "k", "channels"),
    [
        pytest.param(1, 1, 1, id="one of each"),
        pytest.param(9, 9, 16, id="K = N"),
        pytest.param(40, 1, 33, id="one row, past a vector"),
        pytest.param(23, 7, 130, id="130 channels"),
        pytest.param(5, 0, 4, id="no row"),
        pytest.param(0, 0, 4, id="no token"),
    ],
)
def test_shapes(n, k, channels, fast):
    if k > 0:
        return assert_matches_reference(make_call(n=n, k=k, channels=channels), fast)
    none = torch.zeros(2, 0, dtype=torch.int64)
    call = call_of(torch.randn(2, n, channels), torch.rand(2, n), none, torch.full((2, n), -1))
    assert [gradient.tolist() for gradient in call.run(fast)] == [torch.zeros(2, n, channels).tolist(), [[0.0] * n] * 2]


def test_no_image(fast):
    call = make_call()
    empty = Call(*(t[:0] for t in vars(call).values()))
    assert [list(gradient.shape) for gradient in empty.run(fast)] == [[0, 23, 37], [0, 23]]


def formula(features, scores, indices, assignment):
    """Eq. 8 as one would write it in torch; a row of zero mass is its kept token."""
    merged, masses = [], []
    for b in range(len(indices)):
        for r, own in enumerate(indices[b].tolist()):
            members = assignment[b] == r
            mass = scores[b, members].sum() if own >= 0 else scores.new_zeros(())
            empty = own < 0 or mass == 0
            mean = (scores[b, members, None] * features[b, members]).sum(dim=0) / mass
            merged.append(features[b, own] * (own >= 0) if empty else mean)
            masses.append(mass)
    return torch.stack(merged).view(*indices.shape, -1), torch.stack(masses).view(indices.shape)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_is_what_autograd_makes_of_the_formula(backend, cpp):
    call = make_call(torch.float64)
    features, scores = call.features.clone().requires_grad_(), call.scores.clone().requires_grad_()
    results = formula(features, scores, call.indices, call.assignment)
    expected = torch.autograd.grad(results, (features, scores), (call.grad_merged, call.grad_mass))
    for gradient, exact in zip(call.run(backend), expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-14)


FEATURES = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]])
SLOPES, SLOPES_OF_MASS = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]]), torch.tensor([[0.5, 0.25]])


def small(scores, indices, assignment, **fields) -> Call:
    call = call_of(FEATURES, torch.tensor([scores]), torch.tensor([indices]), torch.tensor([assignment]))
    return dataclasses.replace(call, grad_merged=SLOPES, grad_mass=SLOPES_OF_MASS, **fields)


def test_by_hand(backend):
    """Two tokens of weight 1/4 and 3/4: the mean is (2.5, 3.5)."""
    features, scores = small([1.0, 3.0, 2.0, 0.0], [0, 2], [0, 0, 1, 1]).run(backend)
    assert features.tolist() == [[[0.25, 2.5], [0.75, 7.5], [2.0, 20.0], [0.0, 0.0]]]
    assert scores.tolist() == [[(-1.5 - 15) / 4 + 0.5, (0.5 + 5) / 4 + 0.5, 0.25, (4 + 40) / 2 + 0.25]]


def test_a_row_of_zero_mass_is_its_kept_token(backend):
    """Its other members have no part in it; all scores count in the mass."""
    features, scores = small([0.0, 0.0, 1.0, 1.0], [1, 2], [0, 0, 1, 1]).run(backend)
    assert features[0, :2].tolist() == [[0.0, 0.0], [1.0, 10.0]]
    assert scores[0, :2].tolist() == [0.5, 0.5]


def test_a_masked_token_that_had_to_be_kept(backend):
    """It has a row, and is no member of it."""
    features, scores = small([9.0, 1.0, 1.0, 9.0], [1, 3], [-1, 0, 0, -1]).run(backend)
    assert features[0, [0, 3]].tolist() == [[0.0, 0.0], [2.0, 20.0]]
    assert scores[0, [0, 3]].tolist() == [0.0, 0.0]


def test_a_copied_token_that_is_also_merged_elsewhere(backend):
    """Row 1 has no member, so it copies token 3, which row 0 merges: both slopes arrive."""
    features, _ = small([1.0, 1.0, 1.0, 1.0], [0, 3], [0, 0, 0, 0]).run(backend)
    assert features.tolist() == [[[0.25, 2.5], [0.25, 2.5], [0.25, 2.5], [2.25, 22.5]]]


def test_no_such_row(backend):
    features, scores = small([1.0, 1.0, 1.0, 1.0], [0, -1], [0, 1, 1, -1]).run(backend)
    assert features.tolist() == [[[1.0, 10.0]] + [[0.0, 0.0]] * 3]
    assert scores.tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_repeated_indices_do_no_harm(backend):
    """The contract says distinct; what comes out here is not said, but it is finite, and elsewhere nothing changes."""
    call = make_call(n=12, k=3)
    scores = call.scores.masked_fill(call.assignment != 2, 0)
    call = call_of(call.features, scores, call.indices, call.assignment)
    twice = dataclasses.replace(call, indices=call.indices[:, [0, 0, 2]])
    features, grad_scores = twice.run(backend)
    assert features.isfinite().all()
    assert torch.equal(grad_scores, call.run(backend)[1])
    untouched = (call.assignment == 2)[..., None]
    assert torch.equal(features.where(untouched, 0), call.run(backend)[0].where(untouched, 0))


@pytest.mark.parametrize("field", ["grad_merged", "grad_mass", "merged", "mass", "features", "scores"])
def test_nan_stays_in_its_row(field, backend):
    call = make_call(batch=1)
    row = 0
    at = call.indices[0, row] if field in ("features", "scores") else row
    value = getattr(call, field).clone()
    value[(0, at) + (0,) * (value.dim() - 2)] = torch.nan
    outside = call.assignment[0] != row
    for clean, broken in zip(call.run(backend), dataclasses.replace(call, **{field: value}).run(backend), strict=True):
        assert torch.equal(clean[0, outside], broken[0, outside])
    assert any(not g.isfinite().all() for g in dataclasses.replace(call, **{field: value}).run(backend))


@pytest.mark.parametrize("field", ["features", "merged", "grad_merged"])
def test_nan_of_a_row_without_mass_is_not_read(field, backend):
    """The mean of nothing, and the members' features, have no part in the gradient; the slope goes to one token."""
    call = make_call(batch=1)
    value = getattr(call, field).clone()
    if field == "features":
        value[0, call.assignment[0] == 2] = torch.nan
    else:
        value[0, 2] = torch.nan
    features, scores = dataclasses.replace(call, **{field: value}).run(backend)
    assert scores.isfinite().all()
    others = torch.arange(features.shape[1]) != call.indices[0, 2]
    assert features[0, others].isfinite().all()
    assert features.isfinite().all() == (field != "grad_merged")


def views(x: torch.Tensor):
    """The same values behind other strides."""
    yield "sliced", torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    yield "stepped", x.repeat_interleave(2, dim=-1)[..., ::2]
    yield "reversed axes", x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    yield "stepped rows", x.repeat_interleave(3, dim=1)[:, ::3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype, fast):
    call = make_call(dtype, n=12, channels=19)
    expected = call.run(fast)
    for field, value in vars(call).items():
        for name, view in views(value):
            assert_same_bits(dataclasses.replace(call, **{field: view}).run(fast), expected, f"{field}, {name}")


def test_expanded_gradients(fast):
    """What the backward of sum() and mean() hand over: stride 0."""
    call = make_call()
    one = torch.tensor(0.5)
    expanded = dataclasses.replace(call, grad_merged=one.expand(2, 7, 37), grad_mass=one.expand(2, 7))
    filled = dataclasses.replace(call, grad_merged=torch.full((2, 7, 37), 0.5), grad_mass=torch.full((2, 7), 0.5))
    assert_same_bits(expanded.run(fast), filled.run(fast))
    row = dataclasses.replace(call, grad_merged=call.grad_merged[:, :1].expand(2, 7, 37))
    assert_same_bits(row.run(fast), dataclasses.replace(row, grad_merged=row.grad_merged.clone()).run(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_batch_and_threads_do_not_matter(batch, dtype, cpp):
    call = make_call(dtype, batch=batch, n=900, channels=1500)  # long enough for the threads to meet
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call.run(cpp)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(call.run(cpp), expected, f"{count} threads")
        alone = tuple(gradient[-1:] for gradient in expected)
        assert_same_bits(call.image(batch - 1).run(cpp), alone, "the last image alone")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, cpp):
    program = (
        "import torch\n"
        "from test_merge_backward import DTYPES, assert_matches_reference, make_call\n"
        "for dtype in DTYPES:\n"
        "    assert_matches_reference(make_call(dtype, torch.float32, channels=77), 'cpp')\n"
    )
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    environment = {**os.environ, "PYTHONPATH": path, "CONDENSE_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("features", torch.rand(2, 23, 0), "features: expected at least one channel"),
        ("scores", torch.rand(2, 22), "scores: expected shape [B N] = [2, 23]"),
        ("indices", torch.zeros(2, 7), "indices: expected dtype int64, got float32"),
        ("assignment", torch.zeros(2, 7, dtype=torch.int64), "assignment: expected shape [B N] = [2, 23]"),
        ("grad_merged", torch.rand(2, 6, 37), "grad_merged: expected shape [B K D] = [2, 7, 37]"),
        ("grad_merged", torch.rand(2, 7, 37).half(), "grad_merged: expected dtype float32, got float16"),
        ("grad_mass", torch.rand(2, 7, 1), "grad_mass: expected 2 axes [B K], got 3"),
        ("grad_mass", torch.rand(2, 7).double(), "grad_mass: expected dtype float32, got float64"),
        ("merged", torch.rand(2, 7, 36), "merged: expected shape [B K D] = [2, 7, 37]"),
        ("merged", torch.rand(2, 7, 37).double(), "merged: expected dtype float32, got float64"),
        ("mass", torch.rand(1, 7), "mass: expected shape [B K] = [2, 7]"),
        ("mass", torch.rand(2, 7).bfloat16(), "mass: expected dtype float32, got bfloat16"),
        ("indices", torch.full((2, 7), 23), "indices: expected values in [-1, 23), got 23"),
        ("indices", torch.full((2, 7), -2), "indices: expected values in [-1, 23), got -2"),
        ("assignment", torch.full((2, 23), 7), "assignment: expected values in [-1, 7), got 7"),
        ("merged", None, "features, merged: expected both or neither, got features alone. Remedy"),
        ("features", None, "features, merged: expected both or neither, got merged alone. Remedy"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused(field, value, message, cpp):
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        dataclasses.replace(make_call(), **{field: value}).run(cpp)
