"""Calls that are prepared once and repeated. What is repeated here is the interpreter's work, from the raw addresses
that a GPU's launches would get: the bits have to be those of the launcher itself."""

import ctypes
import os
import threading
from types import SimpleNamespace

import pytest
import torch

import condense_kernels as ck
from condense_kernels._dispatch import autograd, backends
from condense_kernels._dispatch.declaration import OPERATORS

if not backends.triton_interprets():
    pytest.skip("these run in the interpreter", allow_module_level=True)

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from condense_kernels._triton import prepared
from condense_kernels._triton.launcher import new, zero
from condense_kernels._triton.prepared import Kept, Spans
from condense_kernels._triton.tables import MergeConfig, trying
from condense_kernels._triton.workspace import carve
from condense_kernels.testing import make_inputs


def interpret(kernel, *args, **options):
    with _disable_current_modes():  # the interpreter uses torch, which a launch does not
        original(kernel, *args, **options)


original = InterpretedFunction.run


class Compiled:
    """What a launch on a GPU would return: runs the kernel from addresses alone."""

    function, packed_metadata = None, ()

    def __init__(self, kernel, args, options):
        self.kernel, self.options = kernel, options
        self.like = [options[name] if name in options else args[i] for i, name in enumerate(kernel.arg_names)]
        self.runs = 0

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.runs += 1
        assert (stream, enter, leave) == ("the current stream", None, None) and len(args) == len(self.like)
        args = tuple(map(at_address, args, self.like))
        options = {name: value for name, value in self.options.items() if name not in self.kernel.arg_names}
        interpret(self.kernel, *args, grid=(x, y, z), warmup=False, **options)


def at_address(value, like):
    """A tensor at the address; only its dtype and where it begins are looked at."""
    if isinstance(like, tuple):
        return type(like)(*map(at_address, value, like))
    if not isinstance(like, torch.Tensor):
        assert value == like  # all but addresses is as it was
        return value
    assert type(value) is int
    return torch.frombuffer((ctypes.c_char * like.element_size()).from_address(value), dtype=like.dtype)


@pytest.fixture
def launched(monkeypatch) -> list[Compiled]:
    """As if launches compiled something. Those that went through Triton's own look at the arguments."""
    compiled = []

    def run(kernel, *args, grid, warmup, **options):
        interpret(kernel, *args, grid=grid, warmup=warmup, **options)
        compiled.append(Compiled(kernel, args, options))
        return compiled[-1]

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    was = driver._active
    driver.set_active(SimpleNamespace(get_current_stream=lambda i: "the current stream", get_current_device=lambda: 0))
    torch.use_deterministic_algorithms(True)  # and then memory that nobody wrote is filled
    yield compiled
    torch.use_deterministic_algorithms(False)
    driver._active = was


def kept(op: str) -> Kept:
    operator = OPERATORS[op]
    return Kept(operator.triton, operator.check, operator.check_memory, autograd.written_by(op))


