"""Callers that own their memory: out= and workspace=, and the number of bytes that workspace_bytes states."""

import pytest
import torch

import condense_kernels as ck
from condense_kernels.testing import KINDS, assert_same_bits, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def empty_like(results: ck.Condensed) -> ck.Condensed:
    return ck.Condensed(*(torch.empty_like(t) for t in results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 9])  # on two threads: one by one or side by side
def test_exactly_the_bytes_stated(batch, kind, dtype, cpp):
    """On the byte, off any alignment: the bytes around it stay as they are, and one less is refused."""
    inputs = make_inputs(kind, batch=batch, num_tokens=50, dtype=dtype)
    needed = ck.workspace_bytes(*inputs.args, **inputs.options)
    memory = torch.full((needed + 10,), 0xFF, dtype=torch.uint8)
    expected = inputs.run(cpp)
    out = empty_like(expected)
    given = ck.select_and_merge(*inputs.args, **inputs.options, workspace=memory[3:-7], out=out)
    assert_same_bits(given, expected)
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in out]
    assert (memory[:3] == 0xFF).all() and (memory[-7:] == 0xFF).all()
    assert not (memory[3:-7] == 0xFF).all()
    with pytest.raises(ValueError, match=f"workspace: expected at least {needed} bytes, got {needed - 1}"):
        ck.select_and_merge(*inputs.args, **inputs.options, workspace=memory[: needed - 1])
    with pytest.raises(RuntimeError, match=f"workspace: expected at least {needed} bytes, got {needed - 1}"):
        torch.ops.condense.select_and_merge_out(
            *inputs.args, **inputs.options, workspace=memory[: needed - 1], **out._asdict()
        )


def test_either_may_be_left_out(backend):
    inputs = make_inputs("random", batch=1, num_tokens=20)
    expected = inputs.run(backend)
    out = empty_like(expected)
    assert_same_bits(ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend), expected)
    assert_same_bits(out, expected)
    needed = ck.workspace_bytes(*inputs.args, **inputs.options, backend=backend)
    workspace = torch.empty(needed, dtype=torch.uint8)
    given = ck.select_and_merge(*inputs.args, **inputs.options, workspace=workspace, backend=backend)
    assert_same_bits(given, expected)


def test_more_threads_need_more(cpp):
    inputs = make_inputs("random", batch=1, num_tokens=600, channels=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ck.workspace_bytes(*inputs.args, **inputs.options)
        torch.set_num_threads(2)
        assert ck.workspace_bytes(*inputs.args, **inputs.options) > one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("merged", lambda t: t[:, :-1], "out.merged: expected shape .B K D. = .2, 8, 16., as the arguments"),
        ("merged", lambda t: t.half(), "out.merged: expected dtype float32, got float16"),
        ("merged", lambda t: t.mT.contiguous().mT, "out.merged: expected a contiguous tensor to write into"),
        ("indices", lambda t: t.int(), "out.indices: expected dtype int64, got int32"),
        ("assignment", lambda t: t[:1], "out.assignment: expected shape .B N. = .2, 24."),
        ("mass", lambda t: t.double(), "out.mass: expected dtype float32, got float64"),
        ("mass", lambda t: None, "out.mass: expected a torch.Tensor"),
    ],
)
def test_wrong_outputs(name, wrong, message):
    inputs = make_inputs("random", num_tokens=24, num_anchors=6, num_background=2)
    out = empty_like(inputs.run())
    out = out._replace(**{name: wrong(getattr(out, name))})
    with pytest.raises((TypeError, ValueError), match=message):
        ck.select_and_merge(*inputs.args, **inputs.options, out=out)
    if getattr(out, name) is not None:
        with pytest.raises(RuntimeError, match=message.removeprefix("out.").split(", as")[0].split(", got")[0]):
            torch.ops.condense.select_and_merge_out(*inputs.args, **inputs.options, **out._asdict())


@pytest.mark.parametrize("wrong", [torch.empty(2, 8, 16), (torch.empty(2, 8, 16),)])
def test_outputs_that_are_not_four(wrong):
    inputs = make_inputs("random")
    with pytest.raises(TypeError, match="out: expected .merged, indices, assignment, mass., got"):
        ck.select_and_merge(*inputs.args, **inputs.options, out=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.empty(1 << 20),
        torch.empty(4, 1 << 20, dtype=torch.uint8),
        torch.empty(1 << 22, dtype=torch.uint8)[::2],
        torch.empty(1, dtype=torch.uint8).expand(1 << 22),
    ],
    ids=["float", "two axes", "strided", "expanded"],
)
def test_wrong_workspace(wrong):
    inputs = make_inputs("random")
    with pytest.raises((TypeError, ValueError), match="workspace: expected"):
        ck.select_and_merge(*inputs.args, **inputs.options, workspace=wrong)


def test_compiled_in_one_graph(cpp):
    """The out variant mutates its arguments, which the compiler must see."""
    inputs = make_inputs("random", num_tokens=24)
    expected = inputs.run(cpp)
    out = empty_like(expected)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def double(features, scores, out, workspace):
        counts = inputs.args[2:]
        return ck.select_and_merge(features, scores, *counts, grid=inputs.grid, out=out, workspace=workspace).merged * 2

    workspace = torch.empty(ck.workspace_bytes(*inputs.args, **inputs.options), dtype=torch.uint8)
    assert torch.equal(double(inputs.features, inputs.scores, out, workspace), expected.merged * 2)
    assert_same_bits(out, expected)


def test_autograd_sees_what_is_written(backend):
    """A result that a graph has kept, overwritten: torch's own error, not a wrong gradient."""
    inputs = make_inputs("random", num_tokens=24)
    out = inputs.run(backend)
    weight = torch.randn_like(out.merged).requires_grad_()
    loss = (weight * out.merged).sum()
    ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bytes_do_not_depend_on_values_or_gradients():
    inputs = make_inputs("random", num_tokens=24)
    features, *rest = inputs.args
    needed = ck.workspace_bytes(features, *rest, **inputs.options)
    assert ck.workspace_bytes(features.clone().requires_grad_(), *rest, **inputs.options) == needed


def test_meta_tensors():
    meta = make_inputs("random", num_tokens=24).to("meta")
    workspace = torch.empty(7, dtype=torch.uint8, device="meta")
    assert ck.select_and_merge(*meta.args, grid=meta.grid, workspace=workspace).merged.is_meta
