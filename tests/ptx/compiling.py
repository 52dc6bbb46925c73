"""PTX of a kernel for a GPU that need not be here. It is kept by what it is compiled from, in build/ptx."""

import functools
import hashlib
import os
import pathlib
import tempfile

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from .engine import BUILT

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}


def ptx_of(kernel, source: ASTSource, options: dict, target: str) -> tuple[str, int]:
    """The text, and how many bytes of shared memory a CTA has."""
    # The source with the functions that it calls and their constants, and what Triton makes of the arguments.
    key = (triton.__version__, kernel.cache_key, source.signature, source.constants, source.attrs, options, target)
    name = f"{kernel.__name__}-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.ptx"
    path = BUILT / target / name
    if not path.exists():
        text, shared = compile_to_ptx(source, options, TARGETS[target])
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as partial:
            partial.write(f"// {shared} bytes of shared memory\n{text}")
        os.replace(partial.name, path)  # other processes see all of it, or nothing
    return read(path)


@functools.lru_cache(maxsize=1024)
def read(path: pathlib.Path) -> tuple[str, int]:
    first, text = path.read_text().split("\n", 1)
    return text, int(first.split()[1])


def compile_to_ptx(source: ASTSource, options: dict, target: GPUTarget) -> tuple[str, int]:
    """As triton.compile, which would go on to ptxas: half of its time."""
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, functions, modules, context)
    stages: dict = {}
    backend.add_stages(stages, parsed, source.language)
    metadata = {"target": target, **vars(parsed)}
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[name](module, metadata)
    return module, metadata["shared"]
