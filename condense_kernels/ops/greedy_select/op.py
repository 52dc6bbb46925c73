from typing import Any

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import (
    FLOATS,
    as_count,
    check_choice,
    check_count,
    check_flag,
    check_s_or_keys,
    check_tensor,
    check_weight,
)
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import OPERATORS, Example, Operator, always, random
from ..._dispatch.packing import NO_SHARDS, check_rows, check_segments, look_at_rows, look_at_segments
from . import reference

COMBINE = ("sub", "mul")


def check_options(sbar, tier, suppression, first, candidates, combine, max_min, sizes, axes, s) -> None:
    """What the dense and the packed operator share; ``axes`` name those of images and those of tokens."""
    images, tokens = axes
    if sbar is not None:
        check_tensor("sbar", sbar, images, sizes, (torch.float32, torch.float64), s)
    if tier is not None:
        if getattr(tier, "dtype", None) == torch.bool:
            raise TypeError("tier: expected dtype int8, got bool. Remedy: candidates= says which tokens may be picked.")
        check_tensor("tier", tier, tokens, sizes, (torch.int8,), s)
    check_weight("suppression", suppression)
    if first is not None:
        is_index = isinstance(first, torch.Tensor) and not first.is_floating_point()
        check_tensor("first", first, images if is_index else tokens, sizes, (torch.int64, *FLOATS), s)
        if max_min:
            raise ValueError("first, max_min: expected one of the two, got both. Remedy: leave out first.")
    if candidates is not None:
        check_tensor("candidates", candidates, tokens, sizes, (torch.bool,), s)
    if combine != "sub":
        check_choice("combine", combine, COMBINE)
    if max_min is not False:
        check_flag("max_min", max_min)


def check(
    s, prior, k, *, sbar=None, tier=None, suppression=1.0, first=None, candidates=None, combine="sub", max_min=False
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "B N N", sizes, (torch.float32, torch.float64))
    if prior is not None:
        check_tensor("prior", prior, "B N", sizes, FLOATS, s)
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")
    check_options(sbar, tier, suppression, first, candidates, combine, max_min, sizes, ("B", "B N"), s)


def fake(s, prior, k, **options):
    return s.new_empty((s.shape[0], k), dtype=torch.int64)


def on_reference(s, prior, k, **options):
    return reference.greedy_select(s, prior, k, **options)


def on_triton(s, prior, k, **options):
    from .kernel import greedy_select as launch

    return launch(s, prior, k, **options)


def flops(s, prior, k, *, max_min=False, **options) -> int:
    """Each pick: a maximum, a product, a difference and a comparison a token. max_min: a maximum a pair."""
    return 4 * s[0] * s[1] * k + (s[0] * s[1] ** 2 if max_min else 0)


REMEDY = "Remedy: candidates=, or tier 3, for what must not be picked; an entry of s that is not finite counts as 0."


def is_candidate(tier, candidates, like) -> torch.Tensor:
    """Which tokens are picked by score; as many as ``like`` has."""
    chosen = torch.ones_like(like, dtype=torch.bool) if candidates is None else candidates
    return chosen if tier is None else chosen & (tier == 0)


def look_at_first(first, lengths, starts, is_candidate) -> None:
    """Indices: of images of so many tokens, that begin at ``starts`` among those of is_candidate."""
    outside = (first < -1) | (first >= lengths)
    refuse("first", first, outside, "values in [-1, N)", ("image",), "Remedy: indices of tokens, -1 for none.")
    given = first >= 0
    wrong = given.clone()
    wrong[given] = ~is_candidate[(starts + first)[given]]
    refuse("first", first, wrong, "a candidate of tier 0", ("image",), "Remedy: a token that may be picked, or -1.")


def look_at_options(prior, sbar, tier, first, candidates, combine, axes) -> None:
    """The values of what the dense and the packed operator share."""
    if tier is not None:
        refuse("tier", tier, (tier < 0) | (tier > 3), "values in [0, 4)", axes, "Remedy: see the page.")
    if prior is not None:
        check_finite("prior", prior, axes, None if tier is None else (tier == 0) | (tier == 3))
    check_finite("sbar", sbar, ("image",))
    if prior is not None and combine == "mul":
        negative = (prior < 0) & is_candidate(tier, candidates, prior)
        refuse("prior", prior, negative, "numbers >= 0, as combine is 'mul'", axes, "Remedy: clamp, or shift.")
    if first is not None and first.is_floating_point():
        check_finite("first", first, axes, is_candidate(tier, candidates, first))


