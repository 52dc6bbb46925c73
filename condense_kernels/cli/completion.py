"""print what makes a shell complete the commands and options of condense-kernels

For good, in bash: condense-kernels completion bash > ~/.local/share/bash-completion/completions/condense-kernels
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from . import need

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=SHELLS, help="whose")


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of the parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)


def run(arguments: argparse.Namespace) -> int:
    need("shtab", remedy="pip install 'condense-kernels[cli]'")
    import shtab

    from ..__main__ import build_parser

    parser = build_parser("condense-kernels")
    for action in actions_of(parser):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks
    print(shtab.complete(parser, arguments.shell))
    return 0
