"""Graphs with the kernels in them, traced on CPU tensors and run: what AOTAutograd makes of the launches computes what
they compute by themselves. Inductor comes after that: test_compile_gpu.py."""

from types import SimpleNamespace

import pytest
import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch.utils._python_dispatch import _disable_current_modes

import condense_kernels as ck
from condense_kernels._dispatch import backends
from condense_kernels.testing import assert_same_bits, make_inputs

from .compiling import TARGETS


@pytest.fixture(autouse=True)
def traced_on_cpu(ptx_device, monkeypatch):
    """As tensors of a GPU are. Of the device only its launches: its look at torch's operators would be traced."""
    target = SimpleNamespace(get_current_target=lambda: TARGETS[ptx_device.target])
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    monkeypatch.setattr(backends, "compiles_for", lambda device: True)
    torch._dynamo.reset()
    with _disable_current_modes():
        yield


class Graphs:
    """``compile`` is torch.compile, and notes how many launches each graph has."""

    def __init__(self) -> None:
        self.launches: list[int] = []

    def compile(self, function):
        return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=self.run))

    def run(self, graph, example_inputs):
        self.launches.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
        assert not any("condense" in str(node.target) for node in graph.graph.nodes)
        return boxed_nop(graph, example_inputs)


def assert_traced_right(function, *tensors: torch.Tensor, launches: list[int]) -> None:
    """``function(backend, *tensors)`` in a graph, where "auto" is traced, and launch by launch."""
    graphs = Graphs()
    results = graphs.compile(lambda *tensors: function("auto", *tensors))(*tensors)
    assert graphs.launches == launches
    assert_same_bits(tuple(results), tuple(function("triton", *tensors)))


@pytest.mark.parametrize("kind", ["clustered", "masked", "nan", "positions", "keys"])
def test_the_flagship(kind):
    inputs = make_inputs(kind, batch=2, num_tokens=70, channels=24, num_anchors=6, num_background=3)
    names = [name for name, value in inputs.options.items() if isinstance(value, torch.Tensor)]

    def call(backend, features, scores, *others):
        options = inputs.options | dict(zip(names, others, strict=True))
        return ck.select_and_merge(features, scores, 6, 3, **options, backend=backend)

    others = [inputs.options[name] for name in names]
    assert_traced_right(call, inputs.features, inputs.scores, *others, launches=[4])


def test_between_other_operators():
    """What it reads was computed in the graph, and is used again after it, as its results are."""

    def call(backend, features, scores):
        out = ck.select_and_merge(features * 2, scores * 0.5, 6, 3, grid=(7, 10), backend=backend)
        again = ck.select_and_merge(out.merged, out.mass, 2, 1, spatial_weight=0, backend=backend)
        return *out, *again, features * 2, out.indices + 1

    inputs = make_inputs("clustered", batch=2, num_tokens=70, channels=24)
    assert_traced_right(call, inputs.features, inputs.scores, launches=[8])


def test_the_stages():
    def call(backend, features, scores):
        s, sbar, g, tier = ck.similarity(features, scores, backend=backend)
        anchors = ck.greedy_select(s, scores, 6, sbar=sbar, tier=tier, backend=backend)
        indices = anchors.sort(dim=1).values
        assignment = ck.assign(s, indices, tier=tier, grid=(7, 10), backend=backend)
        return s, sbar, g, tier, indices, assignment, *ck.merge(features, scores, indices, assignment, backend=backend)

    inputs = make_inputs("clustered", batch=2, num_tokens=70, channels=24)
    assert_traced_right(call, inputs.features, inputs.scores, launches=[5])


def test_under_vmap():
    """Calls that are mapped over are one call, in the graph as well."""

    def call(backend, features, scores):
        def of_one(x, y):
            return tuple(ck.select_and_merge(x, y, 6, 3, grid=(7, 10), backend=backend))

        return torch.vmap(of_one)(features, scores)

    inputs = make_inputs("clustered", batch=4, num_tokens=70, channels=24)
    features, scores = inputs.features.unflatten(0, (2, 2)), inputs.scores.unflatten(0, (2, 2))
    assert_traced_right(call, features, scores, launches=[4])


def test_attention_scores():
    queries, keys = torch.randn(2, 4, 33, 16), torch.randn(2, 2, 70, 16)
    assert_traced_right(
        lambda backend, q, k: (ck.attention_scores(q, k, backend=backend),), queries, keys, launches=[2]
    )


def test_a_training_step():
    """Forward and backward are a graph each, and the gradients those of the launches."""
    inputs = make_inputs("clustered", batch=2, num_tokens=70, channels=24)
    features, scores = inputs.features.requires_grad_(), inputs.scores.requires_grad_()

    def step(call):
        out = call(features, scores)
        return torch.autograd.grad(out[0].square().sum() + out[3].square().sum(), (features, scores))

    def call(backend, features, scores):
        return tuple(ck.select_and_merge(features * 2, scores, 6, 3, grid=(7, 10), backend=backend))

    graphs = Graphs()
    gradients = step(graphs.compile(lambda features, scores: call("auto", features, scores)))
    assert graphs.launches == [4, 2]
    assert_same_bits(gradients, step(lambda features, scores: call("triton", features, scores)))
