"""What the commands share."""

import difflib
import importlib.util
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

PLAIN_WIDTH = 118  # of the tables where standard output is a file or a pipe


class CommandError(Exception):
    """A mistake of the user, told in one line; the exit status is 2."""


class MissingPackage(CommandError):
    """Something of an extra is not installed."""

    def __init__(self, *packages: str, remedy: str = ""):
        self.packages = packages
        remedy = remedy or f"pip install {' '.join(packages)}"
        super().__init__(f"needs {', '.join(packages)}: {remedy}")


def need(*packages: str, remedy: str = "") -> None:
    """Raise MissingPackage of those packages that are not installed; ``packages`` are import names."""
    missing = [{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name) for name in packages if not is_installed(name)]
    if missing:
        raise MissingPackage(*missing, remedy=remedy)


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules[package] is None
        return False


def meant(name: str, known: Iterable[str]) -> str:
    """What was probably meant, to put behind an error; nothing where no name is near."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_outputs(csv: "Path | None", figure: "Path | None") -> None:
    """Of --csv and --figure, before anything is measured."""
    for name, path in (("csv", csv), ("figure", figure)):
        if path is not None and not path.resolve().parent.is_dir():
            raise CommandError(f"--{name}: no such folder: {path.parent}")
        if path is not None and path.is_dir():
            raise CommandError(f"--{name}: expected a file, got a folder: {path}")
    if figure is not None and figure.suffix.lower() != ".png":
        raise CommandError(f"--figure: expected a name that ends in .png, got {figure}")


def make_console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def make_progress() -> "Progress":
    """A bar on standard error that leaves nothing behind: standard output holds the tables alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=30), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
