"""Builds in a folder of their own: setup.py with the torch and the compiler that a case gives it."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from processes import ROOT

COMPILER = '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.so", "_not_built.txt")


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def source_tree(parent: Path) -> Path:
    """What a checkout has: the sources, and nothing that was built."""
    tree = parent / "tree"
    tree.mkdir()
    for name in (".ci", ".github", "benchmarks", "condense_kernels", "csrc", "docs", "hub", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=NOT_SOURCES)
    files = [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "AGENTS.md",
        "CITATION.cff",
        "mkdocs.yml",
        "SECURITY.md",
        ".clang-format",
        ".gitignore",
    ]
    for name in ("setup.py", "pyproject.toml", *files):
        shutil.copy(ROOT / name, tree)
    return tree


class Builder:
    """Runs setup.py with an interpreter that has setuptools and, unless it is None, some torch."""

    def __init__(self, folder: Path, interpreter: str):
        self.tree, self.interpreter, self.site = source_tree(folder), interpreter, folder / "site"
        self.compiler = script(folder / "compiler", COMPILER)
        packages = Path(importlib.util.find_spec("setuptools").origin).parent.parent
        self.site.mkdir()
        for path in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
            (self.site / path.name).symlink_to(path)

    def has_torch(self, version: str) -> None:
        (self.site / "torch").mkdir()
        (self.site / "torch" / "__init__.py").write_text(f"__version__ = {version!r}")

    def run(self, *arguments, **environment: str) -> subprocess.CompletedProcess:
        ours = ("CXX", "CXXFLAGS", "LDFLAGS", "CONDENSE_BUILD_EXT")
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        environment = {**kept, "CXX": self.compiler, "PYTHONPATH": str(self.site), **environment}
        command = [self.interpreter, "setup.py", *arguments]
        return subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)

    def wheel(self, **environment: str) -> Path:
        done = self.run("bdist_wheel", **environment)
        assert done.returncode == 0, done.stderr
        (wheel,) = (self.tree / "dist").iterdir()
        return wheel
