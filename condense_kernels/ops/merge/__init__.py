from .op import merge

__all__ = ["merge"]
