"""`make sanitize`: the C++ library compiled with sanitizers, and what runs on it. Described in docs/checking.md.

    python tests/sanitize.py                       # address and undefined in one library, threads in another
    python tests/sanitize.py --quick undefined     # one alone; the share of it that .ci/run takes

A build goes to build/sanitize/<sanitizers>, with a copy of the package that is first on the path of what runs. What is
found is written to build/sanitize/<sanitizers>/reports by whichever process it was found in, and fails the run.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "build" / "sanitize"
KINDS = ("address", "undefined", "thread")
TOGETHER = ("address,undefined", "thread")  # the first two fit into one library
LEVELS = ("default", "avx2", "avx512", "avx512_bf16")  # of CONDENSE_CPU_CAPABILITY; AMX is on no machine of ours
LIBRARY = "_C.abi3.so"

FLAGS = ["-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
# A float divided by zero is not undefined: IEEE 754 says what it is, and the operators' pages say where.
FLAGS_OF = {"undefined": ["-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all"]}
# Python is not compiled with a sanitizer, whose library then has to be there first; and ASan looks for __cxa_throw when
# the process starts, when Python has no C++ library yet.
PRELOADED = {"address": ["libasan.so", "libstdc++.so.6"], "thread": ["libtsan.so", "libstdc++.so.6"]}
FRAMES = "stack_trace_format='    #%n %p in %f %S [%m]'"  # with the file that a frame is of, which leaks_of goes by
OPTIONS = {
    "ASAN_OPTIONS": f"detect_stack_use_after_return=1:allocator_may_return_null=1:{FRAMES}",
    "LSAN_OPTIONS": "exitcode=0",  # Python and torch leave things behind; leaks_of says which are ours
    "UBSAN_OPTIONS": f"print_stacktrace=1:{FRAMES}",
    # Of what was not compiled with it, TSan knows the locks and threads, and not the accesses.
    "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:history_size=4:report_signal_unsafe=0:{FRAMES}",
}

# The tests of operators, and of what calls them. Not here: Triton's kernels, models, the command line, builds.
OPERATORS = sorted(path.parent.name for path in ROOT.glob("condense_kernels/ops/*/op.py"))
OTHERS = ["background_suppression", "contexts", "errors", "extremes", "from_keys", "gradients", "long_images"]
OTHERS += ["mean_similarity", "operators", "prepared", "scale_prior", "workspace"]
NOT_OURS = {"triton", "reference"}  # the other backends, in a case's parameters
LEFT_OUT = {
    "test_select_and_merge_varlen.py::test_peak_memory_is_that_of_one_image_a_thread": "ASan's own memory counts",
}


def test_files() -> list[str]:
    found = {path for name in OPERATORS for path in ROOT.glob(f"tests/test_{name}*.py")}
    found |= {ROOT / "tests" / f"test_{name}.py" for name in OTHERS}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def pytest_addoption(parser) -> None:
    """This file is a plugin, too: of pytest as it is run here."""
    parser.addoption("--one-in", type=int, default=1, help="of so many cases one, which follows from its name")


def is_wanted(test: str, parameters: Iterable[object], one_in: int) -> bool:
    if any(isinstance(value, str) and value in NOT_OURS for value in parameters):
        return False
    return zlib.crc32(test.encode()) % one_in == 0 and not any(test.endswith(name) for name in LEFT_OUT)


def pytest_collection_modifyitems(config, items) -> None:
    one_in, wanted, left_out = config.getoption("--one-in"), [], []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        (wanted if is_wanted(item.nodeid, parameters, one_in) else left_out).append(item)
    items[:] = wanted
    config.hook.pytest_deselected(items=left_out)


class Failure(Exception):
    """Why nothing can be run, and the remedy."""


def compiler() -> list[str]:
    """CXX or g++. Clang's runtimes have other names, and of the row loops it compiles the portable ones alone."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    remedy = "Remedy: install g++ with its sanitizers (Debian: g++, others: libasan, libubsan and libtsan), or set CXX"
    if shutil.which(command[0]) is None:
        raise Failure(f"no C++ compiler: {command[0]} not found. {remedy}")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in version:
        raise Failure(f"{' '.join(command)} is not GCC: {version.splitlines()[0]}. {remedy}")
    return command


