from .op import coverage_select
from .packed import coverage_select_varlen

__all__ = ["coverage_select", "coverage_select_varlen"]
