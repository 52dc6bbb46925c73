"""A launch while torch traces: a node of the graph that Inductor compiles, in the place of the operator.

torch.library.wrap_triton makes the node. What torch 2.13 makes of it would not be the launch, so it gets the kernel in
another form:

- It finds out which tensors a kernel writes by walking every path through its code, of which a pick loop has more than
  can be walked. It is shown a kernel of the same arguments that touches what this one does and computes nothing.
- It drops enable_fp_fusion=False, and a fused multiply-add rounds once where the contract has two roundings. The text
  that it compiles says so itself.
- It passes a float as fp64, in which the scores would be computed, and specialises sizes whatever do_not_specialize
  says: 1 is a constant. The text begins by making them what a launch makes them.
"""

import ast
import contextlib
import functools
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch

LAUNCHERS = __package__.rpartition(".")[0] + ".ops."
_is_on: ContextVar[bool] = ContextVar("traced", default=False)

# Behind the kernel in the module that Inductor makes of it. Which sizes are multiples of 16 is not said, either.
AS_LAUNCHED = """

_kernels = [value for value in globals().values() if isinstance(value, triton_heuristics.CachingAutotuner)]
if not _kernels:
    raise RuntimeError("condense_kernels: this torch compiles kernels in another way. Remedy: {remedy}.")
for _kernel in _kernels:
    _kernel.triton_meta["enable_fp_fusion"] = False
    for _place in {places}:
        _kernel.triton_meta["configs"][0].pop((_place,), None)
"""
REMEDY = "torch._functorch.config.decompose_custom_triton_ops = False"


def is_on() -> bool:
    return _is_on.get()


@contextlib.contextmanager
def on() -> Iterator[None]:
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


def launch(kernel: Any, grid: tuple, args: tuple, options: dict[str, Any]) -> None:
    """As launcher.launch, into the graph."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    compiled_with = {name: given.pop(name) for name in options if name not in kernel.arg_names}
    if compiled_with.pop("enable_fp_fusion", True):
        raise RuntimeError(f"{kernel.__name__}: a kernel in a graph is compiled with enable_fp_fusion=False.")
    given = {name: getattr(value, "value", value) for name, value in given.items()}  # of a tl.constexpr
    written = tuple(name for name in _written_by(kernel) if _is_first(name, given))
    floats = tuple(name for name, value in given.items() if isinstance(value, float))
    shown = _configured(kernel, written, floats, tuple(compiled_with.items()))
    torch.library.wrap_triton(shown)[(*grid, 1, 1)[:3]](**given)


def _is_first(name: str, given: dict[str, Any]) -> bool:
    """Whether an argument is meant: one that was left out is another's tensor, in its place and never touched."""
    tensor = given[name]
    return tensor is not None and next(other for other, value in given.items() if value is tensor) == name


@functools.cache
def _configured(kernel: Any, written: tuple[str, ...], floats: tuple[str, ...], options: tuple) -> Any:
    """With options, as wrap_triton wants them; made once, so that the same kernel is the same in all graphs."""
    from triton import Config, autotune

    return autotune(configs=[Config({}, **dict(options))], key=[])(_shown(kernel, written, floats))


def _shown(kernel: Any, written: tuple[str, ...], floats: tuple[str, ...]) -> Any:
    """The kernel as torch sees it: to be read, a few loads and stores; to be compiled, what it does."""
    from triton import JITFunction

    unspecialised = [p.name for p in kernel.params if p.do_not_specialize]
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    touches = [f"tl.store({name}, tl.load({name}))" if name in written else f"tl.load({name})" for name in pointers]
    read = _with_body(
        kernel, [f"if {name} is not None:\n    {touch}" for name, touch in zip(pointers, touches, strict=True)]
    )
    as_launched = [f"{name} = {name}.to(tl.float32)" for name in floats]
    as_launched += [f"{name} = tl.to_tensor({name})" for name in unspecialised if name not in floats]
    places = [p.num for p in kernel.params if p.do_not_specialize]
    compiled = ast.unparse(_with_body(kernel, as_launched, keep=True))
    compiled += AS_LAUNCHED.format(places=places, remedy=REMEDY)

    class Shown(JITFunction):  # type: ignore[misc]  # Triton has no types
        launched = kernel

        def parse(self) -> ast.Module:
            return ast.Module([read], [])

        @property
        def src(self) -> str:
            return compiled

        def run(self, *args: Any, **options: Any) -> Any:  # of a graph that nobody compiles
            return kernel.run(*args, enable_fp_fusion=False, **options)

    return Shown(kernel.fn, do_not_specialize=unspecialised)


def _with_body(kernel: Any, lines: list[str], keep: bool = False) -> ast.FunctionDef:
    function = kernel.parse().body[0]
    function.body = ast.parse("\n".join(lines)).body + (function.body if keep else [])
    return ast.fix_missing_locations(function)


@functools.cache
def _written_by(kernel: Any) -> tuple[str, ...]:
    """The pointers among a kernel's arguments that it, or a function that it calls, stores to."""
    function = kernel.parse().body[0]
    origins = {name: {name} for name in kernel.arg_names}  # of a variable: the arguments that it is computed from
    written: set[str] = set()
    for _ in range(2):  # what a loop assigns is used before
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                of_value = _origins_of(node.value, origins)
                for name in (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)):
                    origins[name.id] = origins.get(name.id, set()) | of_value
            elif isinstance(node, ast.Call):
                for pointer in _stored_to(node, kernel):
                    written |= _origins_of(pointer, origins)
    return tuple(name for name in kernel.arg_names if name in written and name.endswith("_ptr"))


def _origins_of(value: ast.expr, origins: dict[str, set[str]]) -> set[str]:
    """Not through calls, whose results are no pointers."""
    if isinstance(value, ast.Call):
        return set()
    if isinstance(value, ast.Name):
        return origins.get(value.id, set())
    children = (child for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))
    return set().union(*(_origins_of(child, origins) for child in children))


def _stored_to(call: ast.Call, caller: Any) -> Iterator[ast.expr]:
    """The arguments of a call that are written through; of one that calls itself, the caller says so already."""
    if isinstance(call.func, ast.Attribute) and call.func.attr.startswith(("store", "atomic_")):
        yield call.args[0]
        return
    callee = caller.fn.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if callee is not None and hasattr(callee, "arg_names") and callee is not caller:
        inner = _written_by(callee)
        yield from (value for name, value in zip(callee.arg_names, call.args, strict=False) if name in inner)
        yield from (keyword.value for keyword in call.keywords if keyword.arg in inner)


class Kernels:
    """Of an operator, for the key under which torch keeps what it has compiled: those in the module of its launcher and
    in those of the launchers that this calls. Looked for when torch asks, as Triton is not imported before."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Any]:
        from triton import JITFunction

        modules = [self.module]
        for module in modules:
            for value in vars(importlib.import_module(module)).values():
                if isinstance(value, JITFunction):
                    yield value
                elif isinstance(value, FunctionType) and value.__module__.startswith(LAUNCHERS):
                    modules += [value.__module__] if value.__module__ not in modules else []
