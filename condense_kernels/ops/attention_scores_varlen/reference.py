"""Attention scores of a packed batch: the dense operator on each segment alone, and what becomes of wrong offsets."""

from collections.abc import Iterator

import torch

from ..attention_scores import reference as dense


def segments_of(cu_seqlens: torch.Tensor, num_tokens: int, max_seqlen: int) -> Iterator[slice]:
    """The segments' tokens. One that is longer than max_seqlen counts as empty."""
    offsets = [min(max(offset, 0), num_tokens) for offset in cu_seqlens.tolist()]
    for s in range(len(offsets) - 1):
        start, stop = offsets[s : s + 2]
        if 0 < stop - start <= max_seqlen:
            yield slice(start, stop)


def attention_scores_varlen(
    queries: torch.Tensor,  # [T, Hq, d]
    keys: torch.Tensor,  # [T, Hkv, d]
    cu_seqlens: torch.Tensor,  # [S + 1] int32
    max_seqlen: int,
    *,
    lse: torch.Tensor | None = None,  # [Hq, T]
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Return scores [Hq, T] fp64; zeros for the tokens of no segment."""
    scores = torch.zeros(queries.shape[1], keys.shape[0], dtype=torch.float64, device=keys.device)
    for tokens in segments_of(cu_seqlens, keys.shape[0], max_seqlen):
        q, k = (x[tokens].transpose(0, 1)[None] for x in (queries, keys))  # [1, H, n, d]
        outside = None if lse is None else lse[None, :, tokens]
        scores[:, tokens] = dense.attention_scores(q, k, lse=outside, scale=scale, causal=causal)[0]
    return scores