def look(
    s, prior, k, *, sbar=None, tier=None, suppression=1.0, first=None, candidates=None, combine="sub", max_min=False
) -> None:
    refuse("s", s, ~s.isfinite(), "finite numbers", ("image", "token", "token"), REMEDY)
    look_at_options(prior, sbar, tier, first, candidates, combine, ("image", "token"))
    look_at_indices(first, tier, candidates, s[:, 0])


def look_at_indices(first, tier, candidates, tokens) -> None:
    """A first pick of each image by index; tokens is anything [B, N]."""
    if first is not None and not first.is_floating_point():
        b, n = tokens.shape
        starts = n * torch.arange(b, dtype=torch.int64, device=tokens.device)
        look_at_first(first, torch.full_like(starts, n), starts, is_candidate(tier, candidates, tokens).flatten())


def examples(b: int) -> list[Example]:
    s, prior, sbar = random(b, 12, 12), random(b, 12), random(b)
    tier = (prior < 0.2).to(torch.int8)
    candidates, first = random(b, 12) < 0.8, (12 * random(b)).long()
    return [
        Example((s, prior, 5), {"sbar": sbar, "tier": tier, "suppression": 0.5, "max_min": True}),
        Example((s, prior, 9), {"candidates": candidates, "combine": "mul", "first": first}),
        Example((s.double(), prior.half(), 0)),
        Example((s, prior, 12), {"suppression": 0.0}),
        Example((s, None, 12), {"first": prior, "tier": tier, "candidates": candidates}),
    ]


def check_varlen(
    s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, sbar=None, tier=None, suppression=1.0, first=None,
    candidates=None, combine="sub", max_min=False,
) -> None:  # fmt: skip
    sizes: dict[str, int] = {}
    check_tensor("s", s, "T max_seqlen", sizes, (torch.float32, torch.float64))
    check_segments(cu_seqlens, max_seqlen, sizes, s)
    if s.shape[1] != max_seqlen:
        raise ValueError(f"s: expected shape [T max_seqlen] = {[s.shape[0], max_seqlen]}, got {list(s.shape)}.")
    sizes["S"] = sizes["S+1"] - 1
    if prior is not None:
        check_tensor("prior", prior, "T", sizes, FLOATS, s)
    check_rows(cu_kept, total_keep, sizes, s)
    check_options(sbar, tier, suppression, first, candidates, combine, max_min, sizes, ("S", "T"), s)


def fake_varlen(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **options):
    return s.new_empty((total_keep,), dtype=torch.int64)


def varlen_on_reference(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **options):
    return reference.greedy_select_varlen(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **options)


def varlen_on_triton(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **options):
    from .kernel import greedy_select_varlen as launch

    return launch(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **options)


def varlen_flops(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, max_min=False, **options) -> int:
    """At most: as if the tokens came in segments of max_seqlen, as the lengths are on the device."""
    return 4 * total_keep * max_seqlen + (s[0] * max_seqlen if max_min else 0)


def look_at_varlen(
    s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, sbar=None, tier=None, suppression=1.0, first=None,
    candidates=None, combine="sub", max_min=False,
) -> None:  # fmt: skip
    lengths = look_at_segments(cu_seqlens, max_seqlen, s.shape[0])
    look_at_rows(cu_kept, lengths, total_keep)
    used = torch.arange(max_seqlen, dtype=torch.int64, device=s.device) < lengths.repeat_interleave(lengths)[:, None]
    refuse("s", s, ~s.isfinite() & used, "finite numbers", ("token", "column"), REMEDY)
    look_at_options(prior, sbar, tier, first, candidates, combine, ("token",))
    if first is not None and not first.is_floating_point():
        look_at_first(first, lengths, cu_seqlens[:-1].long(), is_candidate(tier, candidates, s[:, 0]))


def varlen_examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths, kept = (
        torch.tensor([*sizes[:b], *[5] * (b - 2), 0], dtype=torch.int64, device="cpu") for sizes in ((7, 12), (3, 9))
    )
    as_offsets = lambda sizes: torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()  # noqa: E731
    t = int(lengths.sum())
    offsets = as_offsets(lengths), as_offsets(kept), int(kept.sum()), 12
    s, prior, sbar = random(t, 12), random(t), random(b + 1)
    tier, candidates = (prior < 0.2).to(torch.int8), random(t) < 0.8
    first = torch.zeros(b + 1, dtype=torch.int64, device="cpu")
    return [
        Example((s, prior, *offsets), {"sbar": sbar, "tier": tier, "suppression": 0.5, "max_min": True}),
        Example((s, prior.half(), *offsets), {"candidates": candidates, "combine": "mul", "first": first}),
        Example((s, None, *offsets), {"first": prior}),
        Example((s.double(), prior, *offsets)),
    ]


