"""The Triton kernels as compiled TTIR, executed by ttsem (`make gpu-check`): an access outside of the tensors, a race
between programs, and what is undefined stop it at the line of the kernel.

    python tests/ttsem_calls.py [part of a label]

Every operator's declared examples, and the ways through the flagship that these do not take. Memory that nobody wrote
is NaN there, so that bits which should agree do not.
"""

import pathlib
import sys
import time

import pytest
import torch
import triton
import triton.language as tl
from ttsem import sanitize

from condense_kernels import Condensed
from condense_kernels._dispatch.declaration import OPERATORS
from condense_kernels._triton.tables import FusedConfig, Grouping, trying
from condense_kernels.ops.select_and_merge.kernel import select_and_merge
from condense_kernels.ops.select_and_merge.pipeline import Stages, compose
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen
from condense_kernels.ops.select_and_merge_varlen.reference import for_each_segment
from condense_kernels.testing import Inputs, assert_same_bits, make_inputs

STAGES = compose(
    Stages(
        *(OPERATORS[name].triton for name in ("similarity", "global_similarity", "greedy_select", "assign", "merge"))
    )
)


@triton.jit
def wrong_kernel(x_ptr, y_ptr, SHIFT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Right where nothing is shifted and a program begins behind the one before."""
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + SHIFT) + tl.program_id(0))


def sees_what_is_wrong() -> None:
    """An index that is off by one, and programs that write to one place."""
    x, y = torch.rand(32), torch.empty(32)
    wrong_kernel[(2,)](x, y, 0, 16, BLOCK=16)
    for shift, step, kind in ((1, 16, "oob_read"), (-1, 16, "oob_read"), (0, 15, "race")):
        with pytest.raises(sanitize.KernelFault) as fault:
            wrong_kernel[(2,)](x, y, shift, step, BLOCK=16)
        assert fault.value.fault.kind == kind and "wrong_kernel" in str(fault.value)


def dense(inputs: Inputs) -> None:
    """Stored, without s stored, and with the assignment in the launch of the selection: the bits of the stages."""
    expected = STAGES(*inputs.args, **inputs.options)
    for path in ({}, {"store_s": False}, {"assign_in_select": True}):
        with trying(FusedConfig, **path):
            assert_same_bits(select_and_merge(*inputs.args, **inputs.options), expected, str(path))


def packed(inputs: Inputs) -> None:
    """A long segment, an empty one, one that keeps nothing: the bits of each alone."""
    offsets = [torch.tensor(counts, dtype=torch.int32) for counts in ([0, 66, 66, 70], [0, 3, 3, 3], [0, 2, 2, 2])]
    arguments = (inputs.features[0], inputs.scores[0], *offsets, 5, 66)
    options = {"positions": torch.rand(70, 2)}
    expected = Condensed(*for_each_segment(select_and_merge)(*arguments, **options))
    for path in ({}, {"grouping": Grouping(1, 1)}, {"store_s": False}):
        with trying(FusedConfig, **path):
            assert_same_bits(select_and_merge_varlen(*arguments, **options), expected, str(path))


def calls():
    yield "kernels that are wrong", sees_what_is_wrong
    for name, operator in OPERATORS.items():
        for i, example in enumerate(operator.examples(2)):
            if any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in example.args):
                continue  # which is for CPU tensors
            yield f"{name} {i}", lambda run=operator.triton, e=example: run(*e.args, **e.kwargs)
    for kind, dtype in (("magnitudes", torch.bfloat16), ("masked", torch.float32)):
        inputs = make_inputs(kind, batch=2, num_tokens=70, channels=24, dtype=dtype, num_anchors=4, num_background=3)
        yield f"dense {kind} {dtype}", lambda inputs=inputs: dense(inputs)
        yield f"packed {kind} {dtype}", lambda inputs=inputs: packed(inputs)


def main() -> None:
    torch.manual_seed(0)
    for label, call in calls():
        if "--only" not in sys.argv or sys.argv[-1] in label:
            start = time.process_time()
            call()
            print(f"{time.process_time() - start:6.1f} s  {label}", flush=True)


if __name__ == "__main__":
    report = sanitize.run_program(pathlib.Path(__file__), ["--only", *sys.argv[1:]] if sys.argv[1:] else [])
    print(f"{report.verdict}: {report.launches} launches, {report.races_unchecked} of them too large to look for races")
    print(report.message_for_agent)
    sys.exit(report.verdict != "ok" or report.races_unchecked > 0)
