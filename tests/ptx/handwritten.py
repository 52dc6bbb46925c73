"""Small PTX programs for the tests of the engine."""

import ctypes
import functools

import numpy as np
import torch

from . import engine
from .program import Program

FILE = "kernels/example.py"
PTX = """.version 8.7
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

# Where a thread's 4 bytes are: %rd11 to %rd13 in the first arrays, %r4 in shared memory; %rd8 is 4 x its index.
OF_THREAD = """
    mul.wide.u32 %rd8, %r1, 4;
    add.s64 %rd11, %rd1, %rd8; add.s64 %rd12, %rd2, %rd8; add.s64 %rd13, %rd3, %rd8;
    shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;
"""


def kernel(body: str, arrays: int = 0, warps: int = 1) -> str:
    """A kernel's PTX. It has the addresses of the arrays in %rd1, %rd2, ..., and its thread's index in %r1."""
    pointers = [f".param .u64 .ptr .global .align 1 example_param_{i}" for i in range(arrays)]
    lines = [f"ld.param.b64 %rd{i + 1}, [example_param_{i}];" for i in range(arrays)] + ["mov.u32 %r1, %tid.x;"]
    for number, line in enumerate(body.split("\n")):
        statements = line.split("//")[0].replace(";", ";\n").strip()
        lines += [f".loc 1 {number} 0", statements]
    return PTX.format(parameters=",\n".join(pointers), threads=32 * warps, body="\n".join([*lines, "ret;"]))


class Device:
    """Launches programs on arrays that it copies to the engine's memory and back."""

    def __init__(self):
        self.lib, self.base = engine.library(), engine.arena()
        self.places = {}
        self.lib.regions_clear()

    def place(self, array: np.ndarray, uninitialised: bool = False) -> int:
        """A region of the array's bytes, apart from the others; returns its address."""
        if id(array) not in self.places:
            used = max([address + other.nbytes for address, other in self.places.values()], default=self.base)
            address = used + APART - used % APART + APART
            assert self.lib.region_add(address, array.nbytes, min(4, array.itemsize), uninitialised)
            self.places[id(array)] = address, array
        return self.places[id(array)][0]

    def tainted(self, array: np.ndarray) -> int:
        """Bytes that nobody has written, or that depend on such."""
        return self.lib.count_taint(self.place(array), array.nbytes)

    def tainted_elements(self, array: np.ndarray) -> list[int]:
        taint = np.zeros(array.nbytes, np.uint8)
        self.lib.get_taint(self.place(array), array.nbytes, taint.ctypes.data)
        return np.flatnonzero(taint.reshape(-1, array.itemsize).any(1)).tolist()

    def run(self, body: str, *arrays: np.ndarray, warps: int = 1, grid: int = 1, shared: int = 1024, **options) -> set:
        """What is found: kind, line, line of the other access or None. Lines are named by their comments."""
        program = Program(kernel(body, len(arrays), warps))
        addresses = np.array([self.place(array) for array in arrays], np.uint64)
        for array, address in zip(arrays, addresses.tolist(), strict=True):
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
        found = program.run(addresses.tobytes(), (grid,), shared, **options)
        for array, address in zip(arrays, addresses.tolist(), strict=True):
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return {(one["kind"], named(body, one["at"]), named(body, one.get("other at"))) for one in found}


def named(body: str, place: str | None) -> str | None:
    if place is None:
        return None
    line = body.split("\n")[int(place.removeprefix(FILE + ":"))]
    return line.partition("//")[2].strip() or line.strip()


# Arithmetic: arrays of a type's edges, and an instruction that is applied to them -------------------------------------

REGISTERS = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
INTEGERS = {f"{s}{8 * size}": np.dtype(f"{'i' if s == 's' else 'u'}{size}") for s in "su" for size in (1, 2, 4, 8)}
FLOATS = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
TYPES = {**INTEGERS, **FLOATS, "b16": np.dtype(np.uint16), "b32": np.dtype(np.uint32), "b64": np.dtype(np.uint64)}


