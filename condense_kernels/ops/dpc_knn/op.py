from typing import NamedTuple

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import (
    MAX_TOKENS,
    as_count,
    check_count,
    check_num_tokens,
    check_s_or_keys,
    check_tensor,
    check_tier,
    check_weight,
)
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from ..._dispatch.packing import NO_SHARDS, check_rows, check_segments, look_at_rows, look_at_segments
from ..similarity import similarity
from . import reference

WORKING = (torch.float32, torch.float64)


class DensityPeaks(NamedTuple):
    """What dpc_knn returns; packed: of all segments in a row."""

    order: torch.Tensor  # [B, k] int64
    density: torch.Tensor  # [B, N], dtype of s
    peak_distance: torch.Tensor  # [B, N], dtype of s


def check_options(k_nn, tier, shape, sizes, like, scale) -> None:
    check_count("k_nn", k_nn, 1, MAX_TOKENS, "tokens, a token itself among them")
    check_tier(tier, shape, sizes, like)
    check_weight("scale", scale)


def check(s, k, k_nn=5, *, tier=None, scale=1.0) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "B N N", sizes, WORKING)
    check_num_tokens("s", s)
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")
    check_options(k_nn, tier, "B N", sizes, s, scale)


def fake(s, k, k_nn=5, *, tier=None, scale=1.0):
    tokens = s.shape[:2]
    return s.new_empty((s.shape[0], k), dtype=torch.int64), s.new_empty(tokens), s.new_empty(tokens)


def on_reference(s, k, k_nn=5, *, tier=None, scale=1.0):
    return reference.dpc_knn(s, k, k_nn, tier=tier, scale=scale)


def on_triton(s, k, k_nn=5, *, tier=None, scale=1.0):
    from .kernel import dpc_knn as launch

    return launch(s, k, k_nn, tier=tier, scale=scale)


def flops(s, k, k_nn=5, *, tier=None, scale=1.0) -> int:
    """Comparisons: of every distance with those of the nearest so far, and with the nearest that is denser."""
    return 2 * s[0] * s[1] * s[1]


AXES = ("image", "token", "token")
NO_DISTANCE = "Remedy: s - 1 of cosines, or similarity(keys, metric='neg_l2')."


def look(s, k, k_nn=5, *, tier=None, scale=1.0) -> None:
    check_finite("s", s, AXES)
    apart = ~torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    refuse("s", s, (s > 0) & apart, "negated distances, none above 0", AXES, NO_DISTANCE)
    look_at_tiers(tier, ("image", "token"))


def look_at_tiers(tier, axes) -> None:
    if tier is not None:
        refuse("tier", tier, (tier < 0) | (tier > 3), "values in [0, 4)", axes, "Remedy: see the page.")


def examples(b: int) -> list[Example]:
    s = 0 - 3 * random(b, 12, 12)
    s = (s + s.mT) / 2
    tier = (random(b, 12) < 0.2).to(torch.int8)
    return [
        Example((s, 5, 4), {"tier": tier, "scale": 0.5}),
        Example((s.double(), 0), {"tier": tier}),
        Example((s, 12, 12)),
    ]


backends.register(
    Operator(
        "dpc_knn",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        no_derivatives="a selection is a constant",
        is_traced=always,
    )
)


def check_varlen(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn=5, *, tier=None, scale=1.0) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "T max_seqlen", sizes, WORKING)
    check_segments(cu_seqlens, max_seqlen, sizes, s)
    check_tensor("s", s, "T max_seqlen", {"max_seqlen": max_seqlen}, WORKING)
    check_rows(cu_kept, total_keep, sizes, s)
    check_options(k_nn, tier, "T", sizes, s, scale)


def fake_varlen(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn=5, *, tier=None, scale=1.0):
    tokens = s.shape[:1]
    return s.new_empty((total_keep,), dtype=torch.int64), s.new_empty(tokens), s.new_empty(tokens)


def varlen_on_reference(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn=5, *, tier=None, scale=1.0):
    return reference.dpc_knn_varlen(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn, tier=tier, scale=scale)


def varlen_on_triton(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn=5, *, tier=None, scale=1.0):
    from .kernel import dpc_knn_varlen as launch

    return launch(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn, tier=tier, scale=scale)


def flops_varlen(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn=5, *, tier=None, scale=1.0) -> int:
    """At most: as if all segments were the longest."""
    return 2 * s[0] * s[1]


def look_varlen(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn=5, *, tier=None, scale=1.0) -> None:
    lengths = look_at_segments(cu_seqlens, max_seqlen, s.shape[0])
    look_at_rows(cu_kept, lengths, total_keep)
    column, begins = (
        torch.arange(max_seqlen, dtype=torch.int64, device=s.device),
        cu_seqlens[:-1].repeat_interleave(lengths),
    )
    within = torch.arange(s.shape[0], dtype=torch.int64, device=s.device) - begins
    used = column < lengths.repeat_interleave(lengths)[:, None]  # [T, max_seqlen]
    axes = ("token", "token of the image")
    refuse("s", s, used & ~s.isfinite(), "finite numbers", axes, "Remedy: look where it was computed.")
    apart = used & (column != within[:, None])
    refuse("s", s, apart & (s > 0), "negated distances, none above 0", axes, NO_DISTANCE)
    look_at_tiers(tier, ("token",))


