"""Derivatives of merge in every mode, with every kind of row, dense and packed.

What torch differentiates by itself is the plain formula below.
"""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import condense_kernels as ck
from condense_kernels._dispatch import backends
from condense_kernels.ops.merge import reference
from condense_kernels.testing import assert_same_bits, unit_roundoff

CPU = torch.device("cpu")
MODES = ("mean", "sum", "lerp")
N, D, W = 9, 3, 0.3
# Of rows: two tokens and its own; its own alone; no such row; no member, its token merged elsewhere; one other token.
INDICES = torch.tensor([[4, 1, -1, 7, 8], [0, 2, -1, 5, 6]])
ROWS = torch.tensor([[0, 1, 0, 2, 0, -1, 2, 0, 4], [0, 0, 1, 1, -1, 0, 2, 4, 2]])
WITHOUT_MASS = torch.zeros(2, N, dtype=torch.bool)
WITHOUT_MASS[0, 1], WITHOUT_MASS[1, 2:4] = True, True  # those of row 1
X = torch.randn(2, N, D, generator=torch.manual_seed(1), dtype=torch.float64)
A = torch.rand(2, N, generator=torch.manual_seed(2), dtype=torch.float64) + 0.2


def merged(x, a, mode, backend="auto"):
    a = None if a is None else torch.where(WITHOUT_MASS, 0.0, a)
    return ck.merge(x, a, INDICES, ROWS, mode=mode, centre_weight=W, backend=backend)


def plain(x, a, mode):
    """The definition, row by row, with torch's own derivatives."""
    weightless = torch.zeros_like(WITHOUT_MASS) if a is None else WITHOUT_MASS
    a = torch.ones(2, N, dtype=x.dtype) if a is None else torch.where(WITHOUT_MASS, 0.0, a)
    rows, masses = [], []
    for b in range(len(INDICES)):
        for k, own in enumerate(INDICES[b].tolist()):
            weights = a[b] * (ROWS[b] == k) * (own >= 0)
            mass, total = weights.sum(), weights @ x[b]
            if mode != "sum" and own >= 0:
                empty = not ((ROWS[b] == k) & ~weightless[b]).any()
                mean = total / (mass + empty)
                blend = W * x[b, own] + (1 - W) * mean if mode == "lerp" else mean
                total = x[b, own] if empty else blend
            rows.append(total)
            masses.append(mass)
    return torch.stack(rows).view(2, -1, D), torch.stack(masses).view(2, -1)


@pytest.mark.parametrize("mode", MODES)
def test_is_the_plain_formula(mode, backend):
    if backend == "triton":
        return torch.testing.assert_close(
            merged(X.float(), A.float(), mode, backend), tuple(t.float() for t in plain(X, A, mode))
        )
    torch.testing.assert_close(merged(X, A, mode, backend), plain(X, A, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of", ["both", "features", "scores", "features, no scores"])
def test_gradcheck(mode, of):
    """All orders of derivatives that are in use, batched ones included."""
    x = X.clone().requires_grad_("features" in of or of == "both")
    a = None if "no" in of else A.clone().requires_grad_(of in ("both", "scores"))
    inputs = tuple(t for t in (x, a) if t is not None and t.requires_grad)

    def call(*given):
        given = list(given)
        return merged(*(given.pop(0) if t is not None and t.requires_grad else t for t in (x, a)), mode)[
            : 1 if a is None else 2
        ]

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, inputs, check_forward_ad=True, **batched)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True)


def loss(call, mode):
    def of(x, a):
        rows, mass = call(x, a, mode)
        return (rows * rows.detach().sin()).sum() + rows.pow(3).sum() + mass.pow(3).sum()

    return of


