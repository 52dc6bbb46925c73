"""A call's launches, kept and repeated.

What the host does for a call, checks, strides, launch choices, Triton's look at every argument, follows from the
shapes, dtypes, strides, alignment and options of the call alone, and takes twenty times as long as the launches
themselves. So the first call of a kind is recorded on its way: what it allocates, and the compiled kernel, grid and
arguments of each launch, where a tensor's place is taken by where its address will come from. The next such call
allocates, fills in addresses, and launches.

Only what is understood is kept: a call that launches a tensor of unknown origin (a copy, say), or that compiles nothing
(in the interpreter, on meta tensors), is recorded in vain, and goes the long way each time.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .tables import is_trying

MAX_KEPT = 1024  # calls of an operator, of which the oldest goes first; each holds a few kilobytes

_recording: ContextVar["Recording | None"] = ContextVar("recording", default=None)


def recording() -> "Recording | None":
    """Of the call that this thread records, if it does."""
    return _recording.get()


class Made(NamedTuple):
    """A tensor that the call allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: int | None


class Piece(NamedTuple):
    """A part of a workspace: of which source, and how many bytes from its start."""

    source: int
    start: int


class Tuple(NamedTuple):
    """A tuple among the arguments of a kernel, with what stands in it as in Launch."""

    kind: Callable[[Iterable], tuple]
    values: list[Any]
    places: list[tuple[int, int]]


class Launch(NamedTuple):
    compiled: Any
    grid: tuple[int, ...]  # and ones, of which three count
    args: list[Any]  # in the kernel's order
    places: list[tuple[int, int]]  # the address of which source goes where among them
    tuples: list[tuple[int, Tuple]]


class Zero(NamedTuple):
    """Zeros into bytes of a source."""

    source: int
    start: int
    stop: int


class Unknown(Exception):
    """A tensor whose origin was not recorded."""


