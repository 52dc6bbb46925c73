"""Owns the operator namespace ``condense``: loads the compiled library and supplies what it lacks.

The schemas live in csrc/library.cpp. Where that library is absent (no compiler at installation), the same
schemas are defined here and the reference serves CPU tensors, with one warning.
"""

import functools
import importlib.resources
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

NAMESPACE = "condense"

# The list in csrc/library.cpp, word for word; tests/test_registration.py holds the two together.
SCHEMAS = {
    "similarity": (
        "(Tensor keys, Tensor? scores=None, Tensor? mask=None) -> (Tensor s, Tensor sbar, Tensor g, Tensor tier)"
    ),
    "greedy_select": (
        "(Tensor s, Tensor prior, SymInt k, *, Tensor? sbar=None, Tensor? tier=None, float suppression=1.0)"
        " -> Tensor order"
    ),
    "assign": (
        "(Tensor s, Tensor indices, *, Tensor? tier=None, SymInt[]? grid=None, Tensor? positions=None,"
        " float spatial_weight=1.0) -> Tensor assignment"
    ),
    "merge": "(Tensor features, Tensor scores, Tensor indices, Tensor assignment) -> (Tensor merged, Tensor mass)",
    "merge_backward": (
        "(Tensor grad_merged, Tensor grad_mass, Tensor features, Tensor scores, Tensor merged, Tensor mass,"
        " Tensor indices, Tensor assignment) -> (Tensor grad_features, Tensor grad_scores)"
    ),
    "select_and_merge": (
        "(Tensor features, Tensor scores, SymInt num_anchors, SymInt num_background, *, Tensor? keys=None,"
        " SymInt[]? grid=None, Tensor? positions=None, Tensor? mask=None, float suppression=1.0,"
        " float spatial_weight=1.0) -> (Tensor merged, Tensor indices, Tensor assignment, Tensor mass)"
    ),
    "select_and_merge_varlen": (
        "(Tensor features, Tensor scores, Tensor cu_seqlens, Tensor cu_anchors, Tensor cu_background,"
        " SymInt total_keep, SymInt max_seqlen, *, Tensor? keys=None, Tensor? positions=None, float suppression=1.0,"
        " float spatial_weight=1.0) -> (Tensor merged, Tensor indices, Tensor assignment, Tensor mass)"
    ),
    "select_and_merge_out": (
        "(Tensor features, Tensor scores, SymInt num_anchors, SymInt num_background, *, Tensor? keys=None,"
        " SymInt[]? grid=None, Tensor? positions=None, Tensor? mask=None, float suppression=1.0,"
        " float spatial_weight=1.0, Tensor(a!)? workspace=None, Tensor(b!) merged, Tensor(c!) indices,"
        " Tensor(d!) assignment, Tensor(e!) mass) -> ()"
    ),
    "workspace_bytes": (
        "(Tensor features, Tensor scores, int num_anchors, int num_background, *, Tensor? keys=None,"
        " int[]? grid=None, Tensor? positions=None, Tensor? mask=None, float suppression=1.0,"
        " float spatial_weight=1.0) -> int"
    ),
}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_load_error: str | None = None


def _exists(op: str) -> bool:
    return hasattr(getattr(torch.ops, NAMESPACE), op)


def _load() -> str | None:
    """Load the compiled library; return why it is not there, or None.

    Another copy of the package may have loaded its own already: what counts is whether the operators exist.
    """
    if all(_exists(op) for op in SCHEMAS):
        return None
    if os.environ.get("CONDENSE_DISABLE_CPP") == "1":
        return "CONDENSE_DISABLE_CPP=1 is set"
    path = importlib.resources.files(__package__) / "_C.abi3.so"
    if not path.is_file():
        return "it was not built; install g++ (or clang++) and reinstall with CONDENSE_BUILD_EXT=1 to see the build"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load ({error}); rebuild it against the installed torch {torch.__version__}"
    return None


def _check_schema(op: str) -> None:
    """A stale library with another schema would compute something else under the same name."""
    found = str(getattr(getattr(torch.ops, NAMESPACE), op).default._schema)
    expected = str(torch._C.parse_schema(f"{NAMESPACE}::{op}{SCHEMAS[op]}"))
    if found != expected:
        raise ImportError(
            f"operator {NAMESPACE}::{op} is already registered with another schema: found {found}, this version of "
            f"condense_kernels expects {expected}. Remedy: remove the other version or reinstall this one."
        )


@functools.cache
def schema_of(op: str) -> torch.FunctionSchema:
    return getattr(getattr(torch.ops, NAMESPACE), op).default._schema


def sharding() -> ModuleType | None:
    """condense_kernels.distributed, whose import puts in the rules for DTensors; None while there can be no DTensor.

    torch.distributed.tensor takes half a second to import, so it has to be somebody else who wants it.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from . import distributed

    return distributed


def on_shards(op: str, kernel: Callable) -> Callable:
    """``kernel`` of ``op``, also for DTensors."""
    return kernel if sharding() is None else sharding().on_shards(op, kernel)


def cpp_unavailable() -> str | None:
    """Why the compiled CPU kernels are not in use; None where they are."""
    return _load_error


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


def register_kernel(op: str, kernel: Callable, key: str) -> None:
    """Give ``op`` a kernel at a dispatch key, unless the compiled library, or another copy of the package, has."""
    if not _has_kernel(op, key):
        _library.impl(op, kernel, key)


def register(op: str, *, cpu_fallback: Callable, cuda: Callable, fake: Callable | None) -> None:
    """Give ``op`` its Triton kernel, its fake kernel and, without the compiled library, the reference on CPU."""
    register_kernel(op, cpu_fallback, "CPU")
    register_kernel(op, cuda, "CUDA")
    if fake is not None and not _has_kernel(op, "Meta"):
        torch.library.register_fake(f"{NAMESPACE}::{op}", _on_one_device(fake), lib=_library)


def _on_one_device(fake: Callable) -> Callable:
    """A meta tensor among real ones sends the call to the fake kernel, whose outputs would be real and unwritten."""

    @functools.wraps(fake)
    def checked(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(tensor.device != tensors[0].device for tensor in tensors):
            devices = ", ".join(str(tensor.device) for tensor in tensors)
            raise RuntimeError(f"expected all tensors on the device of the first argument, got {devices}.")
        return fake(*args, **kwargs)

    return checked


_load_error = _load()
for _op, _schema in SCHEMAS.items():
    if _exists(_op):
        _check_schema(_op)
    else:
        _library.define(_op + _schema)
if _load_error is not None:
    warnings.warn(
        f"condense_kernels runs CPU tensors on its slow reference, as the compiled library is not in use: "
        f"{_load_error}.",
        RuntimeWarning,
        stacklevel=2,
    )
