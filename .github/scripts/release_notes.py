"""Print the notes of a release, or refuse it: `python .github/scripts/release_notes.py v0.2.0 [path of the tree]`.

The tag has to be v and the version of the package, and CHANGELOG.md has to have a dated section of that version, above
all others but [Unreleased], with an entry in it. The notes are that section.
"""

import datetime
import re
import runpy
import sys
from pathlib import Path

HEADING = re.compile(r"^## \[?([^\]\s]+)\]?(?: - (.*))?$", re.MULTILINE)


def section(changelog: str, version: str) -> str:
    """What is below the heading of a version, up to the next one; raises ValueError where something is amiss."""
    headings = list(HEADING.finditer(changelog))
    names = [heading[1] for heading in headings]
    if names.count(version) != 1:
        raise ValueError(
            f"CHANGELOG.md: expected one section [{version}], got {names.count(version)} among {', '.join(names)}. "
            f"Remedy: rename [Unreleased] to [{version}] - {datetime.date.today()}, and begin a new [Unreleased]"
        )
    place = names.index(version)
    newer = [name for name in names[:place] if name.lower() != "unreleased"]
    if newer:
        raise ValueError(f"CHANGELOG.md: expected [{version}] to be the newest section, got {newer[0]} above it")
    date = headings[place][2] or ""
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"CHANGELOG.md: expected [{version}] - YYYY-MM-DD, got the date {date!r}") from None
    end = headings[place + 1].start() if place + 1 < len(headings) else len(changelog)
    text = changelog[headings[place].end() : end]
    text = re.sub(r"^\[[^\]]+\]: \S+$", "", text, flags=re.MULTILINE).strip()  # the links of headings at the file's end
    if not re.search(r"^- ", text, re.MULTILINE):
        raise ValueError(f"CHANGELOG.md: expected entries below [{version}], got none")
    return text


def notes(tag: str, root: Path) -> str:
    version = runpy.run_path(str(root / "condense_kernels" / "_version.py"))["__version__"]
    if tag != f"v{version}":
        raise ValueError(
            f"expected the tag v{version}, which is the version in condense_kernels/_version.py, got {tag!r}. Remedy: "
            "change the version and commit, or tag anew"
        )
    return section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: python {sys.argv[0]} TAG [ROOT]")
    try:
        print(notes(sys.argv[1], Path(sys.argv[2] if len(sys.argv) == 3 else ".")))
    except ValueError as error:
        sys.exit(f"not a release: {error}")
