"""Windows and macOS: the wheel for any platform, and every command of it, where elsewhere.py has taken away what is not
there. A stream of cp1252, and no file opened in the encoding of the system."""

import errno
import io
import json
import os
import sys
import zipfile

import pytest
from builds import Builder
from processes import ROOT, SAFE_PATH, python

from condense_kernels import __main__
from condense_kernels.cli import start

SYSTEMS = ("win32", "darwin")
OPTIONAL = ("PIL", "einops", "lmms_eval", "matplotlib", "numpy", "onnx", "rich", "shtab", "transformers", "triton")
EXAMPLES = [example for group in start.GROUPS.values() for _, example in group.values()]

RUN = """
import contextlib, io, json, sys, warnings
system, commands, absent, present = map(json.loads, sys.argv[1:])
for module in ("torch", *present):
    __import__(module)
import elsewhere
elsewhere.pretend(system)
sys.modules.update(dict.fromkeys(absent))  # an import of them fails
warnings.filterwarnings("error", category=EncodingWarning, module="condense_kernels")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    from condense_kernels import __main__
said = [[str(warning.message) for warning in caught if warning.category is RuntimeWarning]]
for command in commands:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = __main__.main(command)
        except SystemExit as stop:
            status = stop.code
    for stream in streams:
        stream.flush()
    said.append([status, *(stream.buffer.getvalue().decode("cp1252") for stream in streams)])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, bare_python):
    """The folder of the installed wheel."""
    tmp_path = tmp_path_factory.mktemp("elsewhere")
    built = Builder(tmp_path, bare_python).wheel(CONDENSE_BUILD_EXT="0")
    assert built.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(built).extractall(tmp_path / "installed")
    return tmp_path / "installed"


def run(wheel, system: str, commands: list[list[str]], absent=(), present=()):
    """The warnings of the import, and status, output and error of each command."""
    path = os.pathsep.join(map(str, (wheel, ROOT / "tests")))
    arguments = map(json.dumps, (system, commands, absent, present))
    done = python(
        *SAFE_PATH, "-X", "warn_default_encoding", "-c", RUN, *arguments, PYTHONPATH=path, TRITON_INTERPRET="0"
    )
    assert done.returncode == 0, done.stderr
    warned, *said = json.loads(done.stdout.splitlines()[-1])
    return warned, said


@pytest.mark.parametrize("system", SYSTEMS)
def test_beside_torch_alone_each_command_says_what_it_needs(wheel, system):
    examples = [example.split() for example in EXAMPLES]
    free = [[], ["--version"], ["--help"], ["env"], ["env", "--json"]]
    (warning,), said = run(wheel, system, [*free, *examples], absent=(*OPTIONAL, "yaml"))
    assert "it was not built: CONDENSE_BUILD_EXT=0 was set" in warning
    assert "elsewhere none is needed for the reference" in warning
    for command, (status, out, err) in zip(free, said[: len(free)], strict=True):
        assert (status, err) == (0, ""), command
        assert out, command
    assert "C++ kernels: not here. Triton: not here." in said[0][1]
    assert {"win32": "Windows", "darwin": "Darwin"}[system] in said[3][1]
    for command, (status, out, err) in zip(examples, said[len(free) :], strict=True):
        if command[0] != "env":
            assert (status, out, err.count("\n")) == (2, "", 1), (command, err)
            assert err.startswith(f"python -m condense_kernels {command[0]} needs "), err
            assert ": pip install " in err


@pytest.mark.parametrize("system", SYSTEMS)
def test_with_what_they_need_the_commands_run(wheel, system, tmp_path):
    commands = [
        ["check", "--quick"],
        ["demo", "--grid", "4", "--keep", "4", "--output", str(tmp_path / "demo.png")],
        ["completion", "bash"],
    ]
    present = ("matplotlib.figure", "PIL.Image", "rich.console", "shtab", "transformers")
    _, said = run(wheel, system, commands, present=present)
    assert [status for status, _, _ in said] == [0, 0, 0], said
    assert "checked is the reference" in said[0][1]
    assert (tmp_path / "demo.png").is_file()
    assert "condense-kernels" in said[2][1]


class Closed(io.StringIO):
    """A pipe that nobody reads, as Windows' C library has it."""

    def flush(self):
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize(("system", "status"), [("win32", 0), ("linux", 2)])
def test_a_closed_pipe_of_windows_is_no_mistake(monkeypatch, capsys, system, status):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert __main__.main([]) == status
    assert ("can't be written" in capsys.readouterr().err) == (status == 2)
