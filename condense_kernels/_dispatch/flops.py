"""torch.utils.flop_counter: what each operator declares, for FlopCounterMode.

That module imports Triton, which a process may want to configure first, and its registry cannot be reached without it.
So the formulas are put in once somebody has imported it.
"""

import functools
import importlib.abc
import importlib.util
import sys
from types import ModuleType

import torch

from .declaration import OPERATORS
from .namespace import NAMESPACE

COUNTER = "torch.utils.flop_counter"


def register(counter: ModuleType) -> None:
    for op, operator in OPERATORS.items():
        packet = getattr(getattr(torch.ops, NAMESPACE), op)
        if packet not in counter.flop_registry:  # another copy of the package may have come first
            counter.register_flop_formula(packet)(without_results(operator.flops))


def without_results(flops):
    @functools.wraps(flops)
    def formula(*args, out_shape=None, **kwargs) -> int:
        return flops(*args, **kwargs)

    return formula


class WhenImported(importlib.abc.MetaPathFinder):
    """Is asked for every module, finds none, and lets itself be told when the counter has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this loader alone
        return spec


def register_when_imported() -> None:
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, WhenImported())
