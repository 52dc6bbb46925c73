"""Greedy MAP inference of a determinantal point process (Chen, Zhang, Zhou 2018): the definition.

It works in the dtype of its inputs (fp32, or fp64 where one of them is), one rounded operation at a time, since the
contract fixes the picks bit for bit for a given s and quality: no kernel may pick differently from this file.
"""

import math

import torch

from ..._dispatch.packing import parts_of
from ..similarity.reference import MASKED, NON_FINITE, TAKEN, VALID


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def rounded_root(x: torch.Tensor) -> torch.Tensor:  # []
    """The square root, rounded to nearest; that of torch may be off by an ulp on a CPU, in fp32 for one in six."""
    return torch.tensor(math.sqrt(float(x)), dtype=x.dtype, device=x.device)


def dpp_select_one(
    s: torch.Tensor,  # [N, N]
    quality: torch.Tensor | None,  # [N]
    tier: torch.Tensor,  # [N] int8
    k: int,
    eps: torch.Tensor,  # []
    damping: torch.Tensor,  # []
) -> list[int]:
    s = s.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    diagonal = s.diagonal()
    if quality is not None:
        quality = quality.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        diagonal = quality * diagonal * quality
    gain = diagonal.clone()  # by which factor a token multiplies the determinant of the picks' kernel
    floor = torch.where(eps * diagonal > 0, eps * diagonal, 0.0)
    factor: list[torch.Tensor] = []  # a row of the Cholesky factor a pick, of all tokens
    order: list[int] = []
    open_ = tier == VALID
    while len(order) < k:
        live = open_ & (gain > floor)  # a NaN is no candidate
        if not bool(live.any()):
            break
        pick = int((live & (gain == gain[live].amax())).nonzero()[0])  # a tie goes to the lowest index
        row = s[pick] if quality is None else quality[pick] * s[pick] * quality
        for earlier in factor:
            row = row - earlier[pick] * earlier
        row = row / rounded_root(gain[pick] + damping)
        gain = gain - row * row
        factor.append(row)
        order.append(pick)
        open_[pick] = False
    by = diagonal if quality is None else quality  # the rest adds nothing to the volume
    order += (
        torch.where(open_, by, -torch.inf).sort(descending=True, stable=True).indices[: int(open_.sum())]
    ).tolist()
    for leftover in (NON_FINITE, MASKED):  # K distinct tokens are due even where fewer are valid
        order += (tier == leftover).nonzero().flatten().tolist()
    return order[:k] + [-1] * (k - len(order))  # -1: nothing was left that may be picked


def open_tiers(
    tokens: torch.Size, tier: torch.Tensor | None, candidates: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Tiers, where no candidate is one that is taken."""
    tier = torch.zeros(tokens, dtype=torch.int8, device=device) if tier is None else tier
    return tier if candidates is None else torch.where(candidates, tier, TAKEN)


def dpp_select(
    s: torch.Tensor,  # [B, N, N]
    quality: torch.Tensor | None,  # [B, N]
    k: int,
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    candidates: torch.Tensor | None = None,  # [B, N] bool
    eps: float = 1e-5,
    damping: float = 0.0,
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    dtype = working_dtype(s, quality)
    s, quality = s.to(dtype), None if quality is None else quality.to(dtype)
    tier = open_tiers(s.shape[:2], tier, candidates, s.device)
    numbers = [torch.tensor(number, dtype=dtype, device=s.device) for number in (eps, damping)]
    order = torch.empty(s.shape[0], k, dtype=torch.int64, device=s.device)
    for b in range(s.shape[0]):
        picks = dpp_select_one(s[b], None if quality is None else quality[b], tier[b], k, *numbers)
        order[b] = torch.tensor(picks, dtype=torch.int64, device=s.device)
    return order


def dpp_select_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    quality: torch.Tensor | None,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    tier: torch.Tensor | None = None,  # [T] int8
    candidates: torch.Tensor | None = None,  # [T] bool
    eps: float = 1e-5,
    damping: float = 0.0,
) -> torch.Tensor:
    """Return order [total_keep] int64 within the segment: the dense operator on each segment alone."""
    order = torch.full((total_keep,), -1, dtype=torch.int64, device=s.device)
    for part in parts_of(cu_seqlens, cu_kept, s.shape[0], total_keep, max_seqlen):
        of_tokens = [None if t is None else t[part.tokens][None] for t in (quality, tier, candidates)]
        square = s[part.tokens, : part.num_tokens][None]
        picks = dpp_select(square, of_tokens[0], part.num_rows, tier=of_tokens[1], candidates=of_tokens[2],
                           eps=eps, damping=damping)  # fmt: skip
        order[part.rows] = picks[0]
    return order