TRANSFORMS = {
    "grad": lambda q: grad(q, argnums=(0, 1))(X, A),
    "hessian": lambda q: hessian(q, argnums=(0, 1))(X, A),
    "jacfwd of jacfwd": lambda q: jacfwd(jacfwd(q, argnums=1), argnums=0)(X, A),
    "jacrev of jacfwd": lambda q: jacrev(jacfwd(q, argnums=1), argnums=0)(X, A),
    "jvp twice": lambda q: jvp(lambda t: jvp(lambda t: q(X, t), (t,), (t,))[1], (A,), (A,)),
    "grad thrice": lambda q: grad(lambda t: grad(lambda t: grad(lambda t: q(X, t))(t).pow(2).sum())(t).sum())(A),
    "vmap of grad": lambda q: vmap(grad(q, argnums=(0, 1)))(torch.stack([X, 2 * X]), torch.stack([A, A])),
    "vmap of hessian": lambda q: vmap(hessian(q, argnums=1), in_dims=(0, None))(torch.stack([X, 2 * X]), A),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name, mode):
    ours, expected = (TRANSFORMS[name](loss(call, mode)) for call in (merged, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_finite_differences(mode, cpp):
    """Of fp32, through the kernels."""
    x, a = X.float().requires_grad_(), A.float().requires_grad_()
    slopes = [torch.randn_like(t) for t in merged(x, a, mode)]
    gradients = torch.autograd.grad(merged(x, a, mode), (x, a), slopes)
    value = lambda x, a: sum(float((t * s.double()).sum()) for t, s in zip(plain(x, a, mode), slopes, strict=True))  # noqa: E731
    for which, gradient in enumerate(gradients):
        for place in range(0, gradient.numel(), 4):
            step = torch.zeros_like(gradient, dtype=torch.float64)
            step.view(-1)[place] = 1e-6
            ahead, behind = ([X, A] for _ in range(2))
            ahead[which], behind[which] = ahead[which] + step, behind[which] - step
            difference = (value(*ahead) - value(*behind)) / 2e-6
            assert abs(difference - float(gradient.view(-1)[place])) < 1e-4 * (1 + abs(difference))


@pytest.mark.parametrize("mode", MODES)
def test_sizes_and_nothing_have_no_gradient(mode, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    x = X.to(dtype, copy=True).requires_grad_()  # else X itself in float64, for every later test
    sizes = torch.where(WITHOUT_MASS, 0, torch.arange(1, N + 1).expand(2, -1))
    options = {"mode": mode, "centre_weight": W, "backend": backend}
    for a, same in ((sizes, sizes.to(dtype)), (None, torch.ones(2, N, dtype=dtype))):
        results = ck.merge(x, a, INDICES, ROWS, **options)
        expected = ck.merge(x, same, INDICES, ROWS, **options)
        slopes = [torch.ones_like(t) for t in results]
        assert_same_bits(torch.autograd.grad(results, x, slopes), torch.autograd.grad(expected, x, slopes))
        assert_same_bits(torch.autograd.forward_ad.unpack_dual(results[0]).primal, expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved(mode, cpp):
    """Of scores' gradient a sum needs no rows; of features' gradient alone nothing needs features."""
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t)
    x, a = X.clone().requires_grad_(), A.clone().requires_grad_()
    with hooks:
        rows, _ = ck.merge(x, a, INDICES, ROWS, mode=mode)
    assert (x.data_ptr() in kept, rows.data_ptr() in kept) == (True, mode != "sum")
    kept.clear()
    with hooks:
        rows, _ = ck.merge(x, A, INDICES, ROWS, mode=mode)
    assert x.data_ptr() not in kept and rows.data_ptr() not in kept


# The operator merge_backward


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of merge_backward."""

    grad_merged: torch.Tensor  # [B, K, D]
    grad_mass: torch.Tensor  # [B, K]
    features: torch.Tensor | None  # [B, N, D]
    scores: torch.Tensor | None  # [B, N]
    merged: torch.Tensor | None  # [B, K, D]
    mass: torch.Tensor  # [B, K]
    indices: torch.Tensor  # [B, K]
    assignment: torch.Tensor  # [B, N]

    def run(self, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return backends.kernel_of("merge_backward", backend, CPU)(*vars(self).values(), **options)

    def but(self, **fields) -> "Call":
        return dataclasses.replace(self, **fields)


def make_call(mode, dtype=torch.float32, scores="floats", batch=2, n=23, k=7, channels=37) -> Call:
    """Random clusters; row 2 without mass, row 4 does not exist, nobody is in row 6; the tokens that rows 5 and 6 are
    named after are in others."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, n, channels, generator=generator).to(dtype)
    a = torch.rand(batch, n, generator=generator) + 0.1
    indices = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(batch)])
    assignment = torch.randint(-1, k, (batch, n), generator=generator)
    assignment.scatter_(1, indices, torch.arange(k).expand(batch, k))
    assignment[assignment == 6] = 0
    assignment.scatter_(1, indices[:, 5:6], 3)
    assert (assignment == 5).any(dim=1).all()
    a[assignment == 2] = 0
    indices[:, 4] = -1
    a = {"floats": a.to(dtype), "sizes": (a * 9).long(), "none": None}[scores]
    rows, mass = reference.merge_as(features, a, indices, assignment, mode, W)
    slopes = torch.randn(rows.shape, generator=generator).to(dtype), torch.randn(mass.shape, generator=generator)
    return Call(*slopes, features, a, rows, mass.float(), indices, assignment)


@pytest.mark.parametrize("scores", ["floats", "sizes", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_kernels_are_the_reference(mode, dtype, scores, fast):
    """Within the roundings of the formulas: those of a chain of sums over channels, of some products and quotients."""
    call = make_call(mode, dtype, scores)
    options = {"mode": mode, "centre_weight": W}
    of_features, of_scores = call.run(fast, **options)
    expected = reference.merge_backward(*vars(call).values(), **options)
    magnitude = reference.merge_backward(*vars(call.but(grad_merged=call.grad_merged.abs())).values(), **options)[0]
    eps, out = unit_roundoff(torch.float32), unit_roundoff(dtype)
    assert of_features.dtype == dtype
    bound = 8 * eps * magnitude.abs() + 1.01 * out * expected[0].abs() + 1e-30
    assert ((of_features.double() - expected[0]).abs() <= bound).all()
    if scores != "floats":
        assert of_scores.shape == (2, 0) and of_scores.dtype == torch.float32
        return
    x, mean = call.features.double(), call.merged.double()
    row = call.assignment.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
    size = x.abs() if mode == "sum" else x.abs() + mean.abs().gather(1, row)
    if mode == "lerp":
        size += 2 * x.gather(1, call.indices.clamp(min=0)[..., None].expand_as(mean)).abs().gather(1, row)
    mass = call.mass.double().gather(1, row[..., 0])
    mass = torch.where((mass == 0) | (mode == "sum"), 1, mass)
    chain = (size * call.grad_merged.double().abs().gather(1, row)).sum(dim=-1) / mass
    bound = (x.shape[2] + 8) * eps * (chain + 3) + 1.01 * out * expected[1].abs()
    assert of_scores.dtype == dtype
    assert ((of_scores.double() - expected[1]).abs() <= bound).all()


@pytest.mark.parametrize("mode", ["sum", "lerp"])
def test_of_features_alone(mode, backend):
    call, options = make_call(mode), {"mode": mode, "centre_weight": W}
    expected = call.run(backend, **options)
    features, scores = call.but(features=None, merged=None).run(backend, **options)
    assert_same_bits([features], [expected[0]])
    of_mass = call.but(grad_merged=torch.zeros_like(call.grad_merged)).run(backend, **options)[1]
    assert_same_bits([scores], [of_mass])


def test_a_sum_needs_no_rows(backend):
    call = make_call("sum")
    assert_same_bits(call.but(merged=None).run(backend, mode="sum"), call.run(backend, mode="sum"))
    with pytest.raises(RuntimeError, match="features, merged: expected both or neither, got merged alone"):
        torch.ops.condense.merge_backward(*vars(call.but(features=None)).values(), mode="sum")
    with pytest.raises(RuntimeError, match="features, merged: expected both or neither, got features alone"):
        torch.ops.condense.merge_backward(*vars(call.but(merged=None)).values(), mode="lerp")


@pytest.mark.parametrize("mode", ["sum", "lerp"])
@pytest.mark.parametrize("batch", [1, 3])
def test_batch_and_threads_do_not_matter(mode, batch, cpp):
    call, options = make_call(mode, batch=batch, n=900, channels=1500), {"mode": mode, "centre_weight": W}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call.run(cpp, **options)
        torch.set_num_threads(3)
        assert_same_bits(call.run(cpp, **options), expected)
    finally:
        torch.set_num_threads(threads)
    alone = Call(*(t[-1:] for t in vars(call).values())).run(cpp, **options)
    assert_same_bits(alone, tuple(t[-1:] for t in expected))


@pytest.mark.parametrize("mode", ["sum", "lerp"])
def test_nan_stays_in_its_row(mode, backend):
    call, options = make_call(mode, batch=1), {"mode": mode, "centre_weight": W}
    clean = call.run(backend, **options)
    slopes = call.grad_merged.clone()
    slopes[0, 0] = torch.nan
    broken = call.but(grad_merged=slopes).run(backend, **options)
    touched = call.assignment[0] == 0
    assert broken[0][0, touched].isnan().all() and broken[1][0, touched].isnan().all()
    assert_same_bits([t[0, ~touched] for t in broken], [t[0, ~touched] for t in clean])


# Planes, and packed batches


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_planes(mode):
    """Scores get the gradients of all planes, of the mass once."""
    planes = torch.randn(2, 2, N, 2, dtype=torch.float64, requires_grad=True)

    def call(x, a):
        return ck.merge(x, torch.where(WITHOUT_MASS, 0.0, a), INDICES, ROWS, mode=mode, centre_weight=W)

    assert gradcheck(call, (planes, A.clone().requires_grad_()), check_forward_ad=True)
    a = A.clone().requires_grad_()
    call(planes, a)[1].sum().backward()
    has_row = (ROWS >= 0) & (ROWS != 2)
    assert torch.equal(a.grad, (has_row & ~WITHOUT_MASS).double())


CU, KEEP = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 9, 9, 12, 18], [0, 5, 5, 5, 8]))


