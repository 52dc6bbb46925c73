"""The engine that executes PTX: compiled from the C++ files of this folder when it is first needed, then kept."""

import ctypes
import fcntl
import functools
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parent.parent / "build" / "ptx"
ARENA_BYTES = 1 << 30  # of addresses; the system gives memory where they are used
FLAGS = ["-std=c++17", "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def compiler() -> list[str] | None:
    """The C++ compiler, CXX or what is found, with its arguments; None: there is none."""
    named = shlex.split(os.environ.get("CXX", "")) or [name for name in ("g++", "c++", "clang++") if shutil.which(name)]
    return named[: None if os.environ.get("CXX") else 1] if named and shutil.which(named[0]) else None


def _target(command: list[str]) -> tuple[list[str], str]:
    """Flags for this machine's processor, if the compiler knows it, and the macros that tell compiler and processor."""
    for flags in (["-march=native"], []):
        done = subprocess.run([*command, *flags, "-dM", "-E", "-xc++", os.devnull], capture_output=True, text=True)
        if done.returncode == 0:
            return flags, done.stdout
    raise RuntimeError(f"{shlex.join(command)} does not compile: {done.stderr}")


def build(folder: Path = BUILT) -> Path:
    """The library for the present sources, compiler and processor; compiled by one process while others wait for it."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler: g++, c++, clang++ not found. Remedy: install one, or name it in CXX")
    sources = sorted(HERE.glob("*.cpp"))
    flags, macros = _target(command)
    flags = [*FLAGS, *flags]
    contents = [path.read_text() for path in (*sorted(HERE.glob("*.h")), *sources)]
    key = hashlib.sha256("\0".join([*command, *flags, macros, *contents]).encode()).hexdigest()[:16]
    library = folder / f"engine-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            subprocess.run([*command, *flags, "-shared", "-fPIC", *sources, "-o", partial], check=True)
            partial.rename(library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The engine's C functions, with their types (scheduler.cpp)."""
    lib = ctypes.CDLL(str(build()))
    pointer, i32, u32, u64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64
    flag, text = ctypes.c_bool, ctypes.c_char_p
    types = {
        "instruction_names": (text, i32),
        "instruction_operands": (text, i32),
        "kind_name": (text, i32),
        "special_registers": (text,),
        "shared_base": (u64,),
        "arena_init": (u64, u64),
        "region_add": (flag, u64, u64, u32, flag),
        "region_bounds": (None, u64, u64, u64),
        "regions_clear": (None,),
        "set_taint": (None, u64, u64, flag),
        "get_taint": (None, u64, u64, pointer),
        "count_taint": (u64, u64, u64),
        "take_executed": (u64,),
        "take_reports": (i32, pointer, i32),
        "launch": (flag, pointer),
    }
    for name, (result, *arguments) in types.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@functools.cache
def arena() -> int:
    """The address of the memory in which regions are added: one for all who launch in this process."""
    return library().arena_init(ARENA_BYTES)


@functools.cache
def instructions() -> dict[str, tuple[int, str]]:
    """By name: the number in the engine's table, and its operands' letters (warp.h)."""
    lib, table = library(), {}
    for number in itertools.count():
        names = lib.instruction_names(number)
        if names is None:
            return table
        for name in names.decode().split():
            table[name] = number, lib.instruction_operands(number).decode()


@functools.cache
def kinds() -> list[str]:
    """What can be found, by the engine's number."""
    return [text.decode() for text in iter(map(library().kind_name, itertools.count()).__next__, None)]