def examples_varlen(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    sums = lambda counts: torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()  # noqa: E731
    cu_seqlens, cu_kept = sums(lengths), sums(lengths // 2)
    t, total = int(cu_seqlens[-1]), int(cu_kept[-1])
    s, tier = 0 - random(t, 12), (random(t) < 0.2).to(torch.int8)
    return [
        Example((s, cu_seqlens, cu_kept, total, 12, 3), {"tier": tier, "scale": 0.5}),
        Example((s.double(), cu_seqlens, cu_kept, total, 12)),
    ]


backends.register(
    Operator(
        "dpc_knn_varlen",
        check=check_varlen,
        reference=varlen_on_reference,
        triton=varlen_on_triton,
        fake=fake_varlen,
        flops=flops_varlen,
        examples=examples_varlen,
        look=look_varlen,
        no_derivatives="a selection is a constant",
        looped=True,
        no_shards=NO_SHARDS,
    )
)


@tracing.leaf(DensityPeaks._make, 3)
def dpc_knn(
    s: torch.Tensor | None = None,  # [B, N, N]
    k: int | None = None,
    k_nn: int = 5,
    *,
    tier: torch.Tensor | None = None,  # [B, N]
    scale: float = 1.0,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    mask: torch.Tensor | None = None,  # [B, N]
    backend: str = "auto",
) -> DensityPeaks:
    """The k tokens that are density peaks: dense themselves, and far from all that are denser.

    With d_ij = -scale * s_ij, density_i is minus the mean of ``d_ij**2`` over the k_nn nearest tokens, token i itself
    being one of them at distance 0 (the published density is the exp of it). peak_distance_i is the distance to the
    nearest denser token, and of the densest one that to the farthest. The k tokens with the largest
    exp(density) * peak_distance are picked (Rodriguez and Laio 2014; Du et al. 2016).

    Args:
        s: [B, N, N] fp32 or fp64, negated distances: row i holds those of token i. What is above 0, or not finite,
            counts as distance 0, and so does the diagonal.
        k: picks per image, 0 <= k <= N.
        k_nn: neighbours, the token itself among them, >= 1; more than there are valid tokens count as these.
        tier: [B, N] int8; tier 0 is picked by score, then tier 1 by index, then tier 2 by index, tier 3 never. Only
            tier 0 has neighbours or is one. None: all tokens are in tier 0.
        scale: finite, >= 0, of all distances: 1 / sqrt(D) where d is a distance of D channels, as published.
        keys: [B, N, Dk] floating, instead of s: s and tier are those of :func:`similarity` of keys and mask, with
            metric="neg_l2".
        mask: [B, N] bool, False = padding; with keys.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        The named tuple of

        order: [B, k] int64, distinct tokens, the largest score first; -1 where only tier 3 was left.
        density: [B, N], dtype of s; -infinity of a token that is not in tier 0.
        peak_distance: [B, N], dtype of s; 0 of a token that is not in tier 0.

        Ties, of densities and of scores, go to the lowest index. Given the same s, all three are the same bit for bit
        on every backend.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, k, k_nn, scale or backend; s and keys, or neither.
    """
    k, k_nn = as_count("k", k), as_count("k_nn", k_nn)
    check_s_or_keys(s, keys, {"tier": tier}, {"mask": (mask, None)})
    if keys is not None:
        s, _, _, tier = similarity(keys, mask=mask, metric="neg_l2", backend=backend)
    tracing.checked(check, s, k, k_nn, tier=tier, scale=scale)
    return DensityPeaks(*backends.run("dpc_knn", backend, (s, k, k_nn), {"tier": tier, "scale": scale}))


@tracing.leaf(DensityPeaks._make, 3)
def dpc_knn_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    k_nn: int = 5,
    *,
    tier: torch.Tensor | None = None,  # [T]
    scale: float = 1.0,
    backend: str = "auto",
) -> DensityPeaks:
    """:func:`dpc_knn` of a packed batch: the same bits as of each segment alone.

    Args:
        s: [T, max_seqlen] fp32 or fp64: row t holds the negated distances from token t to tokens 0, 1, ... of its
            segment; what lies behind them is not used.
        cu_seqlens, cu_kept: [S + 1] int32 on the device of s: running sums of the segments' tokens and picks. Wrong
            ones are harmless, as in :func:`select_and_merge_varlen`.
        total_keep: the last of cu_kept, on the host.
        max_seqlen: tokens of the longest segment, on the host.
        k_nn, tier, scale, backend: as of :func:`dpc_knn`.

    Returns:
        The named tuple of order [total_keep] int64, counted from the segment's first token, -1 where there is no
        token; density [T] and peak_distance [T], 0 for the tokens of no segment.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, number or backend.
    """
    total_keep, max_seqlen = as_count("total_keep", total_keep), as_count("max_seqlen", max_seqlen)
    k_nn, options = as_count("k_nn", k_nn), {"tier": tier, "scale": scale}
    args = (s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn)
    tracing.checked(check_varlen, *args, **options)
    return DensityPeaks(*backends.run("dpc_knn_varlen", backend, args, options))
