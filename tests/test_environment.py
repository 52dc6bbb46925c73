"""Environment variables: one meaning of each value, an error for every other, one module and one page for all."""

import os
import re
import runpy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from condense_kernels._dispatch import environment

ROOT = Path(__file__).parent.parent
SWITCHES = [name for name, kind in environment.VARIABLES.items() if kind is environment.switch]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "yes", "on", "1", "True", "YES", "On")),
        *((text, False) for text in ("false", "no", "off", "0", "False", "NO", "oFF")),
        ("", None),
    ],
)
def test_switches(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)
    assert environment.read(name) is value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("CONDENSE_CPU_CAPABILITY", "avx2", "avx2"),
        ("CONDENSE_CPU_CAPABILITY", "AVX512_BF16", "avx512_bf16"),
        ("CONDENSE_STORED_TOKENS", "0", 0),
        ("CONDENSE_STORED_TOKENS", "9" * 18, 10**18 - 1),
        ("CONDENSE_COMMIT", "3b18e51", "3b18e51"),
        ("CONDENSE_NUM_TOKENS", "1", 1),
        ("CONDENSE_NUM_TOKENS", "64", 64),
        ("CONDENSE_NUM_TOKENS", "1.0", 1.0),
        ("CONDENSE_NUM_TOKENS", "0.25", 0.25),
        ("CONDENSE_BACKGROUND_RATIO", "0", 0.0),
        ("CONDENSE_BACKGROUND_RATIO", "1.0", 1.0),
        ("CONDENSE_SUPPRESSION", "0.5", 0.5),
        ("CONDENSE_SPATIAL_WEIGHT", "12", 12.0),
    ],
)
def test_other_values(monkeypatch, name, text, value):
    assert environment.read(name) is None
    monkeypatch.setenv(name, text)
    assert environment.read(name) == value
    assert type(environment.read(name)) is type(value)
    monkeypatch.setenv(name, "")
    assert environment.read(name) is None