def fresh(value):
    """Other memory, with the same strides, and other values where these may be anything."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage().clone()
    copy = value.new_empty(0).set_(storage, value.storage_offset(), value.shape, value.stride())
    if value.is_floating_point() and 0 not in value.stride():
        copy.copy_(value.flip(0))
    return copy


def results_of(returned, options):
    if returned is None:
        return [options[name] for name in ("merged", "indices", "assignment", "mass")]
    return list(returned) if isinstance(returned, tuple) else [returned]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def is_fp64(example) -> bool:
    return any(
        isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in (*example.args, *example.kwargs.values())
    )


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "workspace_bytes"])
def test_a_repeated_call_has_the_bits_of_its_launcher(op, launched):
    """Of every operator, on all of its examples. A new operator comes here by itself."""
    repeated = 0
    for args, options in OPERATORS[op].examples(2):
        if is_fp64(SimpleNamespace(args=args, kwargs=options)):
            continue
        launcher = kept(op)
        launcher(*args, **options)
        first = len(launched)
        args, options = tuple(map(fresh, args)), {name: fresh(value) for name, value in options.items()}
        again = results_of(launcher(*args, **options), options)
        again = [result.clone() for result in again]
        if launcher.calls:
            assert len(launched) == first  # Triton was not asked
            repeated += 1
        assert_same_bits(again, results_of(OPERATORS[op].triton(*args, **options), options))
    assert repeated or not launched  # the derivative of attention is made of torch operations


def test_a_streamed_image_is_repeated(launched):
    from condense_kernels._triton import tables

    launcher = kept("select_and_merge")
    calls = []
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = make_inputs("random", batch=2, num_tokens=70, channels=8, num_anchors=3, num_background=2)
        calls.append((inputs.features, inputs.scores))
    from condense_kernels.ops.select_and_merge import kernel

    small = tables.FusedConfig(store_s=False, width=80)
    original, tables.FusedConfig.for_shape = tables.FusedConfig.for_shape, classmethod(lambda cls, n: small)
    try:
        for features, scores in calls:
            result = launcher(features, scores, 3, 2, spatial_weight=0.0)
        expected = kernel.select_and_merge(features, scores, 3, 2, spatial_weight=0.0)
    finally:
        tables.FusedConfig.for_shape = original
    assert launcher.calls
    assert_same_bits(result, expected)


def one_call(batch: int = 2, n: int = 12, dtype=torch.float32):
    return torch.rand(batch, n, 6).to(dtype), torch.rand(batch, n)


def test_what_a_call_depends_on_is_told_apart(launched):
    """Shapes, dtypes, strides, alignment and options; the same once more is not recorded again."""
    launcher = kept("select_and_merge")
    features, scores = one_call()
    for count, (x, y, options) in enumerate(
        [
            (features, scores, {}),
            (*one_call(3), {}),
            (*one_call(n=13), {}),
            (*one_call(dtype=torch.bfloat16), {}),
            (features.transpose(1, 2).contiguous().transpose(1, 2), scores, {}),
            (torch.rand(2 * 12 * 6 + 1)[1:].view(2, 12, 6), scores, {}),
            (features, scores, {"suppression": 0.5}),
            (features, scores, {"background_suppression": 0.5}),
            (features, scores, {"mask": torch.ones(2, 12, dtype=torch.bool)}),
            (features, scores, {"keys": features}),
        ],
        start=1,
    ):
        for _ in range(2):
            result = launcher(x, y, 3, 2, spatial_weight=0.0, **options)
            expected = OPERATORS["select_and_merge"].triton(x, y, 3, 2, spatial_weight=0.0, **options)
            assert_same_bits(result, expected)
        assert len(launcher.calls) == count


def test_two_arguments_that_were_one_tensor_need_not_stay_one(launched):
    launcher = kept("select_and_merge")
    features, scores = one_call()
    launcher(features, scores, 3, 2, keys=features, spatial_weight=0.0)
    keys = torch.rand(2, 12, 6)
    result = launcher(features, scores, 3, 2, keys=keys, spatial_weight=0.0)
    assert len(launcher.calls) == 1
    assert_same_bits(
        result, OPERATORS["select_and_merge"].triton(features, scores, 3, 2, keys=keys, spatial_weight=0.0)
    )


def test_views_of_two_arguments_at_one_address_are_not_taken_for_each_other(launched):
    launcher = kept("attention_scores_varlen")
    queries, offsets = torch.rand(9, 2, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    launcher(queries, queries, offsets, 5)  # of which the kernel gets transposed views
    keys = torch.rand(9, 2, 16)
    expected = OPERATORS["attention_scores_varlen"].triton(queries, keys, offsets, 5)
    assert_same_bits([launcher(queries, keys, offsets, 5)], [expected])


def test_a_launch_on_a_tensor_of_unknown_origin_is_not_kept(launched):
    """A copy made on the way: its address is no argument's."""
    launcher = kept("select_and_merge_varlen")
    features, scores = torch.rand(12, 6), torch.rand(12)
    offsets = torch.tensor([0, 9, 5, 9, 12, 9], dtype=torch.int32)[::2]  # not contiguous
    kept_of_each = torch.tensor([0, 2, 3], dtype=torch.int32)
    none = torch.zeros(3, dtype=torch.int32)
    for _ in range(2):
        launcher(features, scores, offsets, kept_of_each, none, 3, 12, spatial_weight=0.0)
    assert not launcher.calls