backends.register(
    Operator(
        "greedy_select",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        is_traced=always,
    )
)
backends.register(
    Operator(
        "greedy_select_varlen",
        check=check_varlen,
        reference=varlen_on_reference,
        triton=varlen_on_triton,
        fake=fake_varlen,
        flops=varlen_flops,
        examples=varlen_examples,
        look=look_at_varlen,
        looped=True,
        no_shards=NO_SHARDS,
    )
)


def options_of(sbar, tier, suppression, first, candidates, combine, max_min) -> dict[str, Any]:
    """As the operators take them; those that came later are left out of most calls, as each costs a little time."""
    options = {"sbar": sbar, "tier": tier, "suppression": suppression}
    if isinstance(first, str):
        if first not in ("prior", "max_min"):
            raise ValueError(f"first: expected 'prior', 'max_min' or a tensor, got {first!r}.")
        first, max_min = None, max_min or first == "max_min"
    if first is not None:
        options["first"] = first
    if candidates is not None:
        options["candidates"] = candidates
    if combine != "sub":
        options["combine"] = combine
    if max_min is not False:
        options["max_min"] = max_min
    return options


def of_keys(mask, scale_prior, metric) -> dict[str, tuple[Any, Any]]:
    """What goes with keys alone, and its defaults."""
    return {"mask": (mask, None), "scale_prior": (scale_prior, True), "metric": (metric, "cosine")}


def options_with_keys(options: dict[str, Any], mask, scale_prior, metric) -> dict[str, Any]:
    rest = {name: value for name, value in options.items() if name not in ("sbar", "tier")}
    return {**rest, "mask": mask, "scale_prior": scale_prior, "metric": metric}


@tracing.leaf()
def greedy_select(
    s: torch.Tensor | None = None,  # [B, N, N]
    prior: torch.Tensor | None = None,  # [B, N]
    k: int | None = None,
    *,
    sbar: torch.Tensor | None = None,  # [B]
    tier: torch.Tensor | None = None,  # [B, N]
    suppression: float = 1.0,
    first: torch.Tensor | str | None = None,  # [B] or [B, N]
    candidates: torch.Tensor | None = None,  # [B, N]
    combine: str = "sub",
    max_min: bool = False,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    mask: torch.Tensor | None = None,  # [B, N]
    scale_prior: bool = True,
    metric: str = "cosine",
    backend: str = "auto",
) -> torch.Tensor:
    """Greedy selection of k tokens that suppresses what is similar to those already picked (Eq. 2 and 4).

    Every step picks the token i with the largest ``u_i - suppression * max_j s_ji`` over the tokens j picked so far,
    with ``combine="mul"`` the largest ``u_i * (1 - suppression * max_j s_ji)``; the first step goes by ``first``. A tie
    goes to the lowest index. The first j picks are those of a call with k = j.

    Args:
        s: [B, N, N] fp32 or fp64; row s[j] is what a picked token j has in common with each other one. It need not be
            symmetric, and may be any negated distance. NaN and infinities count as 0: a token that must not be picked
            is none of the candidates, or in tier 3.
        prior: [B, N] floating; the utility u, or with ``sbar`` what u is made of. A NaN utility counts as the lowest,
            as -inf does: both can be picked. None: 0 for every token.
        k: picks per image, 0 <= k <= N.
        sbar: [B] fp32 or fp64; where given and suppression is not 0, u = sbar / mean|prior| * prior, the mean over
            tiers 0 and 3.
        tier: [B, N] int8; tier 0 is picked by score, then tier 1 by index, then tier 2 by index, tier 3 never.
            None: all tokens are in tier 0.
        suppression: finite, >= 0; 0 gives plain top-k of the prior, whatever sbar is.
        first: which token of tier 0 comes first. None or "prior": that of the highest u. "max_min": that whose
            nearest other one is farthest, i.e. whose largest s_ji over the other candidates j of tier 0 is lowest.
            [B] int64: this token; -1, or one that may not be picked, as None. [B, N] floating: that of the highest
            value here, NaN and infinities as in prior.
        candidates: [B, N] bool; a token that is False is never picked. In tier 0, it counts in mean|prior|.
        combine: "sub", or "mul", where a negative utility counts as 0.
        max_min: True is the same as first="max_min", by which the raw operator knows it.
        keys: [B, N, Dk] floating, instead of s: the picks are those on the s, sbar and tier of
            :func:`similarity(keys, prior, mask)`, which are not returned, and of s only what is needed is computed. The
            raw operator is greedy_select_from_keys.
        mask: [B, N] bool, False = padding; with keys.
        scale_prior: with keys, whether sbar scales the prior; False: the prior is the utility.
        metric: of keys, "cosine" or "neg_l2", as in :func:`similarity`.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        order: [B, k] int64, distinct tokens in the order in which they were picked; -1 where nothing was left that may
        be picked.

        The arithmetic is fp32 (fp64 where s or prior is fp64), every operation rounded: given the same s and u, the
        picks are the same bit for bit on every backend.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, k, suppression, first, combine or backend.
        RuntimeError: on CPU, an index first that is not in [-1, N).
    """
    k = as_count("k", k)
    check_s_or_keys(s, keys, {"sbar": sbar, "tier": tier}, of_keys(mask, scale_prior, metric))
    options = options_of(sbar, tier, suppression, first, candidates, combine, max_min)
    op, on = "greedy_select", s
    if keys is not None:
        op, on = "greedy_select_from_keys", keys
        options = options_with_keys(options, mask, scale_prior, metric)
    tracing.checked(OPERATORS[op].check, on, prior, k, **options)
    return backends.run(op, backend, (on, prior, k), options)


