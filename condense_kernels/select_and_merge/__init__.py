from .budget import condense, split_budget
from .op import Condensed, select_and_merge, workspace_bytes

__all__ = ["Condensed", "condense", "select_and_merge", "split_budget", "workspace_bytes"]
