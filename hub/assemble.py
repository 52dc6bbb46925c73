"""Assembles this tree as Hugging Face's `kernels` loads it and as its kernel-builder builds it (docs/hub.md).

    python hub/assemble.py [--output build/hub] [--no-compile]

source/cpu, source/triton   two projects of kernel-builder: build.toml, torch-ext/, and csrc/ of the first
repository/                 what get_local_kernel takes, and what would be uploaded: build/<variant>/
"""

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
HUB = ROOT / "hub"
PACKAGE = ROOT / "condense_kernels"
NAME = "condense_kernels"
VERSION = re.search('"(.*)"', (PACKAGE / "_version.py").read_text())[1]

FOLDERS = ("_dispatch", "_triton", "ops", "methods")
# A kernel has no command line; warm_up draws its bar by rich, and a kernel imports nothing but torch and Triton.
LEFT_OUT = ("__main__.py", "warming.py")
NOT_IN_INIT = "from .warming import"

NOARCH_BACKENDS = ("cpu", "cuda")
STABLE_ABI = re.search('stable-abi = "(.*)"', (HUB / "build.toml").read_text())[1]
CPU_VARIANT = f"torch-stable-abi{STABLE_ABI.replace('.', '')}-cpu-{platform.machine()}-{platform.system().lower()}"

INIT = """
from . import layers as layers
from . import methods as methods
"""
NAMESPACE = '''"""Where torch knows the operators of this build, and which file brings them."""

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").rstrip(":")
FILE = f"{NAMESPACE}.abi3.so"
'''
OPS = '''"""The operators of this build, whose namespace no other build has."""

import torch

ops = torch.ops.@ID@


def add_op_namespace_prefix(op_name: str) -> str:
    return f"@ID@::{op_name}"
'''
# Old releases of kernels look for a folder of the kernel's name.
OLD_LAYOUT = '''"""For old releases of kernels: the package is one folder up."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("@ID@", _path)
_module = sys.modules.get("@ID@")
if _module is None:
    _module = sys.modules["@ID@"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
globals().update({name: value for name, value in vars(_module).items() if not name.startswith("__")})
'''
NOT_BUILT = (
    "this variant is Python and Triton, without C++. Remedy: for CPU tensors on Linux, the variant that is compiled, "
    'backend="cpu"\n'
)


def shipped() -> dict[str, str]:
    """Every file of the package in a kernel, by its path there."""
    paths = [path for path in PACKAGE.glob("*.py") if path.name not in LEFT_OUT]
    paths += [path for folder in FOLDERS for path in (PACKAGE / folder).rglob("*") if path.suffix in (".py", ".txt")]
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    lines = files["__init__.py"].splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(NOT_IN_INIT)]
    if len(kept) != len(lines) - 1:
        raise SystemExit(f"hub/assemble.py: expected one line of __init__.py to begin with {NOT_IN_INIT!r}")
    files["__init__.py"] = "".join(kept) + INIT
    files["_dispatch/namespace.py"] = NAMESPACE
    files["layers.py"] = (HUB / "layers.py").read_text(encoding="utf-8")
    files["_python39.py"] = (HUB / "python39.py").read_text(encoding="utf-8")
    for path, text in files.items():
        if path.endswith(".py") and path != "_python39.py":
            files[path] = for_python_39(text, depth=path.count("/"))
    return dict(sorted(files.items()))


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns


