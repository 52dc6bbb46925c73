"""`make arm-check`: the wheel for aarch64, built, audited and tested in an emulator. Described in docs/checking.md.

    python tests/emulated.py               # all of it
    python tests/emulated.py --one-in 5    # more of the tests: of five cases one

All goes to .venv-arm: `root` has Debian's Python for arm64, and in it what pip installs for that processor. The
root's `python` is a script that calls the emulator, so that what Python starts as sys.executable is emulated, too, and
the kernel has to know of no other processor. The compiler is a cross compiler, which the emulated setup.py starts.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from builds import script, source_tree
from sanitize import CAPABILITY, Failure, environment_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-arm"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static" if shutil.which("qemu-aarch64-static") else "qemu-aarch64"
PROJECT = (ROOT / "pyproject.toml").read_text()

# As in [tool.cibuildwheel]: the torch that wheels are built against, which is also the last that has a wheel for
# aarch64 without CUDA; and what makes of the wheel one that is released.
TORCH, SETUPTOOLS = re.search(r"before-build = \"uv pip install (\S+) '(\S+)'\"", PROJECT).groups()
REPAIR = re.search(r'repair-wheel-command = "auditwheel (.*)"', PROJECT)[1].replace("$(uname -m)", "aarch64")
AUDITWHEEL = re.search(r"auditwheel==[\d.]+", PROJECT)[0]
NEEDED = [SETUPTOOLS, "filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"]  # by torch
NEEDED += [AUDITWHEEL, "hypothesis", "numpy", "pytest", "pytest-randomly", "pytest-xdist", "rich", "triton"]
PACKAGES = ["libgomp1", "libstdc++6", "python3"]
TESTS = ["similarity", "greedy_select", "assign", "merge", "select_and_merge"]  # test_NAME*.py

# Of the system's sources the packages for arm64; and a state of its own, which knows of nothing that is installed.
APT = """
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
Dir::State "{0}";
Dir::State::status "{0}/status";
Dir::Cache "{0}";
"""
PYTHON = """#!/bin/sh
exec {emulator} -0 "$0" -L '{root}' '{python}' "$@"
"""


def run(title: str, command: list, quiet: bool = True, **options) -> str:
    """Tells how long it took, and what it printed if it failed."""
    print(f"arm-check: {title}", flush=True)
    started = time.monotonic()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if quiet else {}
    done = subprocess.run(command, **{"cwd": ROOT, **output, **options})
    if done.returncode != 0:
        raise Failure(f"{title}: exit status {done.returncode}\n{done.stdout or ''}")
    print(f"arm-check: {title}: {time.monotonic() - started:.0f} s", flush=True)
    return done.stdout or ""


class Machine:
    """Python for aarch64, emulated, in a root of its own."""

    def __init__(self, root: Path):
        self.root = root
        self.python = root / "usr" / "bin" / "python"
        self.site = root / "usr" / "lib" / "python3" / "dist-packages"

    def make(self) -> None:
        for program in (COMPILER, EMULATOR, "apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise Failure(
                    f"{program} not found. Remedy: Debian, and apt-get install g++-aarch64-linux-gnu qemu-user"
                )
        stamp, wanted = self.root / "stamp", repr((PACKAGES, TORCH, NEEDED))
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.root, ignore_errors=True)
        self.unpack(FOLDER / "apt")
        interpreter = next(self.root.glob("usr/bin/python3.*[0-9]"))
        script(self.python, PYTHON.format(emulator=EMULATOR, root=self.root, python=interpreter))
        version = interpreter.name.removeprefix("python")
        self.install(version, "--no-deps", TORCH)  # by the processor that pip runs on it would ask for CUDA
        self.install(version, *NEEDED)
        stamp.write_text(wanted)

    def unpack(self, apt: Path) -> None:
        for folder in ("lists", "archives"):
            (apt / folder / "partial").mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        (apt / "apt.conf").write_text(APT.format(apt))
        environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        run("looking up Debian's packages", ["apt-get", "update"], env=environment)
        run("fetching them", ["apt-get", "install", "--yes", "--download-only", *PACKAGES], env=environment)
        for package in sorted(apt.glob("archives/*.deb")):
            subprocess.run(["dpkg-deb", "--extract", package, self.root], check=True)

    def install(self, version: str, *arguments: str) -> None:
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        command += ["--only-binary=:all:", f"--python-version={version}", *platforms, f"--target={self.site}"]
        run(f"installing {' '.join(arguments)}", [*command, *arguments])

    def run(self, title: str, *arguments: str, first: tuple[Path, ...] = (), quiet: bool = False, **options) -> str:
        variables = {
            "CXX": COMPILER,
            "CONDENSE_BUILD_EXT": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return run(title, [self.python, *arguments], quiet, env=environment_of(list(first), variables), **options)


def wheel_of(machine: Machine) -> Path:
    """Built from the sources alone, and repaired and audited as one that is released."""
    for name in ("tree", "built", "dist"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    built, dist = FOLDER / "built", FOLDER / "dist"
    tree = source_tree(FOLDER)
    machine.run("building the wheel", "setup.py", "bdist_wheel", f"--dist-dir={built}", quiet=True, cwd=tree)
    words = [word.format(dest_dir=dist, wheel=next(built.glob("*.whl"))) for word in REPAIR.split()]
    print(machine.run("naming what it needs", "-m", "auditwheel", "show", words[-1], quiet=True))
    machine.run("repairing it", "-m", "auditwheel", *words, quiet=True)
    wheel = next(dist.glob("*.whl"))
    run("auditing it", ["make", "audit", f"WHEEL={wheel}"], quiet=False)
    return wheel


def check(machine: Machine, one_in: int, calls: int, seed: int) -> None:
    package = FOLDER / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.unpack_archive(wheel_of(machine), package, "zip")
    found = machine.run("importing it", "-c", CAPABILITY, first=(package,), quiet=True).split()
    if found != [str(package / "condense_kernels" / "__init__.py"), "default"]:
        raise Failure(f"expected the wheel's package in {package} and its loops for NEON, got {' '.join(found)}")
    files = sorted({str(path) for name in TESTS for path in (ROOT / "tests").glob(f"test_{name}*.py")})
    options = ["-q", "-n", "auto", "--maxprocesses", "8", "-p", "no:cacheprovider", "-p", "sanitize"]
    machine.run("tests", "-m", "pytest", *options, f"--one-in={one_in}", *files, first=(package,))
    machine.run("fuzz", "tests/fuzz.py", f"--calls={calls}", f"--seed={seed}", first=(package,))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-in", type=int, default=20, help="of so many cases of the tests one (20)")
    parser.add_argument("--calls", type=int, default=300, help="of the fuzz (300)")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzz (0)")
    arguments = parser.parse_args(argv)
    machine = Machine(FOLDER / "root")
    try:
        machine.make()
        check(machine, arguments.one_in, arguments.calls, arguments.seed)
    except Failure as failure:
        print(f"arm-check: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
