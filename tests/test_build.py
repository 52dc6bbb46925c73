"""What setup.py builds, or why it does not: the library's symbols, the wheel's tag, flags, the note for the import.

Most cases have a compiler that writes empty files and a torch that is a version number: what setup.py decides shows
without compiling anything.
"""

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from builds import Builder, script, source_tree
from processes import LIBRARY, PACKAGE, ROOT, copy_package, fresh, import_from, needs_library

SETUP = (ROOT / "setup.py").read_text()
TARGET = re.search(r"-DTORCH_TARGET_VERSION=\w+", SETUP)[0]
needs_nm = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("g++")), reason="needs nm and g++")


def test_the_oldest_versions_are_the_same_everywhere():
    from condense_kernels import _dispatch
    from condense_kernels._dispatch import backends

    project = (ROOT / "pyproject.toml").read_text()
    needed, triton = (f"{major}.{minor}" for major, minor in (_dispatch.OLDEST_TORCH, backends.OLDEST_TRITON))
    assert f'dependencies = ["torch>={needed}"]' in project
    assert f'triton = ["triton>={triton};' in project
    assert f"OLDEST_TORCH = {_dispatch.OLDEST_TORCH}" in SETUP
    target = int(TARGET.partition("=")[2], 16)
    assert (target >> 56, target >> 48 & 0xFF) == _dispatch.OLDEST_TORCH
    assert 'requires-python = ">=3.10"' in project
    texts = [project, *((ROOT / name).read_text() for name in ("Makefile", "CONTRIBUTING.md", "docs/installing.md"))]
    assert len({version for text in texts for version in re.findall(r"setuptools>=([\d.]+)", text)}) == 1


def test_the_sources_are_of_the_oldest_python_and_check_without_assert():
    """An assert statement is gone under python -O."""
    for path in (*PACKAGE.rglob("*.py"), ROOT / "setup.py"):
        tree = ast.parse(path.read_text(), path, feature_version=(3, 10))
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], path


# What the library needs


def undefined_symbols() -> list[str]:
    """With their versions: name@GLIBC_2.14."""
    needed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in needed.stdout.splitlines() if line.split()[-2] == "U"]


@needs_library
@needs_nm
def test_the_library_needs_what_the_oldest_torch_has():
    """Of torch, functions of its stable C interface that are there for TORCH_TARGET_VERSION; of Python, nothing.

    Torch marks each such function with the version that brought it, from 2.10 on.
    """
    names = undefined_symbols()
    of_torch = {name for name in names if not re.match(r"\w+@|_ZN?K?St", name)}  # else of C's or C++'s own library
    include = f"-I{Path(torch.__file__).parent / 'include'}"
    source = "#include <torch/csrc/stable/c/shim.h>"
    headers = subprocess.run(
        ["g++", "-E", "-xc++", TARGET, include, "-"], input=source, capture_output=True, text=True, check=True
    )
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", headers.stdout))
    assert "torch_parallel_for" in of_torch & declared
    assert "torch_from_blob" not in declared  # of 2.11
    assert not of_torch - declared


NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@needs_library
@needs_nm
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the versions of manylinux_2_28 on x86_64")
@pytest.mark.skipif(
    [int(number) for number in re.findall(r"\d+", platform.libc_ver()[1])] > [2, 36],
    reason="compiled beside a newer glibc and libstdc++, the library needs those; releases are built in manylinux_2_28",
)
def test_the_library_needs_no_newer_c_library_than_manylinux_2_28():
    versions = {name.partition("@")[2] for name in undefined_symbols() if "@" in name}
    assert any(version.startswith("GLIBC_") for version in versions)
    for version in versions:
        library, _, number = version.rpartition("_")
        assert tuple(int(part) for part in number.split(".")) <= NEWEST[library], version


# What setup.py decides


BROKEN_COMPILER = "#!/bin/sh\necho 'csrc/merge_cpu.cpp:1:1: fatal error: no space left'\nexit 1\n"


@pytest.fixture
def builder(tmp_path, bare_python) -> Builder:
    return Builder(tmp_path, bare_python)


def test_a_wheel_serves_every_python(builder):
    """It names none, as the library has no symbol of Python."""
    builder.has_torch("2.13.0")
    wheel = builder.wheel()
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"condense_kernels/{LIBRARY.name}" in names
    assert "condense_kernels/py.typed" in names
    assert "condense_kernels/_not_built.txt" not in names


NO_GIL = """
import re, sys, sysconfig
known = sysconfig.get_config_vars()
known["Py_GIL_DISABLED"] = 1
if sys.version_info >= (3, 13):  # those have an ABI without the GIL
    known["SOABI"] = re.sub(r"^(cpython-[0-9]+)-", r"\\1t-", known["SOABI"])
"""


