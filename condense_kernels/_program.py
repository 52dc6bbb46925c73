"""What a program does while it imports this package, and with it torch, before __main__ has a say.

A wrong environment variable, a torch that is missing and Ctrl-C are one line from here on, and a terminal is told what
takes so long. A process that imports the package for another purpose is left alone.
"""

import contextlib
import re
import sys
from pathlib import Path
from types import TracebackType

PROGRAM = "python -m condense_kernels"
INTERRUPTED = 130  # the exit status, as shells have it
PATIENCE = 1.0  # seconds
NOTE = "importing torch ..."
OURS = ("CONDENSE_", "condense_kernels ")  # how errors begin that are raised while this package is imported


def is_this_process() -> bool:
    """Of ``python -m``, which has not yet replaced "-m" in sys.argv, or of the installed script."""
    argv: list[str] = getattr(sys, "argv", [])
    if argv[:1] == ["-m"]:
        return re.fullmatch(f"(-[A-Za-z]*m)?{__package__}", sys.orig_argv[-len(argv)]) is not None
    return bool(argv) and Path(argv[0]).stem == "condense-kernels"


def tell(text: str) -> None:
    """A line on standard error, where somebody takes it."""
    if sys.stderr is not None:  # or print takes standard output
        with contextlib.suppress(OSError):
            print(text.replace("\n", " "), file=sys.stderr, flush=True)


class Patience:
    """NOTE on a terminal, from a second on until what takes so long is done."""

    def __init__(self) -> None:
        import threading

        self.shown = False
        self.timer = threading.Timer(PATIENCE, self.show)
        self.timer.daemon = True
        self.timer.start()

    def show(self) -> None:
        self.shown = True
        sys.stderr.write(f"{NOTE}\r")
        sys.stderr.flush()

    def end(self) -> None:
        self.timer.cancel()
        self.timer.join()
        if self.shown:
            sys.stderr.write(f"{' ' * len(NOTE)}\r")
            sys.stderr.flush()


patience: Patience | None = None


def imported() -> None:
    """To be called by what comes after the import."""
    global patience
    if patience is not None:
        patience.end()
    patience = None


def told(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Instead of sys.excepthook."""
    imported()
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(INTERRUPTED)
    if isinstance(error, ImportError | ValueError) and str(error).startswith(OURS):
        tell(f"{PROGRAM}: error: {error}")
        raise SystemExit(2)
    sys.__excepthook__(kind, error, traceback)


if is_this_process():
    sys.excepthook = told
    if sys.stderr is not None and sys.stderr.isatty():
        patience = Patience()
