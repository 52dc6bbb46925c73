"""greedy_select on the similarities of keys, which are not returned; no more are computed than it needs."""

import torch

from ..._dispatch import backends
from ..._dispatch.checks import FLOATS, check_choice, check_count, check_flag, check_tensor
from ..._dispatch.debug import check_finite
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_rows, look_at_rows, look_at_segments
from ..similarity import op as similarity
from ..similarity import packed
from . import op as on_s


def check(
    keys, prior, k, *, mask=None, suppression=1.0, scale_prior=True, first=None, candidates=None, combine="sub",
    max_min=False, metric="cosine",
) -> None:  # fmt: skip
    similarity.check(keys, None, mask)
    sizes = {"B": keys.shape[0], "N": keys.shape[1]}
    if prior is not None:
        check_tensor("prior", prior, "B N", sizes, FLOATS, keys)
    check_count("k", k, 0, sizes["N"], f"N = {sizes['N']} tokens")
    on_s.check_options(None, None, suppression, first, candidates, combine, max_min, sizes, ("B", "B N"), keys)
    check_flag("scale_prior", scale_prior)
    check_choice("metric", metric, similarity.METRICS)


def fake(keys, prior, k, **_):
    return keys.new_empty((keys.shape[0], k), dtype=torch.int64)


def on_reference(keys, prior, k, *, mask=None, scale_prior=True, metric="cosine", **options):
    s, sbar, _, tier, _ = similarity.with_nearest_on_reference(keys, prior, mask, metric=metric)
    return on_s.on_reference(s, prior, k, sbar=sbar if scale_prior else None, tier=tier, **options)


def on_triton(keys, prior, k, **options):
    from .streamed import greedy_select_from_keys as launch

    return launch(keys, prior, k, **options)


def flops(keys, prior, k, *, max_min=False, **_) -> int:
    """At most: of all similarities, and of the loop on them."""
    return similarity.flops(keys) + on_s.flops((*keys[:2], keys[1]), prior, k, max_min=max_min)


def look(keys, prior, k, *, mask=None, first=None, candidates=None, combine="sub", **_) -> None:
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    tier = None if mask is None else torch.where(mask, 0, 2)
    on_s.look_at_options(prior, None, tier, first, candidates, combine, ("image", "token"))
    on_s.look_at_indices(first, tier, candidates, keys[..., 0])


def examples(b: int) -> list[Example]:
    keys, prior = random(b, 12, 5) - 0.5, random(b, 12)
    mask, candidates, first = prior > 0.1, random(b, 12) < 0.8, (12 * random(b)).long()
    return [
        Example((keys, prior, 5), {"mask": mask, "suppression": 0.5, "scale_prior": False, "metric": "cosine"}),
        Example((keys, prior, 9), {"candidates": candidates, "combine": "mul", "first": first}),
        Example((keys.double(), prior.half(), 0)),
        Example((keys.bfloat16(), prior, 12), {"suppression": 0.0}),
        Example((keys, None, 12), {"max_min": True, "metric": "neg_l2"}),
    ]


def check_varlen(
    keys, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, mask=None, suppression=1.0, scale_prior=True,
    first=None, candidates=None, combine="sub", max_min=False, metric="cosine",
) -> None:  # fmt: skip
    packed.check(keys, cu_seqlens, max_seqlen, mask=mask, metric=metric)
    sizes = {"T": keys.shape[0], "S+1": cu_seqlens.shape[0], "S": cu_seqlens.shape[0] - 1}
    if prior is not None:
        check_tensor("prior", prior, "T", sizes, FLOATS, keys)
    check_rows(cu_kept, total_keep, sizes, keys)
    on_s.check_options(None, None, suppression, first, candidates, combine, max_min, sizes, ("S", "T"), keys)
    check_flag("scale_prior", scale_prior)


def fake_varlen(keys, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **_):
    return keys.new_empty((total_keep,), dtype=torch.int64)


def varlen_on_reference(
    keys, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, mask=None, scale_prior=True, metric="cosine", **options
):
    s, sbar, _, tier, _ = packed.on_reference(keys, cu_seqlens, max_seqlen, scores=prior, mask=mask, metric=metric)
    options |= {"sbar": sbar if scale_prior else None, "tier": tier}
    return on_s.varlen_on_reference(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, **options)


def varlen_on_triton(*args, **options):
    from .streamed import greedy_select_from_keys_varlen as launch

    return launch(*args, **options)


def varlen_flops(keys, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, max_min=False, **_) -> int:
    of_s = packed.flops(keys, cu_seqlens, max_seqlen)
    s = keys[0], max_seqlen
    return of_s + on_s.varlen_flops(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, max_min=max_min)


def look_at_varlen(
    keys, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, *, mask=None, first=None, candidates=None, combine="sub",
    **_,
) -> None:  # fmt: skip
    lengths = look_at_segments(cu_seqlens, max_seqlen, keys.shape[0])
    look_at_rows(cu_kept, lengths, total_keep)
    check_finite("keys", keys, ("token", "channel"), mask)
    tier = None if mask is None else torch.where(mask, 0, 2)
    on_s.look_at_options(prior, None, tier, first, candidates, combine, ("token",))
    if first is not None and not first.is_floating_point():
        live = on_s.is_candidate(tier, candidates, keys[:, 0])
        on_s.look_at_first(first, lengths, cu_seqlens[:-1].long(), live)


def varlen_examples(b: int) -> list[Example]:
    found = []
    for i, ((s, prior, *offsets), options) in enumerate(on_s.varlen_examples(b)):
        keys = random(s.shape[0], 5).to(s.dtype) - 0.5
        rest = {name: value for name, value in options.items() if name not in ("sbar", "tier")}
        if i == 0:
            rest |= {"mask": random(len(keys)) > 0.1, "scale_prior": False, "metric": "neg_l2"}
        found.append(Example((keys, prior, *offsets), rest))
    return found


backends.register(
    Operator(
        "greedy_select_from_keys",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
    )
)
backends.register(
    Operator(
        "greedy_select_from_keys_varlen",
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
