from .op import greedy_select

__all__ = ["greedy_select"]
