"""What surrounds a call does not change its result: autocast, matmul precision, inference mode, threads, pickling."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch

import condense_kernels as ck
from condense_kernels._dispatch import library
from condense_kernels.testing import assert_same_bits, make_inputs

INPUTS = make_inputs("clustered", batch=2, num_tokens=30, channels=24)
PARALLEL = make_inputs("parallel", batch=2, num_tokens=30, channels=24)  # a bit less precision, and other tokens win


@contextlib.contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


CONTEXTS = {
    "autocast to bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "precision medium": lambda: matmul_precision("medium"),
    "precision high": lambda: matmul_precision("high"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "debug": ck.debug,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_around_a_call_changes_a_bit(context, backend):
    for inputs in (INPUTS, PARALLEL):
        expected = inputs.run(backend)
        with CONTEXTS[context]():
            assert_same_bits(inputs.run(backend), expected)
            if backend == "cpp":
                raw = torch.ops.condense.select_and_merge(*inputs.args, **inputs.options)
                assert_same_bits(raw, expected)


def test_the_contexts_do_change_torch():
    """Else the test above could not fail: here is a product of the same keys, which autocast rounds to bf16."""
    keys = INPUTS.features[0]
    with CONTEXTS["autocast to bf16"]():
        assert (keys @ keys.T).dtype == torch.bfloat16


def test_autocast_is_passed_over_on_cpu_and_gpu_alike():
    """No operator has a kernel at an autocast key, so torch falls through to the operator itself, in its dtypes."""
    for op in library.SCHEMAS:
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"condense::{op}", key)


def test_autocast_feeds_mixed_dtypes():
    """What a model under autocast hands over: bf16 features, fp32 scores of a softmax. Gradients in their dtypes."""
    layer = torch.nn.Linear(24, 24)
    tokens, logits = torch.randn(2, 30, 24), torch.randn(2, 30, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, scores = layer(tokens), logits.softmax(-1)
        assert (features.dtype, scores.dtype) == (torch.bfloat16, torch.float32)
        merged, _, _, mass = ck.select_and_merge(features, scores, 4, 2, grid=(5, 6))
        loss = layer(merged).float().square().mean() + mass.square().mean()
    assert (merged.dtype, mass.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0
    assert logits.grad.abs().sum() > 0


def test_inference_tensors(cpp):
    with torch.inference_mode():
        result = INPUTS.run()
        assert result.merged.is_inference()
        again = ck.select_and_merge(result.merged, result.mass, 2, 1, spatial_weight=0.0)
    expected = ck.select_and_merge(result.merged.clone(), result.mass.clone(), 2, 1, spatial_weight=0.0)
    assert_same_bits(again, expected)


def test_threads_that_train_at_the_same_time(cpp):
    """Forward and backward of several callers; the debug switch of one is not that of another."""
    inputs = make_inputs("clustered", batch=2, num_tokens=200, channels=64)  # each call has threads of its own

    def train():
        features, scores = inputs.features.clone().requires_grad_(), inputs.scores.clone().requires_grad_()
        merged, _, _, mass = ck.select_and_merge(features, scores, *inputs.args[2:], **inputs.options)
        return torch.autograd.grad(merged.square().sum() + mass.sum(), (features, scores))

    expected, results, wrong = train(), [None] * 4, inputs.scores.clone()
    wrong[0, 0] = -1

    def work(i):
        with (
            ck.debug(i % 2 == 0),
            pytest.raises(ValueError, match="^scores") if i % 2 == 0 else contextlib.nullcontext(),
        ):
            ck.select_and_merge(inputs.features, wrong, 3, 1, **inputs.options)
        for _ in range(20):
            results[i] = train()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_same_bits(result, expected)


def test_modules_that_use_it_are_copied_pickled_and_saved():
    model = torch.nn.ModuleDict({"project": torch.nn.Linear(24, 24), "condense": ck.Condense(4, 2, grid=(5, 6))})

    def run(model):
        return model["condense"](model["project"](INPUTS.features), INPUTS.scores)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in others:
        assert repr(other) == repr(model)
        assert_same_bits(run(other), run(model))
    assert set(model.state_dict()) == {"project.weight", "project.bias"}
    results = pickle.loads(pickle.dumps(run(model)))
    assert isinstance(results, ck.Condensed)
