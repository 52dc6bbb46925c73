"""A device for Triton that needs no GPU: within ``Device()``, launches run their compiled PTX on CPU tensors.

The grid, the arguments and what Triton makes of them are those of a launch. Every storage that a launch names has a
copy in the engine's arena, apart from all others, so that what lies outside of it is out of bounds.
"""

import ctypes
import functools
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from inspect_kernels import source_of
from torch.utils._python_dispatch import TorchDispatchMode

from condense_kernels._triton import workspace

from . import engine
from .compiling import ptx_of
from .program import SIZES, Program

APART = 4096  # bytes between two storages
ENDLESS = 2**33  # warp instructions of a launch
# Triton lets every thread that holds an element store it: all of them the same value.
HARMLESS = "race between warps, same value"


@dataclass(frozen=True)
class Checks:
    """What a run looks at, and the hardware that it takes for granted."""

    races: bool = True
    guard_bits: int | None = None  # of tensor cores that truncate; None: they add exactly, and round once
    inexact: bool = False  # approximate instructions, div.full and the like, are off by up to 2 ulp
    loads: bool = False  # every load of memory that nobody wrote is a finding, used or not

    @property
    def flags(self) -> int:
        truncates = 0 if self.guard_bits is None else 2 | self.guard_bits << 8
        return self.races | truncates | self.inexact << 2 | self.loads << 3


class Launch(NamedTuple):
    kernel: str
    ptx: str
    grid: tuple[int, ...]
    instructions: int  # of warps
    seconds: float


class Copy(NamedTuple):
    """A storage, held, and the address of its copy."""

    storage: torch.UntypedStorage
    address: int


program_of = functools.lru_cache(maxsize=1024)(Program)