def file_of_compiler(name: str) -> str:
    done = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not os.path.isabs(done.stdout.strip()):
        raise Failure(f"{' '.join(compiler())} has no {name}. Remedy: install the sanitizers of this compiler")
    return done.stdout.strip()


def leaks_of(report: str) -> list[str]:
    """Of LeakSanitizer's report what our library allocated: by itself, or by a call of torch or the C++ library."""
    leaks = re.findall(r"^(?:Direct|Indirect) leak of .*?\n\n", report, flags=re.M | re.S)
    return [leak for leak in leaks if any(LIBRARY in frame for frame in leak.splitlines()[1:7])]


def findings_of(report: str) -> list[str]:
    """What is written in a process's file, less leaks of others."""
    if "LeakSanitizer: detected memory leaks" not in report:
        return [report] if report.strip() else []
    before, _, leaks = report.partition("LeakSanitizer: detected memory leaks")
    found = leaks_of(leaks)
    if re.search(r"(Address|Undefined\w*|Thread)Sanitizer:|runtime error:", before):
        found.insert(0, before)
    return found


def flags_of(kinds: list[str]) -> list[str]:
    more = [flag for kind in kinds for flag in FLAGS_OF.get(kind, [])]
    return [f"-fsanitize={','.join(kinds)}", *more, *FLAGS]


def environment_of(first: list[Path], variables: dict[str, str]) -> dict[str, str]:
    """Of a process that imports the package from the first of these folders."""
    path = os.pathsep.join(map(str, (*first, ROOT / "tests", ROOT / "benchmarks")))
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path, **variables}


class Build:
    """The package with its library compiled for some sanitizers, and what ran on it."""

    def __init__(self, kinds: str):
        self.kinds = kinds.split(",")
        self.folder = BUILDS / "-".join(self.kinds)
        self.reports = self.folder / "reports"
        self.failed: list[str] = []
        shutil.rmtree(self.reports, ignore_errors=True)
        self.reports.mkdir(parents=True)

    def digest(self) -> str:
        """Of what the library is compiled from: it is compiled anew where that has changed."""
        found = hashlib.sha256(repr((flags_of(self.kinds), os.environ.get("CXX"), os.environ.get("CXXFLAGS"))).encode())
        schemas = ROOT.glob("condense_kernels/ops/*/schema.txt")
        for path in sorted([*ROOT.glob("csrc/*"), *schemas, ROOT / "setup.py"]):
            found.update(path.read_bytes())
        return found.hexdigest()

    def make(self) -> None:
        stamp = self.folder / "stamp"
        if not stamp.is_file() or stamp.read_text() != self.digest():
            self.compile()
            stamp.write_text(self.digest())
        package = self.folder / "condense_kernels"
        shutil.rmtree(package, ignore_errors=True)
        left_out = shutil.ignore_patterns("__pycache__", "*.so", "_not_built.txt")
        shutil.copytree(ROOT / "condense_kernels", package, ignore=left_out)
        shutil.copy(self.folder / "compiled" / "condense_kernels" / LIBRARY, package)

    def compile(self) -> None:
        print(f"{self}: compiling csrc/", flush=True)
        ours = shlex.join(flags_of(self.kinds))
        flags = {name: f"{os.environ.get(name, '')} {ours}" for name in ("CXXFLAGS", "LDFLAGS")}
        environment = {**os.environ, **flags, "CXX": shlex.join(compiler()), "CONDENSE_BUILD_EXT": "1"}
        outputs = [f"--build-lib={self.folder / 'compiled'}", f"--build-temp={self.folder / 'objects'}"]
        command = [sys.executable, "setup.py", "build_ext", *outputs]
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failure(f"the library did not compile with {ours}:\n{done.stdout}{done.stderr}")
        print(f"{self}: compiled in {time.monotonic() - started:.0f} s", flush=True)

    def environment(self, log: str, **variables: str) -> dict[str, str]:
        found = environment_of([self.folder], variables)
        preloaded = [file_of_compiler(name) for kind in self.kinds for name in PRELOADED.get(kind, [])]
        found["LD_PRELOAD"] = " ".join(preloaded)
        leaks = int(log == "leaks")  # naming those of others takes minutes
        for name, options in OPTIONS.items():
            found[name] = f"detect_leaks={leaks}:log_path='{self.reports / log}':{options}"
        return found

    def run(self, title: str, *arguments: str, **variables: str) -> None:
        """One process from start to end; and what was reported in it and in those that it started."""
        log = title.replace(" ", "-")
        print(f"{self}: {title}", flush=True)
        started = time.monotonic()
        command = [sys.executable, *arguments]
        if "thread" in self.kinds and addresses_are_too_random():
            command = ["setarch", "-R", *command]
        done = subprocess.run(command, cwd=ROOT, env=self.environment(log, **variables))
        found = [text for path in sorted(self.reports.glob(f"{log}*")) for text in findings_of(path.read_text())]
        for text in found:
            print(text, flush=True)
        if done.returncode != 0 or found:
            self.failed.append(f"{self}: {title}: exit status {done.returncode}, {len(found)} reports of sanitizers")
        print(f"{self}: {title}: {time.monotonic() - started:.0f} s", flush=True)

    def __str__(self) -> str:
        return ",".join(self.kinds)


