"""Host time of a repeated call on a GPU, from Python to the last launch: on a machine without one.

The driver is a stub (stub_driver.py), CPU tensors stand for those of a GPU. Included is all that Python, the
dispatcher and Triton's launcher do; CUDA's own share of a launch, some 2 us, is not, and memory comes from the CPU's
allocator. Every side runs in turn, round by round; medians. The table is that of docs/benchmarks.md.

    python benchmarks/bench_launch.py [--rounds 41] [--calls 200]
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import shapes
import stub_driver
import torch
import triton
from report import markdown

import condense_kernels as ck
from condense_kernels._dispatch import backends

SHAPE = shapes.SHAPES["llava15-64"]
GOALS = {"function": 45, "operator": 35, "out= and workspace=": 30}  # us


def launches_alone() -> Callable[[], None]:
    """The launches of the call that was kept, with ready arguments."""
    ((call, _),) = backends.on_triton["select_and_merge"].calls.values()
    ready = [(step.compiled.run, step.grid[:3], step.compiled, step.args) for step in call.steps]

    def run() -> None:
        for launch, grid, compiled, args in ready:
            launch(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *args)

    return run


def sides() -> dict[str, Callable[[], object]]:
    """To be called where the device is a stub. Each has been called, so that all is compiled and kept."""
    (height, width), kept = SHAPE.grid, (SHAPE.num_anchors, SHAPE.num_background)
    features = torch.empty(SHAPE.batch, height * width, SHAPE.channels, dtype=torch.bfloat16, device="cpu")
    scores = torch.empty(SHAPE.batch, height * width, dtype=torch.bfloat16, device="cpu")
    args, options = (features, scores, *kept), {"grid": SHAPE.grid}
    operator, operator_out = torch.ops.condense.select_and_merge, torch.ops.condense.select_and_merge_out
    out = ck.select_and_merge(*args, **options)
    alone = launches_alone()
    workspace = features.new_empty(ck.workspace_bytes(*args, **options), dtype=torch.uint8)
    found = {
        "function": lambda: ck.select_and_merge(*args, **options),
        "operator": lambda: operator(*args, **options),
        "out= and workspace=": lambda: ck.select_and_merge(*args, **options, out=out, workspace=workspace),
        "operator, both": lambda: operator_out(*args, **options, workspace=workspace, **out._asdict()),
        "the launches alone": alone,
    }
    for call in found.values():
        call()
    return found


def calls_of_python(call: Callable[[], object]) -> int:
    """Functions that a call enters, Python's and C's: what its host time goes with, and the same on every machine."""
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # setprofile's own


def microseconds(found: dict[str, Callable], rounds: int, calls: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, call in found.items():
            start = time.thread_time()  # nothing waits: on an idle machine it is the clock's
            for _ in range(calls):
                call()
            times[name].append((time.thread_time() - start) / calls * 1e6)
    return {name: statistics.median(of_side) for name, of_side in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--calls", type=int, default=200, help="of a side, one after the other, in a round")
    options = parser.parse_args()
    lines = []
    with stub_driver.device():
        found = sides()
        for name, median in microseconds(found, options.rounds, options.calls).items():
            lines.append([name, f"{median:.1f}", str(GOALS.get(name, "")), str(calls_of_python(found[name]))])
    origin = f"{SHAPE}, bf16; torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    print(f"{origin}\n")
    print(markdown(["select_and_merge", "host us", "at most", "functions called"], lines))


if __name__ == "__main__":
    main()
