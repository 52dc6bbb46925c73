from .op import Condensed, select_and_merge, workspace_bytes

__all__ = ["Condensed", "select_and_merge", "workspace_bytes"]
