from .op import dpp_select
from .varlen import dpp_select_varlen

__all__ = ["dpp_select", "dpp_select_varlen"]
