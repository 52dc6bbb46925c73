"""What an operator is made of, and which kernel a call of its Python function runs."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from .._triton.prepared import Kept
from . import autograd, debug, decompose, library, sharding, vmap
from .declaration import OPERATORS, Operator

BACKENDS = ("auto", "cpp", "triton", "reference")
OLDEST_TRITON = (3, 6)
on_triton: dict[str, Kept] = {}  # of every operator
T = TypeVar("T")


def triton_unavailable() -> str | None:
    """Why no Triton kernel can run in this process, with the remedy; None where one can."""
    try:
        import triton
    except Exception as error:  # it loads compiled libraries and plugins: anything can be raised
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "the package triton is not installed. Remedy: pip install 'triton>=3.6'"
        return (
            f"triton is installed, and its import fails ({type(error).__name__}: {error}). "
            "Remedy: pip install --force-reinstall 'triton>=3.6'"
        )
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is installed, expected 3.6 or newer. Remedy: pip install 'triton>=3.6'"
    return None


def triton_interprets() -> bool:
    """Whether Triton runs its kernels on CPU tensors (TRITON_INTERPRET=1 before triton was imported)."""
    if triton_unavailable() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def compiles_for(device: torch.device) -> bool:
    """Whether Triton's compiled kernels run tensors of this device."""
    return device.type == "cuda" and triton_unavailable() is None and not triton_interprets()


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run tensors of ``device``, with the remedy; None where it can."""
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels take CPU tensors, got {device}. Remedy: backend='auto', or .cpu()"
        if library.cpp_unavailable() is not None:
            return f"the compiled library is not in use: {library.cpp_unavailable()}"
    if backend == "triton":
        if (reason := triton_unavailable()) is not None:
            return reason
        if device.type != "cuda" and not triton_interprets():
            return (
                f"Triton kernels take GPU tensors, got {device}. Remedy: .cuda(), or set TRITON_INTERPRET=1 before "
                "the first import to run them in Triton's interpreter"
            )
    return None


def register(operator: Operator) -> None:
    """Everything of an operator but its C++ kernel, which registers itself."""
    op = operator.name
    OPERATORS[op] = operator
    on_triton[op] = Kept(operator.triton, operator.check, operator.check_memory, autograd.written_by(op))
    cpu_fallback, cuda = raw(after(operator.check, operator.check_memory, operator.reference)), raw(on_triton[op])
    library.register(op, cpu_fallback=cpu_fallback, cuda=cuda, fake=operator.fake)
    if operator.derivatives is not None or operator.no_derivatives is not None:
        autograd.register(op)
    vmap.register(op, functools.partial(autograd.dispatch, op))
    if operator.is_traced is not None:
        decompose.register(operator)


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")


def kernel_of(op: str, backend: str, device: torch.device) -> Callable:
    check_backend(backend)
    reason = unavailable(backend, device)
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not available here: {reason}.")
    if backend == "triton" and device.type == "cpu":
        return on_stored(on_triton[op])
    if backend == "reference":
        return OPERATORS[op].reference
    return getattr(library.OPS, op).default


def on_stored(kernel: Callable) -> Callable:
    """``kernel``, which reads memory, on tensors that are in it: neither views that negate it nor zeros without it. On
    its own ways the dispatcher sees to that."""

    def stored(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.zeros_like(value, device=value.device) if value._is_zerotensor() else value.resolve_neg()

    def run(*args, **kwargs):
        return kernel(*map(stored, args), **{name: stored(value) for name, value in kwargs.items()})

    return run


def run(op: str, backend: str, args: tuple, kwargs: dict):
    """Run ``op``.

    Derivatives and transforms are seen to here, not in the dispatcher: that is what torch.func can nest, it serves
    every backend, and a call that needs neither is spared the way through Python a second time.
    """
    kernel = kernel_of(op, backend, args[0].device)
    if torch.compiler.is_compiling():
        return kernel(*args, **kwargs)
    if debug.is_on():
        kernel = debug.checked(op, kernel)
    kernel = sharding.on_shards(op, kernel)
    if torch._C._are_functorch_transforms_active() or autograd.concerned(op, args):
        name = autograd.backward_of(op)
        backward = sharding.on_shards(name, kernel_of(name, backend, args[0].device))
        return autograd.differentiate(autograd.Call(op, kernel, backward), *autograd.flatten(op, args, kwargs))
    with autograd.below(op):
        return kernel(*args, **kwargs)


def is_on_gpu(value: object) -> bool:
    return type(value) is torch.Tensor and value.is_cuda


def looked_at(look: Callable[[], None], run: Callable[[], T], backend: str, first: object) -> T:
    """``run()`` after ``look()``, which raises what the Python function raises for bad arguments.

    A GPU's kernel looks once at each kind of call by itself: before it, nobody does, and after an error somebody does.
    """
    looks_itself = (
        is_on_gpu(first)
        and backend in ("auto", "triton")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not debug.is_on()
    )
    if not looks_itself:
        look()
        return run()
    try:
        return run()
    except Exception:
        look()
        raise


def after(check: Callable, check_memory: Callable | None, kernel: Callable) -> Callable:
    def checked(*args, **kwargs):
        check(*args, **kwargs)
        if check_memory is not None:
            check_memory(*args, **kwargs)
        return kernel(*args, **kwargs)

    return checked


def raw(kernel: Callable) -> Callable:
    """``kernel``, which checks, as the raw operator: its errors are RuntimeErrors as in C++."""

    def run(*args, **kwargs):
        try:
            return kernel(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from error
        except ImportError as error:  # of a kernel, on its first call
            raise RuntimeError(f"GPU tensors need Triton, and {triton_unavailable() or error}.") from error

    return run
