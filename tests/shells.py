"""A shell on a terminal of its own, to type into: what its completion makes of a line."""

import os
import pty
import select
import time
from pathlib import Path

PROGRAM = "condense-kernels"
PROMPT = "READY:"
SECONDS = 60  # of a busy machine
# How each starts without what its user has set, and what it reads before the first line.
STARTED = {
    "zsh": (["zsh", "-f", "-i"], "PS1={prompt}; fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D"),
    "tcsh": (["tcsh", "-f", "-i"], "set prompt={prompt}; source {folder}/_{program}"),
}


class Terminal:
    """A child at the other end of a pseudo-terminal."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.shown = ""
        self.child, self.end = pty.fork()
        if self.child == 0:
            os.execvpe(command[0], command, {**os.environ, "TERM": "vt100", **environment})

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def read_until(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + SECONDS
        while self.shown.count(text) < times and time.monotonic() < end:
            if select.select([self.end], [], [], 0.1)[0]:
                self.shown += os.read(self.end, 65536).decode(errors="replace")

    def close(self) -> None:
        os.close(self.end)
        os.waitpid(self.child, 0)


def completed(shell: str, script: str, typed: str, folder: Path) -> str:
    """The arguments that PROGRAM gets from ``typed``, a tabulator and a return."""
    (folder / f"_{PROGRAM}").write_text(script)
    (folder / PROGRAM).write_text('#!/bin/sh\necho "GOT<$*>"\n')
    (folder / PROGRAM).chmod(0o755)
    command, setting = STARTED[shell]
    terminal = Terminal(command, PATH=f"{folder}:{os.environ['PATH']}")
    try:
        terminal.type(setting.format(prompt="'REA''DY:'", folder=folder, program=PROGRAM) + "\n")
        terminal.read_until(PROMPT)
        terminal.type(f"{PROGRAM} {typed}\t")
        terminal.type("\n")
        terminal.read_until(">", times=terminal.shown.count(">") + 1)
    finally:
        terminal.close()
    return terminal.shown.rpartition("GOT<")[2].partition(">")[0].strip()
