"""Kernels for visual-token condensation. The operators in the order of the data's way:

similarity -> greedy_select -> assign -> merge, and select_and_merge, which is all of them in a row.
"""

from ._version import __version__
from .assign import assign
from .greedy_select import greedy_select
from .merge import merge
from .select_and_merge import Condensed, condense, select_and_merge, split_budget, workspace_bytes
from .select_and_merge_varlen import select_and_merge_varlen
from .similarity import similarity

__all__ = [
    "Condensed",
    "__version__",
    "assign",
    "condense",
    "greedy_select",
    "merge",
    "select_and_merge",
    "select_and_merge_varlen",
    "similarity",
    "split_budget",
    "workspace_bytes",
]
