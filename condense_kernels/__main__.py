"""python -m condense_kernels: see what the operators do, check them on this machine, describe the machine."""

import argparse
import errno
import io
import os
import sys
from types import ModuleType
from typing import NoReturn

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

PROGRAM = "python -m condense_kernels"
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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    examples = {name: example for group in start.GROUPS.values() for name, (_, example) in group.items()}
    parser = Parser(prog=program, description=(__doc__ or "").partition(": ")[2].capitalize())
    parser.add_argument("--version", action="version", version=f"condense_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=False, metavar=f"{{{','.join(COMMANDS)}}}")
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
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit status. A closed pipe behind us (| head) is no error, a full disk is one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that has no ± of its own
    try:
        status = dispatch(argv)
        sys.stdout.flush()
        return status
    except OSError as error:
        if is_closed_pipe(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains of it once more at its end
            return 0
        if error.filename is not None:
            print(f"{PROGRAM}: error: {error.filename}: {error.strerror or error}", file=sys.stderr)
            return 2
        print(f"{PROGRAM}: error: standard output can't be written: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 2


def is_closed_pipe(error: OSError) -> bool:
    of_windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or of_windows


def dispatch(argv: list[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.command is None:
        print(start.screen(PROGRAM), end="")
        return 0
    try:
        return arguments.run(arguments)
    except MissingPackage as error:
        print(f"{PROGRAM} {arguments.command} {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
