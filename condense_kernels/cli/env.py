"""what is installed, what the machine has, and which kernels are in use: to paste into a report

Needs nothing but torch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._dispatch import backends, environment, library

SIMD = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="for programs: one object, as docs/command_line.md lists it"
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def processor() -> tuple[str, str]:
    """Model, and of its instruction sets those that matter to the kernels."""
    facts = dict(line.split(":", 1) for line in read_lines("/proc/cpuinfo") if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    model = facts.get("model name") or platform.processor() or platform.machine()
    return model, " ".join(name for name in SIMD if name in flags) or "unknown"


def threads() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{torch.get_num_threads()} of torch, {usable} cores usable of {os.cpu_count()}"


def gpus() -> list[str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return ["none that torch can use" + ("" if built else " (this torch is built for the CPU alone)")]
    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return found


def driver() -> str:
    lines = read_lines("/proc/driver/nvidia/version") or read_lines("/sys/module/amdgpu/version")
    return lines[0].removeprefix("NVRM version: ").strip() if lines else "none found"


def compiled_library() -> str:
    reason = library.cpp_unavailable()
    if reason is not None:
        return f"none: {reason}"
    source = library.source().removeprefix("the compiled library of ")
    return f"{source}, runs with {torch.ops.condense.cpu_capability()}"


def backends_here() -> list[tuple[str, str]]:
    rows = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for backend in backends.BACKENDS[1:]:
            reason = backends.unavailable(backend, torch.device(device))
            rows.append((f"{backend} on {device}", "available" if reason is None else f"no: {reason}"))
    if backends.triton_interprets():
        rows.append(("triton on cpu runs in", "Triton's interpreter (TRITON_INTERPRET)"))
    return rows


def facts() -> list[tuple[str, str]]:
    model, simd = processor()
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    built = toolkit if torch.version.cuda or torch.version.hip else "CPU"
    return [
        ("condense_kernels", __version__),
        ("torch", f"{torch.__version__} (built for {built})"),
        ("triton", version("triton")),
        ("numpy", version("numpy")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", platform.platform()),
        ("cpu", model),
        ("simd", f"{simd} (torch uses {torch.backends.cpu.get_cpu_capability()})"),
        ("threads", threads()),
        *((f"gpu {i}", name) for i, name in enumerate(gpus())),
        ("gpu driver", driver()),
        ("compiled library", compiled_library()),
        *backends_here(),
        *environment.present().items(),
    ]


def record() -> dict[str, Any]:
    """The same for programs: keys that stay, None where there is nothing."""
    model, simd = processor()
    missing = library.cpp_unavailable()
    found = {package: version(package) for package in ("triton", "numpy", "transformers")}
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    unavailable = {d.type: {b: backends.unavailable(b, d) for b in backends.BACKENDS[1:]} for d in devices}
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return {
        "condense_kernels": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        **{name: None if text == "not installed" else text for name, text in found.items()},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {
            "model": model,
            "simd": [] if simd == "unknown" else simd.split(),
            "cores": os.cpu_count(),
            "usable": len(affinity(0)) if affinity else os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [gpu_record(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "driver": None if driver() == "none found" else driver(),
        "library": {
            "loaded": missing is None,
            "reason": missing,
            "capability": torch.ops.condense.cpu_capability() if missing is None else None,
        },
        "backends": {
            device: {name: {"available": why is None, "reason": why} for name, why in of.items()}
            for device, of in unavailable.items()
        },
        "triton_interpreter": bool(backends.triton_interprets()),
        "variables": environment.present(),
    }


def gpu_record(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    return {"name": facts.name, "capability": [facts.major, facts.minor], "memory": facts.total_memory}


def run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(record(), indent=2))
        return 0
    rows = facts()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}")
    return 0
