"""python -m condense_kernels completion: what bash, zsh and tcsh make of a line that is typed into them."""

import shlex
import shutil
import subprocess
import sys

import pytest
import shells
from processes import SAFE_PATH
from test_cli import run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("comp", {"compare", "compare-answers", "completion"}),
        ("compare --fi", {"--figure"}),
        ("compare --on ", {"dinov2", "tiny"}),
    ],
)
def test_bash_completes(capsys, words, expected):
    status, script, _ = run(capsys, "completion", "bash")
    assert status == 0
    typed = ["condense-kernels", *words.split(" ")]
    asked = f"COMP_WORDS=({shlex.join(typed)}); COMP_CWORD={len(typed) - 1}"
    text = f'{script}\n{asked}; _shtab_condense_kernels; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.fixture(scope="module")
def script():
    """By shell."""
    found = {}

    def of(shell: str) -> str:
        if shell not in found:
            command = [sys.executable, *SAFE_PATH, "-m", "condense_kernels", "completion", shell]
            found[shell] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return found[shell]

    return of


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("compare-a", "compare-answers"),
        ("compare --fi", "compare --figure"),
        ("report --clock w", "report --clock wall"),
        ("completion z", "completion zsh"),
        ("demo pic", "demo picture.png"),
    ],
)
@pytest.mark.parametrize("shell", list(shells.STARTED))
def test_a_shell_on_a_terminal_completes(tmp_path, monkeypatch, script, shell, typed, expected):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").touch()
    assert shells.completed(shell, script(shell), typed, tmp_path) == expected


def test_completion_needs_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, err = run(capsys, "completion", "zsh")
    assert (status, out) == (2, "")
    assert err == "python -m condense_kernels completion needs shtab: pip install 'condense-kernels[cli]'\n"
