"""The greedy, similarity-suppressed selection of Eq. 2 and Eq. 4: the definition.

It works in the dtype of its inputs (fp32, or fp64 where one of them is), one rounded operation at a time, since
the contract fixes the picks bit for bit for a given s: no kernel may pick differently from this file.
"""

import torch

from ..._dispatch.checks import check_values
from ..._dispatch.packing import parts_of
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


def clamped(u: torch.Tensor) -> torch.Tensor:
    """Utilities as they are compared: NaN is the lowest, an infinity the largest or the lowest finite one."""
    limit = torch.finfo(u.dtype).max
    return u.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)


def nearest(s: torch.Tensor, is_candidate: torch.Tensor) -> torch.Tensor:  # [N, N], [N] -> [N]
    """The largest s_ji over the other candidates j: of each token, what it has to do with its nearest neighbour."""
    apart = ~torch.eye(len(s), dtype=torch.bool, device=s.device) & is_candidate[:, None]
    return s.where(apart, -torch.inf).amax(dim=0)


def greedy_select_one(
    s: torch.Tensor,  # [N, N]
    utility: torch.Tensor,  # [N]
    tier: torch.Tensor,  # [N] int8
    k: int,
    suppression: float,
    *,
    first: torch.Tensor | None = None,  # [] int64, or [N] in the dtype of utility
    candidates: torch.Tensor | None = None,  # [N] bool
    combine: str = "sub",
    max_min: bool = False,
) -> list[int]:
    limit = torch.finfo(utility.dtype).max
    u = clamped(utility)
    if combine == "mul":
        u = u.clamp(min=0)  # so that no score rises
    s = s.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    weight = torch.tensor(suppression, dtype=u.dtype, device=u.device)
    may_be_picked = torch.ones_like(tier, dtype=torch.bool) if candidates is None else candidates
    open_ = (tier == VALID) & may_be_picked
    if max_min:
        first_utility = clamped(-nearest(s, open_))
    elif first is None or (first.dim() == 0 and first < 0):
        first_utility = u
    elif first.dim() == 0:
        first_utility = u.index_fill(0, first, torch.inf)  # above all others; where it is no candidate, of no use
    else:
        first_utility = clamped(first)
    order: list[int] = []
    suppressor = None  # max of s over the picks so far: not 0 at first, as cosines can be negative
    while len(order) < k and bool(open_.any()):
        if suppressor is None:
            score = first_utility
        elif combine == "sub":
            score = u - weight * suppressor  # Eq. 2, Eq. 4: two roundings
        else:
            score = u * (1 - weight * suppressor).clamp(-limit, limit)  # three; 0 times infinity would be no score
        best = score[open_].amax()
        pick = int((open_ & (score == best)).nonzero()[0])  # a tie goes to the lowest index
        order.append(pick)
        open_[pick] = False
        suppressor = s[pick] if suppressor is None else torch.maximum(suppressor, s[pick])
    for leftover in (NON_FINITE, MASKED):  # K distinct tokens are due even where fewer are valid
        order += ((tier == leftover) & may_be_picked).nonzero().flatten().tolist()
    return order[:k] + [-1] * (k - len(order))  # -1: nothing is left that may be picked


def greedy_select(
    s: torch.Tensor,  # [B, N, N]
    prior: torch.Tensor | None,  # [B, N]
    k: int,
    *,
    sbar: torch.Tensor | None = None,  # [B]
    tier: torch.Tensor | None = None,  # [B, N] int8
    suppression: float = 1.0,
    first: torch.Tensor | None = None,  # [B] int64, or [B, N]
    candidates: torch.Tensor | None = None,  # [B, N] bool
    combine: str = "sub",
    max_min: bool = False,
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    prior = s.new_zeros(s.shape[:2]) if prior is None else prior
    dtype = torch.float64 if torch.float64 in (s.dtype, prior.dtype) else torch.float32
    s, prior = s.to(dtype), prior.to(dtype)
    tier = torch.zeros_like(prior, dtype=torch.int8) if tier is None else tier
    if torch.tensor(suppression, dtype=dtype, device="cpu") == 0:  # or rounded to it: nothing to scale for
        sbar = None
    if first is not None and first.dim() == 1:
        check_values("first", first, -1, s.shape[1])
    elif first is not None:
        first = first.to(dtype)
    order = torch.empty(s.shape[0], k, dtype=torch.int64, device=s.device)
    for b in range(s.shape[0]):
        utility = prior[b] if sbar is None else scaled_prior(prior[b], sbar[b], tier[b])
        picks = greedy_select_one(
            s[b],
            utility,
            tier[b],
            k,
            suppression,
            first=None if first is None else first[b],
            candidates=None if candidates is None else candidates[b],
            combine=combine,
            max_min=max_min,
        )
        order[b] = torch.tensor(picks, dtype=torch.int64, device=s.device)
    return order


def greedy_select_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    prior: torch.Tensor | None,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    sbar: torch.Tensor | None = None,  # [S]
    tier: torch.Tensor | None = None,  # [T]
    suppression: float = 1.0,
    first: torch.Tensor | None = None,  # [S] int64, or [T]
    candidates: torch.Tensor | None = None,  # [T]
    combine: str = "sub",
    max_min: bool = False,
) -> torch.Tensor:
    """Return order [total_keep] int64, within the segment: each as an image of its own."""
    order = torch.full((total_keep,), -1, dtype=torch.int64, device=s.device)
    by_segment = first is not None and not first.is_floating_point()
    for part in parts_of(cu_seqlens, cu_kept, s.shape[0], total_keep, max_seqlen):
        image = slice(part.number, part.number + 1)
        of_tokens = lambda t, part=part: None if t is None else t[part.tokens][None]  # noqa: E731
        order[part.rows] = greedy_select(
            s[None, part.tokens, : part.num_tokens],
            of_tokens(prior),
            part.num_rows,
            sbar=None if sbar is None else sbar[image],
            tier=of_tokens(tier),
            suppression=suppression,
            first=first[image] if first is not None and by_segment else of_tokens(first),
            candidates=of_tokens(candidates),
            combine=combine,
            max_min=max_min,
        )[0]
    return order