class Recording:
    """What a call does, written down as it does it. A source is where an address comes from: an argument, a tensor that
    the call makes, a piece of a workspace; they are numbered in this order."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.sources: list[torch.Tensor] = list(tensors)  # held, so that no id is given twice
        self.num_arguments = len(tensors)
        self.origins: list[Made | Piece] = []  # of the sources behind the arguments
        self.steps: list[Launch | Zero] = []
        self.is_understood = True

    def made(self, tensor: torch.Tensor, fill: int | None) -> None:
        self.sources.append(tensor)
        self.origins.append(Made(tuple(tensor.shape), tensor.dtype, fill))

    def cut(self, workspace: torch.Tensor, pieces: Iterable[torch.Tensor]) -> None:
        number = self.number_of(workspace)
        for piece in pieces:
            self.sources.append(piece)
            self.origins.append(Piece(number, piece.data_ptr() - workspace.data_ptr()))

    def zeroed(self, tensor: torch.Tensor) -> None:
        try:
            number, start = self.number_of(tensor), 0
        except Unknown:
            self.is_understood = False
            return
        origin = self.origins[number - self.num_arguments]
        if isinstance(origin, Piece):
            number, start = origin
        self.steps.append(Zero(number, start, start + tensor.numel() * tensor.element_size()))

    def launched(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        if not hasattr(compiled, "packed_metadata"):  # nothing compiled was launched
            self.is_understood = False
        if not self.is_understood:
            return
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | options
        try:
            values = [given[name] for name in names]
            tuples = [
                (i, Tuple(getattr(value, "_make", tuple), *self.without_tensors(value)))
                for i, value in enumerate(values)
                if isinstance(value, tuple)
            ]
            self.steps.append(Launch(compiled, (*grid, 1, 1), *self.without_tensors(values), tuples))
        except Unknown:
            self.is_understood = False

    def without_tensors(self, values: Sequence) -> tuple[list[Any], list[tuple[int, int]]]:
        places = [(i, self.number_of(value)) for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
        return [0 if isinstance(value, torch.Tensor) else value for value in values], places

    def number_of(self, tensor: torch.Tensor) -> int:
        """That of the source itself, or of the only argument that begins where this view does."""
        numbers = [i for i, source in enumerate(self.sources) if source is tensor]
        if not numbers:
            at, arguments = tensor.data_ptr(), self.sources[: self.num_arguments]
            numbers = [i for i, source in enumerate(arguments) if source.data_ptr() == at != 0]
        if len(numbers) != 1:
            raise Unknown
        return numbers[0]

    def end(self, returned: Any) -> "Callable[[list[torch.Tensor], list[int]], Any] | None":
        """What to keep: nothing, unless every step is understood and all that is returned was made here."""
        if isinstance(returned, int) and not self.sources[self.num_arguments :]:  # of shapes alone
            return lambda tensors, addresses: returned
        if not self.is_understood or not self.steps:
            return None
        results = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        try:
            numbers = [self.number_of(result) for result in results]
        except Unknown:
            return None
        if min(numbers, default=self.num_arguments) < self.num_arguments:
            return None
        return Call(self.origins, self.steps, numbers, isinstance(returned, tuple))


class Call:
    """A recorded call, to be made again. It holds no tensor, and making it changes nothing in it."""

    def __init__(self, origins: list[Made | Piece], steps: list[Launch | Zero], results: list[int], packs: bool):
        from triton import knobs
        from triton.runtime import driver

        self.origins, self.steps, self.results, self.packs = origins, steps, results, packs
        self.knobs, self.driver = knobs.runtime, driver

    def __call__(self, tensors: list[torch.Tensor], addresses: list[int]) -> Any:
        if tensors[0].is_cuda and torch.cuda.current_device() != tensors[0].device.index:
            with torch.cuda.device(tensors[0].device):
                return self.repeat(tensors, addresses)
        return self.repeat(tensors, addresses)

    def repeat(self, sources: list[torch.Tensor], addresses: list[int]) -> Any:
        """Those of the arguments come in; the others are added."""
        like = sources[0]
        for origin in self.origins:
            if isinstance(origin, Made):
                shape, dtype, fill = origin
                made = like.new_empty(shape, dtype=dtype) if fill is None else like.new_full(shape, fill, dtype=dtype)
                sources.append(made)
                addresses.append(made.data_ptr())
            else:
                sources.append(sources[origin[0]])
                addresses.append(addresses[origin[0]] + origin[1])
        active = self.driver.active
        stream = active.get_current_stream(active.get_current_device())
        enter, leave = _unless_empty(self.knobs.launch_enter_hook), _unless_empty(self.knobs.launch_exit_hook)
        for step in self.steps:
            if isinstance(step, Zero):
                sources[step.source][step.start : step.stop].zero_()
                continue
            compiled, grid, args, places, tuples = step
            args = _with_addresses(args, places, addresses)
            for i, (kind, values, inner) in tuples:
                args[i] = kind(_with_addresses(values, inner, addresses))
            metadata = None if enter is None else compiled.launch_metadata(grid, stream, *args)
            compiled.run(*grid[:3], stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *args)
        results = [sources[number] for number in self.results]
        return tuple(results) if self.packs else results[0] if results else None


def _unless_empty(hook: Any) -> Any:
    """Triton has chains of hooks, for profilers; with an empty one a launch would still describe itself, to nobody."""
    return hook if getattr(hook, "calls", True) else None


def _with_addresses(values: list[Any], places: list[tuple[int, int]], addresses: list[int]) -> list[Any]:
    values = values.copy()
    for i, source in places:
        values[i] = addresses[source]
    return values


class Spans:
    """How far a call's arguments reach from their addresses, and which of them are written."""

    def __init__(self, args: tuple, kwargs: dict, written: Sequence[str]) -> None:
        named = (*((None, value) for value in args), *kwargs.items())
        self.reaches = [(_reach(value), name in written) for name, value in named if isinstance(value, torch.Tensor)]

    def overlap(self, addresses: list[int]) -> bool:
        """Whether one that is written overlaps another."""
        spans = [
            (start, start + size, is_written)
            for start, (size, is_written) in zip(addresses, self.reaches, strict=True)
            if size
        ]
        spans.sort()
        end_of_written = end_of_any = 0
        for start, end, is_written in spans:
            if start < (end_of_any if is_written else end_of_written):
                return True
            end_of_any = max(end_of_any, end)
            if is_written:
                end_of_written = max(end_of_written, end)
        return False


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to behind the last."""
    if tensor.numel() == 0:
        return 0
    return tensor.itemsize * (
        1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )


class Kept:
    """An operator's launcher behind its checks, which keeps the calls that it has made."""

    def __init__(
        self,
        launcher: Callable[..., Any],
        check: Callable[..., None],
        check_memory: Callable[..., None] | None = None,
        written: Sequence[str] = (),
    ) -> None:
        self.launcher = launcher
        self.check = check  # what is the same for all calls of a kind
        self.check_memory = check_memory  # what is not: whether an argument that is written overlaps another
        self.written = written
        self.forget()
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """After a fork, too: nothing of the parent's device can be used, and its lock may be held for ever."""
        self.calls: dict[tuple, tuple[Callable[[list[torch.Tensor], list[int]], Any], Spans]] = {}
        self.lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_trying():
            self.look(args, kwargs)
            return self.launcher(*args, **kwargs)
        key, tensors, addresses = _kind_of(args, kwargs)
        found = self.calls.get(key)
        if found is None:
            self.look(args, kwargs)
            return self.record(key, args, kwargs)
        call, spans = found
        if self.check_memory is not None and spans.overlap(addresses):
            self.check_memory(*args, **kwargs)  # says what overlaps
        return call(tensors, addresses)

    def look(self, args: tuple, kwargs: dict) -> None:
        self.check(*args, **kwargs)
        if self.check_memory is not None:
            self.check_memory(*args, **kwargs)

    def record(self, key: tuple, args: tuple, kwargs: dict) -> Any:
        tensors: list[torch.Tensor] = []

        def alone(value: Any) -> Any:
            """An alias: the same tensor may be two arguments, and need not be the next time."""
            if isinstance(value, torch.Tensor):
                value = value.detach()
                tensors.append(value)
            return value

        args, kwargs = tuple(map(alone, args)), {name: alone(value) for name, value in kwargs.items()}
        recording = Recording(tensors)
        token = _recording.set(recording)
        try:
            returned = self.launcher(*args, **kwargs)
        finally:
            _recording.reset(token)
        call = recording.end(returned)
        if call is not None:
            with self.lock:
                while len(self.calls) >= MAX_KEPT:
                    del self.calls[next(iter(self.calls))]
                self.calls[key] = call, Spans(args, kwargs, self.written)
        return returned


def _kind_of(args: tuple, kwargs: dict) -> tuple[tuple, list[torch.Tensor], list[int]]:
    """All that a call's launches depend on; the tensors among its arguments, and their addresses."""
    kind: list[Any] = list(kwargs)
    tensors, addresses = [], []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            address = value.data_ptr()
            tensors.append(value)
            addresses.append(address)
            kind += (value.dtype, value.device, value.shape, value.stride(), address & 15)
        else:
            kind.append(tuple(value) if isinstance(value, list) else value)
    return tuple(kind), tensors, addresses
