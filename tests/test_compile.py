"""torch.compile: whole graphs, few of them, and the bits of eager, forward and backward.

Most tests compile for the backend aot_eager: it traces as inductor does, dynamic shapes, autograd and functional form
included, and then runs the operators as they are, so that it takes seconds.
"""

import random

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch.autograd import forward_ad

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits, make_inputs

GRIDS = [
    *[(4, 5), (3, 4), (3, 5), (4, 4), (3, 6), (3, 7), (2, 11), (4, 6), (5, 5), (2, 13)],
    *[(3, 9), (4, 7), (5, 6), (4, 8), (3, 11), (5, 7), (6, 6), (3, 13), (5, 8), (6, 7)],
]
BUDGETS = [(4, 2), (6, 3), (3, 0), (0, 5), (8, 4)]
assert len({h * w for h, w in GRIDS}) == 20


def image(grid, budget, batch=2, channels=8, requires_grad=False, dtype=torch.float32) -> tuple:
    """The arguments of the calls below."""
    n = grid[0] * grid[1]
    features = torch.randn(batch, n, channels, dtype=dtype).requires_grad_(requires_grad)
    scores = torch.rand(batch, n, dtype=dtype).requires_grad_(requires_grad)
    return features, scores, torch.rand(n, 2), *grid, *budget


def shuffled(budgets=BUDGETS, **options) -> list[tuple]:
    """Every grid with every budget and batches of 3 to 5, so that from the second call on all sizes change."""
    cases = [(grid, budget, 3 + i % 3) for i, grid in enumerate(GRIDS) for budget in budgets]
    random.Random(0).shuffle(rest := cases[1:])
    return [image(*case, **options) for case in (cases[0], *rest)]


def stages(features, scores, _, height, width, num_anchors, num_background):
    s, sbar, g, tier = ck.similarity(features, scores)
    anchors = ck.greedy_select(s, scores, num_anchors, sbar=sbar, tier=tier)
    background = ck.greedy_select(s, g, num_background, sbar=sbar, tier=tier.scatter(1, anchors, 3))
    indices = torch.cat([anchors, background], dim=1).sort(dim=1).values
    return ck.merge(features, scores, indices, ck.assign(s, indices, tier=tier, grid=(height, width)))


CALLS = {
    "grid": lambda f, s, p, h, w, a, b: ck.select_and_merge(f, s, a, b, grid=(h, w)),
    "positions": lambda f, s, p, h, w, a, b: ck.select_and_merge(f, s, a, b, positions=p),
    "layer": lambda f, s, p, h, w, a, b: ck.Condense(a, b, grid=(h, w))(f, s),
    "budget": lambda f, s, p, h, w, a, b: ck.condense(f, s, keep=a + b, grid=(h, w)),
    "ratio": lambda f, s, p, h, w, a, b: ck.condense(f, s, keep=0.25, grid=(h, w)),
    "stages": stages,
}