class Memory:
    """The copies of storages, and what of them nobody has written."""

    def __init__(self):
        self.engine = engine.library()
        self.next = engine.arena() + APART
        self.engine.regions_clear()
        self.copies: dict[int, Copy] = {}  # by where the storage is
        self.unwritten: dict[int, torch.Tensor] = {}  # likewise; held, so that nothing else comes there

    def allocated(self, tensor: torch.Tensor) -> None:
        """Its contents are nobody's."""
        self.unwritten[tensor.untyped_storage().data_ptr()] = tensor

    def written(self, tensor: torch.Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place in self.copies:
            first, end = self.span(tensor)
            self.engine.set_taint(first, end - first, False)
        else:
            self.unwritten.pop(place, None)

    def address_of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.copies:
            self.copies[place] = Copy(storage, self.next)
            self.next += -(-(storage.nbytes() + APART) // 512) * 512
            granule = min(4, tensor.element_size())
            if storage.nbytes() and not self.engine.region_add(
                self.copies[place].address, storage.nbytes(), granule, place in self.unwritten
            ):
                raise MemoryError(f"{engine.ARENA_BYTES} bytes are not enough for the tensors of this test")
        return self.copies[place].address + tensor.storage_offset() * tensor.element_size()

    def span(self, tensor: torch.Tensor) -> tuple[int, int]:
        """From where to where its elements lie."""
        first = self.address_of(tensor)
        if tensor.numel() == 0:
            return first, first
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return first, first + (last + 1) * tensor.element_size()

    def bound(self, tensors: list[torch.Tensor]) -> list[Copy]:
        """Of a storage, a launch may touch what lies between its tensors. Returns what it is to be given."""
        spans: dict[int, tuple[int, int]] = {}
        for tensor in tensors:
            first, end = self.span(tensor)
            place = tensor.untyped_storage().data_ptr()
            low, high = spans.get(place, (first, end))
            spans[place] = min(low, first), max(high, end)
        for place, span in spans.items():
            if span[0] < span[1]:
                self.engine.region_bounds(self.copies[place].address, *span)
        return [self.copies[place] for place in spans]

    def count_unwritten(self, tensor: torch.Tensor) -> int:
        """Elements of a result that no program wrote, or that were computed from such."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.copies:
            return tensor.numel() if storage.data_ptr() in self.unwritten else 0
        taint = torch.zeros(storage.nbytes(), dtype=torch.uint8)
        self.engine.get_taint(self.copies[storage.data_ptr()].address, storage.nbytes(), taint.data_ptr())
        whole = taint.view(tensor.dtype) if tensor.dtype != torch.bool else taint
        elements = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return int(elements.contiguous().view(torch.uint8).view(*tensor.shape, -1).any(-1).sum())


class Device(TorchDispatchMode):
    """``mutate``, given a kernel's PTX, may return a function that changes its statements, see Program."""

    def __init__(self, target: str, seed: int = 0, checks: Checks = Checks(), mutate=None, limit: int = ENDLESS):
        super().__init__()
        self.target, self.seed, self.checks, self.mutate, self.limit = target, seed, checks, mutate, limit
        self.memory = Memory()
        self.launches: list[Launch] = []
        self.findings: list[dict] = []

    # What torch does -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = function(*args, **kwargs)
        if function.name().startswith(("aten::empty", "aten::new_empty")):
            self.memory.allocated(returned)
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in tensors_in(value):
                    self.memory.written(tensor)
        return returned

    # What Triton does ------------------------------------------------------------------------------------------------

    def launch(self, kernel: triton.JITFunction, *args, grid, warmup: bool, **kwargs) -> None:
        names = [parameter.name for parameter in kernel.params]
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = list(tensors_in(tuple(arguments.values())))
        if any(tensor.is_meta for tensor in tensors):
            return
        source = source_of(kernel, arguments, lambda tensor: self.memory.address_of(tensor) % 16 == 0)
        text, shared = ptx_of(kernel, source, options, self.target)
        program = program_of(text, self.mutate and self.mutate(text))
        grid = tuple(grid(arguments) if callable(grid) else grid)
        parameters = self.parameters_of(program, list(values_in(arguments, source.signature)))
        copies = self.memory.bound(tensors)
        for storage, address in copies:
            ctypes.memmove(address, storage.data_ptr(), storage.nbytes())
        start = time.perf_counter()
        seed = self.seed + 7919 * len(self.launches)
        found = program.run(parameters, grid, shared, seed, self.checks.flags, self.limit)
        seconds = time.perf_counter() - start
        for storage, address in copies:
            ctypes.memmove(storage.data_ptr(), address, storage.nbytes())
        self.launches.append(Launch(kernel.__name__, text, grid, self.memory.engine.take_executed(), seconds))
        for finding in found:
            if finding["space"] == "global":
                finding["tensor"] = self.nearest(finding["addr"], arguments)
        self.findings += found

    def parameters_of(self, program: Program, values: list) -> bytes:
        """As the kernel finds them; two scratch pointers of Triton's come last, and are not used."""
        buffer = bytearray(program.param_bytes)
        for value, (kind, offset) in zip(values, program.param_types[:-2], strict=True):
            if isinstance(value, torch.Tensor):
                struct.pack_into("<Q", buffer, offset, self.memory.address_of(value))
            elif kind == "f32":
                struct.pack_into("<f", buffer, offset, value)
            else:
                struct.pack_into("<q" if SIZES[kind] == 8 else "<i", buffer, offset, value)
        return bytes(buffer)

    def nearest(self, address: int, arguments: dict) -> str:
        """The argument at an address or near it, and where there."""
        best, text = APART // 2, "no tensor"
        for name, argument in arguments.items():
            for tensor in tensors_in(argument):
                first, end = self.memory.span(tensor)
                distance = max(first - address, address - end + 1, 0)
                if distance < best:
                    best, text = distance, f"{name} {list(tensor.shape)}, byte {address - first} of {end - first}"
        return text

    # Within the device -----------------------------------------------------------------------------------------------

    def __enter__(self):
        self.originals = [(triton.JITFunction, "run", triton.JITFunction.run)]
        self.originals += [(m, "carve", m.carve) for m in list(sys.modules.values()) if is_from_workspace(m)]
        triton.JITFunction.run = lambda kernel, *args, **kwargs: self.launch(kernel, *args, **kwargs)
        for module, name, _ in self.originals[1:]:
            setattr(module, name, carve_apart)
        return super().__enter__()

    def __exit__(self, *args):
        for owner, name, original in self.originals:
            setattr(owner, name, original)
        return super().__exit__(*args)

    def take(self) -> list[dict]:
        """The findings so far, those of different launches at the same place as one."""
        places: dict[tuple, dict] = {}
        for finding in self.findings:
            if finding["kind"] != HARMLESS:
                key = tuple(finding.get(name) for name in ("kernel", "kind", "at", "ptx", "other at", "other ptx"))
                first = places.setdefault(key, {**finding, "count": 0})
                first["count"] += finding["count"]
        self.findings.clear()
        return list(places.values())


def is_from_workspace(module) -> bool:
    return getattr(module, "carve", None) is workspace_carve


workspace_carve = workspace.carve


def carve_apart(pieces: workspace.Pieces, memory: torch.Tensor | None, device: torch.device) -> SimpleNamespace:
    """Each piece an allocation of its own, so that what lies beside it is out of bounds."""
    if memory is not None:
        return workspace_carve(pieces, memory, device)
    return SimpleNamespace(
        **{name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in pieces.items()}
    )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for field in value:
            yield from tensors_in(field)


def values_in(value: Any, signature: Any) -> Iterator[Any]:
    """What a compiled kernel is given: all but constants, tuples one by one."""
    if isinstance(signature, dict):
        for name, field in signature.items():
            yield from values_in(value[name], field)
    elif isinstance(signature, tuple):
        for pair in zip(value, signature, strict=True):
            yield from values_in(*pair)
    elif signature != "constexpr":
        yield value


def text_of(finding: dict) -> str:
    """A finding in words."""
    text = f"{finding['kernel']}: {finding['kind']}, {finding['space']} memory, at {finding['at']}: {finding['ptx']}"
    if "other at" in finding:
        text += f"; and at {finding['other at']}: {finding['other ptx']}"
    if "tensor" in finding:
        text += f"; {finding['tensor']}"
    return text + f"; CTA {finding['cta']}, warp {finding['warp']}, lane {finding['lane']}; {finding['count']} times"
