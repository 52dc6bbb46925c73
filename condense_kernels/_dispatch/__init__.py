"""How an operator reaches torch: its schema and library, backends, derivatives, vmap, shards, checks of values."""

from pathlib import Path

from .._version import __version__

OLDEST_TORCH = (2, 10)

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        f"condense_kernels {__version__} needs torch >= 2.10, and no torch is installed. Remedy: pip install torch, "
        "or the build for your machine that https://pytorch.org/get-started names.",
        name="torch",
    ) from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    raise ImportError(
        f"condense_kernels {__version__} needs torch >= 2.10, found torch {torch.__version__} in "
        f"{Path(torch.__file__).parent}. Remedy: pip install 'torch>=2.10'."
    )