WRONG = [
    *((name, text) for name in SWITCHES for text in ("2", "maybe", "tru", " 1", "yes please")),
    *(("CONDENSE_CPU_CAPABILITY", text) for text in ("sse", "avx", "avx2 ", "1")),
    *(("CONDENSE_STORED_TOKENS", text) for text in ("many", "-1", "+1", " 1", "1.0", "1e3", "٣", "9" * 19)),
    *(("CONDENSE_NUM_TOKENS", text) for text in ("many", "0", "0.0", "1.5", "-1", "64 ", "1e2", ".5", "٣", "9" * 19)),
    *(("CONDENSE_BACKGROUND_RATIO", text) for text in ("half", "1.01", "-0.1", "25%", "nan")),
    *(
        (f"CONDENSE_{name}", text)
        for name in ("SUPPRESSION", "SPATIAL_WEIGHT", "BACKGROUND_SUPPRESSION")
        for text in ("-1", "inf", "1e-3", "0,5")
    ),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_wrong_values(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got '{re.escape(text)}'\. Remedy: unset {name}"):
        environment.read(name)
    if name in environment.OF_A_RUN:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            environment.check()
    else:
        environment.check()


def test_the_compiled_library_says_the_same(cpp):
    """Set after the import, so that it is the library that reads them: on the first call, and again on the second.

    A call reads STORED_TOKENS first, and a value that was right is kept.
    """
    names = ("CONDENSE_STORED_TOKENS", "CONDENSE_CPU_CAPABILITY")
    wrong = {name: [text for other, text in WRONG if other == name] for name in names}
    done = python(
        f"""
        import os, torch, condense_kernels
        from condense_kernels._dispatch import environment

        for name, texts in {wrong}.items():
            for text in texts:
                os.environ[name] = text
                try:
                    environment.read(name)
                except ValueError as error:
                    expected = str(error)
                try:
                    torch.ops.condense.select_and_merge(torch.rand(1, 6, 4), torch.rand(1, 6), 2, 1, grid=[2, 3])
                except RuntimeError as error:
                    assert str(error) == expected, (str(error), expected)
                else:
                    raise SystemExit(f"{{name}}={{text}} ran")
            os.environ[name] = ""  # not set
        torch.ops.condense.select_and_merge(torch.rand(1, 6, 4), torch.rand(1, 6), 2, 1, grid=[2, 3])
        """
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_the_compiled_library_takes_any_case(cpp):
    done = python(
        "import torch, condense_kernels; print(torch.ops.condense.cpu_capability())", CONDENSE_CPU_CAPABILITY="Default"
    )
    assert done.stdout == "default\n", done.stderr


def test_the_import_refuses_and_warns():
    done = python("import condense_kernels", CONDENSE_STORED_TOKENS="many")
    assert "ValueError: CONDENSE_STORED_TOKENS: expected a number of 1 to 18 digits, got 'many'" in done.stderr
    done = python("import condense_kernels", CONDENSE_DISABLE_CPPP="1")
    assert done.returncode == 0
    assert "<string>:1: RuntimeWarning: the environment variable CONDENSE_DISABLE_CPPP" in done.stderr
    assert "CONDENSE_DISABLE_CPP is one" in done.stderr


def test_empty_variables_are_silent():
    code = "import torch, condense_kernels as ck; ck.similarity(torch.rand(1, 2, 3))"
    done = python(
        "import warnings; warnings.simplefilter('error'); " + code, **dict.fromkeys(environment.VARIABLES, "")
    )
    without = python(code)
    assert (done.returncode, done.stderr) == (0, "") or "slow reference" in without.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CONDENSE_DISABLE_CPPP", "CONDENSE_DISABLE_CPP"),
        ("CONDENSE_DISABLECPP", "CONDENSE_DISABLE_CPP"),
        ("CONDENSE_DEBGU", "CONDENSE_DEBUG"),
        ("condense_debug", "CONDENSE_DEBUG"),
        ("CONDENSE_CPU_CAPABILITIES", "CONDENSE_CPU_CAPABILITY"),
        ("CONDENSE_STORED_TOKEN", "CONDENSE_STORED_TOKENS"),
        ("CONDENSE_BUILDEXT", "CONDENSE_BUILD_EXT"),
    ],
)
def test_misspelt_names(monkeypatch, name, meant):
    monkeypatch.setenv(name, "1")
    with pytest.warns(RuntimeWarning, match=f"{name} is none of condense_kernels.* {meant} is one"):
        environment.check()


@pytest.mark.parametrize("name", ["CONDENSE_MODEL", "CONDENSE_CHECKPOINT", "CONDENSEVLM_DEBUG", "CONDENSE_", "DEBUG"])
def test_names_of_somebody_else(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.check()


@pytest.mark.parametrize(("text", "said"), [("2", "CONDENSE_BUILD_EXT: expected one of true"), ("off", "=0 was set")])
def test_the_build_reads_it_by_the_same_file(tmp_path, text, said):
    build = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "CONDENSE_BUILD_EXT": text}, capture_output=True, text=True
    )
    assert (said in done.stderr) and (done.returncode == 0) == (text == "off"), done.stderr
    assert runpy.run_path(environment.__file__)["VARIABLES"].keys() == environment.VARIABLES.keys()


# One module, one page

SOURCES = [
    path
    for pattern in ("condense_kernels/**/*.py", "benchmarks/*.py", "csrc/*", "setup.py")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".py", ".cpp", ".h")
]
READS = re.compile(r"environ\b(?!ment)(?!\.pop)|getenv")
OTHERWISE = re.compile(r"\*\*os\.environ|environ\.get\(\"(CC|CXX|CXXFLAGS|LDFLAGS)\"|environ\[\"[A-Z_]+\"\] = ")
OWNERS = {"condense_kernels/_dispatch/environment.py", "csrc/environment.cpp"}


def test_one_module_reads_them():
    """Others may hand the environment on to a process, set what Triton reads, and read the variables of compilers."""
    found = {}
    for path in SOURCES:
        lines = [line for line in path.read_text().splitlines() if READS.search(line) and not OTHERWISE.search(line)]
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found.keys() == OWNERS, found


def test_every_variable_is_on_the_page():
    page = (ROOT / "docs" / "environment.md").read_text()
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", page, re.MULTILINE)
    listed = [name for row in rows for name in re.findall("[A-Z_]+", row)]
    assert listed == [*environment.VARIABLES, *environment.OF_OTHERS]
    texts = [*SOURCES, *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "benchmarks/gpu.sh"]
    named = {name for path in texts for name in re.findall(r"\bCONDENSE_[A-Z_]+[A-Z]\b", path.read_text())}
    macros = {name for name in named if re.match("CONDENSE_(ISA|HAS|INSTANTIATE)", name)}
    assert named - macros - {"CONDENSE_DISABLE_CPPP"} == set(environment.VARIABLES)
