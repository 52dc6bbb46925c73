"""Attention scores in fp64 from the whole map, written apart from the reference, and how far off a backend may be."""

import math
from typing import NamedTuple

import torch

from .compare import unit_roundoff


class ExactAttention(NamedTuple):
    scores: torch.Tensor  # [B, Hq, N] fp64
    bound: torch.Tensor  # [B, Hq, N], of what is computed in fp32, or in fp64 from fp64 queries


def exact_attention(
    queries: torch.Tensor,  # [B, Hq, M, d]
    keys: torch.Tensor,  # [B, Hkv, N, d]
    *,
    rows: torch.Tensor | None = None,  # [R] or [B, R]
    mask: torch.Tensor | None = None,  # [B, N]
    lse: torch.Tensor | None = None,  # [B, Hq, M]
    scale: float | None = None,
    causal: bool = False,
) -> ExactAttention:
    """The scores, and a bound of their errors, which keeps M x N maps.

    A product q k is off by at most E = (4 sqrt(d) + 3) eps scale sum |q_i k_i|: a random walk, as in
    :func:`similarity_bound`, and the rounding of the scale. The exponent x = q k - maximum is rounded three times more.
    A probability moves by the error of its exponent, and by the mean of the others' through the normaliser; then come
    the exponential, some products, and two sums that walk over N keys and M rows.
    """
    (batch, heads, m, d), (_, key_heads, n, _) = queries.shape, keys.shape
    scale = 1 / math.sqrt(d) if scale is None else scale
    eps = unit_roundoff(torch.float64 if queries.dtype == torch.float64 else torch.float32)
    q, k = queries.double(), keys.double().repeat_interleave(heads // key_heads, dim=1)
    s, sizes = scale * (q @ k.mT), scale * (q.abs() @ k.abs().mT)  # [B, Hq, M, N]
    seen = torch.ones(batch, 1, m, n, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(n - m)
    if mask is not None:
        seen = seen & mask[:, None, None]
    s = s.masked_fill(~seen, -torch.inf)
    normaliser = s.logsumexp(dim=-1) if lse is None else lse.double()
    p = (s - normaliser[..., None]).exp().masked_fill(~seen | normaliser.isinf()[..., None], 0)
    top = s.amax(dim=-1) if lse is None else normaliser
    x = torch.where(p > 0, (s - top[..., None]).abs(), 0)
    off = torch.where(p > 0, (4 * math.sqrt(d) + 3) * eps * sizes + 3 * eps * x, 0)
    shared = (p * off).sum(dim=-1, keepdim=True) if lse is None else 0
    error = p * torch.expm1(off + shared + (16 + 4 * math.sqrt(n) + 4 * math.sqrt(m)) * eps)
    listed = torch.arange(m, dtype=torch.int64, device=q.device) if rows is None else rows
    times = (listed[..., None] == torch.arange(m, dtype=torch.int64, device=q.device)).sum(dim=-2)  # [M] or [B, M]
    weights = (times.double() / times.sum(dim=-1, keepdim=True).clamp(min=1)).reshape(-1, 1, m, 1)
    weighted = [torch.where(weights > 0, weights * y, 0).sum(dim=2) for y in (p, error)]
    tiny = torch.finfo(torch.float32).smallest_normal  # what is below counts as 0
    return ExactAttention(weighted[0], weighted[1] + tiny)
