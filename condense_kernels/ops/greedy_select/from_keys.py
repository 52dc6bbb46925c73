"""greedy_select on the similarities of keys, which are not returned; no more are computed than it needs."""

import torch

from ..._dispatch import backends
from ..._dispatch.checks import FLOATS, check_choice, check_count, check_flag, check_tensor
from ..._dispatch.debug import check_finite
from ..._dispatch.declaration import Example, Operator, random
from ..similarity import op as similarity
from . import op as on_s

METRICS = ("cosine",)


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
    check_choice("metric", metric, METRICS)


def fake(keys, prior, k, **_):
    return keys.new_empty((keys.shape[0], k), dtype=torch.int64)


def on_reference(keys, prior, k, *, mask=None, scale_prior=True, metric="cosine", **options):
    s, sbar, _, tier = similarity.on_reference(keys, prior, mask)
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
        Example((keys, None, 12), {"max_min": True}),
    ]


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
