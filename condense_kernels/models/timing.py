"""How long the parts of a call took, without waiting for the device before someone asks."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Times spans by name: the host's clock on CPU, events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple]] = {}

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.spans.setdefault(name, []).append((start, self.now()))

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, name: str) -> float:
        if not self.on_gpu:
            return sum(1e3 * (end - start) for start, end in self.spans.get(name, []))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans.get(name, []))
