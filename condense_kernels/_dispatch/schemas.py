"""The operators' schemas, written once, in ops/<op>/schema.txt: a paragraph an operator.

setup.py runs this file, too, and compiles the same text into the library. So it imports nothing but the standard
library, and nothing of this package.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable


def read(ops: Traversable) -> dict[str, str]:
    """Of the folder ``ops``: name -> "(arguments) -> returns", without line breaks."""
    schemas = {}
    for folder in sorted(ops.iterdir(), key=lambda folder: folder.name):
        if (file := folder / "schema.txt").is_file():
            for paragraph in file.read_text(encoding="utf-8").strip().split("\n\n"):
                name, bracket, rest = " ".join(paragraph.split()).partition("(")
                schemas[name] = bracket + rest
    return schemas
