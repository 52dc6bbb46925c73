"""Tracing tools beside torch.compile and torch.export: each records one node an operator, or says what to do."""

import io
import pickle
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import condense_kernels as ck
from condense_kernels._dispatch.declaration import OPERATORS
from condense_kernels.testing import assert_same_bits

FREE = {"spatial_weight": 0.0}


def tokens(batch: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, num_tokens, 8), torch.rand(batch, num_tokens)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.condense = ck.Condense(3, 1, **FREE)

    def forward(self, features, scores):
        out = self.condense(2 * features, scores)
        return out.merged + 1, out.indices


def flagship(features, scores):
    merged, indices, assignment, mass = ck.select_and_merge(features, scores, 3, 1, keys=features[..., :4], **FREE)
    return merged, indices, assignment, mass


def budget(features, scores):
    return tuple(ck.condense(features, scores, keep=6, **FREE))


def stages(features, scores):
    s, sbar, g, tier = ck.similarity(features.detach(), scores)
    indices = ck.greedy_select(s, scores, 3, sbar=sbar, tier=tier).sort(dim=1).values
    assignment = ck.assign(s, indices, tier=tier, **FREE)
    return *ck.merge(features, scores, indices, assignment), g


def there_and_back(features, scores):
    out = ck.select_and_merge(features, scores, 3, 1, **FREE)
    rows, tokens = ck.gather_tokens(out.indices, features), ck.unmerge(out.merged, out.assignment)
    return rows, tokens, ck.sizes(out.assignment, out.indices)


def packed(features, scores):
    cu_seqlens, cu_anchors, cu_background = (torch.arange(0, 3 * n + 1, n, dtype=torch.int32) for n in (8, 2, 1))
    offsets = {"cu_seqlens": cu_seqlens, "cu_kept": cu_anchors + cu_background}
    tokens = features.flatten(0, 1), scores.flatten()
    out = ck.select_and_merge_varlen(*tokens, cu_seqlens, cu_anchors, cu_background, 9, 8, **FREE)
    rows, back = ck.gather_tokens(out.indices, tokens[1], **offsets), ck.unmerge(out.mass, out.assignment, **offsets)
    return *out, rows, back, ck.sizes(out.assignment, out.indices, **offsets)


def raw(features, scores):
    return torch.ops.condense.select_and_merge(features, scores, 3, 1, **FREE)


# What is traced, and the operators that its graph has to hold.
CASES = {
    "layer": (Layer(), ["select_and_merge"]),
    "flagship": (flagship, ["select_and_merge"]),
    "budget": (budget, ["select_and_merge"]),
    "stages": (stages, ["similarity", "greedy_select", "assign", "merge"]),
    "there and back": (there_and_back, ["select_and_merge"]),
    "packed": (packed, ["select_and_merge_varlen"]),
    "raw": (raw, ["select_and_merge"]),
}
EXAMPLE, OTHER = tokens(2, 12), tokens(3, 20)
PACKED_OTHER = tokens(1, 24)  # its offsets are constants