def addresses_are_too_random() -> bool:
    """GCC's TSan before 14 needs memory where Linux puts it with up to 28 random bits; newer kernels take 32."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    return bits.is_file() and int(bits.read_text()) > 28


CAPABILITY = "import condense_kernels as ck, torch; print(ck.__file__); print(torch.ops.condense.cpu_capability())"


def level_of(build: Build, level: str) -> str:
    """What the library runs with where `level` is the best that is allowed; the check that it is this library."""
    environment = build.environment("capability", CONDENSE_CPU_CAPABILITY=level)
    done = subprocess.run([sys.executable, "-c", CAPABILITY], cwd=ROOT, env=environment, capture_output=True, text=True)
    package = str(build.folder / "condense_kernels" / "__init__.py")
    if done.returncode != 0 or done.stdout.splitlines()[:1] != [package]:
        raise Failure(f"{build}: expected {package} to be imported, got {done.stdout}{done.stderr}")
    return done.stdout.split()[-1]


def fuzz(build: Build, calls: int, seed: int, levels: tuple[str, ...], *arguments: str, **variables: str) -> None:
    for level in levels:
        if (found := level_of(build, level)) != level:
            print(f"{build}: fuzz {level}: skipped, this processor has no more than {found}", flush=True)
            continue
        command = ["tests/fuzz.py", "--calls", str(calls), "--seed", str(seed), *arguments]
        build.run(f"fuzz {level}", *command, CONDENSE_CPU_CAPABILITY=level, **variables)


def tests(build: Build, one_in: int, *arguments: str, **variables: str) -> None:
    options = ["-q", "-n", "auto", "--maxprocesses", "8", "-p", "no:cacheprovider", "-p", "sanitize"]
    build.run("tests", "-m", "pytest", *options, f"--one-in={one_in}", *arguments, *test_files(), **variables)


def check(build: Build, quick: bool, seed: int) -> None:
    best = level_of(build, LEVELS[-1])
    levels = (LEVELS[0], best) if quick else LEVELS
    if "thread" in build.kinds:
        tests(build, 1, "-k", "thread")
        fuzz(build, 300 if quick else 3000, seed, levels, "--threads", "4")
    else:
        tests(build, 6 if quick else 1)
        fuzz(build, 1000 if quick else 20_000, seed, levels)
    if "address" in build.kinds and not quick:
        build.run("leaks", "tests/fuzz.py", "--calls", "50", "--seed", str(seed))


def sanitizers(text: str) -> str:
    kinds = text.split(",")
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds) or set(kinds) > {"thread"}:
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(KINDS)}, or address,undefined in one library, got {text!r}"
        )
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", type=sanitizers, help=", ".join(KINDS) + "; or address,undefined in one")
    parser.add_argument("--quick", action="store_true", help="a sixth of the tests, fewer calls of the fuzz")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzz")
    arguments = parser.parse_args(argv)
    failed = []
    try:
        for kind in arguments.kinds or TOGETHER:
            build = Build(kind)
            build.make()
            check(build, arguments.quick, arguments.seed)
            failed += build.failed
    except Failure as failure:
        print(f"sanitize: {failure}", file=sys.stderr)
        return 1
    for line in failed:
        print(line)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
