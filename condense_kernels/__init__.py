"""Kernels for visual-token condensation. The operators in the order of the data's way:

similarity -> greedy_select -> assign -> merge, and select_and_merge, which is all of them in a row.
"""

from . import _library
from ._debug import debug
from ._version import __version__
from .assign import assign
from .greedy_select import greedy_select
from .merge import merge
from .modules import Condense
from .select_and_merge import Condensed, condense, select_and_merge, split_budget, workspace_bytes
from .select_and_merge_varlen import VarlenBudget, select_and_merge_varlen, varlen_budget
from .similarity import similarity
from .tokens import gather_tokens, unmerge

__all__ = [
    "Condense",
    "Condensed",
    "VarlenBudget",
    "__version__",
    "assign",
    "condense",
    "debug",
    "gather_tokens",
    "greedy_select",
    "merge",
    "select_and_merge",
    "select_and_merge_varlen",
    "similarity",
    "split_budget",
    "unmerge",
    "varlen_budget",
    "workspace_bytes",
]

_library.sharding()  # where DTensor has been imported before this package