@pytest.mark.parametrize(("version", "abi"), [("3.10", "cp310"), ("3.14", "cp314"), ("3.14", "cp314t")])
def test_a_wheel_built_without_the_gil_installs_everywhere(builder, tmp_path, version, abi):
    """setuptools refuses the limited API's tag there, and pip that tag on such a Python."""
    builder.has_torch("2.13.0")
    (builder.site / "sitecustomize.py").write_text(NO_GIL)
    wheel = builder.wheel()
    target = ["--target", tmp_path / "target", "--only-binary=:all:", "--platform", f"linux_{platform.machine()}"]
    python = ["--python-version", version, "--implementation", "cp", "--abi", abi]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *target, *python, wheel], check=True)
    assert (tmp_path / "target" / "condense_kernels" / LIBRARY.name).is_file()


@pytest.mark.parametrize("version", ["65.5.0", "70.1.1.post20240701", "77.0.2"])
def test_an_older_setuptools_is_named_with_the_version_that_is_needed(builder, version):
    for path in builder.site.glob("setuptools*"):
        path.unlink()
    (builder.site / "setuptools").mkdir()
    (builder.site / "setuptools" / "__init__.py").write_text(f"__version__ = {version!r}")
    done = builder.run("bdist_wheel")
    assert done.returncode == 1
    assert done.stderr == (
        f"condense_kernels: setuptools >= 77.0.3 is needed to build, found {version} in {builder.site}/setuptools. "
        "Remedy: pip install 'setuptools>=77.0.3'\n"
    )


# Why there is no library


def warning_of(folder: Path, *behind: Path) -> str:
    """Of the import from the folder, before these and no other copies."""
    others = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, "condense_kernels"))]
    sys.path[:] = [*map(str, behind), *others]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ck = import_from(folder)
    assert ck.__file__.startswith(str(folder))
    (message,) = (str(warning.message) for warning in caught)
    with pytest.raises(ValueError, match="backend='cpp' is not available here") as raised:
        ck.similarity(torch.rand(1, 4, 2), backend="cpp")
    assert ck._dispatch.library.cpp_unavailable() in message
    assert ck._dispatch.library.cpp_unavailable() in str(raised.value)
    return message


CAUSES = {
    "isolated from torch": (
        None,
        {},
        "found no torch to compile against (ModuleNotFoundError: No module named 'torch'). Remedy: install torch first",
        "pip install 'setuptools>=77.0.3', then reinstall with --no-build-isolation (build: --no-isolation)",
    ),
    "an old torch": (
        "2.9.1+cpu",
        {},
        "torch 2.9.1+cpu was installed, and the kernels need torch >= 2.10",
        "pip install 'torch>=2.10', then reinstall",
    ),
    "no compiler": (
        "2.13.0",
        {"CXX": "", "PATH": "/nonexistent"},
        "no C++ compiler: g++, c++, clang++ not found",
        "install g++ (or clang++), then reinstall",
    ),
    "no such compiler": (
        "2.13.0",
        {"CXX": "g++-1 -m64"},
        "no C++ compiler: g++-1 -m64 not found",
        "unset or mend CXX, then reinstall",
    ),
    "the compilation fails": (
        "2.13.0",
        {"CXX": "BROKEN"},
        "failed with status 1 (csrc/merge_cpu.cpp:1:1: fatal error: no space left)",
        "reinstall with CONDENSE_BUILD_EXT=1, and pip's -v, to see all of its messages",
    ),
    "left out": (
        "2.13.0",
        {"CONDENSE_BUILD_EXT": "0"},
        "CONDENSE_BUILD_EXT=0 was set",
        "on Linux, the wheel for Linux, or reinstall without it; elsewhere none is needed for the reference",
    ),
}


