"""Owns the operator namespace ``condense``: loads the compiled library, or defines what it would have brought.

The operators of a process come from one source, never from a mixture. The compiled library brings the schemas that it
was built with. Where it cannot be loaded, they are defined here and the reference serves CPU tensors, with one warning.
The copy of the package that is imported first owns the namespace; another one uses what is there, if it means the same.
What happens when: docs/installing.md.
"""

import dataclasses
import functools
import importlib.resources
import os
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .._version import __version__
from . import environment, schemas
from .namespace import FILE as FILE
from .namespace import NAMESPACE as NAMESPACE

OPS = getattr(torch.ops, NAMESPACE)
PACKAGE = __package__.rpartition(".")[0]
SCHEMAS = schemas.read(importlib.resources.files(PACKAGE) / "ops")


@dataclasses.dataclass
class _Owner:
    """Where the operators of this process come from. Kept on torch.ops.condense, where every copy of the package finds
    it, whatever its name and version: these fields stay.
    """

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    source: str | None = None
    cpp_unavailable: str | None = None
    library: torch.library.Library | None = None  # torch takes back what it registered once nobody holds it


FOLDER = Path(__file__).parent.parent
IS_SOURCE_TREE = FOLDER.with_name("csrc").is_dir()
BUILD_IN_PLACE = f"CONDENSE_BUILD_EXT=1 pip install --no-build-isolation -e {FOLDER.parent}"
THIS_COPY = f"condense_kernels {__version__} in {FOLDER}"
OUR_LIBRARY = f"the compiled library of {THIS_COPY}"

_owner: _Owner = vars(OPS).setdefault("_owner", _Owner())  # of two threads, one sets it


def _exists(op: str) -> bool:
    return hasattr(OPS, op)


def _claim() -> None:
    """Bring the operators into this process, unless they are there; then they have to be those of this version."""
    if any(_exists(op) for op in SCHEMAS):
        if _owner.source is None:
            _owner.source = "something else than this version of the package"
            if not _exists("cpu_capability"):
                _owner.cpp_unavailable = f"the operators come from {_owner.source}"
        _check_schemas()
        return
    reason = _load()
    if reason is None:
        _owner.source = OUR_LIBRARY
        _check_schemas()
        return
    warnings.warn(
        f"condense_kernels runs CPU tensors on its slow reference, as the compiled library is not in use: {reason}.",
        RuntimeWarning,
        stacklevel=4,  # this module, the package, who imports it
    )
    for op, schema in SCHEMAS.items():
        registry.define(op + schema)
    _owner.source, _owner.cpp_unavailable = THIS_COPY, reason


def _load() -> str | None:
    """Load the compiled library; return why it is not in use, or None. With a reason, nothing was registered.

    Never when an operator of it exists: registering one twice ends the process.
    """
    if environment.read("CONDENSE_DISABLE_CPP"):
        return "CONDENSE_DISABLE_CPP=1 is set"
    resource = importlib.resources.files(PACKAGE) / FILE
    if not resource.is_file():
        return _why_there_is_none()
    with importlib.resources.as_file(resource) as path:  # of a zip: unpacked for the moment of loading
        return _load_file(path)


def _why_there_is_none() -> str:
    """What this copy's build left a note of, or that none took place; and where another copy's is."""
    note = importlib.resources.files(PACKAGE) / "_not_built.txt"
    if note.is_file():
        reason = f"it was not built: {note.read_text(encoding='utf-8').strip()}"
    elif IS_SOURCE_TREE:
        reason = f"it was not built in {FOLDER}, a source tree. Remedy: build in place: {BUILD_IN_PLACE}"
    else:
        reason = f"{FOLDER / FILE} is missing. Remedy: reinstall with CONDENSE_BUILD_EXT=1"
    behind = (os.path.join(entry, *PACKAGE.split(".")) for entry in sys.path)
    built = next((copy for copy in behind if os.path.isfile(os.path.join(copy, FILE))), None)
    if built is None:
        return reason
    return (
        f"{reason}; or run from another folder, so that Python does not find {FOLDER} before {built}, which was built"
    )


def _load_file(path: Path) -> str | None:
    try:
        if _is_cut_off(path):
            raise OSError(f"{path}: the file is cut off")
        torch.ops.load_library(str(path))
    except OSError as error:
        return (
            f"it does not load ({error.__cause__ or error}); rebuild it on this machine against the installed torch "
            f"{torch.__version__}"
        )
    return None


def _is_cut_off(path: Path) -> bool:
    """Whether the file ends before the last byte that would be mapped. The loader does not ask: SIGBUS."""
    segment = struct.Struct("<IIQQQQQQ")  # of an ELF file of 64 bits: type, flags, offset, two addresses, size, ...
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return False  # no such file: the loader says what is wrong
        (start,), (count,) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<H", header, 56)
        file.seek(start)
        table = file.read(segment.size * count)
    if len(table) < segment.size * count:
        return True
    ends = [offset + size for _, _, offset, _, _, size, _, _ in segment.iter_unpack(table)]
    return path.stat().st_size < max(ends, default=0)


def _check_schemas() -> None:
    """Operators of another version would compute something else under the same name, or be missing."""
    wrong = []
    for op, schema in SCHEMAS.items():
        expected = str(torch._C.parse_schema(f"{NAMESPACE}::{op}{schema}"))
        found = str(getattr(OPS, op).default._schema) if _exists(op) else "no such operator"
        if found != expected:
            wrong.append(f"  expected {expected}\n  found    {found}")
    if not wrong:
        return
    remedy = (
        f"rebuild the library, {BUILD_IN_PLACE if IS_SOURCE_TREE else 'reinstalling with CONDENSE_BUILD_EXT=1'}, or go "
        "without it, CONDENSE_DISABLE_CPP=1"
        if _owner.source == OUR_LIBRARY
        else "one version of condense_kernels for all that this process imports"
    )
    raise ImportError(
        "\n".join([f"{THIS_COPY} has other operators than {_owner.source}, which this process has loaded:", *wrong])
        + f"\nRemedy: {remedy}."
    )


@functools.cache
def schema_of(op: str) -> torch.FunctionSchema:
    return getattr(OPS, op).default._schema


def listed(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def as_returned(op: str, results: tuple):
    """One result is no tuple."""
    return results if len(schema_of(op).returns) > 1 else results[0]


def cpp_unavailable() -> str | None:
    """Why the compiled CPU kernels are not in use; None where they are."""
    return _owner.cpp_unavailable


def source() -> str:
    """Which copy of the package, or what else, brought the operators of this process."""
    return str(_owner.source)


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


def register_kernel(op: str, kernel: Callable, key: str) -> None:
    """Give ``op`` a kernel at a dispatch key, unless the compiled library, or another copy of the package, has."""
    if not _has_kernel(op, key):
        registry.impl(op, kernel, key)


def register(op: str, *, cpu_fallback: Callable, cuda: Callable, fake: Callable | None) -> None:
    """Give ``op`` its Triton kernel, its fake kernel and, without the compiled library, the reference on CPU."""
    register_kernel(op, cpu_fallback, "CPU")
    register_kernel(op, cuda, "CUDA")
    if fake is not None and not _has_kernel(op, "Meta"):
        torch.library.register_fake(f"{NAMESPACE}::{op}", _on_one_device(fake), lib=registry)


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


environment.check()
with _owner.lock:
    registry = _owner.library = _owner.library or torch.library.Library(NAMESPACE, "FRAGMENT")
    _claim()
