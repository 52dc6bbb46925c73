"""A GPU for Triton's launch path, and none for its kernels: they compile, load and launch, and nothing runs.

Triton finds a driver library of this project's (stub_driver.c), built on the first use, where it looks for CUDA's. All
else is the real thing: JITFunction.run, ptxas, the C launcher, the package's launchers. CPU tensors stand for those of
the GPU; results are what the allocation held. TRITON_INTERPRET has to be unset before triton is imported, so tests use
a process of their own.

>>> with stub_driver.device(capability=90) as counts:
...     condense_kernels.select_and_merge(features, scores, 48, 16, grid=(24, 24))
>>> counts.launches
{'tiles_kernel': 1, 'select_kernel': 1, 'assign_kernel': 1, 'merge_kernel': 1}
>>> counts.compilations
[Compilation(kernel='tiles_kernel', seconds=1.2, cached=False), ...]
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import resource
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

from condense_kernels._dispatch import backends, library

SOURCE = pathlib.Path(__file__).with_suffix(".c")
INCLUDE = pathlib.Path(nvidia.__file__).with_name("include")  # Triton brings cuda.h
MAX_THREADS, SHARED, WARP, CLOCK, SMS, MEMORY_CLOCK, BUS, MAJOR, MINOR, SHARED_SM, OPTIN, REGISTERS = (
    1,
    8,
    10,
    13,
    16,
    36,
    37,
    75,
    76,
    81,
    97,
    12,
)  # fmt: skip  of cuda.h's CUdevice_attribute
COMMON = {MAX_THREADS: 1024, SHARED: 49152, WARP: 32, REGISTERS: 65536, BUS: 5120}
FIGURES = {  # of an A100 and an H100 (SXM)
    80: {SMS: 108, OPTIN: 166912, SHARED_SM: 167936, CLOCK: 1410000, MEMORY_CLOCK: 1593000},
    90: {SMS: 132, OPTIN: 232448, SHARED_SM: 233472, CLOCK: 1980000, MEMORY_CLOCK: 2619000},
}


class Compilation(NamedTuple):
    kernel: str
    seconds: float  # of CPU, ptxas included
    cached: bool  # found in Triton's cache on disk


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    params: bytes  # as the kernel would find them


class _Function(ctypes.Structure):
    pass


_Function._fields_ = [
    ("name", ctypes.c_char * 256),
    ("launches", ctypes.c_longlong),
    ("num_params", ctypes.c_int),
    ("size", ctypes.c_int * 128),
    ("offset", ctypes.c_int * 128),
    ("next", ctypes.POINTER(_Function)),
]


class _Launch(ctypes.Structure):
    pass


_Launch._fields_ = [
    ("function", ctypes.POINTER(_Function)),
    ("grid", ctypes.c_uint * 3),
    ("threads", ctypes.c_uint),
    ("shared", ctypes.c_uint),
    ("stream", ctypes.c_uint64),
    ("bytes", ctypes.c_int),
    ("params", ctypes.c_ubyte * 4096),
    ("next", ctypes.POINTER(_Launch)),
]


@functools.cache
def build() -> pathlib.Path:
    """The library, in Triton's cache."""
    source = SOURCE.read_bytes()
    cache = get_cache_manager(hashlib.sha256(source).hexdigest())
    if (path := cache.get_file("libcuda.so.1")) is None:
        file = SOURCE.with_name(f".libcuda.{os.getpid()}")
        flags = ["-O2", "-shared", "-fPIC", "-pthread", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1"]
        try:
            subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", file, SOURCE], check=True)
            path = cache.put(file.read_bytes(), "libcuda.so.1", binary=True)
        finally:
            file.unlink(missing_ok=True)
    return pathlib.Path(path)


@functools.cache
def load() -> ctypes.CDLL:
    """Before Triton's own module, which asks for the library by its name, and gets what the process has."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set. Remedy: unset it before triton is imported.")
    triton.knobs.nvidia.libcuda_path = str(build().parent)
    stub = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    stub.stub_functions.restype = ctypes.POINTER(_Function)
    stub.stub_take_launches.restype = ctypes.POINTER(_Launch)
    stub.stub_free_launches.argtypes = [ctypes.POINTER(_Launch)]
    return stub


def linked(node) -> Iterator:
    while node:
        yield node.contents
        node = node.contents.next


class Counts:
    """What happened since the device was there, or since reset().

    current_device and current_stream are what Triton is told, and may be set.
    """

    def __init__(self, stub: ctypes.CDLL):
        self._stub = stub
        self.current_device, self.current_stream = 0, 0
        self.kernels: set[triton.JITFunction] = set()  # that were compiled
        self.reset()

    def reset(self) -> None:
        self.compilations: list[Compilation] = []
        self._before = self._launched()
        self.take()

    def _launched(self) -> Counter:
        total: Counter = Counter()
        for function in reversed([*linked(self._stub.stub_functions())]):
            total[function.name.decode()] += function.launches
        return total

    @property
    def launches(self) -> dict[str, int]:
        """By kernel, as many as the driver was asked for."""
        return dict(self._launched() - self._before)

    @property
    def compiled(self) -> dict[str, int]:
        return dict(Counter(compilation.kernel for compilation in self.compilations))

    def take(self) -> list[Launch]:
        """The launches since the last take, in order, where device(record=True)."""
        first = self._stub.stub_take_launches()
        found = [
            Launch(
                launch.function.contents.name.decode(), tuple(launch.grid), launch.threads, launch.shared,
                launch.stream, bytes(launch.params[: launch.bytes]),
            )
            for launch in linked(first)
        ]  # fmt: skip
        self._stub.stub_free_launches(first)
        return found


def loaded() -> int:
    """Kernels that were looked up in modules, of all devices so far."""
    return sum(1 for _ in linked(load().stub_functions()))


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Uncompiled(SimpleNamespace):
    """In place of a compiled kernel, where only their number is asked for."""

    function, packed_metadata, hash = 0, None, ""

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        return None


def _counted(counts: Counts, compiling: bool, compile_):
    """JITFunction._do_compile, which a launch comes to once for each specialisation."""

    def compile_and_count(kernel, key, signature, device, *rest, **options):
        counts.kernels.add(kernel)
        before, hit = cpu_seconds(), []
        if compiling:
            triton.knobs.compilation.listener = lambda *, cache_hit, **_: hit.append(cache_hit)
            compiled = compile_(kernel, key, signature, device, *rest, **options)
        else:
            compiled = kernel.device_caches[device][0][key] = Uncompiled(name=kernel.__name__)
        counts.compilations.append(Compilation(kernel.__name__, cpu_seconds() - before, any(hit)))
        return compiled

    return compile_and_count


def _driver(counts: Counts, capability: int):
    driver = nvidia.CudaDriver()  # whose functions are torch's, which has no CUDA here
    driver.get_current_device = lambda: counts.current_device
    driver.set_current_device = lambda device: setattr(counts, "current_device", device)
    driver.get_current_stream = lambda device: counts.current_stream
    driver.get_device_capability = lambda device=None: divmod(capability, 10)
    return driver


def _forget(kernels: set) -> None:
    """Compiled kernels are kept by the device's number, and that of the next device is the same."""
    for kept in backends.on_triton.values():
        kept.forget()
    for kernel in kernels:
        kernel.device_caches.clear()


@contextlib.contextmanager
def raw_operators_on_cpu() -> Iterator[None]:
    """torch.ops.condense.* do on CPU tensors what they do on CUDA's: the dispatcher, check, Triton kernel."""
    with contextlib.ExitStack() as stack:
        registry = torch.library.Library(library.NAMESPACE, "IMPL")
        stack.callback(registry._destroy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are kernels already
            for name, kernel in backends.on_triton.items():
                registry.impl(name, backends.raw(kernel), "CPU", allow_override=True)
        yield


@contextlib.contextmanager
def device(capability: int = 90, *, compiling: bool = True, record: bool = False, devices: int = 1) -> Iterator[Counts]:
    """Within, Triton's driver is a stub of a GPU of this capability, and CPU tensors go to the Triton kernels: with
    backend="auto" on the way of CUDA tensors, through the raw operators, with backend="triton" straight.

    compiling: False counts the specialisations, in microseconds each, and nothing is compiled or launched.
    record: keep every launch with its arguments for counts.take().
    """
    stub = load()
    major, minor = divmod(capability, 10)
    for attribute, value in (COMMON | FIGURES[capability] | {MAJOR: major, MINOR: minor}).items():
        stub.stub_set_attribute(attribute, value)
    stub.stub_set_devices(devices)
    stub.stub_record(record)
    counts = Counts(stub)
    counted = _counted(counts, compiling, triton.JITFunction._do_compile)
    with contextlib.ExitStack() as stack:
        stack.callback(stub.stub_record, False)
        for place, name, value in (
            (triton.JITFunction, "_do_compile", counted),
            (triton.knobs.compilation, "listener", None),
            (backends, "triton_interprets", lambda: True),
            (backends, "compiles_for", lambda device: True),
            (backends, "is_on_gpu", lambda value: type(value) is torch.Tensor),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        # It stays where there was none: a compiled kernel that outlives this asks the driver to unload it.
        if (before := triton.runtime.driver._active) is not None:
            stack.callback(triton.runtime.driver.set_active, before)
        triton.runtime.driver.set_active(_driver(counts, capability))
        stack.callback(_forget, counts.kernels)
        stack.enter_context(raw_operators_on_cpu())
        yield counts
