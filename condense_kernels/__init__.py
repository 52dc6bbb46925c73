"""Kernels for visual-token condensation. The operators in the order of the data's way:

similarity -> greedy_select -> assign -> merge, and select_and_merge, which is all of them in a row.
"""

from . import _program  # noqa: F401  before torch, which takes seconds
from ._dispatch import flops as _flops
from ._dispatch import library as _library  # noqa: F401  its warning names who imports this package
from ._dispatch import sharding as _sharding
from ._dispatch.debug import debug as debug
from ._version import __version__ as __version__
from .budget import VarlenBudget as VarlenBudget
from .budget import condense as condense
from .budget import split_budget as split_budget
from .budget import varlen_budget as varlen_budget
from .matching import bipartite_match as bipartite_match
from .matrices import merge_matrix as merge_matrix
from .modules import Condense as Condense
from .ops import *  # noqa: F403  each by the line that registers it there
from .segments import allocate_budget as allocate_budget
from .segments import segment_topk as segment_topk
from .segments import segment_topk_indices as segment_topk_indices
from .tokens import gather_tokens as gather_tokens
from .tokens import sizes as sizes
from .tokens import unmerge as unmerge
from .warming import warm_up as warm_up

_flops.register_when_imported()
_sharding.rules()  # where DTensor has been imported before this package
