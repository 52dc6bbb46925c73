"""The attention that keys get, of a packed batch: the dense kernels, which find their segment by themselves."""

import torch

from ..._triton.launcher import Packed, new, on_device_of, reject_float64
from ..attention_scores.kernel import launch_attention


def attention_scores_varlen(
    queries: torch.Tensor,  # [T, Hq, d]
    keys: torch.Tensor,  # [T, Hkv, d]
    cu_seqlens: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    lse: torch.Tensor | None = None,  # [Hq, T] fp32 or fp64
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Return scores [Hq, T] fp32."""
    reject_float64(queries=queries, keys=keys)
    num_tokens, heads, _ = queries.shape
    max_seqlen = min(max_seqlen, num_tokens)
    scores = new(queries, (heads, num_tokens), torch.float32, fill=0)  # and 0 they stay where there is no segment
    if cu_seqlens.shape[0] > 1 and max_seqlen > 0:
        packed = Packed.of(cu_seqlens, None, None, num_tokens, 0, max_seqlen)
        with on_device_of(queries):
            by_head = queries.transpose(0, 1), keys.transpose(0, 1)
            launch_attention(*by_head, None, None, lse, scale, causal, scores, packed)
    return scores
