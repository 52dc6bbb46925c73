"""The build's entry: compiles csrc/ into condense_kernels/_C.abi3.so against the torch that is installed.

torch.ops.load_library loads that library, so one file serves every Python >= 3.10 and every torch >= 2.10, and no
Python headers are needed. Without torch, without a C++ compiler, or where the build fails, the package is pure Python
and its reference serves CPU tensors.

    CONDENSE_BUILD_EXT=1      what would end in the pure-Python package is an error
    CONDENSE_BUILD_EXT=0      build the pure-Python package
    CXX, CXXFLAGS, LDFLAGS    the compiler, and flags put before those below
"""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-Wall",
    # Rounding is part of the contract (docs/design/numerics.md): no fused multiply-add that the source does not name.
    "-ffp-contract=off",
    # Neither errno nor the floating-point flags are read; without them loops vectorise. Results stay the same.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    # Torch's stable ABI as of 2.10: the library runs on that and every later torch.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
OLDEST_TORCH = (2, 10)
SCHEMAS = glob("condense_kernels/ops/*/schema.txt")

PROBE = """
import json, os, torch
root = os.path.dirname(torch.__file__)
print(json.dumps({"version": torch.__version__, "include": root + "/include", "lib": root + "/lib"}))
"""


class CannotBuild(Exception):
    """Why there will be no compiled library."""


def find_torch() -> dict[str, str]:
    """Version, include and lib folder of the installed torch, asked of the interpreter itself.

    pip's isolated build hides the environment's packages by PYTHONPATH; -I makes the second attempt blind to that.
    """
    for flags in ([], ["-I"]):
        command = [sys.executable, *flags, "-c", PROBE]
        probe = subprocess.run(command, cwd=os.path.abspath(os.sep), capture_output=True, text=True)
        if probe.returncode == 0:
            found = json.loads(probe.stdout.splitlines()[-1])
            if tuple(int(part) for part in found["version"].split(".")[:2]) < OLDEST_TORCH:
                raise CannotBuild(f"torch {found['version']} is installed; the kernels need torch >= 2.10")
            return found
    reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
    raise CannotBuild(
        f"{sys.executable} has no torch to build against ({reason}). Remedy: install torch first; where another "
        "tool than pip runs the build in an environment of its own, build without isolation"
    )


def find_compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler: {' '.join(asked) or 'g++, c++, clang++'} not found")


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode != 0:
        raise CannotBuild(f"{command[0]} failed with status {done.returncode}; its messages are above")


def write_schemas(header: Path) -> None:
    read = runpy.run_path("condense_kernels/_dispatch/schemas.py")["read"]
    lines = (f'    R"({name}{schema})",' for name, schema in read(Path("condense_kernels/ops")).items())
    text = "\n".join(["namespace condense {", "constexpr const char* kSchemas[] = {", *lines, "};", "}", ""])
    header.write_text(text, encoding="utf-8")


def compile_library(sources: list[str], objects: Path, library: Path) -> None:
    torch, compiler = find_torch(), find_compiler()
    print(f"condense_kernels: building against torch {torch['version']} in {torch['lib']}", flush=True)
    objects.mkdir(parents=True, exist_ok=True)
    write_schemas(objects / "schemas.h")
    flags = shlex.split(os.environ.get("CXXFLAGS", "")) + COMPILE_FLAGS + [f"-I{objects}", "-isystem", torch["include"]]
    outputs = [str(objects / f"{Path(source).stem}.o") for source in sources]
    commands = [[*compiler, *flags, "-c", s, "-o", o] for s, o in zip(sources, outputs, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    library.parent.mkdir(parents=True, exist_ok=True)
    link = ["-shared", "-Wl,--no-undefined", f"-L{torch['lib']}", f"-Wl,-rpath-link,{torch['lib']}"]
    libraries = ["-ltorch_cpu", "-lc10"]
    user = shlex.split(os.environ.get("LDFLAGS", ""))
    run([*compiler, *user, *link, *outputs, *libraries, "-o", str(library)])


class BuildLibrary(build_ext):
    """Compile with the C++ compiler itself: Python's own build flags may change rounding or name an absent compiler."""

    built = False  # bdist_wheel runs this command twice

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".abi3.so"

    def run(self):
        if BuildLibrary.built or not self.extensions:
            return
        extension = self.extensions[0]
        library = Path(self.get_ext_fullpath(extension.name))
        library.unlink(missing_ok=True)  # a stale one must not outlive a build that fails
        try:
            wanted = runpy.run_path("condense_kernels/_dispatch/environment.py")["read"]("CONDENSE_BUILD_EXT")
        except ValueError as error:
            raise SystemExit(str(error)) from None
        try:
            if wanted is False:
                raise CannotBuild("CONDENSE_BUILD_EXT=0 is set")
            compile_library(extension.sources, Path(self.build_temp), library)
            BuildLibrary.built = True
        except CannotBuild as reason:
            if wanted:
                raise SystemExit(f"condense_kernels: CONDENSE_BUILD_EXT=1 is set, but {reason}.") from None
            print(
                f"\nWARNING: condense_kernels is installed without its compiled kernels: {reason}.\n"
                "CPU tensors will run on the slow reference. CONDENSE_BUILD_EXT=1 makes this an error.\n",
                file=sys.stderr,
                flush=True,
            )
            self.distribution.ext_modules = self.extensions = []


class Wheel(bdist_wheel):
    """Whether the library could be built decides the wheel's tag, so it is built first."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_base, ignore_errors=True)  # no stale file in a wheel
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[
        Extension(
            "condense_kernels._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + SCHEMAS),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
