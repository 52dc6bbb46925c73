"""Assembles this tree as Hugging Face's `kernels` loads it, and as its kernel-builder builds it: docs/hub.md.

    python hub/assemble.py [--output build/hub] [--no-compile]

source/cpu, source/triton   projects of kernel-builder: build.toml, torch-ext/, and csrc/ in the first
repository/                 what get_local_kernel takes and what would be uploaded: build/<variant>/
"""

import argparse
import ast
import base64
import functools
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
NAME = PACKAGE.name

FOLDERS = ("_dispatch", "_triton", "ops", "methods")
# A kernel has no command line, and warm_up draws its bar by rich: a kernel imports nothing but torch and Triton.
LEFT_OUT = ("__main__.py", "_program.py", "warming.py")
LEFT_OUT_OF_INIT = ("from . import _program", "from .warming import")
IN_INIT = "\nfrom . import layers as layers\nfrom . import methods as methods\n"

NOARCH = {"torch-cpu": "cpu", "torch-cuda": "cuda"}  # variant: backend
NOT_BUILT = (
    "this variant is Python and Triton, without C++. Remedy: for CPU tensors on Linux, the variant that is compiled, "
    'backend="cpu"\n'
)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def files_of(folder: Path, *suffixes: str) -> dict[str, str]:
    """Path in ``folder`` -> text."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in suffixes)
    return {path.relative_to(folder).as_posix(): text_of(path) for path in found}


CONFIG = text_of(HUB / "build.toml")
STABLE_ABI = re.search('stable-abi = "(.*)"', CONFIG)[1].replace(".", "")
CPU_VARIANT = f"torch-stable-abi{STABLE_ABI}-cpu-{platform.machine()}-{platform.system().lower()}"
VERSION = int(re.search('"(.*?)[.]', text_of(PACKAGE / "_version.py"))[1])  # the major one, as the hub counts


@functools.cache
def package() -> dict[str, str]:
    """Every file of the package in a kernel, by its path there."""
    files = {path: text for path, text in files_of(PACKAGE, ".py", ".txt").items() if is_shipped(path)}
    lines = files["__init__.py"].splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(LEFT_OUT_OF_INIT)]
    if len(kept) != len(lines) - len(LEFT_OUT_OF_INIT):
        raise SystemExit(f"hub/assemble.py: expected one line of __init__.py to begin with each of {LEFT_OUT_OF_INIT}.")
    files["__init__.py"] = "".join(kept) + IN_INIT
    files.update(files_of(HUB / "package", ".py"))
    return {path: for_python_39(path, text) if path.endswith(".py") else text for path, text in files.items()}


def is_shipped(path: str) -> bool:
    folder, slash, _ = path.partition("/")
    return folder in FOLDERS if slash else path.endswith(".py") and path not in LEFT_OUT


def for_python_39(path: str, text: str) -> str:
    """Two imports, where they are needed: annotations as text, which may have X | Y, and a zip that knows strict=."""
    tree = ast.parse(text)
    unions = any(isinstance(node, ast.BitOr) for found in annotations(tree) for node in ast.walk(found))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    zips = any(keyword.arg == "strict" for call in calls for keyword in call.keywords)
    after_docstring = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    future = next((node.end_lineno for node in imports if node.module == "__future__"), None)
    lines = text.splitlines(keepends=True)
    if zips and path != "_python39.py":
        lines.insert(future or after_docstring, f"\nfrom {'.' * (path.count('/') + 1)}_python39 import zip\n")
    if unions and future is None:
        lines.insert(after_docstring, "\nfrom __future__ import annotations\n")
    return "".join(lines)


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns


def projects() -> dict[str, dict[str, str]]:
    """The files of both projects of kernel-builder, which adds _ops.py and registration.h."""
    csrc = {f"csrc/{path}": text for path, text in files_of(ROOT / "csrc", ".cpp", ".h").items()}
    csrc["csrc/schemas.h"] = schemas()
    sources = "\n".join(f'    "{path}",' for path in csrc)
    cpu = CONFIG.replace("@VERSION@", str(VERSION)).replace("@SOURCES@", sources)
    triton = text_of(HUB / "build-noarch.toml").replace("@VERSION@", str(VERSION))
    both = {f"torch-ext/{NAME}/{path}": text for path, text in package().items()}
    both |= {"flake.nix": text_of(HUB / "flake.nix"), "CARD.md": text_of(HUB / "README.md")}
    binding = {"torch-ext/torch_binding.cpp": text_of(HUB / "torch_binding.cpp")}
    return {
        "cpu": {"build.toml": cpu, **both, **binding, **csrc},
        "triton": {"build.toml": triton, **both, f"torch-ext/{NAME}/_not_built.txt": NOT_BUILT},
    }


def schemas() -> str:
    """As setup.py writes them."""
    read = runpy.run_path(str(PACKAGE / "_dispatch" / "schemas.py"))["read"]
    lines = [f'    R"({name}{schema})",' for name, schema in read(PACKAGE / "ops").items()]
    return "\n".join(["namespace condense {", "constexpr const char* kSchemas[] = {", *lines, "};", "}", ""])


def identifiers(sources: dict[str, dict[str, str]]) -> dict[str, str]:
    """Of each variant its operators' namespace, which one other byte anywhere would change."""
    everything = json.dumps([sources, files_of(HUB / "built", ".py")], sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()[:10]
    noarch = {variant: f"_{NAME}_{backend}_{digest}_py" for variant, backend in NOARCH.items()}
    return {**noarch, CPU_VARIANT: f"_{NAME}_cpu_{digest}"}


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def compile_library(identifier: str, library: Path) -> None:
    """By setup.py. The C++ code's namespace and torch's are one word, so that one macro renames both."""
    flags = f"-Dcondense={identifier} {os.environ.get('CXXFLAGS', '')}"
    environment = {**os.environ, "CXXFLAGS": flags, "CONDENSE_BUILD_EXT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}{done.stderr}Remedy: --no-compile assembles what needs no compiler.")
        shutil.move(Path(folder, NAME, "_C.abi3.so"), library)


def add_metadata(variant: Path, identifier: str, backend: str) -> None:
    hashes = {}
    for path in sorted(path for path in variant.rglob("*") if path.is_file()):
        digest = hashlib.sha256(path.read_bytes()).digest()
        hashes[path.relative_to(variant).as_posix()] = base64.b64encode(digest).decode()
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "upstream": re.search('upstream = "(.*)"', CONFIG)[1],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def assemble(output: Path, *, compiled: bool = True) -> list[Path]:
    """Write both layouts into ``output``, in the place of earlier ones; return the variants' folders."""
    if output.exists() and not (output.is_dir() and set(os.listdir(output)) <= {"source", "repository"}):
        raise SystemExit(f"--output: expected a new folder or an earlier output, got {output}, another thing.")
    for layout in ("source", "repository"):
        shutil.rmtree(output / layout, ignore_errors=True)
    sources = projects()
    for project, files in sources.items():
        write(output / "source" / project, files)
    write(output / "repository", {"README.md": text_of(HUB / "README.md")})
    variants = []
    for variant, identifier in identifiers(sources).items():
        if variant in NOARCH or compiled:
            folder = output / "repository" / "build" / variant
            built = {path: text.replace("@ID@", identifier) for path, text in files_of(HUB / "built", ".py").items()}
            write(folder, package() | built)
            if variant in NOARCH:
                write(folder, {"_not_built.txt": NOT_BUILT})
            else:
                compile_library(identifier, folder / f"{identifier}.abi3.so")
            add_metadata(folder, identifier, NOARCH.get(variant, "cpu"))
            variants.append(folder)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "build" / "hub"
    parser.add_argument("--output", type=Path, default=default, help="a new folder or an earlier output [build/hub]")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave out the C++ variant")
    options = parser.parse_args()
    for variant in assemble(options.output.resolve(), compiled=options.compiled):
        print(variant)


if __name__ == "__main__":
    main()
