"""What generate takes on all visual tokens and on fewer: time, memory, FLOPs, KV cache, side by side.

Every side answers the same prompts, one at a time. Times come from calls that do nothing else, with the sides in turn;
FLOPs, the cache and the peak of memory from calls of their own, which also warm up.
"""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.generation.streamers import BaseStreamer

from .apply import CondenseHandle, apply_condense

T = TypeVar("T")
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """A method and its budget; None: the model as it is."""

    method: str | None = None
    keep: int | float = 1.0

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[CondenseHandle | None]:
        if self.method is None:
            yield None
        else:
            with apply_condense(model, self.keep, method=self.method) as handle:
                yield handle


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call of generate, by the clock that measure was given."""

    total: float
    first: float  # to the first token: encoder, scores, operator and prefill
    token: float  # each one after it; NaN where there is none
    wall: float  # total by the wall's clock, whatever the other
    operator: float  # scores and operator, as handle.report() says: wall time
    share: float  # of the operator in the wall time to the first token


@dataclass(frozen=True)
class Counts:
    """Of one prompt. Bytes and FLOPs are counted, not computed from sizes."""

    visual: int  # tokens in the language model
    prompt: int  # with text
    flops: int  # of prefill, two a multiply-add: encoder, operator, language model, head
    decoder_flops: int  # of them, the layers of the language model
    operator_flops: int  # of them, this package's operators
    kv_bytes: int  # what the cache holds after prefill
    peak_bytes: int


@dataclass
class Row:
    side: Side
    counts: list[Counts] = field(default_factory=list)  # of each prompt
    runs: list[list[Times]] = field(default_factory=list)  # of each prompt in each round
    reason: str = ""  # why there are none

    def mean(self, name: str) -> float:
        """Of a count, over prompts."""
        return statistics.fmean(getattr(count, name) for count in self.counts)

    def times(self, name: str) -> list[float]:
        """Of each round, the mean over prompts."""
        return [statistics.fmean(getattr(times, name) for times in run) for run in self.runs]

    def median(self, name: str) -> float:
        return statistics.median(self.times(name))

    def quartiles(self, name: str) -> tuple[float, float]:
        times = self.times(name)
        if len(times) < 2:
            return times[0], times[0]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, high


Clock = Callable[[], float]  # seconds
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class Stamps(BaseStreamer):  # type: ignore[misc]  # transformers is not followed
    """By every clock, when generate hands out the prompt, and each token."""

    def __init__(self) -> None:
        self.times: list[dict[str, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(now())

    def end(self) -> None:
        pass


def generate(model: Any, inputs: dict[str, Any], new_tokens: int, **further: Any) -> Any:
    """Greedily, and that many: what a side answers does not change how long its answer is."""
    counts = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(**inputs, **counts, do_sample=False, num_beams=1, use_cache=True, **further)


def in_turn(sides: dict[str, Callable[[], T]], rounds: int, tick: Tick = lambda what: None) -> dict[str, list[T]]:
    """What each side returns in each round. Each round begins with another one, so that none always comes first."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    names = list(sides)
    for at in range(rounds):
        start = at % len(names) if names else 0
        for name in names[start:] + names[:start]:
            tick(name)
            found[name].append(sides[name]())
    return found


def now() -> dict[str, float]:
    """Milliseconds."""
    return {name: 1e3 * clock() for name, clock in CLOCKS.items()}


def timed(model: Any, side: Side, inputs: dict[str, Any], new_tokens: int, clock: str = "wall") -> Times:
    stamps = Stamps()
    with side.applied(model) as handle:
        wait(model)
        start = now()
        generate(model, inputs, new_tokens, streamer=stamps)
        wait(model)
        end = now()
        report = handle.report() if handle is not None else None
    first, last = stamps.times[1], stamps.times[-1]  # the prompt comes before
    operator = 0.0 if report is None else (report.scores_ms or 0.0) + (report.operator_ms or 0.0)
    return Times(
        total=end[clock] - start[clock],
        first=first[clock] - start[clock],
        token=(last[clock] - first[clock]) / (new_tokens - 1) if new_tokens > 1 else math.nan,
        wall=end["wall"] - start["wall"],
        operator=operator,
        share=operator / (first["wall"] - start["wall"]),
    )


def wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def counted(model: Any, side: Side, inputs: dict[str, Any], new_tokens: int) -> Counts:
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    with side.applied(model) as handle:
        seen = inputs if handle is None else handle.rewritten(dict(inputs), {})
        ids = seen["input_ids"]
        # The counter knows no fused attention on CPU: its matrix products are what is counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, of_decoder(model, counter) as own:
            result = generate(model, inputs, 1, return_dict_in_generate=True)
        by_op = counter.get_flop_counts()["Global"]
        return Counts(
            visual=int((ids == model.config.image_token_id).sum()),
            prompt=ids.shape[1],
            flops=counter.get_total_flops(),
            decoder_flops=sum(own),
            operator_flops=sum(count for op, count in by_op.items() if str(op).startswith("condense")),
            kv_bytes=cache_bytes(result),
            peak_bytes=peak(model, lambda: generate(model, inputs, new_tokens)),
        )


@contextlib.contextmanager
def of_decoder(model: Any, counter: Any) -> Iterator[list[int]]:
    """FLOPs of each call of the language model, without its head."""
    decoder, starts, found = model.base_model.get_decoder(), [], []
    before = decoder.register_forward_pre_hook(lambda *_: starts.append(counter.get_total_flops()))
    after = decoder.register_forward_hook(lambda *_: found.append(counter.get_total_flops() - starts.pop()))
    try:
        yield found
    finally:
        before.remove()
        after.remove()


def cache_bytes(result: Any) -> int:
    """Of keys and values in the cache of what generate returned; linear attention's states are among them."""
    cache = getattr(result, "cache", None)  # past_key_values before transformers 5.24
    layers = (result.past_key_values if cache is None else cache).layers
    held = [value for layer in layers for value in vars(layer).values()]
    held += [state for value in held if isinstance(value, dict) for state in value.values()]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    return size_of(tensor for tensor in tensors if tensor.is_floating_point())  # a length may be a tensor, too


def weight_bytes(model: Any) -> int:
    return size_of([*model.parameters(), *model.buffers()])


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak(model: Any, call: Callable[[], object]) -> int:
    """On a GPU torch.cuda.max_memory_allocated; on CPU the weights, and the most that tensors of the call took at a
    time, by the profiler's record of torch's allocator: the process has much beside the model."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with errors_to_nowhere(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result  # not while it is recorded
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return weight_bytes(model) + most


@contextlib.contextmanager
def errors_to_nowhere() -> Iterator[None]:
    """The profiler writes two lines to standard error, whatever its log level."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@torch.no_grad()
def tokens_of(model: Any, prompts: Sequence[dict[str, Any]]) -> list[int]:
    """Of each image, or of each of its crops: what num_tokens counts."""
    found: list[int] = []
    with apply_condense(model, 1.0, method="topk") as handle:
        for inputs in prompts:
            handle.rewritten(dict(inputs), {})
            found += [n for n, _ in handle.counts]
    return found


@torch.no_grad()
def measure(
    model: Any,
    prompts: Sequence[dict[str, Any]],
    sides: Sequence[Side],
    new_tokens: int = 16,
    rounds: int = 10,
    clock: str = "wall",
    tick: Tick = lambda what: None,
) -> list[Row]:
    """A row a side, in their order. A side whose method cannot have that many tokens has the reason in its place.

    ``clock``: "wall"; or "cpu", the time of all threads of this process, which what else runs on the machine hardly
    touches, and which on one thread is what the wall's clock says where nothing else runs.
    """
    rows = [Row(side) for side in sides]
    for row in rows:
        tick(named(row.side))
        try:
            row.counts = [counted(model, row.side, inputs, new_tokens) for inputs in prompts]
        except ValueError as error:
            row.reason = str(error)

    def answering(side: Side) -> Callable[[], list[Times]]:
        return lambda: [timed(model, side, inputs, new_tokens, clock) for inputs in prompts]

    running = {str(at): answering(row.side) for at, row in enumerate(rows) if not row.reason}
    found = in_turn(running, rounds, lambda at: tick(named(rows[int(at)].side)))
    for at, runs in found.items():
        rows[int(at)].runs = runs
    return rows


def named(side: Side) -> str:
    if side.method is None:
        return "all tokens"
    return f"{side.method}, {side.keep if isinstance(side.keep, int) else f'{100 * side.keep:.1f} %'}"
