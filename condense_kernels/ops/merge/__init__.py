from .op import merge
from .varlen import merge_varlen

__all__ = ["merge", "merge_varlen"]