def for_python_39(text: str, depth: int) -> str:
    """Two imports, where they are needed: annotations as text, which may have X | Y, and a zip that has strict=."""
    tree = ast.parse(text)
    unions = any(isinstance(node, ast.BitOr) for found in annotations(tree) for node in ast.walk(found))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    zips = any(keyword.arg == "strict" for call in calls for keyword in call.keywords)
    after = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
    future = next(
        (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"), None
    )
    lines = text.splitlines(keepends=True)
    if zips:
        where = after if future is None else future.end_lineno
        lines.insert(where, f"\nfrom {'.' * (depth + 1)}_python39 import zip\n")
    if unions and future is None:
        lines.insert(after, "\nfrom __future__ import annotations\n")
    return "".join(lines)


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def card() -> str:
    return (HUB / "README.md").read_text(encoding="utf-8")


def sources() -> dict[str, dict[str, str]]:
    """The files of both projects."""
    major = VERSION.split(".")[0]
    csrc = {f"csrc/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").iterdir())}
    csrc["csrc/schemas.h"] = schemas_header()
    listed = "\n".join(f'    "{path}",' for path in csrc)
    package = {f"torch-ext/{NAME}/{path}": text for path, text in shipped().items()}
    both = {"flake.nix": (HUB / "flake.nix").read_text(), "CARD.md": card(), **package}
    binding = {"torch-ext/torch_binding.cpp": (HUB / "torch_binding.cpp").read_text()}
    cpu = (HUB / "build.toml").read_text().replace("@VERSION@", major).replace("@SOURCES@", listed)
    noarch = (HUB / "build-noarch.toml").read_text().replace("@VERSION@", major)
    note = {f"torch-ext/{NAME}/_not_built.txt": NOT_BUILT}
    return {
        "cpu": {"build.toml": cpu, **both, **binding, **csrc},
        "triton": {"build.toml": noarch, **both, **note},
    }


def schemas_header() -> str:
    read = runpy.run_path(str(PACKAGE / "_dispatch" / "schemas.py"))["read"]
    lines = [f'    R"({name}{schema})",' for name, schema in read(PACKAGE / "ops").items()]
    return "\n".join(["namespace condense {", "constexpr const char* kSchemas[] = {", *lines, "};", "}", ""])


def unique(projects: dict[str, dict[str, str]]) -> str:
    """Of what is built: another file, another name."""
    digest = hashlib.sha256(json.dumps(projects, sort_keys=True).encode())
    return digest.hexdigest()[:10]


def compile_library(namespace: str, library: Path) -> None:
    """By setup.py; the C++ namespace and torch's are one word."""
    flags = f"-Dcondense={namespace} {os.environ.get('CXXFLAGS', '')}"
    environment = {**os.environ, "CXXFLAGS": flags, "CONDENSE_BUILD_EXT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}{done.stderr}\nRemedy: mend the build, or --no-compile.")
        shutil.move(Path(folder, NAME, "_C.abi3.so"), library)


def add_metadata(variant: Path, name: str, backend: str) -> None:
    hashes = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": name,
        "version": int(VERSION.split(".")[0]),
        "license": "Apache-2.0",
        "upstream": re.search('upstream = "(.*)"', (HUB / "build.toml").read_text())[1],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def assemble(output: Path, *, compiled: bool = True) -> list[Path]:
    """Write both layouts into ``output``, in the place of earlier ones; return the variants' folders."""
    if output.exists() and not {path.name for path in output.iterdir()} <= {"source", "repository"}:
        raise SystemExit(
            f"--output: expected a new folder, or an earlier output, got {output}, which holds other files."
        )
    for layout in ("source", "repository"):
        shutil.rmtree(output / layout, ignore_errors=True)
    projects = sources()
    for project, files in projects.items():
        write(output / "source" / project, files)
    write(output / "repository", {"README.md": card()})
    variants = {f"torch-{backend}": (backend, {"_not_built.txt": NOT_BUILT}) for backend in NOARCH_BACKENDS}
    if compiled:
        variants[CPU_VARIANT] = ("cpu", {})
    for variant, (backend, more) in variants.items():
        folder = output / "repository" / "build" / variant
        name = f"_{NAME}_{backend}_{unique(projects)}" + ("" if variant == CPU_VARIANT else "_py")
        own = {"_ops.py": OPS, f"{NAME}/__init__.py": OLD_LAYOUT}
        write(folder, {**shipped(), **more, **{path: text.replace("@ID@", name) for path, text in own.items()}})
        if variant == CPU_VARIANT:
            compile_library(name, folder / f"{name}.abi3.so")
        add_metadata(folder, name, backend)
    return [output / "repository" / "build" / variant for variant in variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "hub", help="a new folder, or an earlier output"
    )
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="without the C++ variant")
    options = parser.parse_args()
    for variant in assemble(options.output.resolve(), compiled=options.compiled):
        print(variant)


if __name__ == "__main__":
    main()
