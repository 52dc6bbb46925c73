"""python -m condense_kernels: see what the operators do, check them on this machine, describe the machine."""

import argparse
import contextlib
import errno
import io
import os
import sys
from types import ModuleType
from typing import Any, TextIO

from . import _program
from ._program import INTERRUPTED, PROGRAM, tell
from ._version import __version__
from .cli import (
    CommandError,
    MissingPackage,
    check,
    compare,
    compare_answers,
    completion,
    demo,
    env,
    report,
    reproduce,
    show,
    start,
)
from .cli.arguments import Parser

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "show": show,
    "compare": compare,
    "compare-answers": compare_answers,
    "report": report,
    "reproduce": reproduce,
    "check": check,
    "env": env,
    "completion": completion,
}


class NotWritten(Exception):
    """Standard output took no more. It is no OSError: those may be of any other file."""


class Output:
    """Standard output, whose errors are told from others."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def write(self, text: str) -> int:
        return self.guarded("write", text)

    def flush(self) -> None:
        self.guarded("flush")

    def guarded(self, what: str, *given: str) -> Any:
        if self.stream is None:
            raise NotWritten("it is closed")
        try:
            return getattr(self.stream, what)(*given)
        except OSError as error:
            raise NotWritten(error.strerror or str(error)) from error


def build_parser(program: str = PROGRAM) -> Parser:
    examples = {name: example for group in start.GROUPS.values() for name, (_, example) in group.items()}
    parser = Parser(prog=program, description=(__doc__ or "").partition(": ")[2].capitalize())
    parser.add_argument("--version", action="version", version=f"condense_kernels {__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(dest="command", required=False, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n", 1)[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=f"example:\n  {PROGRAM} {examples[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit status. A closed pipe behind us (| head) is no error, a full disk is one."""
    _program.imported()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that has no ± of its own
    output = Output(sys.stdout)
    try:
        with contextlib.redirect_stdout(output):
            status = dispatch(argv)
            output.flush()
        return status
    except NotWritten as error:
        if output.stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains of it once more at its end
        if is_closed_pipe(error.__cause__):
            return 0
        tell(f"{PROGRAM}: error: standard output can't be written: {error}")
    except OSError as error:
        named = "" if error.filename is None else f"{error.filename}: "
        tell(f"{PROGRAM}: error: {named}{error.strerror or error}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 2


def is_closed_pipe(error: BaseException | None) -> bool:
    of_windows = sys.platform == "win32" and isinstance(error, OSError) and error.errno == errno.EINVAL
    return of_windows or isinstance(error, BrokenPipeError)


def dispatch(argv: list[str] | None) -> int:
    try:
        arguments, unknown = build_parser().parse_known_args(argv)
        if unknown:
            arguments.parser.refuse(unknown[0])
    except SystemExit as stop:  # of --help, --version and mistakes
        return int(stop.code or 0)
    if arguments.command is None:
        print(start.screen(PROGRAM), end="")
        return 0
    try:
        return arguments.run(arguments)
    except MissingPackage as error:
        tell(f"{PROGRAM} {arguments.command} {error}")
    except CommandError as error:
        tell(f"{PROGRAM} {arguments.command}: error: {error}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
