"""What the commands share."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

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


def check_output(option: str, path: Path | None, suffix: str = "") -> None:
    """Of a file to be written, before anything is measured. None: not asked for."""
    if path is None:
        return
    if path.suffix.lower() != suffix and suffix:
        raise CommandError(f"{option}: expected a name that ends in {suffix}, got {path}")
    if path.is_dir():
        raise CommandError(f"{option}: expected a file, got a folder: {path}")
    if not path.parent.is_dir():
        raise CommandError(f"{option}: no such folder: {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"{option}: {path} can't be written: Permission denied")


def on_terminal() -> bool:
    """Whether somebody sees standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def make_console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def print_table(console: "Console", table: "Table") -> None:
    """Where a terminal is too narrow, lines are longer than it: rich would cut the numbers."""
    from rich.measure import Measurement

    for column in table.columns:
        found = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
        column.min_width = max(cell.maximum if column.no_wrap else cell.minimum for cell in found)
    console.print(table, crop=False)


def make_progress() -> "Progress":
    """A bar on standard error that leaves nothing behind: standard output holds the tables alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=30), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not on_terminal())


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A bar while something runs that does not say how far it is. Without a terminal rich is not needed."""
    if not on_terminal():
        yield
        return
    with make_progress() as progress:
        progress.add_task(what, total=None)
        yield
