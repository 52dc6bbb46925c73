"""torch's default device and dtype are those of the caller's new tensors: nothing of ours depends on them."""

import ast
import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

import condense_kernels as ck
from condense_kernels.testing import KINDS, assert_matches_reference, assert_same_bits, make_inputs

PACKAGE = Path(ck.__file__).parent
META = torch.device("meta")  # a tensor there has no values: whoever makes one by mistake cannot go on


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "set_default_device": default_device,
    "with torch.device": lambda: torch.device("meta"),
    "fp64": lambda: default_dtype(torch.float64),
    "fp16": lambda: default_dtype(torch.float16),
}


def forward(inputs, backend):
    """Every operator, dense: alone, in a row, in caller's memory, as a budget and as a layer."""
    out = inputs.run(backend)
    yield from out
    stages = inputs.run_stages(backend)
    yield from (*stages[:-1], *stages.condensed)
    workspace = torch.empty(
        ck.workspace_bytes(*inputs.args, **inputs.options, backend=backend), dtype=torch.uint8, device="cpu"
    )
    memory = ck.Condensed(*map(torch.empty_like, out))
    yield from ck.select_and_merge(*inputs.args, **inputs.options, backend=backend, out=memory, workspace=workspace)
    yield from ck.condense(*inputs.args[:2], keep=0.5, **inputs.options, backend=backend)
    layer = ck.Condense(2, 1, spatial_weight=0.0, backend=backend)
    yield from layer(*inputs.args[:2])
    heads = inputs.features[:, None], inputs.features[:, None].cos()
    for form in ({"mask": inputs.mask, "causal": True}, {"rows": [0, 2]}, {"rows": 1}, {"over_rows": "mean_query"}):
        yield ck.attention_scores(*heads, **form, backend=backend)
    yield ck.gather_tokens(out.indices, inputs.features)
    yield ck.unmerge(out.merged, out.assignment)
    yield ck.sizes(out.assignment, out.indices)


def gradients(inputs, backend):
    """First and second order, forward mode, and the mapped call."""
    where = inputs.options

    def loss(features, scores):
        merged, _, _, mass = ck.select_and_merge(features, scores, *inputs.args[2:], **where, backend=backend)
        return merged.square().sum() + mass.square().sum()

    features, scores = (t.clone().requires_grad_() for t in inputs.args[:2])
    first = torch.autograd.grad(loss(features, scores), (features, scores), create_graph=True)
    yield from first
    yield from torch.autograd.grad(sum(g.square().sum() for g in first), (features, scores))
    tangents = torch.ones_like(inputs.features), torch.ones_like(inputs.scores)
    yield from torch.func.jvp(loss, inputs.args[:2], tangents)
    stacked = [torch.stack([t, t.flip(0)]) for t in inputs.args[:2]]
    where = {"spatial_weight": 0.0}
    yield torch.func.vmap(loss)(*stacked)
    yield from torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(*stacked)


def packed(inputs, backend):
    """A packed batch and what is done with it; its offsets go where they are asked for."""
    budget = ck.varlen_budget([5, 0, 12], keep=4, device="cpu")
    yield from budget[:3]
    features, scores = inputs.features.flatten(0, 1)[:17].clone(), inputs.scores.flatten()[:17].clone()
    features.requires_grad_(), scores.requires_grad_()
    positions = None if inputs.spatial_weight == 0 else features.detach()[:, :2].float()
    options = {"positions": positions, "spatial_weight": inputs.spatial_weight, "backend": backend}
    out = ck.select_and_merge_varlen(features, scores, *budget, **options)
    yield from (t.detach() for t in out)
    yield from torch.autograd.grad(out.merged.square().sum() + out.mass.square().sum(), (features, scores))
    offsets = {"cu_seqlens": budget.cu_seqlens, "cu_kept": budget.cu_anchors + budget.cu_background}
    yield ck.gather_tokens(out.indices, features.detach(), **offsets)
    yield ck.unmerge(out.merged.detach(), out.assignment, **offsets)
    yield ck.sizes(out.assignment, out.indices, **offsets)
    starts = budget.cu_seqlens.long()
    jagged = [torch.nested.nested_tensor_from_jagged(t.detach(), starts) for t in (features, scores)]
    rest = budget.cu_anchors, budget.cu_background, budget.total_keep
    out = ck.select_and_merge_varlen(*jagged, None, *rest, 12, spatial_weight=0.0, backend=backend)
    yield from (t.values() for t in out)


def debugged(inputs, backend):
    with ck.debug():
        yield from inputs.run(backend)
        yield from inputs.run_stages(backend).condensed


CALLS = {"forward": forward, "gradients": gradients, "packed": packed, "debug": debugged}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_no_result_depends_on_a_default(call, default, backend):
    for kind in ("positions",) if backend == "triton" else ("random", "positions"):  # on a grid or not
        inputs = make_inputs(kind, batch=2, num_tokens=12, channels=8)
        expected = list(CALLS[call](inputs, backend))
        with DEFAULTS[default]():
            results = list(CALLS[call](inputs, backend))
        assert_same_bits(results, expected, f"{kind} {call}")


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tools_for_tests_do_not_either(kind, default):
    expected = make_inputs(kind, num_tokens=12)
    with DEFAULTS[default]():
        inputs = make_inputs(kind, num_tokens=12)
        assert_matches_reference(inputs.run(), inputs)
    for field in dataclasses.fields(inputs):
        made, wanted = getattr(inputs, field.name), getattr(expected, field.name)
        if isinstance(wanted, torch.Tensor):
            assert_same_bits([made], [wanted], field.name)
        else:
            assert made == wanted


def test_the_defaults_do_reach_torch():
    """Else the tests above could not fail."""
    with default_device():
        assert torch.empty(1).device == META
    with DEFAULTS["with torch.device"]():
        assert torch.empty(1).device == META
    with DEFAULTS["fp16"]():
        assert (torch.arange(3) / 2).dtype == torch.float16


def test_a_budget_without_a_device_is_on_the_default_one():
    with DEFAULTS["with torch.device"]():
        assert ck.varlen_budget([5, 3], keep=2).cu_seqlens.device == META
    assert ck.varlen_budget([5, 3], keep=2).cu_seqlens.device.type == "cpu"


# torch's functions that make a tensor out of no tensor
FACTORIES = {
    *("arange", "as_tensor", "asarray", "complex", "empty", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "zeros"),
}


def factory_calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "torch":
            yield called.attr, node


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_new_tensor_states_device_and_dtype(path):
    """On a GPU, too, where the tests above do not come."""
    for name, call in factory_calls(path):
        keywords = {keyword.arg for keyword in call.keywords}
        if name in FACTORIES:
            assert {"device", "dtype"} <= keywords, f"{path}:{call.lineno}: torch.{name}"
        if name == "Generator":
            assert call.args or "device" in keywords, f"{path}:{call.lineno}: torch.Generator"
