from .budget import VarlenBudget, varlen_budget
from .op import select_and_merge_varlen

__all__ = ["VarlenBudget", "select_and_merge_varlen", "varlen_budget"]
