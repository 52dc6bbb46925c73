"""Every input that is refused: the Python functions say ValueError or TypeError, the raw operators RuntimeError."""

import re

import pytest
import torch

import condense_kernels as ck
from condense_kernels._dispatch import backends, library

F, S = torch.rand(2, 6, 4), torch.rand(2, 6)  # features [B, N, D], scores [B, N]
S3 = torch.rand(2, 6, 6)  # similarities [B, N, N]
IDX = torch.tensor([[0, 3], [1, 2]])
ROWS = torch.zeros(2, 6, dtype=torch.int64)
GRID = (2, 3)
META = torch.rand(2, 6, device="meta")
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
PACKED = (
    F[0],
    S[0],
    CU,
    CU // 2,
    CU // 6,
    4,
    6,
)  # features [T, D], scores [T], offsets [S + 1], total_keep, max_seqlen
MERGED = torch.rand(2, 2, 4)


def packed(**changed) -> tuple:
    names = ("features", "scores", "cu_seqlens", "cu_anchors", "cu_background", "total_keep", "max_seqlen")
    return tuple(changed.get(name, value) for name, value in zip(names, PACKED, strict=True))


NOWHERE = {"spatial_weight": 0.0}

# operator, arguments, options, exception of the Python function, what the message must say
CASES = [
    # similarity
    ("similarity", (F[0],), {}, ValueError, "keys: expected 3 axes [B N Dk], got 2: [6, 4]"),
    ("similarity", (F.long(),), {}, TypeError, "keys: expected dtype float32, float16, bfloat16, float64, got"),
    ("similarity", (F[:, :0],), {}, ValueError, "keys: expected at least one token"),
    ("similarity", (F[:, :, :0],), {}, ValueError, "keys: expected at least one channel"),
    ("similarity", (F, S[:, :5]), {}, ValueError, "scores: expected shape [B N] = [2, 6]"),
    ("similarity", (F, S.int()), {}, TypeError, "scores: expected dtype"),
    ("similarity", (F, S, S), {}, TypeError, "mask: expected dtype bool, got"),
    ("similarity", (F, S, (S > 0)[:1]), {}, ValueError, "mask: expected shape [B N] = [2, 6]"),
    # greedy_select
    ("greedy_select", (S3[:, :5], S, 2), {}, ValueError, "s: expected shape [B N N]"),
    ("greedy_select", (S3.half(), S, 2), {}, TypeError, "s: expected dtype float32, float64"),
    ("greedy_select", (S3, S[:1], 2), {}, ValueError, "prior: expected shape [B N] = [2, 6]"),
    ("greedy_select", (S3, S, 7), {}, ValueError, "k: expected 0 <= k <= 6 (N = 6 tokens), got 7"),
    ("greedy_select", (S3, S, -1), {}, ValueError, "k: expected 0 <= k <= 6 (N = 6 tokens), got -1"),
    ("greedy_select", (S3, S, 2), {"suppression": -1.0}, ValueError, "suppression: expected a finite number >= 0"),
    ("greedy_select", (S3, S, 2), {"suppression": 1e39}, ValueError, "suppression: expected a finite number >= 0"),
    ("greedy_select", (S3, S, 2), {"tier": S}, TypeError, "tier: expected dtype int8"),
    ("greedy_select", (S3, S, 2), {"sbar": S[0]}, ValueError, "sbar: expected shape [B] = [2]"),
    # assign
    ("assign", (S3, IDX[:1]), {"grid": GRID}, ValueError, "indices: expected shape [B K]"),
    ("assign", (S3, IDX.int()), {"grid": GRID}, TypeError, "indices: expected dtype int64"),
    ("assign", (S3, IDX), {}, ValueError, "grid, positions: expected one of the two, as spatial_weight is not 0"),
    ("assign", (S3, IDX), {"grid": (2, 2)}, ValueError, "grid: expected (H, W) or (T, H, W) with product N = 6"),
    ("assign", (S3, IDX), {"grid": (6,)}, ValueError, "grid: expected (H, W) or (T, H, W) with product N = 6"),
    ("assign", (S3, IDX), {"grid": (-2, -3)}, ValueError, "grid: expected (H, W) or (T, H, W) with product N = 6"),
    ("assign", (S3, IDX), {"grid": (2**62, 4, 6)}, ValueError, "grid: expected (H, W) or (T, H, W) with product N"),
    ("assign", (S3, IDX), {"grid": GRID, "positions": F[0, :, :2]}, ValueError, "grid, positions: expected one of"),
    ("assign", (S3, IDX), {"positions": F[0, :5]}, ValueError, "positions: expected shape [N P] = [6, "),
    ("assign", (S3, IDX), {"positions": F[0, :, :0]}, ValueError, "positions: expected at least one coordinate"),
    ("assign", (S3, IDX), {"positions": S3 > 0}, TypeError, "positions: expected dtype"),
    ("assign", (S3, IDX), {"grid": GRID, "spatial_weight": float("nan")}, ValueError, "spatial_weight: expected a"),
    # merge
    ("merge", (F[..., :0], S, IDX, ROWS), {}, ValueError, "features: expected at least one channel"),
    ("merge", (F, S.T, IDX, ROWS), {}, ValueError, "scores: expected shape [B N] = [2, 6]"),
    ("merge", (F, S, IDX[0], ROWS), {}, ValueError, "indices: expected 2 axes [B K]"),
    ("merge", (F, S, IDX, ROWS.float()), {}, TypeError, "assignment: expected dtype int64"),
    ("merge", (F, S, IDX, ROWS[:, :5]), {}, ValueError, "assignment: expected shape [B N] = [2, 6]"),
    # select_and_merge
    ("select_and_merge", (F[0], S, 2, 1), {"grid": GRID}, ValueError, "features: expected 3 axes [B N D], got 2"),
    ("select_and_merge", (F.int(), S, 2, 1), {"grid": GRID}, TypeError, "features: expected dtype"),
    ("select_and_merge", (F, S[:, :5], 2, 1), {"grid": GRID}, ValueError, "scores: expected shape [B N] = [2, 6]"),
    ("select_and_merge", (F, S, -1, 1), {"grid": GRID}, ValueError, "num_anchors: expected 0 <= num_anchors <= 6"),
    ("select_and_merge", (F, S, 1, 9), {"grid": GRID}, ValueError, "num_background: expected 0 <= num_background"),
    ("select_and_merge", (F, S, 0, 0), {"grid": GRID}, ValueError, "num_anchors + num_background: expected 1 <= K"),
    ("select_and_merge", (F, S, 4, 3), {"grid": GRID}, ValueError, "num_anchors + num_background: expected 1 <= K"),
    ("select_and_merge", (F, S, 2, 1), {}, ValueError, "grid, positions: expected one of the two, as"),
    ("select_and_merge", (F, S, 2, 1), {"grid": (3, 3)}, ValueError, "grid: expected (H, W) or (T, H, W)"),
    ("select_and_merge", (F, S, 2, 1), {"grid": GRID, "keys": F[:, :5]}, ValueError, "keys: expected shape [B N Dk]"),
    ("select_and_merge", (F, S, 2, 1), {"grid": GRID, "mask": S}, TypeError, "mask: expected dtype bool"),
    ("select_and_merge", (F, S, 2, 1), {"positions": F[:1]}, ValueError, "positions: expected shape [B N P]"),
    ("select_and_merge", (F, S, 2, 1), {"grid": GRID, "suppression": -0.1}, ValueError, "suppression: expected a"),
    (
        "select_and_merge",
        (F, S, 2, 1),
        {"grid": GRID, "background_suppression": -0.1},
        ValueError,
        "background_suppression: expected a finite number >= 0, got -0.1",
    ),
    # select_and_merge_varlen
    ("select_and_merge_varlen", packed(features=F), NOWHERE, ValueError, "features: expected 2 axes [T D], got 3"),
    ("select_and_merge_varlen", packed(features=F[0].int()), NOWHERE, TypeError, "features: expected dtype"),
    (
        "select_and_merge_varlen",
        packed(features=F[0, :, :0]),
        NOWHERE,
        ValueError,
        "features: expected at least one ch",
    ),
    ("select_and_merge_varlen", packed(scores=S[0, :5]), NOWHERE, ValueError, "scores: expected shape [T] = [6]"),
    ("select_and_merge_varlen", packed(cu_seqlens=CU.long()), NOWHERE, TypeError, "cu_seqlens: expected dtype int32"),
    (
        "select_and_merge_varlen",
        packed(cu_seqlens=CU[:0]),
        NOWHERE,
        ValueError,
        "cu_seqlens: expected at least one off",
    ),
    (
        "select_and_merge_varlen",
        packed(cu_anchors=CU[:2]),
        NOWHERE,
        ValueError,
        "cu_anchors: expected shape [S+1] = [3]",
    ),
    ("select_and_merge_varlen", packed(cu_background=CU[None]), NOWHERE, ValueError, "cu_background: expected 1 axes"),
    ("select_and_merge_varlen", packed(total_keep=7), NOWHERE, ValueError, "total_keep: expected 0 <= total_keep <= 6"),
    (
        "select_and_merge_varlen",
        packed(total_keep=-1),
        NOWHERE,
        ValueError,
        "total_keep: expected 0 <= total_keep <= 6",
    ),
    ("select_and_merge_varlen", packed(max_seqlen=-1), NOWHERE, ValueError, "max_seqlen: expected 0 <= max_seqlen <="),
    ("select_and_merge_varlen", PACKED, {}, ValueError, "positions: expected a tensor [T, P], as spatial_weight is"),
    ("select_and_merge_varlen", PACKED, {"positions": F[0, :5]}, ValueError, "positions: expected shape [T P] = [6, "),
    ("select_and_merge_varlen", PACKED, {**NOWHERE, "keys": S}, ValueError, "keys: expected shape [T Dk] = [6, "),
    (
        "select_and_merge_varlen",
        PACKED,
        {"spatial_weight": -1.0},
        ValueError,
        "spatial_weight: expected a finite number",
    ),
    ("select_and_merge_varlen", PACKED, {**NOWHERE, "suppression": -1.0}, ValueError, "suppression: expected a finite"),
    (
        "select_and_merge_varlen",
        PACKED,
        {**NOWHERE, "background_suppression": float("inf")},
        ValueError,
        "background_suppression: expected a finite",
    ),
]

