"""Where DTensors come in: dtensor.py has the rules, and is imported once there can be a DTensor.

torch.distributed.tensor takes half a second to import, so it has to be somebody else who wants it.
"""

import sys
from collections.abc import Callable
from types import ModuleType


def rules() -> ModuleType | None:
    """The module dtensor, whose import puts in the rules; None while there can be no DTensor."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from . import dtensor

    return dtensor


def on_shards(op: str, kernel: Callable) -> Callable:
    """``kernel`` of ``op``, also for DTensors."""
    dtensor = rules()
    return kernel if dtensor is None else dtensor.on_shards(op, kernel)
