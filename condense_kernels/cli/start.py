"""What there is, for whoever calls the program without a command. Needs nothing but torch."""

import importlib.metadata

from .. import __version__
from .._dispatch import backends, library

DOCS = "https://condense-kernels.github.io/condense_kernels/"  # where the installed metadata has no address
GROUPS = {
    "see": {
        "demo": ("condense a picture and draw it", "demo my.jpg --keep 64"),
        "show": ("kept tokens, answers, and why", "show --html show.html"),
    },
    "measure": {
        "compare": ("methods: quality against time", "compare --on tiny"),
        "compare-answers": ("right answers on fewer tokens", "compare-answers --keep 32"),
        "report": ("time, memory, FLOPs of a model", "report --model tiny"),
        "reproduce": ("the paper's tables by lmms-eval", "reproduce --table tiny"),
    },
    "check": {
        "check": ("every backend against fp64", "check --quick"),
        "env": ("versions, devices, kernels in use", "env --json"),
        "completion": ("complete commands in a shell", "completion bash"),
    },
}


def address() -> str:
    try:
        urls = importlib.metadata.metadata("condense-kernels").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return DOCS
    named = dict(url.split(", ", 1) for url in urls if ", " in url)
    return named.get("Documentation", DOCS)


def here() -> str:
    """Which kernels this process has."""
    has = "C++ kernels: " + ("loaded" if library.cpp_unavailable() is None else "not here")
    triton = "installed" if backends.triton_unavailable() is None else "not here"
    return f"{has}. Triton: {triton}. More: env"


def screen(program: str) -> str:
    lines = [
        f"condense_kernels {__version__}",
        "The N visual tokens of an image become K: kernels for CPU and GPU, one contract.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", group]
        lines += [f"  {name:<16}{what:<35}{example}" for name, (what, example) in commands.items()]
    return "\n".join([*lines, "", f"Run one: {program} demo", f"Docs: {address()}", here(), ""])
