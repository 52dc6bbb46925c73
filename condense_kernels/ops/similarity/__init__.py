from .op import similarity

__all__ = ["similarity"]
