"""python -m condense_kernels: what is wrong is told in one line, whatever it is and however early."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import PACKAGE, SAFE_PATH, python
from shells import Terminal
from test_cli import run

from condense_kernels import __main__, _program
from condense_kernels.cli import arguments, checkpoint, demo, env

PROGRAM = "python -m condense_kernels"
COMMAND = (*SAFE_PATH, "-m", "condense_kernels")

# Arguments

NO_NUMBERS = ("", " ", "x", "nan", "inf", "-inf", "-1", "-0.5", "1e400", "0x10", "1,5", "9" * 5000)
TEXTS = {"device", "question"}  # of any content
REQUIRED = {"reproduce": ["--table", "tiny"]}
NUMBERS = [
    (command, action.option_strings[0])
    for command, parser in __main__.build_parser()._subparsers._group_actions[0].choices.items()
    for action in parser._actions
    if action.type not in (None, Path)
]


def test_every_number_has_bounds():
    """An argument that is text and no choice is a name, or a text: not int or float, which take anything."""
    parsers = __main__.build_parser()._subparsers._group_actions[0].choices
    assert {action.type for parser in parsers.values() for action in parser._actions}.isdisjoint({int, float})
    assert len(NUMBERS) >= 18


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_no_number_is_told_at_once(capsys, command, option):
    for text in NO_NUMBERS:
        if text == "9" * 5000 and option == "--keep":
            continue  # a count, and above the tokens that there are: told where those are known
        status, out, err = run(capsys, command, *REQUIRED.get(command, ()), f"{option}={text}")
        assert (status, out) == (2, "")
        assert err.startswith(f"{PROGRAM} {command}: error: argument {option}: expected "), text
        assert err.count("\n") == 1 and len(err) < 250


def test_numbers_within_bounds_are_taken():
    assert arguments.whole(2, 5)("5") == 5 and arguments.whole(0)("0") == 0
    assert arguments.decimal(0, 1)("0.25") == 0.25
    assert arguments.count_or_ratio("64") == 64 and arguments.count_or_ratio("1.0") == 1.0
    assert isinstance(arguments.count_or_ratio("1"), int)
    torch.Generator().manual_seed(arguments.LARGEST_SEED)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["shwo"], "show"),
        (["env", "--jsn"], "--json"),
        (["demo", "--grd=3"], "--grid"),
        (["demo", "--score", "pixel"], "pixels"),
        (["demo", "--backend", "tritn"], "triton"),
        (["show", "--methods", "maxmn"], "maxmin"),
        (["report", "--methods", "poling"], "pooling"),
        (["report", "--clock", "wal"], "wall"),
        (["report", "--model", "tinny"], "tiny"),
        (["report", "--config-only", "--model", "llava-1.5-7"], "llava-1.5-7b"),
        (["compare", "--on", "dino"], "dinov2"),
        (["compare", "--methods", "condensvlm"], "condensevlm"),
        (["compare-answers", "--positions", "orginal"], "original"),
        (["completion", "bsh"], "bash"),
    ],
)
def test_a_misspelt_name_is_told_what_was_meant(capsys, given, meant):
    status, out, err = run(capsys, *given)
    assert (status, out) == (2, "")
    assert f"(did you mean {meant!r}?)" in err
    assert err.count("\n") == 1


def test_a_name_that_is_near_to_none(capsys):
    status, _, err = run(capsys, "demo", "--zzzzzz")
    assert (status, err) == (2, f"{PROGRAM} demo: error: unknown argument '--zzzzzz' (see --help)\n")


# Files


@pytest.mark.parametrize("config", ["", "[1]", '{"model_type": "llava", "text_config": {"num_hidden_layers": "x"}}'])
@pytest.mark.parametrize("given", [["compare-answers"], ["report", "--config-only"]])
def test_a_broken_model_is_told(capsys, tmp_path, config, given):
    folder = tmp_path / "broken\nmodel"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    status, out, err = run(capsys, *given, "--model", folder)
    assert (status, out) == (2, "")
    assert "broken model: expected " in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["compare", "compare-answers", "report"])
def test_a_folder_as_output_is_told(capsys, tmp_path, command):
    status, _, err = run(capsys, command, "--csv", tmp_path)
    assert status == 2
    assert "--csv: expected a file, got a folder" in err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody can write")
@pytest.mark.parametrize("allowed", [True, False])
def test_a_folder_that_takes_no_files(capsys, monkeypatch, allowed):
    """root is allowed to write there, and fails."""
    monkeypatch.setattr("condense_kernels.cli.os.access", lambda path, mode: allowed)
    monkeypatch.setattr(demo, "BACKENDS", ())
    monkeypatch.chdir("/proc")
    status, _, err = run(capsys, "demo", "--grid", 2, "--keep", 1)
    assert status == 2
    assert err.startswith(f"{PROGRAM} demo: error: --output: demo.png can't be written: ") and err.count("\n") == 1


# Standard output


@pytest.mark.parametrize(
    ("command", "after", "expected", "words"),
    [
        ("env", "| head -0", 0, ""),
        ("env", "> /dev/full", 2, "standard output can't be written: No space left on device"),
        ("env", ">&-", 2, "standard output can't be written: it is closed"),
        ("--help", "> /dev/full", 2, "standard output can't be written: No space left on device"),
        ("--help", "2>&-", 0, ""),
        ("env --jsn", "2> /dev/full", 2, ""),
    ],
)
def test_output_that_nobody_takes(command, after, expected, words):
    shell = f"set -o pipefail; {sys.executable} -P -m condense_kernels {command} {after}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert done.returncode == expected
    assert words in done.stderr and done.stderr.count("\n") == bool(words)


def test_a_file_that_cannot_be_written_is_named(capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device", "demo.png")

    monkeypatch.setattr(env, "run", full)
    status, _, err = run(capsys, "env")
    assert status == 2
    assert err == "python -m condense_kernels: error: demo.png: No space left on device\n"


def test_an_error_of_something_else_is_not_blamed_on_standard_output(capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(env, "run", full)
    assert run(capsys, "env") == (2, "", f"{PROGRAM}: error: No space left on device\n")


def test_no_bar_of_others_where_nobody_looks(capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    checkpoint.load("tiny")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


# Before the first command: torch is another here, so that its import ends as the case wants


def with_torch(folder: Path, code: str) -> str:
    (folder / "torch.py").write_text(code)
    return f"{folder}:{PACKAGE.parent}"


def test_a_wrong_variable_is_told_in_one_line():
    done = python(*COMMAND, "env", CONDENSE_DEBUG="maybe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{PROGRAM}: error: CONDENSE_DEBUG: expected one of true,")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ModuleNotFoundError('No module named torch', name='torch')", "needs torch >= 2.10, and no torch is"),
        ("__version__ = '2.4.0'", "needs torch >= 2.10, found torch 2.4.0"),
    ],
)
def test_a_torch_that_does_not_do_is_told_in_one_line(tmp_path, code, words):
    done = python(*COMMAND, "env", PYTHONPATH=with_torch(tmp_path, code))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{PROGRAM}: error: condense_kernels ") and words in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_installed_script_tells_it_in_one_line_too(tmp_path):
    script = tmp_path / "condense-kernels"
    script.write_text("import sys\nfrom condense_kernels.__main__ import main\nsys.exit(main())\n")
    done = python(str(script), "env", PYTHONPATH=with_torch(tmp_path, "__version__ = '2.4.0'"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{PROGRAM}: error: condense_kernels ") and done.stderr.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path):
    done = python(*COMMAND, "env", PYTHONPATH=with_torch(tmp_path, "1 / 0"))
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_a_process_that_only_imports_is_left_alone(tmp_path):
    path = with_torch(tmp_path, "raise ModuleNotFoundError('No module named torch', name='torch')")
    done = python("-c", "import condense_kernels", PYTHONPATH=path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def interruptible() -> None:
    """A shell's job in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_control_c_during_the_import(tmp_path):
    path = with_torch(tmp_path, "import time\nprint('importing', flush=True)\ntime.sleep(60)")
    options = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options["preexec_fn"] = interruptible
    process = subprocess.Popen([sys.executable, *COMMAND, "env"], env={"PYTHONPATH": path}, text=True, **options)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_control_c_during_the_work(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", interrupted)
    assert run(capsys, "env") == (130, "", "")


def test_a_long_import_is_told_on_a_terminal_alone(tmp_path):
    path = with_torch(tmp_path, f"import time\ntime.sleep({_program.PATIENCE + 0.5})\n__version__ = '2.4.0'")
    terminal = Terminal([sys.executable, *COMMAND, "env"], PYTHONPATH=path)
    terminal.read_until("Remedy")
    terminal.close()
    told, _, rest = terminal.shown.partition(f"{_program.NOTE}\r")
    assert told == "" and rest.startswith(f"{' ' * len(_program.NOTE)}\r{PROGRAM}: error: ")
    assert python(*COMMAND, "env", PYTHONPATH=path).stderr.startswith(f"{PROGRAM}: error: ")


def test_a_quick_import_is_not_told(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    patience = _program.Patience()
    patience.end()
    time.sleep(0.01)
    assert (patience.shown, sys.stderr.getvalue()) == (False, "")
