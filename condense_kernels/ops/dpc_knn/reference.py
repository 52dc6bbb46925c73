"""Density peaks with k nearest neighbours (Rodriguez and Laio 2014; Du et al. 2016): the definition.

It works in the dtype of s, one rounded operation at a time, since the contract fixes the order bit for bit for a given
s: no kernel may pick differently from this file. The sum of squares is one of integers, so that its order is free, and
what decides between tokens is in fp64, of which every operation is written out.
"""

import torch

from ..._dispatch.packing import parts_of
from ..similarity.reference import MASKED, NON_FINITE, VALID

LOG_TERMS = 10  # of the series, behind the first: the rest is below 2**-56 of it


def distances(s: torch.Tensor) -> torch.Tensor:
    """-s, not below 0; 0 where s is not finite."""
    return torch.where(s.isfinite(), (0 - s).clamp(min=0), 0)


def log(x: torch.Tensor) -> torch.Tensor:
    """ln x of x >= 0 fp64: log 2**e + 2 artanh z, z = (m - 1) / (m + 1), |z| < 0.172. The library's is not portable."""
    m, e = torch.frexp(x)
    small = m < 0.70703125
    m, e = torch.where(small, m * 2, m), torch.where(small, e - 1, e)
    z = (m - 1) / (m + 1)
    w = z * z
    series = torch.full_like(z, 1 / (2 * LOG_TERMS + 1))
    for i in reversed(range(LOG_TERMS)):
        series = series * w + 1 / (2 * i + 1)
    return torch.where(x > 0, e.double() * 0.6931471805599453 + 2 * z * series, -torch.inf)


def density_of(
    near: torch.Tensor,  # [K' - 1], the distances of the nearest others
    scale: torch.Tensor,  # []
) -> torch.Tensor:
    """- mean of (scale * d)**2 over the others and the token itself, at distance 0."""
    limit = torch.finfo(near.dtype).max
    top = near.amax() if len(near) > 0 else near.new_zeros(())
    _, exponent = torch.frexp(top)
    half = exponent // 2  # in two steps, as 2**-exponent itself may not be representable
    unit = torch.ldexp(torch.ldexp(near, -half), half - exponent)  # below 1
    fixed = (unit * unit).mul(2.0**40).long().sum()
    mean = fixed.double() / (len(near) + 1) * 2.0**-40 * (scale.double() * scale.double())
    for _ in range(2):  # d**2 is 2**(2 exponent) times as much
        mean = torch.ldexp(torch.ldexp(mean, half), exponent - half)
    return 0 - mean.to(near.dtype).clamp(max=limit)


def dpc_knn_one(
    s: torch.Tensor,  # [N, N]
    tier: torch.Tensor,  # [N] int8
    k: int,
    k_nn: int,
    scale: torch.Tensor,  # []
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = len(s)
    d = distances(s)
    valid = tier == VALID
    token = torch.arange(n, dtype=torch.int64, device=s.device)
    density, peak_distance = s.new_full((n,), -torch.inf), s.new_zeros(n)
    score = torch.full((n,), -torch.inf, dtype=torch.float64, device=s.device)
    for i in token[valid].tolist():
        others = d[i][valid & (token != i)].sort().values
        density[i] = density_of(others[: k_nn - 1], scale)
    for i in token[valid].tolist():
        denser = valid & ((density > density[i]) | ((density == density[i]) & (token < i)))
        others = d[i][valid & (token != i)]
        farthest = others.amax() if len(others) > 0 else d.new_zeros(())
        peak = d[i][denser].amin() if bool(denser.any()) else farthest  # the densest of all
        peak_distance[i] = peak * scale
        score[i] = log(peak.double()) + density[i].double()
    order = sorted(token[valid].tolist(), key=lambda i: (-score[i].item(), i))
    for leftover in (NON_FINITE, MASKED):  # K distinct tokens are due even where fewer are valid
        order += token[tier == leftover].tolist()
    order = order[:k] + [-1] * (k - len(order))  # -1: every token was in tier 3
    return torch.tensor(order, dtype=torch.int64, device=s.device), density, peak_distance


def dpc_knn(
    s: torch.Tensor,  # [B, N, N]
    k: int,
    k_nn: int = 5,
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return order [B, k] int64, density [B, N], peak_distance [B, N]."""
    b, n, _ = s.shape
    tier = torch.zeros(b, n, dtype=torch.int8, device=s.device) if tier is None else tier
    factor = torch.tensor(scale, dtype=s.dtype, device=s.device)
    order = torch.empty(b, k, dtype=torch.int64, device=s.device)
    density, peak_distance = s.new_empty(b, n), s.new_empty(b, n)
    for i in range(b):
        order[i], density[i], peak_distance[i] = dpc_knn_one(s[i], tier[i], k, k_nn, factor)
    return order, density, peak_distance


def dpc_knn_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    cu_seqlens: torch.Tensor,  # [S + 1] int32
    cu_kept: torch.Tensor,  # [S + 1] int32
    total_keep: int,
    max_seqlen: int,
    k_nn: int = 5,
    *,
    tier: torch.Tensor | None = None,  # [T] int8
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each segment alone. Return order [total_keep] int64 within the segment, density [T], peak_distance [T]."""
    t = len(s)
    tier = torch.zeros(t, dtype=torch.int8, device=s.device) if tier is None else tier
    order = torch.full((total_keep,), -1, dtype=torch.int64, device=s.device)
    density, peak_distance = s.new_zeros(t), s.new_zeros(t)
    for part in parts_of(cu_seqlens, cu_kept, t, total_keep, max_seqlen):
        square = s[part.tokens, : part.num_tokens][None]
        found = dpc_knn(square, part.num_rows, k_nn, tier=tier[part.tokens][None], scale=scale)
        order[part.rows], density[part.tokens], peak_distance[part.tokens] = (result[0] for result in found)
    return order, density, peak_distance