@tracing.leaf()
def greedy_select_varlen(
    s: torch.Tensor | None = None,  # [T, max_seqlen]
    prior: torch.Tensor | None = None,  # [T]
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
    total_keep: int | None = None,
    max_seqlen: int | None = None,
    *,
    sbar: torch.Tensor | None = None,  # [S]
    tier: torch.Tensor | None = None,  # [T]
    suppression: float = 1.0,
    first: torch.Tensor | str | None = None,  # [S] or [T]
    candidates: torch.Tensor | None = None,  # [T]
    combine: str = "sub",
    max_min: bool = False,
    keys: torch.Tensor | None = None,  # [T, Dk]
    mask: torch.Tensor | None = None,  # [T]
    scale_prior: bool = True,
    metric: str = "cosine",
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`greedy_select` of a packed batch: S images of any number of tokens, one after the other.

    Every segment gets the picks that :func:`greedy_select` makes of it alone. The offsets stay on the device, and are
    not checked: wrong ones read and write nothing out of bounds.

    Args:
        s: [T, max_seqlen] fp32 or fp64; row t has what token t has in common with its segment's tokens 0, 1, ...; what
            lies behind them is not used.
        prior: [T] floating, or None.
        cu_seqlens: [S + 1] int32 on the device of s: segment i is tokens cu_seqlens[i] to cu_seqlens[i + 1].
        cu_kept: [S + 1] int32: its picks are order[cu_kept[i] : cu_kept[i + 1]], at most as many as it has tokens.
        total_keep: int, cu_kept[S].
        max_seqlen: int, at least the tokens of the longest segment.
        sbar: [S], and tier, candidates: [T], as there.
        first: as there; [S] int64, an index within the segment, or [T] floating.
        keys, mask: [T, Dk], [T], instead of s, sbar and tier, as there. The raw operator is
            greedy_select_from_keys_varlen.
        suppression, combine, max_min, scale_prior, metric, backend: as there.

    Returns:
        order: [total_keep] int64, indices within the segment in the order in which they were picked; -1 where there is
        no token.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, count, suppression, first, combine or backend.
        RuntimeError: on CPU, an index first that is not in its segment, nor -1.
    """
    total_keep, max_seqlen = as_count("total_keep", total_keep), as_count("max_seqlen", max_seqlen)
    check_s_or_keys(s, keys, {"sbar": sbar, "tier": tier}, of_keys(mask, scale_prior, metric))
    options = options_of(sbar, tier, suppression, first, candidates, combine, max_min)
    op, on = "greedy_select_varlen", s
    if keys is not None:
        op, on = "greedy_select_from_keys_varlen", keys
        options = options_with_keys(options, mask, scale_prior, metric)
    args = (on, prior, cu_seqlens, cu_kept, total_keep, max_seqlen)
    tracing.checked(OPERATORS[op].check, *args, **options)
    return backends.run(op, backend, args, options)
