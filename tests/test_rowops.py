"""The row loops of csrc/ beside plain ones (tests/rowops), as other compilers make them, and for other processors.

They need no library of torch, so that an emulator runs them: apt-get install g++-aarch64-linux-gnu qemu-user. Clang
comes with `make port-check`. A test whose tools are missing says so.
"""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import emulated
import pytest
import torch
from builds import Builder, script
from emulated import COMPILER as CROSS
from emulated import EMULATOR

from condense_kernels._dispatch.declaration import OPERATORS

ROOT = Path(__file__).parent.parent
SETS = ("default", "avx2", "avx512", "avx512_bf16", "amx")

# Who may fuse a product with a sum: what numerics.md says so of. No score and no bound of one is among them.
NAMED = {
    *("multiply_block", "multiply_tile", "sum_of_squares", "accumulate_row", "sum_columns", "gradient_row", "exp_row"),
    *("multiply_diagonal", "spin"),
}
FUSED = re.compile(r"\tv?(fn?m(add|sub)|fml[as])")  # of x86 and aarch64
FUNCTION = re.compile(r"_ZN8condense\d+isa_[a-z0-9_]+?12_GLOBAL__N_1(\d+)(\w+)")


def flags_of_the_build() -> list[str]:
    """As setup.py has them: running it would build."""
    wanted = [node for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Assign)]
    wanted = [node for node in wanted if node.targets[0].id in ("VALUES_AS_WRITTEN", "COMPILE_FLAGS")]
    found: dict[str, list[str]] = {}
    exec(compile(ast.Module(wanted, []), "setup.py", "exec"), found)
    return [*found["COMPILE_FLAGS"], "-Icsrc", "-isystem", str(Path(torch.__file__).parent / "include")]


class Target(NamedTuple):
    """Who compiles, and who runs the result."""

    compiler: list[str]
    runner: tuple[str, ...] = ()
    is_ours: bool = True  # so that a warning is an error; others' compilers may have new ones

    def missing(self) -> str | None:
        if "ziglang" in self.compiler and importlib.util.find_spec("ziglang") is None:
            return "clang: ziglang is not installed (make port-check)"
        for program in (self.compiler[0], *self.runner[:1]):
            if not shutil.which(program):
                return f"{program} is not installed"
        return None


def clang(target: str) -> list[str]:
    command = [sys.executable, "-m", "ziglang", "c++", "-target", f"{target}-linux-gnu.2.28"]
    return [*command, "-Wno-unused-command-line-argument"]  # of its own


NATIVE = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "clang++"]
TARGETS = {
    "native": Target(NATIVE, is_ours=False),
    "aarch64": Target([CROSS, "-static"], (EMULATOR,)),
    "unsigned char": Target([*NATIVE, "-funsigned-char"], is_ours=False),
    "clang": Target(clang("x86_64")),
    "clang, avx2": Target([*clang("x86_64"), "-mavx2", "-mfma"]),
    "clang, aarch64": Target(clang("aarch64"), (EMULATOR, "-L", "/usr/aarch64-linux-gnu")),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(TARGETS)[2:]]


def run(command, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def driver(target: Target, folder: Path, *flags: str) -> tuple[Path, str]:
    """The program, and the assembly of its loops."""
    reason = target.missing()
    if reason is not None:
        pytest.skip(reason)
    strict = ["-Wextra", "-Werror"] if target.is_ours else []
    flags = (*flags_of_the_build(), *strict, *flags)
    loops, main, program = (str(folder / name) for name in ("rowops.s", "main.o", "rowops"))
    run([*target.compiler, *flags, "-S", "csrc/rowops.cpp", "-o", loops])
    run([*target.compiler, *flags, "-O1", "-c", "tests/rowops/main.cpp", "-o", main])
    run([*target.compiler, *[flag for flag in flags if "sanitize" in flag], loops, main, "-o", program])
    return Path(program), Path(loops).read_text(errors="replace")


def used_and_right(target: Target, program: Path) -> set[str]:
    """Runs it with every instruction set allowed in turn: those that the processor had."""
    used = set()
    for number in range(len(SETS)):
        found = run([*target.runner, program, str(number)]).split()[0]
        assert SETS.index(found) <= number
        used.add(found)
    return used


def fused_in(assembly: str) -> set[str]:
    found, function = set(), ""
    for line in assembly.splitlines():
        if line.startswith("_Z"):
            match = FUNCTION.match(line)
            function = match[2][: int(match[1])] if match else line
        elif FUSED.match(line):
            found.add(function)
    return found


@pytest.mark.parametrize("name", ["native", "aarch64", *SLOW])
def test_the_loops_are_the_plain_ones(tmp_path, name):
    """Bit for bit where the order of operations is fixed, and no score is fused by the compiler."""
    target = TARGETS[name]
    program, assembly = driver(target, tmp_path)
    used = used_and_right(target, program)
    assert "default" in used
    assert fused_in(assembly) <= NAMED
    if "aarch64" in name or "avx2" in used:
        assert "exp_row" in fused_in(assembly)  # else nothing was looked at


@pytest.mark.slow
def test_the_loops_under_sanitizers(tmp_path):
    program, _ = driver(TARGETS["native"], tmp_path, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    used_and_right(TARGETS["native"], program)


def test_a_fused_score_is_found():
    lines = ["_ZN8condense11isa_avx51212_GLOBAL__N_19next_pickIfEEv:", "\tvfmadd231ps\t%ymm1, %ymm2, %ymm3"]
    assert fused_in("\n".join(lines)) == {"next_pick"}
    lines = ["_ZN8condense11isa_default12_GLOBAL__N_19score_rowIfEEv.part.0:", "\tfmla\tv0.4s, v1.4s, v2.4s"]
    assert fused_in("\n".join(lines)) == {"score_row"}


ASSEMBLE = """#!/bin/sh
for argument; do
  shift
  case $argument in
    -shared) linking=1 ;;
    -c) argument=-S ;;
  esac
  set -- "$@" "$argument"
done
test -n "$linking" || exec {compiler} "$@" -Wextra -Werror
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.mark.slow(minutes=1)
def test_the_library_compiles_for_aarch64(tmp_path, bare_python):
    """By setup.py's own commands, without a warning. What is left out is the link: torch for aarch64 is not here."""
    if shutil.which(CROSS) is None:
        pytest.skip(f"{CROSS} is not installed")
    builder = Builder(tmp_path, bare_python)
    builder.has_torch("2.13.0")
    (builder.site / "torch" / "include").symlink_to(Path(torch.__file__).parent / "include")
    compiler = script(tmp_path / "assemble", ASSEMBLE.format(compiler=CROSS))
    done = builder.run("build_ext", "--inplace", CONDENSE_BUILD_EXT="1", CXX=compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    texts = {path.stem: path.read_text() for path in builder.tree.glob("build/temp*/*.o")}
    assert set(texts) == {path.stem for path in (ROOT / "csrc").glob("*.cpp")}
    assert {name for name, text in texts.items() if fused_in(text)} == {"rowops"}


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_operators_with_other_instruction_sets(capability, cpp):
    """Their own tests, of the C++ backend."""
    files = [path for name in OPERATORS if (path := ROOT / "tests" / f"test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    environment = {**os.environ, "CONDENSE_CPU_CAPABILITY": capability}
    output = run([*command, "-k", "cpp and not instruction_sets", *files], env=environment)
    assert int(re.search(r"(\d+) passed", output)[1]) > 500


def test_arm_check_names_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert emulated.main([]) == 1
    assert f"{CROSS} not found. Remedy: Debian, and apt-get install" in capsys.readouterr().err