@pytest.mark.parametrize(("torch_version", "environment", "reason", "remedy"), CAUSES.values(), ids=CAUSES)
def test_the_import_says_why_the_build_was_left_out(builder, tmp_path, torch_version, environment, reason, remedy):
    """The wheel is pure Python and holds the reason; where the library is a must, that is the error."""
    if torch_version is not None:
        builder.has_torch(torch_version)
    if environment.get("CXX") == "BROKEN":
        environment = {"CXX": script(tmp_path / "broken", BROKEN_COMPILER)}
    wheel = builder.wheel(**environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    message = fresh(warning_of, tmp_path / "installed")
    assert "the compiled library is not in use: it was not built: " in message
    assert reason in message
    assert message.endswith(f"{remedy}.")
    if "CONDENSE_BUILD_EXT" not in environment:
        done = builder.run("bdist_wheel", CONDENSE_BUILD_EXT="1", **environment)
        assert done.returncode == 1
        assert "condense_kernels: CONDENSE_BUILD_EXT=1 is set, but " in done.stderr
        assert reason in done.stderr
        assert done.stderr.endswith(f"{remedy}.\n")


def test_a_reason_does_not_outlive_its_build(builder):
    """In a source tree, where one build follows the other."""
    library, note = (builder.tree / "condense_kernels" / name for name in (LIBRARY.name, "_not_built.txt"))

    def build(**environment):
        builder.run("build_ext", "--inplace", **environment)
        return library.exists(), note.exists() and note.read_text().partition(".")[0]

    no_torch = "the build found no torch to compile against (ModuleNotFoundError: No module named 'torch')"
    left_out = "CONDENSE_BUILD_EXT=0 was set, as for a release's wheel of any platform"
    assert build() == (False, no_torch)
    builder.has_torch("2.13.0")
    assert build() == (True, False)
    assert build(CONDENSE_BUILD_EXT="0") == (False, left_out)
    assert build() == (True, False)
    assert build(CONDENSE_BUILD_EXT="1", CXX="g++-1") == (False, "no C++ compiler: g++-1 not found")
    assert build(CONDENSE_BUILD_EXT="maybe") == (False, "no C++ compiler: g++-1 not found")  # nothing was touched


def build_in_place(tree: Path) -> str:
    return f"Remedy: build in place: CONDENSE_BUILD_EXT=1 pip install --no-build-isolation -e {tree}"


def test_a_source_tree_that_was_not_built_says_so(tmp_path):
    tree = source_tree(tmp_path)
    message = fresh(warning_of, tree)
    assert message.endswith(f"it was not built in {tree}/condense_kernels, a source tree. {build_in_place(tree)}.")


@pytest.mark.parametrize("note", [None, "CONDENSE_BUILD_EXT=0 was set. Remedy: reinstall without it"])
def test_a_source_tree_before_an_installed_copy_names_it(tmp_path, note):
    """As after pip install . in the tree, where Python looks first."""
    tree, site, empty = source_tree(tmp_path), tmp_path / "site", tmp_path / "empty"
    copy_package(site, library=b"built")
    reason = f"it was not built in {tree}/condense_kernels, a source tree. {build_in_place(tree)}"
    if note is not None:
        (tree / "condense_kernels" / "_not_built.txt").write_text(f"{note}\n")
        reason = f"it was not built: {note}"
    message = fresh(warning_of, tree, empty, site)
    assert message.endswith(
        f"{reason}; or run from another folder, so that Python does not find {tree}/condense_kernels before "
        f"{site}/condense_kernels, which was built."
    )


def test_a_library_that_was_removed_is_missing(tmp_path):
    copy = copy_package(tmp_path)
    for name in (LIBRARY.name, "_not_built.txt"):
        (copy / name).unlink(missing_ok=True)
    message = fresh(warning_of, tmp_path)
    assert message.endswith(f"{copy / LIBRARY.name} is missing. Remedy: reinstall with CONDENSE_BUILD_EXT=1.")


# The sdist


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def sdist(builder: Builder, folder: Path) -> Path:
    done = builder.run("sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (builder.tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    (unpacked,) = folder.iterdir()
    return unpacked


def test_the_sdist_holds_what_a_checkout_does(builder, tmp_path):
    checkout = files_of(builder.tree)
    built = {"condense_kernels/_C.abi3.so", "condense_kernels/_not_built.txt"}
    for name in built:
        (builder.tree / name).write_text("of this machine")
    found = files_of(sdist(builder, tmp_path / "unpacked"))
    assert not checkout - found
    assert not built & found


def digest() -> str:
    """Of the bits of a call in each dtype, and whether the process has subnormal numbers still."""
    import condense_kernels as ck
    from condense_kernels.testing import make_inputs

    assert ck._dispatch.library.cpp_unavailable() is None
    bits = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for result in make_inputs("random", num_tokens=300, channels=67, dtype=dtype).run():
            bits.update(result.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{bits.hexdigest()} {sys.float_info.min / 2 > 0}"


def digest_of(folder: Path) -> str:
    assert import_from(folder).__file__.startswith(str(folder))
    return digest()


@pytest.mark.slow(minutes=2)
@needs_library
def test_the_sdist_builds_and_tests_itself_whatever_the_flags(builder, tmp_path):
    """Compiled with flags that would change every sum: the bits are those of the library here."""
    unpacked = sdist(builder, tmp_path / "unpacked")
    hostile = {"CXXFLAGS": "-Ofast -march=native -ffp-contract=fast", "LDFLAGS": "-Ofast", "CXX": ""}
    environment = {**os.environ, **hostile, "CONDENSE_BUILD_EXT": "1", "PYTHONPATH": ""}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=unpacked, env=environment, check=True, capture_output=True)
    expected = fresh(digest_of, PACKAGE.parent)
    assert expected.endswith("True")
    assert fresh(digest_of, unpacked) == expected
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_merge.py", "tests/test_docs.py"]
    environment["PYTHONPATH"] = str(unpacked)
    done = subprocess.run(tests, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_off_linux_nothing_is_compiled_unless_it_is_asked_for(builder, tmp_path):
    builder.has_torch("2.13.0")
    (builder.site / "sitecustomize.py").write_text(
        "import sys, sysconfig\nsysconfig.get_config_vars()\nsys.platform = 'freebsd'\n"
    )
    wheel = builder.wheel()
    assert wheel.name.endswith("-py3-none-any.whl")
    note = zipfile.ZipFile(wheel).read("condense_kernels/_not_built.txt").decode()
    assert "the kernels are built on Linux, and this is " in note
