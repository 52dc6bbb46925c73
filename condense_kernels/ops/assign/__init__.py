from .op import assign
from .varlen import assign_varlen

__all__ = ["assign", "assign_varlen"]