class Graphs:
    """``compile`` is torch.compile(fullgraph=True), and counts what it compiles."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def compile(self, function, dynamic: bool | None = None):
        backend = aot_autograd(fw_compiler=self._count("forward"), bw_compiler=self._count("backward"))
        return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)

    def _count(self, direction: str):
        def compiler(graph, example_inputs):
            setattr(self, direction, getattr(self, direction) + 1)
            return boxed_nop(graph, example_inputs)

        return compiler


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()


def gradients(function, arguments: tuple, parameters=()) -> list[torch.Tensor]:
    """Of a loss in which every result counts, with respect to features, scores and parameters."""
    merged, *_, mass = function(*arguments)
    loss = merged.square().sum() + mass.square().sum()
    return torch.autograd.grad(loss, (*arguments[:2], *parameters))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (True, 1)])
def test_graphs_of_20_sizes_and_5_budgets(name, dynamic, expected, graphs, cpp):
    """By default the first graph has the sizes of the first call, and the second all others."""
    compiled = graphs.compile(CALLS[name], dynamic)
    # A stage that picks nothing has an empty result, for which torch compiles again.
    budgets = [budget for budget in BUDGETS if all(budget) or name != "stages"]
    for arguments in shuffled(budgets):
        assert_same_bits(compiled(*arguments), CALLS[name](*arguments))
    assert (graphs.forward, graphs.backward) == (expected, 0)


@pytest.mark.parametrize("name", ["grid", "positions"])
@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (True, 1)])
def test_graphs_of_the_gradients(name, dynamic, expected, graphs, cpp):
    compiled = graphs.compile(CALLS[name], dynamic)
    for arguments in shuffled(requires_grad=True)[:20]:
        assert_same_bits(gradients(compiled, arguments), gradients(CALLS[name], arguments))
    assert (graphs.forward, graphs.backward) == (expected, expected)


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.project, self.head = torch.nn.Linear(8, 6, dtype=dtype), torch.nn.Linear(6, 4, dtype=dtype)

    def forward(self, features, scores, _, height, width, num_anchors, num_background):
        merged, _, _, mass = ck.select_and_merge(
            self.project(features), scores, num_anchors, num_background, grid=(height, width)
        )
        return self.head(merged), mass


@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (True, 1)])
def test_graphs_of_a_model(dynamic, expected, graphs, cpp):
    """The gradients reach the layers on both sides. In fp64, where another order of the matmul's sums moves no pick."""
    model = Model()
    compiled = graphs.compile(model, dynamic)
    for arguments in shuffled(requires_grad=True, dtype=torch.float64)[:20]:
        of_both = (gradients(call, arguments, model.parameters()) for call in (compiled, model))
        for actual, eager in zip(*of_both, strict=True):
            torch.testing.assert_close(actual, eager)
    assert (graphs.forward, graphs.backward) == (expected, expected)


@pytest.mark.parametrize(("name", "expected"), [("positions", 3), ("grid", 4)])
def test_sizes_that_change_one_after_the_other(name, expected, graphs, cpp):
    """A graph for each size found to change: here the budget, then N and W, then H."""
    compiled = graphs.compile(CALLS[name])
    for grid in [(3, 4), (3, 5), (3, 6), (4, 5), (4, 6), (7, 5)]:
        for budget in BUDGETS:
            compiled(*image(grid, budget))
    assert graphs.forward == expected


def test_marked_sizes_are_one_graph(graphs, cpp):
    """The grid may be two axes of a tensor, and a square at first: a marked size is taken to be equal to no other."""

    def condense(planes, scores):  # [B, H, W, D], [B, H, W]
        return ck.select_and_merge(planes.flatten(1, 2), scores.flatten(1), 4, 2, grid=planes.shape[1:3])

    compiled = graphs.compile(condense)
    for batch, height, width in [(4, 4, 4), (3, 4, 5), (5, 5, 4), (2, 7, 3)]:
        planes, scores = torch.randn(batch, height, width, 8), torch.rand(batch, height, width)
        for axis in range(3):
            torch._dynamo.mark_dynamic(planes, axis)
            torch._dynamo.mark_dynamic(scores, axis)
        assert_same_bits(compiled(planes, scores), condense(planes, scores))
    assert graphs.forward == 1


WHAT_RECOMPILES = {  # after image((4, 5), (4, 2), batch=3), compiled with dynamic=True
    "channels": ({"channels": 9}, 0),
    "no background": ({"budget": (4, 0)}, 0),
    "all tokens kept": ({"budget": (16, 4)}, 0),
    "one token kept": ({"budget": (1, 0)}, 1),
    "one image": ({"batch": 1}, 1),
    "one token": ({"grid": (1, 1), "budget": (1, 0)}, 1),
    "another dtype": ({"dtype": torch.bfloat16}, 1),
    "gradients": ({"requires_grad": True}, 1),
}


@pytest.mark.parametrize("change", WHAT_RECOMPILES)
def test_what_else_recompiles(change, graphs, cpp):
    first = {"grid": (4, 5), "budget": (4, 2), "batch": 3}
    options, expected = WHAT_RECOMPILES[change]
    compiled = graphs.compile(CALLS["grid"], dynamic=True)
    compiled(*image(**first))
    arguments = image(**(first | options))
    assert_same_bits(compiled(*arguments), CALLS["grid"](*arguments))
    assert graphs.forward == 1 + expected


