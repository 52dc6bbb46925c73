"""Small PTX programs for the tests of the engine: every line of a body is a line of ``kernels/example.py``."""

import ctypes

import numpy as np

from . import engine
from .program import Program

FILE = "kernels/example.py"
HEADER = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.file 1 "/somewhere/kernels/example.py"
.visible .entry example({parameters})
.reqntid {threads}
{{
.reg .pred %p<99>;
.reg .b16 %rs<99>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
{body}
}}
"""
APART = 4096  # bytes between arrays, which belong to nobody


def kernel(body: str, arrays: int = 0, warps: int = 1) -> str:
    """A kernel's PTX; it finds the addresses of the arrays in %rd1, %rd2, ... and its thread's index in %r1."""
    pointers = [f".param .u64 .ptr .global .align 1 example_param_{i}" for i in range(arrays)]
    lines = [f"ld.param.b64 %rd{i + 1}, [example_param_{i}];" for i in range(arrays)] + ["mov.u32 %r1, %tid.x;"]
    for number, line in enumerate(body.strip().split("\n"), 1):
        lines += [f".loc 1 {number} 0", *line.split(" | ")]
    return HEADER.format(parameters=",\n".join(pointers), threads=32 * warps, body="\n".join([*lines, "ret;"]))


class Device:
    """Launches bodies on arrays that it copies to the engine's memory and back."""

    def __init__(self):
        self.lib, self.base = engine.library(), engine.arena()
        self.where = {}

    def place(self, array: np.ndarray, uninitialised: bool = False) -> int:
        """A region of the array's bytes, apart from the others; returns its address."""
        if id(array) not in self.where:
            used = max([address + other.nbytes for address, other in self.where.values()], default=self.base)
            address = used + APART - used % APART
            assert self.lib.region_add(address, array.nbytes, min(4, array.itemsize), uninitialised)
            self.where[id(array)] = address, array
        return self.where[id(array)][0]

    def tainted(self, array: np.ndarray) -> int:
        """Bytes that nobody has written, or that depend on such."""
        return self.lib.count_taint(self.place(array), array.nbytes)

    def run(self, body: str, *arrays: np.ndarray, warps: int = 1, grid: int = 1, shared: int = 1024, **options):
        """What is found, as (kind, line, line of the other access or None)."""
        program = Program(kernel(body, len(arrays), warps))
        addresses = np.array([self.place(array) for array in arrays], np.uint64)
        for array, address in zip(arrays, addresses, strict=True):
            ctypes.memmove(int(address), array.ctypes.data, array.nbytes)
        found = program.run(addresses.tobytes(), (grid,), shared, **options)
        for array, address in zip(arrays, addresses, strict=True):
            ctypes.memmove(array.ctypes.data, int(address), array.nbytes)
        return {(one["kind"], line(one["at"]), line(one.get("other at"))) for one in found}


def line(place: str | None) -> int | None:
    return None if place is None else int(place.removeprefix(FILE + ":"))