def compute(device: Device, instruction: str, result, *operands: np.ndarray, **options) -> np.ndarray:
    """``instruction`` of arrays, an element a thread: D stands for its result, A, B, C for its operands."""
    padded = [np.resize(operand, -(-len(operand) // 32) * 32) for operand in operands]
    out = np.zeros(len(padded[0]), result)
    body = ["mov.u32 %r90, %ctaid.x; shl.b32 %r90, %r90, 5; add.s32 %r91, %r90, %r1;"]
    for k, (name, array) in enumerate([*zip("ABC", padded, strict=False), ("D", out)]):
        register, size = f"{REGISTERS[array.itemsize]}{80 + k}", array.itemsize
        body += [f"mul.wide.u32 %rd70, %r91, {size}; add.s64 %rd{71 + k}, %rd{k + 1}, %rd70;"]
        body += [f"ld.global.b{8 * size} {register}, [%rd{71 + k}];"] if name != "D" else []
        instruction = instruction.replace(name, register)
    body += [instruction, f"st.global.b{8 * size} [%rd{71 + k}], {register};"]
    assert device.run("\n".join(body), *padded, out, grid=len(out) // 32, **options) == set()
    return out[: len(operands[0])]


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but for NaN, which are all one."""
    assert a.dtype == b.dtype
    if a.dtype.kind != "f":
        return bool((a == b).all())
    same = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    return bool((same | (np.isnan(a) & np.isnan(b))).all())


@functools.cache
def edges(kind: str) -> np.ndarray:
    """The ends of a type's range, numbers around zero and of all magnitudes."""
    random = np.random.default_rng(0)
    if kind in FLOATS:
        info = np.finfo(FLOATS[kind])
        special = [0, 0.5, 1, 1.5, 2, 3, info.max, info.tiny, info.tiny * 0.75, info.smallest_subnormal, 1 + info.eps]
        values = np.concatenate([special, [np.inf], random.standard_normal(20) * 2.0 ** random.integers(-12, 12, 20)])
        return np.concatenate([values, -values, [np.nan]]).astype(FLOATS[kind])
    dtype, info = TYPES[kind], np.iinfo(TYPES[kind])
    special = [0, 1, 2, 3, 7, 31, 32, 33, 64, info.max, info.max - 1, info.max - 7, info.max // 3]
    special += [-1, -2, -7, info.min, info.min + 1, info.min // 5] if info.min else []
    return np.concatenate([np.array(special, dtype), random.integers(info.min, info.max, 20, dtype)])


def pairs(kind: str, other: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Every one with every other."""
    first, second = np.meshgrid(edges(kind), edges(other or kind))
    return first.reshape(-1).copy(), second.reshape(-1).copy()


# Matrices of halves, and the registers that hold them -----------------------------------------------------------------

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


def bits(halves: torch.Tensor) -> np.ndarray:
    return halves.contiguous().view(torch.int16).numpy().view(np.uint16)


def quarters(a: np.ndarray) -> list[np.ndarray]:
    """The registers of a 16 x 16 operand: upper left, lower left, upper right, lower right."""
    return [registers_of(a[row : row + 8, column : column + 8]) for column in (0, 8) for row in (0, 8)]


def registers_of(matrix: np.ndarray) -> np.ndarray:
    """What a warp's lanes hold of 8 x 8 halves: two by two, row after row."""
    return np.ascontiguousarray(matrix).reshape(32, 2).view(np.uint32).reshape(32)


def numbered(first: int, count: int) -> str:
    return ", ".join(f"%r{first + k}" for k in range(count))


def load_all(first: int, count: int, address: str, stride: int) -> str:
    return " ".join(f"ld.global.b32 %r{first + k}, [{address}+{stride * k}];" for k in range(count))


def store_all(first: int, count: int, address: str, stride: int) -> str:
    return " ".join(f"st.global.b32 [{address}+{stride * k}], %r{first + k};" for k in range(count))
