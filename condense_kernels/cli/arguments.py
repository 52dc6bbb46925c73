"""Arguments as every command reads them: numbers within bounds, and names of which a misspelt one is told."""

import argparse
import difflib
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from .. import _program
from . import CommandError

MANY = 100_000  # above every sensible number of pictures, rounds and the like
LARGEST_SEED = 2**63 - 1
SHOWN = 40  # characters of what came


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that say what was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def refuse(self, unknown: str) -> NoReturn:
        """Of an argument that no option and no position takes."""
        name = unknown.partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown argument {shortened(unknown)!r}{meant(name, options) if name.startswith('-') else ''}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, mismatch(value, list(action.choices), "one"))

    def _print_message(self, message: str, file: Any = None) -> None:  # argparse's own hides a full disk
        if file is None:
            _program.tell(message.rstrip("\n"))
        elif message:
            file.write(message)


def meant(name: str, known: Iterable[str]) -> str:
    """What was probably meant, to put behind an error; nothing where no name is near."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def mismatch(name: str, known: Collection[str], how_many: str = "some", also: Iterable[str] = ()) -> str:
    """``also``: other names that are understood, and not listed."""
    return f"expected {how_many} of {', '.join(known)}, got {shortened(name)!r}{meant(name, (*known, *also))}"


def check_name(option: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise CommandError(f"{option}: {mismatch(name, known)}")


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def whole(low: int, high: int = MANY) -> Callable[[str], int]:
    """A type of argparse: a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {shortened(text)!r}")
        return value

    return read


def decimal(low: float, high: float) -> Callable[[str], float]:
    """A type of argparse: a number from ``low`` to ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {shortened(text)!r}")
        return value

    return read


def count_or_ratio(text: str) -> int | float:
    """A type of argparse, as ``keep`` of condense: 64, or 0.25."""
    for form in (int, float):
        try:
            value = form(text)
        except ValueError:
            continue
        if (form is int and value >= 1) or 0 < value <= 1:
            return value
        break
    raise argparse.ArgumentTypeError(f"expected a count or a ratio in (0, 1], got {shortened(text)!r}")
