"""Cosine similarity of all token pairs, and the means that Eq. 2 to 4 take over it: the definition, in fp64."""

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


def similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N] bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return s [B, N, N] fp64, sbar [B] fp64, g [B, N] fp64, tier [B, N] int8."""
    tier = token_tiers(keys, scores, mask)
    valid = (tier == VALID).double()  # [B, N]
    z = torch.where(tier[..., None] == VALID, keys.double(), 0.0)
    # A power of two scales exactly: no key of finite magnitude overflows when squared, or vanishes.
    _, exponent = torch.frexp(z.abs().amax(dim=-1, keepdim=True))
    z = torch.ldexp(torch.ldexp(z, -(exponent // 2)), -(exponent - exponent // 2))
    norm = z.square().sum(dim=-1, keepdim=True).sqrt()  # [B, N, 1]
    z = torch.where(norm > 0, z / norm, 0.0)  # a zero-norm key has cosine 0 with everything
    # Not matmul: its result would depend on autocast and on the batch.
    s = torch.stack([(z * z[:, i : i + 1]).sum(dim=-1) for i in range(z.shape[1])], dim=1)  # [B, N, N]
    count = valid.sum(dim=-1)  # [B]
    sbar = s.abs().sum(dim=(1, 2)) / (count * count).clamp(min=1)  # E[|S|] of Eq. 2 and 4
    g = s.sum(dim=-1)  # Eq. 3
    return s, sbar, g, tier
