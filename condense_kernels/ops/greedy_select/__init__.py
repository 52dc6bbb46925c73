from .op import greedy_select, greedy_select_varlen

__all__ = ["greedy_select", "greedy_select_varlen"]
