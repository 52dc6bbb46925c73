"""How long select_and_merge takes on each backend of this machine."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .._dispatch import backends
from ..testing import Inputs, compare

MAX_RUNS, SECONDS = 30, 2.0  # of one backend: whichever comes first


class Timing(NamedTuple):
    backend: str
    device: str
    median: float | None  # milliseconds
    fastest: float | None
    runs: int
    note: str  # why there is no time, or what was checked
    wrong: bool = False


def devices() -> dict[str, str]:
    """The device on which each backend is timed here."""
    return {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu", "reference": "cpu"}


def measure_times(run: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of several runs. The first, which compiles and warms up, is left out unless it is slow itself."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = seconds()
    times = [first] if first > SECONDS else []
    while not times or (sum(times) < SECONDS and len(times) < MAX_RUNS):
        times.append(seconds())
    return [1e3 * t for t in times]


def time_backend(backend: str, inputs: Inputs) -> Timing:
    """No time without a correct result: the comparison with the fp64 reference comes first."""
    device = devices()[backend]
    reason = backends.unavailable(backend, torch.device(device))
    if reason is not None:
        return Timing(backend, device, None, None, 0, f"not here: {reason}")
    if backend == "triton" and device == "cpu":
        return Timing(backend, device, None, None, 0, "interpreter, not timed")
    inputs = inputs.to(device)
    note = "the fp64 definition itself"
    if backend != "reference":
        wrong = [finding for finding in compare(inputs.run(backend), inputs, backend=backend) if not finding.ok]
        if wrong:
            return Timing(backend, device, None, None, 0, f"does not match the reference: {wrong[0].what}", wrong=True)
        note = "matches the fp64 reference"
    times = measure_times(lambda: inputs.run(backend), device)
    return Timing(backend, device, statistics.median(times), min(times), len(times), note)
