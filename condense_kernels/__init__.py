"""Kernels for visual-token condensation. The operators in the order of the data's way:

similarity -> greedy_select -> assign -> merge, and select_and_merge, which is all of them in a row.
"""

from ._dispatch import flops as _flops
from ._dispatch import library as _library  # noqa: F401  first: its warning names who imports this package
from ._dispatch import sharding as _sharding
from ._dispatch.debug import debug
from ._version import __version__
from .budget import VarlenBudget, condense, split_budget, varlen_budget
from .modules import Condense
from .ops import (
    Condensed,
    assign,
    greedy_select,
    merge,
    select_and_merge,
    select_and_merge_varlen,
    similarity,
    workspace_bytes,
)
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

_flops.register_when_imported()
_sharding.rules()  # where DTensor has been imported before this package
