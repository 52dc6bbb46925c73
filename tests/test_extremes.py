"""Numbers beyond every range, and indices below -1: an error that names them, or a rule, of each function."""

import math
import re

import pytest
import torch

import condense_kernels as ck

F, S = torch.rand(2, 6, 4), torch.rand(2, 6)  # features [B, N, D], scores [B, N]
S3 = torch.rand(2, 6, 6)  # similarities [B, N, N]
IDX = torch.tensor([[0, 3], [1, 2]])
GRID = (2, 3)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)

# argument, a call with that number; each number is refused, whatever it is
WEIGHTS = {
    "suppression": [
        lambda x: ck.select_and_merge(F, S, 2, 1, grid=GRID, suppression=x),
        lambda x: ck.condense(F, S, 3, grid=GRID, suppression=x),
        lambda x: ck.workspace_bytes(F, S, 2, 1, grid=GRID, suppression=x),
        lambda x: ck.greedy_select(S3, S, 2, suppression=x),
        lambda x: ck.Condense(2, 1, suppression=x),
        lambda x: ck.select_and_merge_varlen(F[0], S[0], CU, CU // 2, CU // 6, 4, 6, spatial_weight=0, suppression=x),
    ],
    "background_suppression": [
        lambda x: ck.select_and_merge(F, S, 2, 1, grid=GRID, background_suppression=x),
        lambda x: ck.condense(F, S, 3, grid=GRID, background_suppression=x),
        lambda x: ck.workspace_bytes(F, S, 2, 1, grid=GRID, background_suppression=x),
        lambda x: ck.Condense(2, 1, background_suppression=x),
        lambda x: ck.select_and_merge_varlen(
            F[0], S[0], CU, CU // 2, CU // 6, 4, 6, spatial_weight=0, background_suppression=x
        ),
    ],
    "spatial_weight": [
        lambda x: ck.select_and_merge(F, S, 2, 1, grid=GRID, spatial_weight=x),
        lambda x: ck.condense(F, S, 3, grid=GRID, spatial_weight=x),
        lambda x: ck.workspace_bytes(F, S, 2, 1, grid=GRID, spatial_weight=x),
        lambda x: ck.assign(S3, IDX, grid=GRID, spatial_weight=x),
        lambda x: ck.Condense(2, 1, spatial_weight=x),
        lambda x: ck.select_and_merge_varlen(F[0], S[0], CU, CU // 2, CU // 6, 4, 6, spatial_weight=x),
    ],
    "background_ratio": [
        lambda x: ck.split_budget(6, 3, x),
        lambda x: ck.condense(F, S, 3, x, grid=GRID),
        lambda x: ck.varlen_budget([6], 3, x),
    ],
}
COUNTS = {
    "num_anchors": [
        lambda x: ck.select_and_merge(F, S, x, 1, grid=GRID),
        lambda x: ck.workspace_bytes(F, S, x, 1, grid=GRID),
        lambda x: ck.Condense(x, 1),
    ],
    "num_background": [
        lambda x: ck.select_and_merge(F, S, 1, x, grid=GRID),
        lambda x: ck.workspace_bytes(F, S, 1, x, grid=GRID),
        lambda x: ck.Condense(1, x),
    ],
    "k": [lambda x: ck.greedy_select(S3, S, x)],
    "keep": [lambda x: ck.split_budget(6, x), lambda x: ck.condense(F, S, x, grid=GRID)],
    "num_tokens": [lambda x: ck.split_budget(x, 3), lambda x: ck.split_budget(x, 0.5)],
    "total_keep": [lambda x: ck.select_and_merge_varlen(F[0], S[0], CU, CU // 2, CU // 6, x, 6, spatial_weight=0)],
    "max_seqlen": [lambda x: ck.select_and_merge_varlen(F[0], S[0], CU, CU // 2, CU // 6, 4, x, spatial_weight=0)],
    "seqlens": [lambda x: ck.varlen_budget([3, x]), lambda x: ck.varlen_budget([x], keep=0.5)],
    "grid": [
        lambda x: ck.select_and_merge(F, S, 2, 1, grid=(x, 3)),
        lambda x: ck.condense(F, S, 3, grid=(2, 3, x)),
        lambda x: ck.assign(S3, IDX, grid=(x, x)),
        lambda x: ck.Condense(2, 1, grid=(2, 3))(F, S, grid=(2, x)),
    ],
}


def brief(number: int | float) -> str:
    """Python prints no int of 5000 digits."""
    return f"{'-' * (number < 0)}{number.bit_length()} bits" if isinstance(number, int) else str(number)


def calls(table: dict) -> list:
    return [pytest.param(name, call, id=f"{name} {i}") for name in table for i, call in enumerate(table[name])]


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000, 2**1024, -1, math.inf, math.nan], ids=brief)
@pytest.mark.parametrize(("name", "call"), calls(WEIGHTS))
def test_weights(name, call, number):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        call(number)


@pytest.mark.parametrize("number", [2**31, 2**63, 2**70, 10**400, 10**5000, -(2**70), -(10**5000)], ids=brief)
@pytest.mark.parametrize(("name", "call"), calls(COUNTS))
def test_counts(name, call, number):
    with pytest.raises(ValueError, match=f"^{name}: expected ") as caught:
        call(number)
    assert len(str(caught.value)) < 400  # and no page of digits


def test_huge_numbers_are_described():
    with pytest.raises(ValueError, match="got an int of 1329 bits"):
        ck.greedy_select(S3, S, 2, suppression=10**400)
    with pytest.raises(ValueError, match="got 1180591620717411303424"):
        ck.greedy_select(S3, S, 2**70)


def test_as_much_as_fits_is_taken():
    assert ck.split_budget(2**19, 0.5) == (196608, 65536)
    budget = ck.varlen_budget([2**19] * 4095 + [2**19 - 1], keep=1)
    assert budget.cu_seqlens[-1] == 2**31 - 1
    limit = torch.finfo(torch.float32).max
    assert ck.greedy_select(S3, S, 2, suppression=limit).shape == (2, 2)


def test_lengths_whose_sum_no_offset_holds():
    with pytest.raises(ValueError, match=r"^seqlens: expected a sum of at most 2147483647 tokens.* got 2147483648"):
        ck.varlen_budget([2**19] * 4096, keep=1)
    with pytest.raises(ValueError, match=r"^seqlens: expected at most 524288 tokens an image, got 2147483648"):
        ck.varlen_budget([2**31])


def test_condense_of_too_many_tokens_names_the_features():
    scores = torch.zeros(1, 1).expand(1, 2**19 + 1)
    with pytest.raises(ValueError, match="^features: expected at most 524288 tokens an image, got 524289"):
        ck.condense(scores[..., None], scores, 1, spatial_weight=0)


@pytest.mark.parametrize(
    ("op", "args", "options", "name"),
    [
        ("select_and_merge", (F, S, 2**70, 1), {"grid": GRID}, "num_anchors"),
        ("select_and_merge", (F, S, 2, 1), {"grid": [2**70, 3]}, "grid"),
        ("select_and_merge", (F, S, 2, 1), {"grid": GRID, "suppression": 10**400}, "suppression"),
        ("greedy_select", (S3, S, 2**70), {}, "k"),
        ("assign", (S3, IDX), {"grid": GRID, "spatial_weight": 10**400}, "spatial_weight"),
    ],
)
def test_raw_operators(op, args, options, name):
    """Torch itself refuses what its ints and floats cannot hold, before the operator is asked."""
    with pytest.raises(RuntimeError, match=f"Expected a value of type .* for argument '{name}'"):
        getattr(torch.ops.condense, op)(*args, **options)


def test_raw_operators_up_to_what_an_int_holds():
    for number in (2**31, 2**63 - 1, -(2**63)):
        with pytest.raises(RuntimeError, match=f"^num_anchors: expected 0 <= num_anchors <= 6 .*, got {number}"):
            torch.ops.condense.select_and_merge(F, S, number, number, grid=GRID)
        with pytest.raises(RuntimeError, match="^grid: expected"):
            torch.ops.condense.assign(S3, IDX, grid=[number, number])


# Indices below -1

BELOW = (-2, -7, -(2**31), -(2**31) - 1, -(2**63))


def rows(at: torch.Tensor):
    """With gradients, which such a row has none of."""
    planes = torch.linspace(0, 1, 48).reshape(2, 6, 4).requires_grad_()
    gathered, merged = ck.gather_tokens(at, planes), ck.unmerge(planes, at)
    grads = torch.autograd.grad(gathered.square().sum() + 3 * merged.square().sum(), planes)
    return gathered, merged, *grads, ck.sizes(at, torch.zeros(2, 4, dtype=torch.int64))


def packed_rows(at: torch.Tensor):
    offsets = {"cu_seqlens": CU, "cu_kept": torch.tensor([0, 1, 3], dtype=torch.int32)}
    counts = ck.sizes(at.flatten()[:6], at[0, :3], **offsets)
    return ck.gather_tokens(at[0, :3], F[0], **offsets), ck.unmerge(F[0, :3], at.flatten()[:6], **offsets), counts


@pytest.mark.parametrize("value", BELOW)
def test_planes_and_sizes_count_them_as_minus_one(value):
    at = torch.tensor([[0, value, 1, 2], [value, 3, -1, 0]])
    for call in (rows, packed_rows):
        for result, expected in zip(call(at), call(at.clamp(min=-1)), strict=True):
            assert torch.equal(result, expected)
    assert rows(at)[0][0, 1].eq(0).all() and rows(at)[1][1, 0].eq(0).all()


def merge_and_back(indices, assignment, backend):
    features, scores = F.clone().requires_grad_(), S.clone().requires_grad_()
    merged, mass = ck.merge(features, scores, indices, assignment, backend=backend)
    return merged, mass, *torch.autograd.grad(merged.square().sum() + mass.square().sum(), (features, scores))


def assigned(indices, _, backend):
    return (ck.assign(S3 + S3.mT, indices, spatial_weight=0.0, backend=backend),)


@pytest.mark.parametrize("value", [*BELOW, 6, 2**31, 2**63 - 1])
@pytest.mark.parametrize(
    ("call", "name"), [(merge_and_back, "indices"), (merge_and_back, "assignment"), (assigned, "indices")]
)
def test_merge_and_assign(call, name, value, backend):
    """C++ and the reference refuse them; the Triton kernels, which are made for GPUs, count them as -1."""
    given = {"indices": torch.tensor([[0, 5], [2, 4]]), "assignment": torch.tensor([[0, 1, -1, 0, 1, 1]] * 2)}
    wrong, as_nobody = dict(given), dict(given)
    for values, at in ((wrong, value), (as_nobody, -1)):
        values[name] = given[name].clone()
        values[name][1, 1] = at
    if backend != "triton":
        high = 6 if name == "indices" else 2
        with pytest.raises(RuntimeError, match=re.escape(f"{name}: expected values in [-1, {high}), got {value}")):
            call(*wrong.values(), backend)
        return
    for result, expected in zip(call(*wrong.values(), backend), call(*as_nobody.values(), backend), strict=True):
        assert torch.equal(result, expected)
