from .op import gather_merge

__all__ = ["gather_merge"]