# Of the operator that has no Python function.
BACKWARD = (MERGED, MERGED[..., 0], F, S, MERGED, MERGED[..., 0], IDX, ROWS)
BACKWARD_CASES = [
    ({0: MERGED.half()}, "grad_merged: expected dtype float32, got float16"),
    ({0: MERGED[:, :1]}, "grad_merged: expected shape [B K D] = [2, 2, 4]"),
    ({1: MERGED}, "grad_mass: expected 2 axes [B K], got 3"),
    ({1: MERGED[..., 0].double()}, "grad_mass: expected dtype float32, got float64"),
    ({2: F[0]}, "features: expected 3 axes [B N D], got 2"),
    ({2: None}, "features, merged: expected both or neither, got merged alone"),
    ({2: None, 4: None, 0: MERGED[0]}, "grad_merged: expected 3 axes [B K D], got 2"),
    ({2: None, 4: None, 0: MERGED[..., :0]}, "grad_merged: expected at least one channel"),
    ({2: None, 4: None, 3: S[0]}, "scores: expected 2 axes [B N], got 1"),
    ({2: None, 4: None, 5: MERGED[:1, :, 0]}, "mass: expected shape [B K] = [2, 2]"),
    ({3: S.to(torch.complex64)}, "scores: expected dtype"),
    ({4: MERGED[..., :3]}, "merged: expected shape [B K D] = [2, 2, 4]"),
    ({5: MERGED[:1, :, 0]}, "mass: expected shape [B K] = [2, 2]"),
    ({6: IDX.int()}, "indices: expected dtype int64, got int32"),
    ({6: IDX + 6}, "indices: expected values in [-1, 6), got"),
    ({7: ROWS + 2}, "assignment: expected values in [-1, 2), got 2"),
    ({7: ROWS[:, :5]}, "assignment: expected shape [B N] = [2, 6]"),
]


