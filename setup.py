"""The build's entry: compiles csrc/ into condense_kernels/_C.abi3.so against the torch that is installed.

torch.ops.load_library loads that library, so one file serves every Python >= 3.10, with and without the GIL, and every
torch >= 2.10, and no Python headers are needed. Without torch, without a C++ compiler, or where the build fails, the
package is pure Python, its reference serves CPU tensors, and _not_built.txt tells the import why.

    CONDENSE_BUILD_EXT=1      what would end in the pure-Python package is an error
    CONDENSE_BUILD_EXT=0      build the pure-Python package
    CXX, CXXFLAGS, LDFLAGS    the compiler, and flags put before those below; no others are read (CFLAGS, CPPFLAGS)
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import setuptools

PYPROJECT = Path("pyproject.toml").read_text(encoding="utf-8")
# An older one fails at the imports below, or at the licence in pyproject.toml, and blames those.
SETUPTOOLS = re.search(r"setuptools>=([\d.]+)", PYPROJECT)[1]
if [int(n) for n in re.findall(r"\d+", setuptools.__version__)[:3]] < [int(n) for n in SETUPTOOLS.split(".")]:
    raise SystemExit(
        f"condense_kernels: setuptools >= {SETUPTOOLS} is needed to build, found {setuptools.__version__} in "
        f"{Path(setuptools.__file__).parent}. Remedy: pip install 'setuptools>={SETUPTOOLS}'"
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

# Rounding is part of the contract (docs/design/numerics.md): no fused multiply-add that the source does not name, no
# sum in another order. Behind the user's flags these undo -Ofast and its kind; at the link, too, where GCC would make
# the whole process flush subnormal numbers. What they cannot undo, csrc/rounding.h refuses.
VALUES_AS_WRITTEN = [
    "-O3",
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-ffp-contract=off",
]
COMPILE_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-Wall",
    *VALUES_AS_WRITTEN,
    "-include",
    "csrc/rounding.h",
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
    """Why there will be no compiled library, and the remedy; the import of the package says it again."""


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
                raise CannotBuild(
                    f"torch {found['version']} was installed, and the kernels need torch >= 2.10. Remedy: pip install "
                    "'torch>=2.10', then reinstall"
                )
            return found
    reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
    raise CannotBuild(
        f"the build found no torch to compile against ({reason}). Remedy: install torch first; if it was installed, "
        "the build was isolated from it (uv and build do that, pip where torch is on PYTHONPATH or in the user site): "
        f"pip install 'setuptools>={SETUPTOOLS}', then reinstall with --no-build-isolation (build: --no-isolation)"
    )


def find_compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(
        f"no C++ compiler: {' '.join(asked) or 'g++, c++, clang++'} not found. Remedy: "
        f"{'unset or mend CXX' if asked else 'install g++ (or clang++)'}, then reinstall"
    )


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode != 0:
        error = next((line for line in done.stdout.splitlines() if "error" in line.lower()), "no message")
        raise CannotBuild(
            f"{command[0]} failed with status {done.returncode} ({error.strip()}). Remedy: reinstall with "
            "CONDENSE_BUILD_EXT=1, and pip's -v, to see all of its messages"
        )


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
    run([*compiler, *user, *VALUES_AS_WRITTEN, *link, *outputs, *libraries, "-o", str(library)])


class BuildLibrary(build_ext):
    """Compile with the C++ compiler itself: Python's own build flags may change rounding or name an absent compiler."""

    built = False  # bdist_wheel runs this command twice

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".abi3.so"

    def run(self):
        if BuildLibrary.built or not self.extensions:
            return
        try:
            wanted = runpy.run_path("condense_kernels/_dispatch/environment.py")["read"]("CONDENSE_BUILD_EXT")
        except ValueError as error:
            raise SystemExit(str(error)) from None
        extension = self.extensions[0]
        library = Path(self.get_ext_fullpath(extension.name))
        note = library.with_name("_not_built.txt")
        for stale in (library, note):  # neither may outlive the build that it is of
            stale.unlink(missing_ok=True)
        try:
            if wanted is False:
                raise CannotBuild(
                    "CONDENSE_BUILD_EXT=0 was set, as for a release's wheel of any platform. Remedy: on Linux, the "
                    "wheel for Linux, or reinstall without it; elsewhere none is needed for the reference"
                )
            if wanted is None and not sys.platform.startswith("linux"):
                raise CannotBuild(
                    f"the kernels are built on Linux, and this is {sys.platform}. Remedy: none is needed for the "
                    "reference; CONDENSE_BUILD_EXT=1 tries, untested there"
                )
            compile_library(extension.sources, Path(self.build_temp), library)
            BuildLibrary.built = True
        except CannotBuild as reason:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{reason}\n", encoding="utf-8")
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

    def get_tag(self):
        """No Python symbol is used: any Python, whatever its ABI. The limited API's tag would leave out those without
        the GIL."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_base, ignore_errors=True)  # no stale file in a wheel
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def description() -> str:
    """The README for the package index, which knows none of its folders: each link names the file of this version."""
    repository = re.search(r'^Repository = "(.*)"', PYPROJECT, re.M)[1]
    version = runpy.run_path("condense_kernels/_version.py")["__version__"]

    def absolute(link: re.Match) -> str:
        return f"]({repository}/{'raw' if link[1].endswith('.png') else 'blob'}/v{version}/{link[1]})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", absolute, Path("README.md").read_text(encoding="utf-8"))


setuptools.setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        setuptools.Extension(
            "condense_kernels._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + SCHEMAS),
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