def test_each_ratio_is_a_graph(graphs, cpp):
    """torch.compile takes floats for constants. The counts that split_budget makes of them outside are sizes."""
    compiled = graphs.compile(lambda f, s, p, keep: ck.condense(f, s, keep, positions=p), dynamic=True)
    features, scores, positions, *_ = image((4, 5), (4, 2), batch=3)
    for keep in (0.25, 0.5, 0.75):
        compiled(features, scores, positions, keep)
    assert graphs.forward == 3


@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (True, 1)])
def test_graphs_of_packed_batches(dynamic, expected, graphs, cpp):
    """The number of images S, of all tokens T and of all rows, and the longest image change with every call.

    In the first one no two sizes are equal, the offsets' places in memory included: torch would hold others to that.
    """

    def call(features, scores, positions, *offsets):
        return ck.select_and_merge_varlen(features, scores, *offsets, positions=positions)

    compiled = graphs.compile(call, dynamic)
    for seqlens, keep in [([6, 9, 4], 3), ([5, 12], 0.3), ([7, 0, 3, 8, 5], 4), ([11, 2, 4, 6], 2)]:
        features, scores = torch.randn(sum(seqlens), 7), torch.rand(sum(seqlens))
        offsets = ck.varlen_budget(seqlens, keep)
        arguments = features.requires_grad_(), scores.requires_grad_(), torch.rand(sum(seqlens), 2), *offsets
        assert_same_bits(compiled(*arguments), call(*arguments))
        assert_same_bits(gradients(compiled, arguments), gradients(call, arguments))
    assert (graphs.forward, graphs.backward) == (expected, expected)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference_mode", "no_grad", "autocast"],
)  # fmt: skip
def test_a_model_in_other_modes(mode, graphs, cpp):
    """Under autocast features come in bf16 from the layer before, and scores stay as they are."""
    model, arguments = Model(torch.float32), image((4, 5), (4, 2))
    with mode():
        assert_same_bits(graphs.compile(model)(*arguments), model(*arguments))


def test_memory_of_the_caller(graphs, cpp):
    """out and workspace, written into by a graph that torch has made functional."""
    inputs, other = (make_inputs("masked", num_tokens=20, seed=seed) for seed in (0, 1))
    out, expected = inputs.run(), other.run()
    workspace = torch.empty(ck.workspace_bytes(*other.args, **other.options), dtype=torch.uint8)

    def call(features, scores, mask, out, workspace):
        options = {"grid": other.grid, "mask": mask, "out": out, "workspace": workspace}
        return ck.select_and_merge(features, scores, other.num_anchors, other.num_background, **options)

    result = graphs.compile(call)(other.features, other.scores, other.mask, out, workspace)
    assert_same_bits(result, expected)
    assert_same_bits(out, expected)


def test_an_argument_is_checked_when_the_graph_runs(graphs, cpp):
    """By the operator itself, which takes any sizes while it is traced."""
    compiled = graphs.compile(CALLS["grid"])
    features, scores, positions, *_ = image((4, 5), (4, 2))
    with pytest.raises(RuntimeError, match=r"^grid: expected .* product N = 20, got \[4, 6\].*Remedy"):
        compiled(features, scores, positions, 4, 6, 4, 2)
    with pytest.raises(RuntimeError, match=r"^num_anchors: expected 0 <= num_anchors <= 20"):
        compiled(features, scores, positions, 4, 5, 21, 2)