def test_nothing_is_kept_where_a_launch_choice_is_tried(launched):
    launcher = kept("merge")
    args, options = OPERATORS["merge"].examples(2)[0]
    with trying(MergeConfig, block_n=4):
        launcher(*args, **options)
    assert not launcher.calls


def test_what_is_kept_is_bounded(launched, monkeypatch):
    monkeypatch.setattr(prepared, "MAX_KEPT", 3)
    launcher = kept("select_and_merge")
    for n in (5, 6, 7, 8, 5):
        launcher(*one_call(n=n), 2, 1, spatial_weight=0.0)
    sizes = [next(value for value in key if isinstance(value, torch.Size))[1] for key in launcher.calls]
    assert sizes == [7, 8, 5]


def test_checks_run_once(launched):
    checked = []
    launcher = Kept(OPERATORS["merge"].triton, lambda *a, **k: checked.append("kind"))
    args, options = OPERATORS["merge"].examples(2)[0]
    for _ in range(3):
        launcher(*args, **options)
    assert checked == ["kind"]


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("distance", [-7, -6, 0, 5, 6])
def test_overlaps_are_seen(written, distance):
    """Of 6 elements each; two that are only read may overlap, and do."""
    memory = torch.zeros(40)
    tensors = {str(i): memory[10:16] for i in range(3)}
    tensors[str(written)] = memory[10 + distance :][:12].view(6, 2)[:, 0][:3] if distance else memory[10:16]
    spans = Spans((memory[0:2], 3), tensors, [str(written)])
    addresses = [memory.data_ptr(), *(tensor.data_ptr() for tensor in tensors.values())]
    assert spans.overlap(addresses) == (-5 < distance < 6)


def test_overlapping_memory_is_refused_in_a_repeated_call(launched):
    launcher = kept("select_and_merge_out")
    features, scores = one_call()
    out = {
        "merged": torch.empty(2, 5, 6),
        "indices": torch.empty(2, 5, dtype=torch.int64),
        "assignment": torch.empty(2, 12, dtype=torch.int64),
        "mass": torch.empty(2, 5),
    }
    launcher(features, scores, 3, 2, spatial_weight=0.0, **out)
    assert launcher.calls
    with pytest.raises(ValueError, match=r"out.merged: expected memory apart from that of features"):
        launcher(
            features,
            scores,
            3,
            2,
            spatial_weight=0.0,
            **out | {"merged": features[:, :5].as_strided((2, 5, 6), (30, 6, 1))},
        )


def test_threads_share_what_is_kept(launched):
    launcher = kept("merge")
    args, options = OPERATORS["merge"].examples(2)[0]
    launcher(*args, **options)
    expected = results_of(OPERATORS["merge"].triton(*args, **options), options)
    call, _ = next(iter(launcher.calls.values()))
    before = (str(call.steps), str(call.origins))
    failures = []

    def work():
        try:
            result = Kept.record(launcher, ("another key",), args, options)
            assert_same_bits(result, expected)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)  # while this thread records nothing
    thread.start()
    assert prepared.recording() is None
    thread.join()
    launcher(*args, **options)
    assert not failures and (str(call.steps), str(call.origins)) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_starts_with_nothing(launched):
    launcher = kept("merge")
    args, options = OPERATORS["merge"].examples(2)[0]
    launcher(*args, **options)
    assert launcher.calls
    with launcher.lock:  # held for ever, as far as the child knows
        pid = os.fork()
        if pid == 0:
            os._exit(1 if launcher.calls or not launcher.lock.acquire(blocking=False) else 0)
    assert os.waitpid(pid, 0)[1] == 0 and launcher.calls


