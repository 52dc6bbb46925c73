"""What autograd keeps for backward: by what requires grad, in eager and compiled calls, dense and packed."""

import weakref

import pytest
import torch
from functorch.compile import default_partition, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits

BATCH, N, D, A, B, GRID = 8, 576, 1024, 48, 16, (24, 24)
FEATURES, SCORES = torch.rand(BATCH, N, D), torch.rand(BATCH, N)
KEPT = ck.select_and_merge(FEATURES, SCORES, A, B, grid=GRID)
BUDGET = ck.varlen_budget([N] * BATCH, keep=A + B)
SMALL = 8 * (N * (4 + 8) + (A + B) * (4 + 8))  # scores, assignment, mass, indices
LARGE = FEATURES.nbytes + KEPT.merged.nbytes
OFFSETS = sum(cu.nbytes for cu in BUDGET[:3])
assert SMALL + OFFSETS < 0.1e6 and LARGE > 20e6


def packed(run):
    def call(features, scores):
        out = run(features.flatten(0, 1), scores.flatten(), *BUDGET, spatial_weight=0.0)
        return out[0].unflatten(0, (BATCH, -1)), out[3].unflatten(0, (BATCH, -1))

    return call


CALLS = {  # of features and scores, to merged and mass
    "dense": lambda f, s: ck.select_and_merge(f, s, A, B, grid=GRID)[::3],
    "dense raw": lambda f, s: torch.ops.condense.select_and_merge(f, s, A, B, grid=GRID)[::3],
    "layer": lambda f, s: ck.Condense(A, B, grid=GRID)(f, s)[::3],
    "packed": packed(ck.select_and_merge_varlen),
    "packed raw": packed(torch.ops.condense.select_and_merge_varlen),
    "merge": lambda f, s: ck.merge(f, s, KEPT.indices, KEPT.assignment),
    "merge raw": lambda f, s: torch.ops.condense.merge(f, s, KEPT.indices, KEPT.assignment),
}
WHAT = [(True, False), (False, True), (True, True), (False, False)]  # of features and scores
WHAT_IDS = ["features", "scores", "both", "none"]


def expected_bytes(name: str, of_features: bool, of_scores: bool) -> int:
    if not (of_features or of_scores):
        return 0
    offsets = OFFSETS if "packed" in name else 0
    return SMALL + offsets + (LARGE if of_scores else 0)


@pytest.mark.parametrize("what", WHAT, ids=WHAT_IDS)
@pytest.mark.parametrize("name", CALLS)
def test_bytes_saved(name, what, cpp):
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    leaves = [t.detach().requires_grad_(needed) for t, needed in zip((FEATURES, SCORES), what, strict=True)]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        CALLS[name](*leaves)
    assert sum(saved.values()) == expected_bytes(name, *what)


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
@pytest.mark.parametrize("what", WHAT[:3], ids=WHAT_IDS[:3])
@pytest.mark.parametrize("name", ["dense", "dense raw", "packed", "packed raw", "merge"])
def test_bytes_saved_by_a_compiled_call(name, what, partition, cpp):
    """What its backward graph takes, but for the slopes that it is given."""
    torch._dynamo.reset()
    saved = []

    def backward_compiler(graph, example_inputs):
        inputs = (node for node in graph.graph.nodes if node.op == "placeholder")
        saved.append(sum(node.meta["val"].nbytes for node in inputs if not node.name.startswith("tangents")))
        return boxed_nop(graph, example_inputs)

    backend = aot_autograd(fw_compiler=boxed_nop, bw_compiler=backward_compiler, partition_fn=partition)
    leaves = [t.detach().requires_grad_(needed) for t, needed in zip((FEATURES, SCORES), what, strict=True)]
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=backend)
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = [torch.autograd.grad(call(*leaves)[0].sum(), needed) for call in (compiled, CALLS[name])]
    assert_same_bits(*gradients)
    assert saved[0] <= expected_bytes(name, *what)


@pytest.mark.parametrize("name", CALLS)
def test_features_are_let_go(name, cpp):
    """Where nothing but their gradient is asked for, nobody holds them, or the rows, until then."""
    leaf = FEATURES.detach().requires_grad_()
    features = leaf * 1
    rows, _ = CALLS[name](features, SCORES)
    loss = rows.sum()
    gone = weakref.ref(features.untyped_storage()), weakref.ref(rows.untyped_storage())
    del features, rows
    assert [storage() is None for storage in gone] == [True, True]
    loss.backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant, cpp):
    def gradient(run):
        leaf = FEATURES.detach().requires_grad_()
        run(leaf, SCORES)[0].square().sum().backward()
        return leaf.grad

    again = lambda *x: checkpoint(CALLS["dense"], *x, use_reentrant=use_reentrant)  # noqa: E731
    assert_same_bits([gradient(again)], [gradient(CALLS["dense"])])
