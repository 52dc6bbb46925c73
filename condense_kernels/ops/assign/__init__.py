from .op import assign

__all__ = ["assign"]
