"""python -m condense_kernels: see what the operators do, check them on this machine, describe the machine."""

import argparse
import sys
from types import ModuleType
from typing import NoReturn

from .cli import CommandError, MissingPackage, check, compare, compare_answers, demo, env, report, reproduce, show

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
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").partition(": ")[2].capitalize())
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n", 1)[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
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
