"""Which kernel a Python call runs: "auto", "cpp", "triton" or "reference"."""

import functools
from collections.abc import Callable

import torch

from . import _library

BACKENDS = ("auto", "cpp", "triton", "reference")


def triton_interprets() -> bool:
    """Whether Triton runs its kernels on CPU tensors (TRITON_INTERPRET=1 before triton was imported)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run tensors of ``device``, with the remedy; None where it can."""
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels take CPU tensors, got {device}. Remedy: backend='auto', or .cpu()"
        if _library.cpp_unavailable() is not None:
            return f"the compiled library is not in use: {_library.cpp_unavailable()}"
    if backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "the package triton is not installed. Remedy: pip install triton"
        if device.type != "cuda" and not triton_interprets():
            return (
                f"Triton kernels take GPU tensors, got {device}. Remedy: .cuda(), or set TRITON_INTERPRET=1 before "
                "the first import to run them in Triton's interpreter"
            )
    return None


def run(
    op: str, backend: str, reference: Callable, triton: Callable, args: tuple, kwargs: dict, differentiable: bool = True
):
    """Run operator ``op``; ``reference`` and ``triton`` are the same operator on those backends."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
    reason = unavailable(backend, args[0].device)
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not available here: {reason}.")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if differentiable and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{op.removesuffix('_out')} has no gradients yet, and an argument requires grad. Remedy: call it under "
            "torch.no_grad(), or pass tensor.detach()."
        )
    if backend == "reference":
        return reference(*args, **kwargs)
    if backend == "triton" and args[0].device.type == "cpu":
        return triton(*args, **kwargs)
    return getattr(torch.ops.condense, op)(*args, **kwargs)


def raw(check: Callable, kernel: Callable) -> Callable:
    """``kernel`` behind ``check``, for the raw operator, whose errors are RuntimeErrors as in C++."""

    @functools.wraps(kernel)
    def checked(*args, **kwargs):
        try:
            check(*args, **kwargs)
            return kernel(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from error

    return checked