def other(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return PACKED_OTHER if name == "packed" else OTHER


def recorded(graph: torch.fx.Graph) -> list[str]:
    """The names of our functions and operators among the nodes, in order."""
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    ours = [target for target in called if "condense" in str(getattr(target, "__module__", ""))]
    return [getattr(target, "__name__", str(target)).removesuffix(".default") for target in ours]


@pytest.mark.parametrize("name", CASES)
def test_symbolic_trace(name):
    """A call of a Python function is a node, too; it checks its arguments once the graph runs, with gradients."""
    call, ops = CASES[name]
    traced = torch.fx.symbolic_trace(call)
    around = ["gather_tokens", "unmerge", "sizes"] if name in ("there and back", "packed") else []
    expected = ["condense"] if name == "budget" else [*ops, *around]
    assert recorded(traced.graph) == expected
    traced.graph.lint()
    assert_same_bits(traced(*other(name)), call(*other(name)))
    assert_same_bits(pickle.loads(pickle.dumps(traced))(*other(name)), call(*other(name)))

    def gradient(function):
        features = other(name)[0].clone().requires_grad_()
        return torch.autograd.grad(function(features, other(name)[1])[0].square().sum(), features)

    assert_same_bits(gradient(traced), gradient(call))
    with pytest.raises((TypeError, RuntimeError), match="expected dtype"):
        traced(other(name)[0], other(name)[1].int())


PUBLIC = [name for name in OPERATORS if hasattr(ck, name)] + [
    "condense",
    "gather_tokens",
    "unmerge",
    "sizes",
    "split_budget",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_symbolic_trace_knows_every_function(name):
    function = getattr(ck, name)
    traced = torch.fx.symbolic_trace(lambda tensor: function(None, scores=tensor))
    (node,) = [node for node in traced.graph.nodes if node.target is function]
    assert node.args == (None,) and list(node.kwargs) == ["scores"]


def test_symbolic_trace_of_sizes():
    def call(features, scores):
        num_anchors, num_background = ck.split_budget(features.shape[1], 0.5)
        return ck.select_and_merge(features, scores, num_anchors, num_background, **FREE).merged

    traced = torch.fx.symbolic_trace(call)
    assert recorded(traced.graph) == ["split_budget", "select_and_merge"]
    assert_same_bits([traced(*OTHER)], [call(*OTHER)])


def jit_trace(call, example):
    """With every warning of the tracer an error; that the tool is deprecated is none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(call, example)


@pytest.mark.parametrize("name", CASES)
def test_jit_trace(name):
    call, ops = CASES[name]
    traced = jit_trace(call, PACKED_OTHER if name == "packed" else EXAMPLE)
    graph = str(traced.inlined_graph)
    assert [graph.count(f" condense::{op}(") for op in ops] == [1] * len(ops)
    assert_same_bits(traced(*other(name)), call(*other(name)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_same_bits(torch.jit.load(file)(*other(name)), call(*other(name)))


def test_jit_trace_of_a_ratio_is_refused():
    """Its count would be that of the first size for ever, in silence."""
    with pytest.raises(ValueError, match=r"^keep: expected an int, as torch.jit.trace .* Remedy: keep=6, or torch.exp"):
        jit_trace(lambda *args: tuple(ck.condense(*args, keep=0.5, **FREE)), EXAMPLE)


def test_jit_trace_still_checks():
    with pytest.raises(ValueError, match="^scores: expected shape"):
        jit_trace(flagship, (EXAMPLE[0], OTHER[1]))
    assert not torch.jit.is_tracing()
    with pytest.raises(RuntimeError, match="num_anchors: expected 0 <= num_anchors <= 2"):
        jit_trace(raw, EXAMPLE)(*tokens(1, 2))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_make_fx(name, mode):
    call, ops = CASES[name]
    example = PACKED_OTHER if name == "packed" else EXAMPLE
    with torch.no_grad():
        traced = make_fx(call, tracing_mode=mode)(*example)
    assert recorded(traced.graph) == [f"condense.{op}" for op in ops] or recorded(traced.graph) == ops
    arguments = other(name) if mode == "symbolic" else [1 - example[0], 1 - example[1]]
    assert_same_bits(traced(*arguments), call(*arguments))


def test_make_fx_with_open_counts_and_grid():
    def call(planes, scores):
        height, width = planes.shape[1:3]
        flat = planes.flatten(1, 2), scores.flatten(1)
        ratio = ck.condense(*flat, keep=0.25, grid=(height, width))
        return *ratio, *ck.select_and_merge(*flat, height, width, grid=[height, width])

    traced = make_fx(call, tracing_mode="symbolic")(torch.rand(2, 4, 5, 8), torch.rand(2, 4, 5))
    planes, scores = torch.rand(3, 6, 7, 8), torch.rand(3, 6, 7)
    assert_same_bits(traced(planes, scores), call(planes, scores))


def test_onnx_export_names_the_operator():
    """The older exporter; what the newer one says needs packages that torch does not bring."""
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="condense::select_and_merge"):
        torch.onnx.export(Layer(), EXAMPLE, io.BytesIO(), dynamo=False)