def packed(mode, cu=CU, keep=KEEP, max_seqlen=9):
    """9 tokens and 5 rows, none, 3 tokens and no row, 6 tokens and 3 rows; with rows of every kind."""
    indices = torch.tensor([*INDICES[0].tolist(), 5, 0, -1])
    rows = torch.tensor([*ROWS[0].tolist(), 0, -1, 0, 0, 0, 1, 1, 2, 7])

    def call(x, a):
        options = {"mode": mode, "centre_weight": W}
        return ck.merge_varlen(x.reshape(18, D), a.reshape(18), indices, rows, cu, keep, max_seqlen, **options)

    return call


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_a_packed_batch(mode):
    inputs = X.clone().requires_grad_(), A.clone().requires_grad_()
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(packed(mode), inputs, check_forward_ad=True, **batched)
    assert gradgradcheck(packed(mode), inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("cu", "keep", "max_seqlen"),
    [
        pytest.param([-7, 4, 9, 12, 99], [0, 2, 4, 6, 8], 9, id="tokens that are not"),
        pytest.param([3, 6, 9, 12, 15], [2, 3, 4, 6, 7], 9, id="not from 0"),
        pytest.param([0, 1, 9, 18, 18], [0, 4, 5, 8, 8], 8, id="more rows than tokens, and too long"),
        pytest.param([0, 9, 9, 12, 18], [2, 5, 2**31 - 1, -5, 8], 9, id="rows anyhow"),
        pytest.param([0, 9, 9, 10, 18], [0, 5, 5, 8, 8], 9, id="a row too many, named after a token"),
        pytest.param([18], [8], 9, id="no segment"),
    ],
)
@pytest.mark.parametrize("mode", ["mean", "lerp"])
def test_gradcheck_with_wrong_offsets(mode, cu, keep, max_seqlen):
    """Each row's gradient goes where the row came from."""
    cu, keep = (torch.tensor(t, dtype=torch.int32) for t in (cu, keep))
    inputs = X.clone().requires_grad_(), A.clone().requires_grad_()
    assert gradcheck(packed(mode, cu, keep, max_seqlen), inputs, check_forward_ad=True)
