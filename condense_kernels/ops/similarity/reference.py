"""Similarity of all token pairs, and the means that Eq. 2 to 4 take over it: the definition, in fp64."""

import torch

VALID, NON_FINITE, MASKED, TAKEN = 0, 1, 2, 3  # tiers; greedy_select picks from 0, then 1, then 2, never from 3


def token_tiers(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None,  # [B, N]
    mask: torch.Tensor | None,  # [B, N] bool
) -> torch.Tensor:  # [B, N] int8
    finite = keys.isfinite().all(dim=-1)
    if scores is not None:
        finite = finite & scores.isfinite()
    tier = torch.where(finite, VALID, NON_FINITE)
    if mask is not None:
        tier = torch.where(mask, tier, MASKED)
    return tier.to(torch.int8)


def units(z: torch.Tensor) -> torch.Tensor:  # [N, Dk] fp64, zeros where not valid -> the same, of length 1 or 0
    # A power of two scales exactly: no key of finite magnitude overflows when squared, or vanishes.
    _, exponent = torch.frexp(z.abs().amax(dim=-1, keepdim=True))
    z = torch.ldexp(torch.ldexp(z, -(exponent // 2)), -(exponent - exponent // 2))
    norm = z.square().sum(dim=-1, keepdim=True).sqrt()  # [N, 1]
    return torch.where(norm > 0, z / norm, 0.0)  # a zero-norm key has cosine 0 with everything


def cosines(z: torch.Tensor) -> torch.Tensor:  # [N, Dk] fp64, zeros where not valid -> [N, N]
    z = units(z)
    # Not matmul, whose result depends on autocast and on a token's place; products commute, so s is symmetric.
    return torch.stack([(z * row).sum(dim=-1) for row in z])


def negated_distances(z: torch.Tensor) -> torch.Tensor:  # [N, Dk] fp64, zeros where not valid -> [N, N]
    """By differences: |x|^2 + |y|^2 - 2 x y would lose what is small beside the distance from 0."""
    _, exponent = torch.frexp(z.abs().amax())  # one scale for all: they are subtracted from each other
    z = torch.ldexp(torch.ldexp(z, -(exponent // 2)), -(exponent - exponent // 2))
    distance = torch.stack([(z - row).square().sum(dim=-1).sqrt() for row in z])
    return 0.0 - torch.ldexp(torch.ldexp(distance, exponent // 2), exponent - exponent // 2)


def nearest_of(s: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:  # [N, N], [N] bool -> [N]
    """The largest similarity to another valid token; -infinity where there is none, or the token is not valid."""
    others = valid[:, None] & valid & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    return torch.where(others, s, -torch.inf).amax(dim=-1) + 0.0  # not -0, of which a maximum may take any


def similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N] bool
    metric: str = "cosine",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return s [B, N, N] fp64, sbar [B] fp64, g [B, N] fp64, tier [B, N] int8."""
    pairs_of = cosines if metric == "cosine" else negated_distances
    tier = token_tiers(keys, scores, mask)
    batch, n, _ = keys.shape
    s = torch.empty(batch, n, n, dtype=torch.float64, device=keys.device)
    sbar = s.new_empty(batch)
    for b in range(batch):  # image by image, each laid out alike: no bit depends on the batch or on strides
        valid = tier[b] == VALID
        s[b] = pairs_of(torch.where(valid[:, None], keys[b].double(), 0.0).contiguous())
        s[b] = torch.where(valid[:, None] & valid, s[b], 0.0)  # also of distances
        count = valid.sum().clamp(min=1)
        sbar[b] = s[b].abs().sum() / (count * count)  # E[|S|] of Eq. 2 and 4
    g = s.sum(dim=-1)  # Eq. 3
    return s, sbar, g, tier


def global_similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g [B, N] fp64, tier [B, N] int8: each unit key times the sum of all, which is the sum of its cosines."""
    tier = token_tiers(keys, scores, mask)
    g = torch.zeros(tier.shape, dtype=torch.float64, device=keys.device)
    for b in range(len(keys)):
        z = units(torch.where((tier[b] == VALID)[:, None], keys[b].double(), 0.0).contiguous())
        g[b] = (z * z.sum(dim=0)).sum(dim=-1)  # Eq. 3
    return g, tier
