from .mean import mean_similarity
from .op import similarity
from .packed import similarity_varlen
from .sums import global_similarity

__all__ = ["global_similarity", "mean_similarity", "similarity", "similarity_varlen"]
