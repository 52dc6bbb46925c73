"""Derivatives of the merge, through every operator that merges: backward, forward mode, torch.func, vmap.

The plain formula below, with the selection as a constant, is what torch differentiates by itself.
"""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits, make_inputs

A, B = 3, 2  # anchors, background
INPUTS = make_inputs("random", num_tokens=12, channels=5, num_anchors=A, num_background=B, dtype=torch.float64)
F, S, GRID = INPUTS.features, INPUTS.scores, (3, 4)
KEPT = ck.select_and_merge(F, S, A, B, grid=GRID)
WEIGHTS = torch.linspace(-1, 1, KEPT.merged.numel(), dtype=torch.float64).reshape(KEPT.merged.shape)

CU = [torch.tensor(x, dtype=torch.int32) for x in ([0, 7, 7, 9, 24], [0, 2, 2, 3, 6], [0, 1, 1, 2, 2])]
POSITIONS = torch.rand(24, 2, generator=torch.manual_seed(0))


def condensed(features, scores, backend="auto"):
    return ck.select_and_merge(features, scores, A, B, grid=GRID, backend=backend)[::3]


def condensed_raw(features, scores):
    return torch.ops.condense.select_and_merge(features, scores, A, B, grid=GRID)[::3]


def packed(features, scores, backend="auto"):
    tokens = features.reshape(24, -1), scores.reshape(24)
    return ck.select_and_merge_varlen(*tokens, *CU, 8, 15, positions=POSITIONS, backend=backend)[::3]


def packed_raw(features, scores):
    tokens = features.reshape(24, -1), scores.reshape(24)
    return torch.ops.condense.select_and_merge_varlen(*tokens, *CU, 8, 15, positions=POSITIONS)[::3]


def merged(features, scores, backend="auto"):
    return ck.merge(features, scores, KEPT.indices, KEPT.assignment, backend=backend)


def plain(features, scores):
    """Eq. 8 with the clusters of KEPT."""
    rows = torch.nn.functional.one_hot(KEPT.assignment, A + B).to(features.dtype)
    mass = torch.einsum("bnk,bn->bk", rows, scores)
    return torch.einsum("bnk,bn,bnd->bkd", rows, scores, features) / mass[..., None], mass


CALLS = [condensed, condensed_raw, packed, packed_raw, merged]


@pytest.mark.parametrize("call", CALLS)
def test_gradcheck(call):
    """All orders of derivatives that are in use, batched ones included."""
    inputs = F.clone().requires_grad_(), S.clone().requires_grad_()
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, inputs, check_forward_ad=True, **batched)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("which", [0, 1], ids=["features", "scores"])
def test_gradcheck_of_one_argument(call, which):
    """The other is a constant, and what its gradient alone would need was not saved."""
    inputs = F, S
    leaf = inputs[which].clone().requires_grad_()

    def of_one(x):
        return call(*(x if i == which else constant for i, constant in enumerate(inputs)))

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(of_one, leaf, check_forward_ad=True, **batched)
    assert gradgradcheck(of_one, leaf, check_fwd_over_rev=True)


@pytest.mark.parametrize("call", [condensed, packed, merged])
def test_gradcheck_of_the_reference(call):
    inputs = F.clone().requires_grad_(), S.clone().requires_grad_()
    for arguments in (inputs, (inputs[0], S), (F, inputs[1])):
        assert gradcheck(lambda *x: call(*x, backend="reference"), arguments)
        assert gradgradcheck(lambda *x: call(*x, backend="reference"), arguments)


def test_gradcheck_with_rows_of_every_kind(cpp):
    """A row of one token, one of zero mass and two tokens, a masked token that had to be kept, a row that is not."""
    indices = torch.tensor([[0, 2, 5, -1], [1, 3, 4, 5]])
    assignment = torch.tensor([[0, 1, 1, 0, -1, -1], [0, 0, 1, 1, 2, 3]])
    zero = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    features = F[:, :6].clone().requires_grad_()

    def call(features, scores):
        return ck.merge(features, torch.where(zero, 0.0, scores), indices, assignment)

    rows, mass = call(features, S[:, :6])
    assert (mass == 0).tolist() == [[False, True, True, True], [False] * 4]
    assert gradcheck(call, (features, S[:, :6].clone().requires_grad_()), check_forward_ad=True)
    assert gradgradcheck(call, (features, S[:, :6].clone().requires_grad_()), check_fwd_over_rev=True)
    rows.sum().backward()
    assert features.grad[0, 2].eq(1).all() and features.grad[0, 5].eq(1).all()  # each is its row
    assert features.grad[0, [1, 4]].eq(0).all()


