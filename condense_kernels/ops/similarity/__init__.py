from .op import similarity
from .packed import similarity_varlen

__all__ = ["similarity", "similarity_varlen"]
