"""What `make sanitize` rests on: that the sanitizers are told what they cannot know, and that no report is lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import torch

ROOT = Path(__file__).parent.parent
INCLUDES = ["-Icsrc", "-isystem", str(Path(torch.__file__).parent / "include")]
FAULTS = ["beyond a piece", "beyond a whole line", "before a piece", "slack of the block", "of the image before"]


def compiled(kinds: str, sources: list[str], folder: Path) -> str:
    try:
        runtimes = [sanitize.file_of_compiler(f"lib{short}.so") for short in ("asan", "ubsan", "tsan")]
        compiler = sanitize.compiler()
    except sanitize.Failure as failure:
        pytest.skip(str(failure))
    assert all(Path(runtime).exists() for runtime in runtimes)
    flags = [*sanitize.flags_of([kinds]), "-std=c++17", "-O1", "-Wall", "-Werror"]
    command = [
        *compiler,
        *flags,
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *INCLUDES,
        *sources,
        "-o",
        folder / "out",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return str(folder / "out")


def outcome(program: str, fault: str) -> tuple[bool, str]:
    done = subprocess.run([program, fault], capture_output=True, text=True)
    return done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> str:
    return compiled("address", ["tests/sanitized_memory.cpp", "csrc/memory.cpp"], tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("fault", [*FAULTS, "a call's end"])
def test_what_is_not_lent_out_is_a_finding(fault, memory):
    ended_well, report = outcome(memory, fault)
    assert not ended_well
    assert "AddressSanitizer: use-after-poison" in report


def test_what_is_lent_out_is_none(memory):
    """Nor what the caller lent, once the call is over."""
    assert outcome(memory, "none") == (True, "")


def test_threads_that_share_scratch_are_a_finding(tmp_path):
    """And those of a crew, with scratch of their own, are none."""
    program = compiled("thread", ["tests/sanitized_threads.cpp"], tmp_path)
    assert outcome(program, "own") == (True, "")
    ended_well, report = outcome(program, "shared")
    assert not ended_well
    assert "ThreadSanitizer: data race" in report


def test_every_operator_is_among_the_tests():
    files = sanitize.test_files()
    for operator in sanitize.OPERATORS:
        assert f"tests/test_{operator}.py" in files
    assert all((ROOT / file).is_file() for file in files)
    assert not any("triton" in file for file in files)


def test_what_is_left_out_exists():
    for name, reason in sanitize.LEFT_OUT.items():
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text()
        assert f"tests/{file}" in sanitize.test_files()
        assert reason


def test_the_cases_are_those_of_the_library():
    """One in six is a share of all, the same each time; other backends' are left out, and one test."""
    cases = [f"tests/test_merge.py::test_x[cpp-{i}]" for i in range(600)]
    assert all(sanitize.is_wanted(case, ("cpp", 7), 1) for case in cases)
    assert 60 < sum(sanitize.is_wanted(case, ("cpp", 7), 6) for case in cases) < 140
    assert not any(sanitize.is_wanted(case, (torch.float32, other), 1) for case in cases for other in sanitize.NOT_OURS)
    assert not any(sanitize.is_wanted(f"tests/{name}", (), 1) for name in sanitize.LEFT_OUT)


LEAKS = """
=================================================================
==7==ERROR: LeakSanitizer: detected memory leaks

Direct leak of 64 byte(s) in 1 object(s) allocated from:
    #0 0x1 in operator new(unsigned long) lsan.cpp:1 [/usr/lib/libasan.so]
    #1 0x2 in PyObject_Malloc obmalloc.c:1 [/usr/bin/python3]
    #2 0x3 in a [/usr/bin/python3]
    #3 0x3 in a [/usr/bin/python3]
    #4 0x3 in a [/usr/bin/python3]
    #5 0x3 in a [/usr/bin/python3]
    #6 0x3 in boxed_fn library.h:1 [/build/condense_kernels/_C.abi3.so]

Indirect leak of 24 byte(s) in 3 object(s) allocated from:
    #0 0x1 in operator new(unsigned long) lsan.cpp:1 [/usr/lib/libasan.so]
    #1 0x2 in condense::(anonymous namespace)::merge csrc/merge_cpu.cpp:7 [/build/condense_kernels/_C.abi3.so]

SUMMARY: AddressSanitizer: 88 byte(s) leaked in 4 allocation(s).
"""


def test_a_leak_is_ours_where_we_allocated_it():
    (leak,) = sanitize.findings_of(LEAKS)
    assert leak.startswith("Indirect leak of 24") and "merge_cpu.cpp:7" in leak
    assert sanitize.findings_of(LEAKS.replace("_C.abi3.so", "_other.so")) == []


@pytest.mark.parametrize(
    "report",
    [
        "==7==ERROR: AddressSanitizer: heap-use-after-free on address 0x1\n",
        "csrc/merge.h:7:3: runtime error: signed integer overflow\n",
        "WARNING: ThreadSanitizer: data race (pid=7)\n",
        "FATAL: ThreadSanitizer: unexpected memory mapping\n",
    ],
)
def test_every_other_report_is_a_finding(report):
    assert sanitize.findings_of(report) == [report]
    assert sanitize.findings_of(report + LEAKS)[0].startswith(report)
    assert sanitize.findings_of("") == []


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("clang++-none", "no C++ compiler: clang++-none not found"), (sys.executable, "is not GCC: Python 3")],
)
def test_a_compiler_without_these_sanitizers_is_refused(compiler, message, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(sanitize.Failure, match=message.replace("+", r"\+")):
        sanitize.compiler()


@pytest.mark.parametrize("kinds", ["memory", "address,thread", "address,address"])
def test_sanitizers_that_there_are_not_are_refused(kinds, capsys):
    with pytest.raises(SystemExit):
        sanitize.main([kinds])
    assert "address, undefined, thread" in capsys.readouterr().err
