from .op import select_and_merge_varlen

__all__ = ["select_and_merge_varlen"]
