"""Callers that own their memory: out= and workspace=, and the number of bytes that workspace_bytes states."""

import contextlib
import dataclasses

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


def test_the_raw_operator_tells_autograd_too(cpp):
    """As often as torch's own operators count a write; in inference mode as well."""
    inputs = make_inputs("random", num_tokens=24)
    out = inputs.run(cpp)
    for context in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        versions = [t._version for t in out]
        with context():
            torch.ops.condense.select_and_merge_out(*inputs.args, **inputs.options, **out._asdict())
        assert [t._version for t in out] == [version + 1 for version in versions]
        with context():
            ck.select_and_merge(*inputs.args, **inputs.options, out=out)
        assert [t._version for t in out] == [version + 2 for version in versions]
    weight = torch.randn_like(out.merged).requires_grad_()
    loss = (weight * out.merged).sum()
    torch.ops.condense.select_and_merge_out(*inputs.args, **inputs.options, **out._asdict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# What may be written: only memory that no other tensor of the call has, and no tensor that autograd would be wrong of.

READ, WRITTEN = ("features", "scores", "keys", "positions", "mask"), ("merged", "indices", "assignment", "mass")


def tensors_of_a_call() -> dict[str, torch.Tensor]:
    """All of them, each of a multiple of 8 bytes."""
    inputs = make_inputs("positions", num_tokens=24, num_anchors=6, num_background=2)
    inputs = dataclasses.replace(inputs, keys=inputs.features.cos(), mask=torch.ones(2, 24, dtype=torch.bool))
    needed = ck.workspace_bytes(*inputs.args, **inputs.options)
    results = {name: torch.empty_like(t) for name, t in inputs.run()._asdict().items()}
    workspace = torch.empty(-(-needed // 8) * 8, dtype=torch.uint8)
    return {**{name: getattr(inputs, name) for name in READ}, **results, "workspace": workspace}


def call(tensors: dict[str, torch.Tensor], backend: str = "auto") -> ck.Condensed:
    options = {name: tensors[name] for name in (*READ[2:], "workspace")}
    out = ck.Condensed(*(tensors[name] for name in WRITTEN))
    return ck.select_and_merge(tensors["features"], tensors["scores"], 6, 2, **options, out=out, backend=backend)


def call_raw(tensors: dict[str, torch.Tensor]) -> None:
    options = {name: t for name, t in tensors.items() if name not in ("features", "scores")}
    torch.ops.condense.select_and_merge_out(tensors["features"], tensors["scores"], 6, 2, **options)


def side_by_side(first: torch.Tensor, second: torch.Tensor, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of both in one block, the second beginning so many bytes before the first ends."""
    sizes = [t.numel() * t.itemsize for t in (first, second)]
    block = torch.zeros(sum(sizes), dtype=torch.uint8)
    starts = (0, sizes[0] - shared)
    first, second = (
        block[start : start + size].view(t.dtype).view(t.shape).copy_(t)
        for start, size, t in zip(starts, sizes, (first, second), strict=True)
    )
    return first, second


@pytest.mark.parametrize(
    ("written", "other"), [(a, b) for a in (*WRITTEN, "workspace") for b in (*READ, *WRITTEN) if a != b]
)
def test_no_byte_that_is_written_is_of_another_tensor(written, other, cpp):
    """Tensors that touch pass, on either side, with the right results; 8 bytes in common do not."""
    tensors = tensors_of_a_call()
    expected = call(tensors_of_a_call())
    for first, second in ((written, other), (other, written)):
        pair = dict(zip((first, second), side_by_side(tensors[first], tensors[second], 0), strict=True))
        assert_same_bits(call({**tensors, **pair}), expected)
        call_raw({**tensors, **pair})
        assert_same_bits(ck.Condensed(*({**tensors, **pair}[name] for name in WRITTEN)), expected)
        pair = dict(zip((first, second), side_by_side(tensors[first], tensors[second], 8), strict=True))
        both = f"({first}|{second})"
        message = f"{both}: expected memory apart from that of (out.)?{both}, got 8 bytes in the address ranges of both"
        with pytest.raises(ValueError, match=message):
            call({**tensors, **pair})
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call_raw({**tensors, **pair})


def test_overlaps_that_harm_nobody(backend):
    """Arguments with each other; a copy that is made only once it is written; tensors without a byte."""
    inputs = make_inputs("random", batch=1, num_tokens=24, num_anchors=6, num_background=2)
    inputs = dataclasses.replace(inputs, keys=inputs.features, scores=inputs.features[..., 0].abs())
    expected = inputs.run(backend)

    def with_a_lazy_copy() -> ck.Condensed:
        lazy = torch._lazy_clone(inputs.features[:, :8])
        assert torch._C._data_address(lazy) == torch._C._data_address(inputs.features)
        return empty_like(expected)._replace(merged=lazy)

    out = with_a_lazy_copy()
    assert_same_bits(ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend), expected)
    out = with_a_lazy_copy()
    if backend == "cpp":
        torch.ops.condense.select_and_merge_out(*inputs.args, **inputs.options, **out._asdict())
        assert_same_bits(out, expected)
    if backend == "reference":  # which needs no workspace
        nothing = inputs.features.flatten().view(torch.uint8)[8:8]
        ck.select_and_merge(*inputs.args, **inputs.options, workspace=nothing, backend=backend)

    none, memory = make_inputs("random", batch=0, num_tokens=24), torch.zeros(8)
    results = none.run(backend)
    out = ck.Condensed(*(memory[4:4].view(t.dtype).view(t.shape) for t in results))
    none = dataclasses.replace(none, features=memory[4:4].view(none.features.shape))
    assert_same_bits(ck.select_and_merge(*none.args, **none.options, out=out, backend=backend), results)


def test_a_gap_of_a_strided_argument_is_refused(backend):
    """Only first and last addresses are compared: what lies between the rows of features counts as theirs."""
    block = torch.rand(1, 24, 32)
    inputs = dataclasses.replace(make_inputs("random", batch=1, num_tokens=24), features=block[..., :16])
    inputs = dataclasses.replace(inputs, num_anchors=1, num_background=0)
    out = empty_like(inputs.run(backend))._replace(merged=block[:, :1, 16:])
    assert out.merged.is_contiguous()
    with pytest.raises(ValueError, match="out.merged: expected memory apart from that of features, got 64 bytes"):
        ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend)


OUTPUTS_OF_GRAPHS = {
    "leaf": lambda t: torch.zeros_like(t).requires_grad_(),
    "view of a leaf": lambda t: torch.zeros_like(t).requires_grad_()[:],
    "in a graph": lambda t: torch.zeros_like(t).requires_grad_() * 2,
}


@pytest.mark.parametrize("kind", OUTPUTS_OF_GRAPHS)
@pytest.mark.parametrize("name", ["merged", "mass"])
def test_an_output_with_a_gradient(name, kind, backend):
    """Its gradient would be that of what it held before. Under no_grad it may be written, as with torch."""
    inputs = make_inputs("random", num_tokens=24)
    expected = inputs.run(backend)
    out = empty_like(expected)
    out = out._replace(**{name: OUTPUTS_OF_GRAPHS[kind](getattr(out, name))})
    with pytest.raises(RuntimeError, match="in-place operation|out=... arguments don't support"):
        torch.add(getattr(expected, name), 0, out=getattr(out, name))
    message = f"{name}: expected a tensor without a gradient to write into, got one that requires grad"
    with pytest.raises(ValueError, match=f"^out.{message}"):
        ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend)
    if backend == "cpp":
        with pytest.raises(RuntimeError, match=f"^{message}"):
            torch.ops.condense.select_and_merge_out(*inputs.args, **inputs.options, **out._asdict())
    with torch.no_grad():
        ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend)
    assert_same_bits(out, expected)


def test_an_output_with_a_tangent(backend):
    inputs = make_inputs("random", num_tokens=24)
    out = empty_like(inputs.run(backend))
    with torch.autograd.forward_ad.dual_level():
        out = out._replace(merged=torch.autograd.forward_ad.make_dual(out.merged, torch.ones_like(out.merged)))
        with pytest.raises(ValueError, match=r"^out.merged: expected a tensor without a gradient .* or has a tangent"):
            ck.select_and_merge(*inputs.args, **inputs.options, out=out, backend=backend)


def odd_outputs(results: ck.Condensed) -> dict[str, tuple[str, torch.Tensor, str]]:
    """Of each kind the result that is replaced, with what, and what the message says."""
    merged, indices = torch.empty_like(results.merged), torch.empty_like(results.indices)
    with torch.inference_mode():
        inference = torch.empty_like(merged)
    quantized = torch.quantize_per_tensor(torch.zeros_like(merged), 1.0, 0, torch.quint8)
    return {
        "negated": ("merged", torch._neg_view(merged), "merged: expected a tensor to write into as it is in memory"),
        "imaginary part": ("merged", torch.complex(merged, merged).conj().imag, "merged: expected a contiguous tensor"),
        "inference": ("merged", inference, "merged: expected a normal tensor to write into outside of torch.inference"),
        "negated workspace": ("workspace", torch._neg_view(torch.empty(9, dtype=torch.uint8)), "workspace: expected a"),
        "expanded": ("indices", indices[:, :1].expand_as(indices), "indices: expected a contiguous tensor"),
        "sparse": ("merged", torch.zeros_like(merged).to_sparse(), "merged: expected a dense tensor"),
        "quantized": ("merged", quantized, "merged: expected dtype float32, got quint8"),
        "complex": ("merged", torch.complex(merged, merged).conj(), "merged: expected dtype float32, got complex64"),
    }


@pytest.mark.parametrize("kind", odd_outputs(make_inputs("random", num_tokens=24).run("reference")))
def test_odd_outputs(kind, backend):
    inputs = make_inputs("random", num_tokens=24)
    expected = inputs.run(backend)
    name, odd, message = odd_outputs(expected)[kind]
    options = {"workspace": None, **empty_like(expected)._asdict(), name: odd}
    out = ck.Condensed(*(options[name] for name in WRITTEN))
    with pytest.raises((TypeError, ValueError), match=f"^(out.)?{message}"):
        ck.select_and_merge(*inputs.args, **inputs.options, out=out, workspace=options["workspace"], backend=backend)
    if backend == "cpp":
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.ops.condense.select_and_merge_out(*inputs.args, **inputs.options, **options)


def test_arguments_that_are_not_what_memory_holds(backend):
    """Views that negate what they read, and zeros that are nowhere."""
    inputs = make_inputs("random", num_tokens=24)
    part = torch.complex(inputs.features, -inputs.features).conj().imag
    negated = dataclasses.replace(inputs, features=part, scores=torch._neg_view(-inputs.scores))
    assert negated.features.is_neg() and negated.scores.is_neg()
    expected = inputs.run(backend)
    assert_same_bits(negated.run(backend), expected)
    out = empty_like(expected)
    assert_same_bits(ck.select_and_merge(*negated.args, **negated.options, out=out, backend=backend), expected)
    zeros = dataclasses.replace(inputs, scores=torch._efficientzerotensor(inputs.scores.shape))
    stored = dataclasses.replace(inputs, scores=torch.zeros_like(inputs.scores))
    assert_same_bits(zeros.run(backend), stored.run(backend))


def test_compiled_calls_look_at_their_memory_when_they_run(cpp):
    """The compiler has no addresses."""
    tensors = tensors_of_a_call()
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors: call(tensors).merged * 1, fullgraph=True)
    expected = call(tensors_of_a_call())
    assert torch.equal(compiled(tensors), expected.merged)
    part = tensors["features"].flatten()[: tensors["merged"].numel()]
    with pytest.raises(RuntimeError, match="^merged: expected memory apart from that of features, got 1024 bytes"):
        compiled({**tensors, "merged": part.view_as(tensors["merged"])})
    with pytest.raises(RuntimeError, match="merged: expected a tensor without a gradient to write into"):
        compiled({**tensors, "merged": torch.zeros_like(tensors["merged"]).requires_grad_()})


def test_bytes_do_not_depend_on_values_or_gradients():
    inputs = make_inputs("random", num_tokens=24)
    features, *rest = inputs.args
    needed = ck.workspace_bytes(features, *rest, **inputs.options)
    assert ck.workspace_bytes(features.clone().requires_grad_(), *rest, **inputs.options) == needed


def test_meta_tensors():
    meta = make_inputs("random", num_tokens=24).to("meta")
    workspace = torch.empty(7, dtype=torch.uint8, device="meta")
    assert ck.select_and_merge(*meta.args, grid=meta.grid, workspace=workspace).merged.is_meta