@pytest.mark.parametrize(
    ("cu_seqlens", "cu_anchors", "cu_background"),
    [
        pytest.param([-7, 4, 9, 99], [0, 2, 4, 6], [0, 0, 0, 0], id="tokens that are not"),
        pytest.param([3, 6, 9, 12], [2, 3, 4, 6], [0, 0, 0, 0], id="not from 0"),
        pytest.param([0, 1, 9, 24], [0, 4, 5, 6], [0, 0, 1, 2], id="more rows than tokens, and too long"),
        pytest.param([0, 4, 9, 12], [0, *[2**31 - 1] * 3], [0, 1, 1, 2**31 - 1], id="sums beyond int32"),
    ],
)
def test_gradcheck_with_wrong_offsets(cu_seqlens, cu_anchors, cu_background, cpp):
    """Each row's gradient goes where the row came from."""
    offsets = [torch.tensor(x, dtype=torch.int32) for x in (cu_seqlens, cu_anchors, cu_background)]

    def call(features, scores):
        return ck.select_and_merge_varlen(features, scores, *offsets, 9, 14, positions=POSITIONS)[::3]

    inputs = F.reshape(24, -1).clone().requires_grad_(), S.reshape(24).clone().requires_grad_()
    assert gradcheck(call, inputs, check_forward_ad=True)


def test_second_order_where_the_first_is_zero(cpp):
    """Row 0 has no mass, row 2 is not, and nobody's is token 6: no 0 / 0 on the way, and no part in anything."""
    indices, assignment = torch.tensor([[0, 2, -1]]), torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    scores = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    features = F[:1, :7].clone()
    features[0, [1, 4, 6]] = torch.nan  # read by none of them

    def of(features, scores):
        rows, mass = ck.merge(features, scores, indices, assignment)
        return rows.square().sum() + mass.square().sum()

    for name, order in (("backward", jacrev(jacrev(of, argnums=1), argnums=1)), ("forward", jacfwd(jacfwd(of, 1), 1))):
        curvature = order(features, scores)[0, :, 0]
        assert curvature[:2, :2].eq(2).all() and curvature[2:4, 2:4].ne(0).all(), name  # that of the mass, squared
        curvature[:2, :2] = curvature[2:4, 2:4] = 0
        assert curvature.eq(0).all(), name


def test_gradcheck_without_rows(cpp):
    """Nothing is kept: gradients, and theirs, are zeros."""
    offsets = [torch.tensor([0, n], dtype=torch.int32) for n in (24, 0, 0)]
    features = F.reshape(24, -1).clone().requires_grad_()
    out = ck.select_and_merge_varlen(features, S.reshape(24), *offsets, 0, 24, spatial_weight=0.0)
    gradient = torch.autograd.grad(out.merged.sum() + out.mass.sum(), features, create_graph=True)[0]
    assert gradient.eq(0).all() and torch.autograd.grad(gradient.sum(), features)[0].eq(0).all()


def loss(call):
    def of(features, scores):
        rows, mass = call(features, scores)
        return (rows * WEIGHTS).pow(2).sum() + mass.pow(3).sum()

    return of