def test_the_interpreter_keeps_nothing():
    launcher = kept("merge")
    args, options = OPERATORS["merge"].examples(2)[0]
    launcher(*args, **options)
    assert not launcher.calls


def test_a_number_is_kept():
    """What workspace_bytes returns follows from shapes, too."""
    launcher = kept("workspace_bytes")
    counts = [launcher(*one_call(n=n), 2, 1, spatial_weight=0.0) for n in (12, 12, 70)]
    assert counts[0] == counts[1] < counts[2] and len(launcher.calls) == 2


def test_zeros_are_repeated_where_they_were_written():
    """Of a piece, and of nothing beside it."""
    recording = prepared.Recording([torch.empty(3)])
    token = prepared._recording.set(recording)
    try:
        x = torch.empty(3)
        w = carve({"a": ((3,), torch.int32), "b": ((5,), torch.int64)}, None, x.device)
        zero(w.b)
        made = new(x, (2,), fill=7)
    finally:
        prepared._recording.reset(token)
    (step,) = recording.steps
    assert (step.start, step.stop) == (256, 256 + 40) and made.tolist() == [7, 7]


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "workspace_bytes"])
def test_a_launcher_computes_nothing_with_torch(op, launched):
    """What torch computes between launches would not be repeated: a launcher allocates, looks at views and launches."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.name().split(".")[0])
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    for args, options in OPERATORS[op].examples(2):
        if is_fp64(SimpleNamespace(args=args, kwargs=options)):
            continue
        launcher = kept(op)
        with Seen():
            launcher(*args, **options)
        if launcher.calls:
            harmless = {
                "aten::detach",
                "aten::view",
                "aten::slice",
                "aten::expand",
                "aten::transpose",
                "aten::lift_fresh",
            }
            made = {"aten::new_empty", "aten::new_full", "aten::empty", "aten::zero_"}
            assert names <= harmless | made, names - harmless - made
        names.clear()


@pytest.mark.parametrize("with_out", [False, True], ids=["new results", "out"])
def test_the_function_leaves_the_checks_to_the_kernel_on_a_gpu(launched, monkeypatch, with_out):
    """A repeated call is not looked at, and wrong arguments are the function's errors all the same."""
    from condense_kernels.ops.select_and_merge import op

    monkeypatch.setattr(backends, "is_on_gpu", lambda value: isinstance(value, torch.Tensor))
    looked = []
    name = "select_and_merge_out" if with_out else "select_and_merge"
    monkeypatch.setitem(backends.on_triton, name, kept(name))
    look, monkeypatched = op.check, lambda *args, **options: (looked.append(1), look(*args, **options))
    monkeypatch.setattr(op, "check", monkeypatched)
    features, scores = one_call()
    options = {"spatial_weight": 0.0, "backend": "triton"}
    if with_out:
        options["out"] = ck.select_and_merge(features, scores, 3, 2, backend="reference", spatial_weight=0.0)
        looked.clear()
    results = [ck.select_and_merge(features, scores, 3, 2, **options) for _ in range(3)]
    assert len(looked) == with_out  # by the kernel, of the first call
    assert_same_bits(results[-1], OPERATORS["select_and_merge"].triton(features, scores, 3, 2, spatial_weight=0.0))
    with pytest.raises(ValueError, match=r"^scores: expected"):
        ck.select_and_merge(features, scores[:, :5], 3, 2, **options)
    with pytest.raises(TypeError, match=r"^scores: expected"):
        ck.select_and_merge(features, None, 3, 2, **options)
    assert looked