def test_planes_keep_their_sizes_open(graphs):
    """And the axis of their tokens; shapes that are known are still refused."""

    def call(indices, ids, features):
        return ck.gather_tokens(indices, ids, dim=-1), ck.gather_tokens(indices, features)

    compiled = graphs.compile(call, dynamic=True)
    for batch, n, k in [(5, 12, 2), (6, 10, 4), (2, 7, 5)]:
        indices = torch.stack([torch.randperm(n)[:k] for _ in range(batch)])
        arguments = indices, torch.randint(9, (3, batch, n)), torch.randn(batch, n, 8)
        assert_same_bits(compiled(*arguments), call(*arguments))
    assert graphs.forward == 1
    fixed = torch.compile(ck.gather_tokens, backend="eager", dynamic=False)
    with pytest.raises(ValueError, match=r"expected dim=, as \[3, 3, 12\] may be"):
        fixed(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 3, 12))


def test_sizes_of_clusters_keep_theirs_open(graphs):
    compiled = graphs.compile(ck.sizes, dynamic=True)
    for batch, n, k in [(5, 12, 2), (6, 10, 4), (2, 7, 5)]:
        arguments = torch.randint(-1, k, (batch, n)), torch.zeros(batch, k, dtype=torch.int64)
        assert torch.equal(compiled(*arguments), ck.sizes(*arguments))
    assert graphs.forward == 1


@pytest.mark.parametrize("run", [ck.select_and_merge, torch.ops.condense.select_and_merge], ids=["python", "raw"])
def test_vmap_inside_keeps_gradients(run, graphs, cpp):
    def call(features, scores):
        return torch.vmap(torch.vmap(lambda f, s: tuple(run(f, s, 4, 2, grid=(4, 5)))))(features, scores)

    arguments = torch.randn(2, 3, 2, 20, 8, requires_grad=True), torch.rand(2, 3, 2, 20, requires_grad=True)

    def looped(features, scores):
        pairs = zip(features.flatten(0, 1), scores.flatten(0, 1), strict=True)
        columns = zip(*(ck.select_and_merge(f, s, 4, 2, grid=(4, 5)) for f, s in pairs), strict=True)
        return [torch.stack(column).unflatten(0, (2, 3)) for column in columns]

    expected = gradients(looped, arguments)
    for mapped in (call, graphs.compile(call)):
        assert_same_bits(mapped(*arguments), looped(*arguments))
        assert_same_bits(gradients(mapped, arguments), expected)


def loss(features, scores):
    return ck.select_and_merge(features, scores, 4, 2, grid=(4, 5)).merged.square().sum()


def dual(features, scores):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(features, features), scores)).tangent


@pytest.mark.parametrize(
    "transformed", [torch.func.grad(loss), lambda f, s: torch.func.jvp(lambda x: loss(x, s), (f,), (f,)), dual],
    ids=["grad", "jvp", "dual"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_other_derivatives_inside_are_refused(transformed, graphs, cpp):
    """A graph holds the raw operator, of which torch would drop them: an error, and no silent zeros."""
    with pytest.raises(
        RuntimeError, match=r"select_and_merge has no derivatives inside .* inside torch.compile. Remedy"
    ):
        graphs.compile(transformed)(*image((4, 5), (4, 2))[:2])


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="torch.compile refuses tensors with a tangent from 2.14 on")
def test_forward_mode_around_a_compiled_function(graphs, cpp):
    features, scores, *_ = image((4, 5), (4, 2))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(features, torch.randn_like(features))
        results = (forward_ad.unpack_dual(call(x, scores)).tangent for call in (graphs.compile(loss), loss))
        assert_same_bits([next(results)], [next(results)])


def scaled(features, scores, _, height, width, num_anchors, num_background):
    """Neighbours for inductor to fuse whose rounding does not depend on how it does that."""
    merged, indices, assignment, mass = ck.select_and_merge(
        features * 2, scores.abs() * 0.5, num_anchors, num_background, grid=(height, width)
    )
    return merged * 4, indices + 1, assignment, mass * 0.25


@pytest.mark.slow
def test_inductor(cpp):
    """With torch's own compiler and changing sizes, all bits."""
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True)
    for arguments in shuffled(requires_grad=True)[:5]:
        assert_same_bits(compiled(*arguments), scaled(*arguments))
        assert_same_bits(gradients(compiled, arguments), gradients(scaled, arguments))