FS, SS = torch.stack([F, F.flip(2)]), torch.stack([S, S])
TRANSFORMS = {
    "grad": lambda q: grad(q, argnums=(0, 1))(F, S),
    "hessian": lambda q: hessian(q, argnums=(0, 1))(F, S),
    "jacfwd of jacfwd": lambda q: jacfwd(jacfwd(q, argnums=1), argnums=0)(F, S),  # 0 by torch's own default
    "jacrev of jacrev": lambda q: jacrev(jacrev(q, argnums=1), argnums=0)(F, S),
    "jacrev of jacrev, features first": lambda q: jacrev(jacrev(q, argnums=0), argnums=1)(F, S),
    "jacfwd of jacrev, features first": lambda q: jacfwd(jacrev(q, argnums=0), argnums=1)(F, S),
    "jacrev of jacfwd": lambda q: jacrev(jacfwd(q, argnums=1), argnums=0)(F, S),
    "jvp thrice": lambda q: jvp(
        lambda t: jvp(lambda t: jvp(lambda t: q(F, t), (t,), (t,))[1], (t,), (t,))[1], (S,), (S,)
    ),
    "grad thrice": lambda q: grad(lambda t: grad(lambda t: grad(lambda t: q(F, t))(t).pow(2).sum())(t).sum())(S),
    "vmap": lambda q: vmap(q, in_dims=(2, None))(FS.movedim(0, 2), S),
    "vmap of grad": lambda q: vmap(grad(q, argnums=(0, 1)))(FS, SS),
    "vmap of grad, features alone": lambda q: vmap(grad(q), in_dims=(0, None))(FS, S),
    "vmap of hessian": lambda q: vmap(hessian(q, argnums=1))(FS, SS),
    "vmap of jvp": lambda q: vmap(lambda x: jvp(lambda t: q(x, t), (S,), (S,))[1])(FS),
    "vmap of vmap": lambda q: vmap(vmap(q))(torch.stack([FS, FS]), torch.stack([SS, SS])),
    "grad of vmap": lambda q: grad(lambda x, t: vmap(q)(x, t).sum(), argnums=(0, 1))(FS, SS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name):
    """Of the merge, whose clusters are given: both sides keep the same tokens, whatever vmap feeds them."""
    ours, expected = (TRANSFORMS[name](loss(call)) for call in (merged, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_transforms_of_the_flagship():
    for name in ("hessian", "jacfwd of jacfwd", "jacrev of jacfwd"):
        ours, expected = (TRANSFORMS[name](loss(call)) for call in (condensed, plain))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_third_order_by_autograd():
    def third(call):
        inputs = F.clone().requires_grad_(), S.clone().requires_grad_()
        values = [loss(call)(*inputs)]
        for _ in range(3):
            values = torch.autograd.grad(sum(v.pow(2).sum() for v in values), inputs, create_graph=True)
        return values

    torch.testing.assert_close(third(condensed), third(plain), rtol=1e-7, atol=1e-7)


def test_forward_mode_over_backward():
    def tangent(call):
        features = F.clone().requires_grad_()
        with forward_ad.dual_level():
            scores = forward_ad.make_dual(S, 3 * S)
            gradient = torch.autograd.grad(loss(call)(forward_ad.make_dual(features, 2 * F), scores), features)[0]
            return forward_ad.unpack_dual(gradient).tangent

    torch.testing.assert_close(tangent(condensed), tangent(plain))


def test_vmap_folds_into_the_batch(cpp):
    """Bit for bit what a loop gives; shared and mapped positions, keys, masks; a stage that returns one tensor."""
    keys, positions = torch.rand(3, 2, 12, 4), torch.rand(3, 12, 2)
    mask = torch.rand(2, 12, 3) > 0.2
    features, scores = torch.rand(2, 12, 5), torch.rand(3, 2, 12)
    options = {"keys": keys, "positions": positions, "mask": mask}

    def call(scores, keys, positions, mask, run=ck.select_and_merge):
        return run(features, scores, A, B, keys=keys, positions=positions, mask=mask)

    axes = (0, 0, 0, 2)
    loop = [call(scores[i], keys[i], positions[i], mask[..., i]) for i in range(3)]
    for run in (ck.select_and_merge, torch.ops.condense.select_and_merge):
        mapped = vmap(lambda *x, run=run: call(*x, run=run), in_dims=axes)(scores, *options.values())
        assert_same_bits(tuple(mapped), [torch.stack(column) for column in zip(*loop, strict=True)])
    shared = vmap(lambda t: ck.select_and_merge(features, t, A, B, positions=positions[0]))(scores)
    assert_same_bits(
        [part[1] for part in shared], ck.select_and_merge(features, scores[1], A, B, positions=positions[0])
    )
    s = ck.similarity(features)[0]
    orders = vmap(vmap(lambda t: ck.greedy_select(s, t, 4)))(scores[None])
    assert_same_bits([orders[0, 2]], [ck.greedy_select(s, scores[2], 4)])
    nested = vmap(vmap(lambda t: torch.ops.condense.greedy_select(s, t, 4)))(scores[None])
    assert_same_bits([nested], [orders])
    packed_twice = vmap(packed)(FS, SS)
    assert_same_bits([part[1] for part in packed_twice], packed(FS[1], SS[1]))


def test_vmap_of_no_call():
    """As torch's own operators have it; jacrev of an empty batch is one."""
    features, scores = FS[:0].movedim(0, 2), SS[:0].movedim(0, 2)
    results = vmap(lambda x, t: ck.select_and_merge(x, t, A, B, grid=GRID), in_dims=(2, 2))(features, scores)
    assert [list(part.shape) for part in results] == [[0, *part.shape] for part in KEPT]
    assert jacrev(lambda x: condensed(x, S[:0])[0])(F[:0]).shape == (0, A + B, 5, 0, 12, 5)


@pytest.mark.parametrize("call", [condensed, condensed_raw])
def test_gradients_go_through_vmap(call):
    """autograd around vmap, where a raw operator stands below the mapped axis."""
    features = FS.clone().requires_grad_()
    mapped = torch.autograd.grad(vmap(loss(call))(features, SS).sum(), features)[0]
    loop = [torch.autograd.grad(loss(call)(x, t), x)[0] for x, t in zip(features.unbind(), SS, strict=True)]
    assert_same_bits(mapped.unbind(), loop)


def test_what_has_no_derivatives_says_so_inside_transforms():
    with pytest.raises(ValueError, match="^similarity has no derivatives"):
        grad(lambda x: ck.similarity(x)[0].sum())(F)
    with pytest.raises(ValueError, match="^similarity has no derivatives"):
        grad(lambda x: vmap(lambda y: ck.similarity(y)[0])(x[None]).sum())(F)
    with pytest.raises(ValueError, match="^similarity has no derivatives"):
        jvp(lambda x: vmap(lambda y: ck.similarity(y)[0])(x[None]), (F,), (F,))
    with forward_ad.dual_level():  # of constants
        vmap(lambda y: ck.similarity(y)[0])(FS)
    with pytest.raises(RuntimeError, match="^similarity has no derivatives"):
        jvp(lambda x: torch.ops.condense.similarity(x)[0], (F,), (F,))
    with pytest.raises(RuntimeError, match=r"^torch.ops.condense.select_and_merge has no derivatives inside.*Remedy"):
        grad(lambda x: condensed_raw(x, S)[0].sum())(F)
    with pytest.raises(RuntimeError, match=r"^select_and_merge_out has no rule for torch.func.vmap. Remedy"):
        vmap(lambda x, t: ck.select_and_merge(x, t, A, B, grid=GRID, out=KEPT))(FS, SS)


def test_transforms_that_do_not_concern_a_call_leave_it_alone():
    """out=, workspace= and workspace_bytes return no tensors, so there is nothing to mark as a constant."""
    workspace = torch.empty(ck.workspace_bytes(F, S, A, B, grid=GRID), dtype=torch.uint8)
    out = ck.Condensed(*map(torch.empty_like, KEPT))

    def of_constants(x):
        ck.select_and_merge(F, S, A, B, grid=GRID, out=out, workspace=workspace)
        return x.sum() * ck.workspace_bytes(F, S, A, B, grid=GRID)

    assert torch.equal(grad(of_constants)(S), torch.full_like(S, workspace.numel()))
    assert_same_bits(out, KEPT)


@pytest.mark.parametrize("call", [condensed, packed, merged])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(call, use_reentrant):
    """A checkpoint unpacks what was saved once, and recomputes it for that."""

    def gradients(run):
        inputs = F.clone().requires_grad_(), S.clone().requires_grad_()
        rows, mass = run(*inputs)
        (rows.square().sum() + mass.square().sum()).backward()
        return [t.grad for t in inputs]

    assert_same_bits(gradients(lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant)), gradients(call))


@pytest.mark.parametrize("call", [condensed, condensed_raw, packed, merged])
def test_one_argument_alone(call):
    """Only features, or only scores, require grad; keys and positions never get one."""
    for i in range(2):
        inputs = [t.clone().requires_grad_(i == j) for j, t in enumerate((F, S))]
        sum(result.sum() for result in call(*inputs)).backward()
        assert inputs[i].grad.abs().sum() > 0 and inputs[1 - i].grad is None


INPLACE = {
    "dropout": lambda t, inplace: torch.nn.functional.dropout(t, inplace=inplace),
    "add": lambda t, inplace: t.add_(1.0) if inplace else t + 1.0,
    "mul": lambda t, inplace: t.mul_(3.0) if inplace else t * 3.0,
}


@pytest.mark.parametrize("change", INPLACE)
@pytest.mark.parametrize("call", CALLS)
def test_merged_may_be_written_into(call, change):
    """Where only features require grad; the gradient of scores needs merged as it was, and torch says so."""

    def gradients(inplace, of_scores=False):
        torch.manual_seed(0)
        inputs = F.clone().requires_grad_(), S.clone().requires_grad_(of_scores)
        rows, mass = call(*inputs)
        loss = INPLACE[change](rows, inplace).square().sum() + mass.square().sum()
        return torch.autograd.grad(loss, inputs if of_scores else inputs[:1])

    assert_same_bits(gradients(inplace=True), gradients(inplace=False, of_scores=True)[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(inplace=True, of_scores=True)


@pytest.mark.parametrize("call", CALLS)
def test_features_may_be_written_into(call):
    """After the call, as those of a layer whose activation works in place."""
    features, scale = F.clone(), torch.ones((), dtype=F.dtype, requires_grad=True)
    scaled = features * scale
    rows, _ = call(scaled, S)
    scaled.zero_()
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), scale)[0], rows.detach().sum())


@pytest.mark.parametrize("call", CALLS)
def test_mass_alone_has_a_gradient_of_zeros_in_features(call):
    features = F.clone().requires_grad_()
    call(features, S)[1].sum().backward()
    assert features.grad.shape == F.shape and features.grad.eq(0).all()


def test_indices_and_assignment_are_constants():
    result = ck.select_and_merge(F.clone().requires_grad_(), S, A, B, grid=GRID)
    assert [part.requires_grad for part in result] == [True, False, False, True]
    keys = F.clone().requires_grad_()
    assert not ck.select_and_merge(F, S, A, B, keys=keys, grid=GRID).merged.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_gradients(dtype, fast):
    """In the dtype of the argument, as near to fp64's as one rounding of the result and of merged allow."""
    inputs = make_inputs("random", num_tokens=24, channels=16, dtype=dtype)
    features, scores = inputs.features.requires_grad_(), inputs.scores.requires_grad_()
    rows, indices, assignment, mass = inputs.run(fast)
    gradient = torch.linspace(-1, 1, rows.numel()).reshape(rows.shape).to(dtype)
    torch.autograd.backward([rows, mass], [gradient, torch.ones_like(mass)])
    assert features.grad.dtype == dtype and scores.grad.dtype == dtype
    wide = features.detach().double().requires_grad_(), scores.detach().double().requires_grad_()
    expected = ck.merge(*wide, indices, assignment)
    torch.autograd.backward(expected, [gradient.double(), torch.ones_like(expected[1])])
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(features.grad.double(), wide[0].grad, rtol=2 * unit, atol=1e-7)
    # merged is rounded: |merged| |gradient| unit / mass, summed over the channels
    slack = (rows.double() * gradient.double()).abs().sum(-1) / expected[1].detach() * (2 * unit) + 2 * unit + 1e-6
    bound = slack.gather(1, assignment) + 4 * unit * wide[1].grad.abs()
    assert ((scores.grad.double() - wide[1].grad).abs() <= bound).all()


def test_a_layer_before_the_operator_learns(cpp):
    """A linear layer in front of the merge, and one that makes the scores, learn to reproduce the image's mean."""
    torch.manual_seed(0)
    tokens = torch.randn(4, 36, 16)
    target = tokens.mean(dim=1) + 1
    project, score = torch.nn.Linear(16, 16), torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*project.parameters(), *score.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        features, scores = project(tokens), score(tokens)[..., 0].sigmoid()
        rows, _, _, mass = ck.select_and_merge(features, scores, 4, 2, keys=tokens, grid=(6, 6))
        image = (rows * mass[..., None]).sum(dim=1) / mass.sum(dim=1, keepdim=True)
        losses.append((image - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (project.weight, score.weight))
    assert losses[-1] < 0.05 * losses[0]


def test_deterministic_algorithms_are_no_obstacle(cpp):
    torch.use_deterministic_algorithms(True)  # not warn_only
    first, second = (torch.autograd.grad(loss(condensed)(x, S), x) for x in [F.clone().requires_grad_()] * 2)
    assert_same_bits(first, second)


def test_gradients_do_not_depend_on_autocast_or_threads(cpp):
    inputs = make_inputs("clustered", batch=2, num_tokens=200, channels=64)

    def gradients():
        features, scores = inputs.features.clone().requires_grad_(), inputs.scores.clone().requires_grad_()
        rows, mass = ck.select_and_merge(features, scores, *inputs.args[2:], **inputs.options)[::3]
        return torch.autograd.grad(rows.square().sum() + mass.square().sum(), (features, scores))

    expected, threads = gradients(), torch.get_num_threads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(gradients(), expected)
    try:
        torch.set_num_threads(1)
        assert_same_bits(gradients(), expected)
    finally:
        torch.set_num_threads(threads)
