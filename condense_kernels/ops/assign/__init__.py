from . import from_keys  # noqa: F401  an operator of its own
from .op import assign
from .varlen import assign_varlen

__all__ = ["assign", "assign_varlen"]
