"""The gradient on a packed batch: that of one image whose rows see the keys of their own segment. A segment is at most
max_seqlen long, so a strip of rows looks at a window of keys that the host knows, and no offset is read."""

import math

import torch

from ..attention_scores.gradients import STRIP, Rows, image_gradients


def segment_of_tokens(cu_seqlens: torch.Tensor, num_tokens: int, max_seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token its segment [T], and 1 / that one's length [T] fp64, 0 outside of all."""
    ends = cu_seqlens.long().clamp(0, num_tokens).cummax(dim=0).values
    token = torch.arange(num_tokens, dtype=torch.int64, device=cu_seqlens.device)
    segment = torch.searchsorted(ends, token, right=True) - 1
    inside = (segment >= 0) & (segment < len(ends) - 1)
    begin, end = (ends[at.clamp(0, len(ends) - 1)] for at in (segment, segment + 1))
    inside &= end - begin <= max_seqlen
    return segment, torch.where(inside, 1 / (end - begin).clamp(min=1).double(), 0)


def attention_scores_varlen_backward(
    grad_scores: torch.Tensor,  # [Hq, T]
    queries: torch.Tensor,  # [T, Hq, d]
    keys: torch.Tensor,  # [T, Hkv, d]
    cu_seqlens: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return grad_queries [T, Hq, d] and grad_keys [T, Hkv, d] fp64."""
    (t, heads, d), longest = queries.shape, min(max_seqlen, queries.shape[0])
    if t == 0:
        return torch.zeros_like(queries, dtype=torch.float64), torch.zeros_like(keys, dtype=torch.float64)
    segment, weight = segment_of_tokens(cu_seqlens, t, max_seqlen)
    token = torch.arange(t, dtype=torch.int64, device=keys.device)

    def see(strip: slice) -> tuple[slice, torch.Tensor]:
        window = slice(max(strip.start - longest, 0), min(strip.stop + longest, t))
        seen = segment[strip, None] == segment[window]
        if causal:
            seen = seen & (token[window] <= token[strip, None])
        return window, seen

    of_queries, of_keys = image_gradients(
        grad_scores,
        queries.transpose(0, 1),
        keys.transpose(0, 1),
        Rows(weight),
        see,
        max(1, min(longest, STRIP // (heads * min(3 * longest, t)))) if longest else t,
        1 / math.sqrt(d) if scale is None else scale,
    )
    return of_queries.transpose(0, 1), of_keys.transpose(0, 1)
