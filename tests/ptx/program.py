"""Reads the PTX that Triton emits, and runs it."""

import ctypes
import re
import zlib
from pathlib import Path

import numpy as np

from . import engine
from .encoding import SIZES, Encoder, Registers, UnknownInstruction

ENCODED = np.dtype(  # struct Encoded of warp.h
    [(name, "i4") for name in ("operation", "guard", "negated", "operands", "count")]
    + [(name, "i4") for name in ("width", "cell", "shared", "is_signed", "option")]
    + [("offset", "i8"), ("other_offset", "i8")]
)
FINDING = np.dtype(  # struct Finding of memory.h
    [(name, "i4") for name in ("kind", "pc", "pc2", "cta", "warp", "lane", "shared", "unused")]
    + [("addr", "u8"), ("count", "u8")]
)
MOST_FINDINGS = 4096


class Launch(ctypes.Structure):  # struct Launch of scheduler.cpp
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("code", "operands", "parameters")),
        *((name, ctypes.c_void_p) for name in ("constant_slots", "constant_values", "constant_wide")),
        *((name, ctypes.c_uint64) for name in ("seed", "limit")),
        *((name, ctypes.c_uint32) for name in ("code_length", "num_constants", "units", "num_warps")),
        *((name, ctypes.c_uint32) for name in ("grid_x", "grid_y", "grid_z", "shared_size", "shared_granule", "flags")),
    ]


class Program:
    """A kernel. ``mutate`` takes the statements, each a text and a place, and the labels, and returns both changed."""

    def __init__(self, ptx: str, mutate=None):
        header, body = ptx.split(".entry", 1)[1].split("\n{\n", 1)
        body = body.split("\n}\n", 1)[0]
        self.name = re.match(r"\s*(\w+)\(", header)[1]
        self.num_threads = int(re.search(r"\.reqntid (\d+)", header)[1])
        self._read_parameters(header)
        statements, labels = self._read_statements(ptx, body)
        if mutate:
            statements, labels = mutate(statements, labels)
        self.labels = labels
        self.text = [text for text, _ in statements]
        self.where = [place for _, place in statements]
        self._encode(Registers({name: kind for kind, name in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<", body)}))

    def _read_parameters(self, header: str) -> None:
        self.params, self.param_types, self.param_bytes = {}, [], 0
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^\n,]*?\s(\w+_param_\d+)", header):
            offset = -(-self.param_bytes // SIZES[kind]) * SIZES[kind]
            self.params[name] = offset
            self.param_types.append((kind, offset))
            self.param_bytes = offset + SIZES[kind]

    @staticmethod
    def _read_statements(ptx: str, body: str):
        files = {number: short(Path(path)) for number, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx)}
        statements, labels, place = [], {}, "?"
        for line in body.split("\n"):
            text = line.split("//")[0].strip()
            if m := re.match(r"\.loc\s+(\d+) (\d+) \d+(?:.*inlined_at (\d+) (\d+) \d+)?", text):
                place = f"{files.get(m[1], m[1])}:{m[2]}"
                place += f" (from {files.get(m[3], m[3])}:{m[4]})" if m[3] else ""
            elif m := re.fullmatch(r"([\w$]+):", text):
                labels[m[1]] = len(statements)
            elif text and not text.startswith((".reg", ".pragma", "{", "}")):
                if not text.endswith(";"):
                    raise ValueError(f"no statement of PTX: {text!r}")
                statements.append((text[:-1].strip(), place))
        return statements, labels

    def _encode(self, registers: Registers) -> None:
        encoder = Encoder(registers, self.params, self.labels)
        self.code = np.zeros(len(self.text), ENCODED)
        operands, defined = [], set()
        for row, text in zip(self.code, self.text, strict=True):
            try:
                encoded = encoder.statement(text)
            except (UnknownInstruction, ValueError, KeyError) as error:
                raise UnknownInstruction(f"PTX instruction {text!r} of {self.name}: {error}") from error
            row["operation"], row["operands"] = encoded.operation, len(operands)
            for name, value in encoded.fields.items():
                row[name] = value
            operands += encoded.results + encoded.sources
            defined.update(encoded.results)
        self.operands = np.array(operands, np.int32)
        widths = self.code["width"][self.code["shared"] == 1]
        self.smallest_shared = int(widths.min(initial=4))
        self._set_constants(registers, defined)

    def _set_constants(self, registers: Registers, defined: set[int]) -> None:
        """Literals; and LLVM's "undef", registers that nothing defines: any value, of which no use is to show."""
        constants = [(slot, wide, value) for (value, wide), slot in registers.constants.items()]
        for name, slot in registers.slots.items():
            if slot not in defined and "." not in name:
                letter, bits = registers.letter(name), zlib.crc32(name.encode())
                value = {"p": 0, "2": bits & 0xFFFF, "4": bits, "8": bits * 0x100000001}[letter]
                constants.append((slot, letter == "8", value))
        slots, wide, values = zip(*constants, strict=True) if constants else ((), (), ())
        self.constants = np.array(slots, np.int32), np.array(values, np.uint64), np.array(wide, np.uint8)
        self.units = registers.units

    def run(self, params: bytes, grid, shared: int, seed: int = 0, flags: int = 1, limit: int = 2**33) -> list[dict]:
        """Executes a launch, and says what the checks found."""
        lib, (slots, values, wide) = engine.library(), self.constants
        parameters = np.frombuffer(params.ljust(self.param_bytes + 8, b"\0"), np.uint8)
        arrays = [array.ctypes.data for array in (self.code, self.operands, parameters, slots, values, wide)]
        sizes = len(self.code), len(slots), self.units, self.num_threads // 32
        launch = Launch(*arrays, seed, limit, *sizes, *(*grid, 1, 1)[:3], shared, self.smallest_shared, flags)
        lib.launch(ctypes.byref(launch))
        found = np.zeros(MOST_FINDINGS, FINDING)
        return [self.describe(one) for one in found[: lib.take_reports(found.ctypes.data, len(found))]]

    def describe(self, finding) -> dict:
        numbers = {name: int(finding[name]) for name in ("count", "addr", "cta", "warp", "lane", "pc")}
        kind, pc, other = engine.kinds()[finding["kind"]], finding["pc"], finding["pc2"]
        found = {"kernel": self.name, "kind": kind, "space": "shared" if finding["shared"] else "global", **numbers}
        found |= {"at": self.where[pc], "ptx": self.text[pc]}
        if other >= 0:
            found |= {"pc2": int(other), "other at": self.where[other], "other ptx": self.text[other]}
        return found


def short(path: Path) -> str:
    """A source file as it is named in findings."""
    return path.name if "triton" in str(path) else "/".join(path.parts[-2:])
