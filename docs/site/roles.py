"""Docstrings refer to each other as Sphinx has it, :func:`merge`: links here, and words where it is not on the site."""

import re

import api
import griffe

ROLE = re.compile(r":func:`([\w.]+)(\(.*?\))?`")


class Roles(griffe.Extension):
    def __init__(self) -> None:
        self.anchors = api.anchors()

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(self.link, obj.docstring.value)

    def link(self, found: re.Match) -> str:
        anchor = self.anchors.get(found[1].rpartition(".")[2])
        words = f"`{found[1]}{found[2] or ''}`"
        return f"[{words}][{anchor}]" if anchor else words
