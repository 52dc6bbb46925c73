"""Docstrings as the site shows them: references as links, Returns as a list of results, defaults by their values."""

import re
import sys
import textwrap

import api
import griffe

ROLE = re.compile(r":func:`([\w.]+)(\(.*?\))?`")
RETURNS = re.compile(r"^Returns:\n((?:[ ]+.*\n?|\n)+)", re.M)
RESULT = re.compile(r"(\w+): ")


class Roles(griffe.Extension):
    def __init__(self) -> None:
        self.anchors = api.anchors()

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(self.link, obj.docstring.value)
            obj.docstring.value = RETURNS.sub(lambda found: results(found[1]), text)

    def on_function_instance(self, *, func: griffe.Function, **_) -> None:
        module = sys.modules.get(func.module.path)  # of public names it was imported for their anchors
        for parameter in func.parameters:
            value = getattr(module, str(parameter.default), None)
            if isinstance(value, int | float | str):
                parameter.default = repr(value)

    def link(self, found: re.Match) -> str:
        """As Sphinx writes it, :func:`merge`: a link here, and words where it is not on the site."""
        anchor = self.anchors.get(found[1].rpartition(".")[2])
        words = f"`{found[1]}{found[2] or ''}`"
        return f"[{words}][{anchor}]" if anchor else words


def results(section: str) -> str:
    """Markdown of a section Returns, in which griffe takes each line for a result and gives it a type by its place."""
    lines = ['<span class="doc-section-title">Returns:</span>', ""]
    listing = False
    for line in textwrap.dedent(section).splitlines():
        result = RESULT.match(line)
        if result and not listing and lines[-1]:
            lines.append("")
        listing = bool(line) and (listing or bool(result))
        lines.append(f"- `{result[1]}`: {line[result.end() :]}" if result else line.strip())
    return "\n".join(lines).rstrip() + "\n\n"