@pytest.mark.parametrize(
    ("op", "args", "options", "error", "message"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_refused(op, args, options, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        getattr(ck, op)(*args, **options)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops.condense, op)(*args, **options)


@pytest.mark.parametrize(("changed", "message"), BACKWARD_CASES)
def test_refused_in_backward(changed, message):
    args = [changed.get(i, value) for i, value in enumerate(BACKWARD)]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.condense.merge_backward(*args)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((F.tolist(), S, 2, 1), {}, TypeError, "features: expected a torch.Tensor [B N D], got list"),
        ((F.to_sparse(), S, 2, 1), {}, TypeError, "features: expected a dense tensor"),
        ((F, META, 2, 1), {}, ValueError, "scores: expected device cpu, as of the first argument, got meta"),
        ((F, S, 2.0, 1), {}, TypeError, "num_anchors: expected an int, got float"),
        ((F, S, 2, True), {}, TypeError, "num_background: expected an int, got bool"),
        ((F, S, 2, 1), {"suppression": "1"}, TypeError, "suppression: expected a number, got str"),
        (
            (F, S, 2, 1),
            {"background_suppression": "1"},
            TypeError,
            "background_suppression: expected a number, got str",
        ),
        ((F, S, 2, 1), {"spatial_weight": None}, TypeError, "spatial_weight: expected a number, got NoneType"),
        ((F, S, 2, 1), {"grid": 6}, TypeError, "grid: expected (H, W) or (T, H, W) as ints"),
        ((F, S, 2, 1), {"grid": (2.0, 3)}, TypeError, "grid: expected (H, W) or (T, H, W) as ints"),
        ((F, S, 2, 1), {"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'cpp', 'triton'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused_in_python(args, options, error, message):
    """What the dispatcher itself refuses in a raw call, or converts."""
    with pytest.raises(error, match="^" + re.escape(message)):
        ck.select_and_merge(*args, **{"grid": GRID, **options})


def test_a_meta_tensor_among_real_ones_is_refused():
    """It sends a raw call to the fake kernel, whose real outputs nobody would write."""
    with pytest.raises(RuntimeError, match="expected all tensors on the device of the first argument"):
        torch.ops.condense.greedy_select(S3, META, 2)


def test_a_grid_whose_product_overflows(cpp):
    with pytest.raises(RuntimeError, match="^grid: expected"):
        torch.ops.condense.assign(S3, IDX, grid=[2**32, 2**32, 6])


def test_the_missing_batch_axis_is_the_remedy():
    with pytest.raises(ValueError, match=re.escape("Remedy: add features[None], the batch axis.")):
        ck.select_and_merge(F[0], S[0], 2, 1, grid=GRID)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.arange(6.0), "positions: expected 2 axes [N P], got 1: [6]. Remedy: add positions[:, None], the coor"),
        (META, "positions: expected shape [N P] = [6, P], as the arguments before it have, got [2, 6]."),
        ([0, 1], "positions: expected a torch.Tensor [N P], got list. Remedy: torch.as_tensor(positions)."),
    ],
    ids=["line", "scores", "list"],
)
def test_positions_of_the_wrong_kind(positions, message):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        ck.assign(S3, IDX, positions=positions)


def test_no_gradient_is_lost_in_silence(backend):
    """Where an operator has no derivatives: torch itself would return a result that does not require grad."""
    features = F.clone().requires_grad_()
    out = ck.select_and_merge(F, S, 2, 1, grid=GRID)
    with pytest.raises(ValueError, match=r"^similarity has no derivatives: .*Remedy: .*torch.no_grad\(\)"):
        ck.similarity(features, backend=backend)
    with pytest.raises(ValueError, match=r"^select_and_merge_out has no derivatives: it writes into tensors"):
        ck.select_and_merge(features, S, 2, 1, grid=GRID, backend=backend, out=out)
    with pytest.raises(RuntimeError, match=r"^similarity has no derivatives"):
        torch.ops.condense.similarity(features)
    with torch.no_grad():
        assert not ck.similarity(features, backend=backend)[0].requires_grad


def test_raw_operators_raise_runtime_errors_from_their_launchers_too():
    def launch(keys):
        raise ValueError("keys: expected fp32")

    with pytest.raises(RuntimeError, match="^keys: expected fp32"):
        backends.raw(launch)(F)


def test_unavailable_backend_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setattr(backends, "triton_interprets", lambda: False)
    with pytest.raises(ValueError, match=r"backend='triton' is not available here: .*Remedy: .*TRITON_INTERPRET=1"):
        ck.similarity(F, backend="triton")
    monkeypatch.setattr(library, "cpp_unavailable", lambda: "it was not built")
    with pytest.raises(ValueError, match=r"backend='cpp' is not available here: .* it was not built"):
        ck.similarity(F, backend="cpp")


@pytest.mark.parametrize("op", ["similarity", "select_and_merge"])
def test_fp64_on_triton_is_refused(op):
    if backends.unavailable("triton", torch.device("cpu")) is not None:
        pytest.skip("triton does not interpret here")
    args = (F.double(),) if op == "similarity" else (F.double(), S, 2, 1)
    options = {} if op == "similarity" else {"grid": GRID}
    with pytest.raises(ValueError, match=r"float64"):
        getattr(ck, op)(*args, **options, backend="triton")


def test_more_tokens_than_the_sums_can_hold():
    """2**24 |s| summed over 2**19 x 2**19 pairs is just below 2**63; not reached by running it."""
    scores = torch.zeros(1, 1).expand(1, 2**19 + 1)
    message = "expected at most 524288 tokens an image, got 524289"
    for error, call in (
        (ValueError, lambda: ck.similarity(scores[..., None])),
        (ValueError, lambda: ck.select_and_merge(scores[..., None], scores, 1, 0, spatial_weight=0)),
        (RuntimeError, lambda: torch.ops.condense.similarity(scores[..., None])),
        (RuntimeError, lambda: torch.ops.condense.select_and_merge(scores[..., None], scores, 1, 0, spatial_weight=0)),
    ):
        with pytest.raises(error, match=message):
            call()
