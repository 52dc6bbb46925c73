"""What the package uses of Python 3.10 and Python 3.9 lacks: zip(strict=)."""

# ruff: noqa: B905, UP036  (the oldest Python of the project itself is newer)

import builtins
import sys

if sys.version_info >= (3, 10):
    zip = builtins.zip
else:

    def zip(*iterables, strict=False):
        if not strict:
            return builtins.zip(*iterables)
        columns = [list(iterable) for iterable in iterables]
        if len({len(column) for column in columns}) > 1:
            raise ValueError("zip(): expected iterables of one length")
        return builtins.zip(*columns)
