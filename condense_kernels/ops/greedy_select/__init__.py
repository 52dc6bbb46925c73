from . import from_keys  # noqa: F401  an operator of its own
from .op import greedy_select, greedy_select_varlen

__all__ = ["greedy_select", "greedy_select_varlen"]
