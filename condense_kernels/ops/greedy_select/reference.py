"""The greedy, similarity-suppressed selection of Eq. 2 and Eq. 4: the definition.

It works in the dtype of its inputs (fp32, or fp64 where one of them is), one rounded operation at a time, since
the contract fixes the picks bit for bit for a given s: no kernel may pick differently from this file.
"""

import torch

from ..similarity.reference import MASKED, NON_FINITE, TAKEN, VALID


def scaled_prior(
    prior: torch.Tensor,  # [N] fp32 or fp64
    sbar: torch.Tensor,  # [] fp32 or fp64
    tier: torch.Tensor,  # [N] int8
) -> torch.Tensor:  # [N]
    """u = E|S| / E|prior| * prior (Eq. 2, 4), the mean over tiers 0 and 3; 0 where the mean is 0.

    The mean is a sum of integers (40 fractional bits below the largest entry), so its order is free.
    """
    counted = (tier == VALID) | (tier == TAKEN)
    magnitude = torch.where(counted & prior.isfinite(), prior.abs(), 0)
    _, exponent = torch.frexp(magnitude.amax())
    half = exponent // 2  # in two steps, as 2**-exponent itself may not be representable
    unit = torch.ldexp(torch.ldexp(prior, -half), half - exponent)  # |unit| < 1 where finite
    fixed = torch.where(counted & prior.isfinite(), unit.abs(), 0).double().mul(2.0**40).long()
    mean = fixed.sum().double() / counted.sum().clamp(min=1) * 2.0**-40
    if mean == 0:
        return torch.zeros_like(prior)
    return (sbar.double() / mean).to(prior.dtype) * unit


def greedy_select_one(
    s: torch.Tensor,  # [N, N]
    utility: torch.Tensor,  # [N]
    tier: torch.Tensor,  # [N] int8
    k: int,
    suppression: float,
) -> list[int]:
    limit = torch.finfo(utility.dtype).max
    u = utility.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    s = s.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    weight = torch.tensor(suppression, dtype=u.dtype, device=u.device)
    order: list[int] = []
    suppressor = None  # max of s over the picks so far: not 0 at first, as cosines can be negative
    open_ = tier == VALID
    while len(order) < k and bool(open_.any()):
        score = u if suppressor is None else u - weight * suppressor  # Eq. 2, Eq. 4: two roundings
        best = score[open_].amax()
        pick = int((open_ & (score == best)).nonzero()[0])  # a tie goes to the lowest index
        order.append(pick)
        open_[pick] = False
        suppressor = s[pick] if suppressor is None else torch.maximum(suppressor, s[pick])
    for leftover in (NON_FINITE, MASKED):  # K distinct tokens are due even where fewer are valid
        order += (tier == leftover).nonzero().flatten().tolist()
    return order[:k] + [-1] * (k - len(order))  # -1: every token was in tier 3


def greedy_select(
    s: torch.Tensor,  # [B, N, N]
    prior: torch.Tensor,  # [B, N]
    k: int,
    *,
    sbar: torch.Tensor | None = None,  # [B]
    tier: torch.Tensor | None = None,  # [B, N] int8
    suppression: float = 1.0,
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    dtype = torch.float64 if torch.float64 in (s.dtype, prior.dtype) else torch.float32
    s, prior = s.to(dtype), prior.to(dtype)
    tier = torch.zeros_like(prior, dtype=torch.int8) if tier is None else tier
    if torch.tensor(suppression, dtype=dtype, device="cpu") == 0:  # or rounded to it: nothing to scale for
        sbar = None
    order = torch.empty(s.shape[0], k, dtype=torch.int64, device=s.device)
    for b in range(s.shape[0]):
        utility = prior[b] if sbar is None else scaled_prior(prior[b], sbar[b], tier[b])
        order[b] = torch.tensor(
            greedy_select_one(s[b], utility, tier[b], k, suppression), dtype=torch.int64, device=s.device
        )
    return order
