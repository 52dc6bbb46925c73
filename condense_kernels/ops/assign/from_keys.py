"""assign on the similarities of keys, of which the kept tokens' rows alone are computed."""

import torch

from ..._dispatch import backends
from ..._dispatch.checks import check_choice, check_tensor, check_weight, check_where
from ..._dispatch.debug import check_finite, check_indices, check_positions
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_places, check_rows, look_at_rows, look_at_segments, parts_of
from ..similarity import op as similarity
from ..similarity import packed
from . import op as on_s
from . import varlen


def check(
    keys, indices, *, mask=None, grid=None, positions=None, spatial_weight=1.0, sources=None, metric="cosine"
) -> None:
    similarity.check(keys, None, mask)
    sizes = {"B": keys.shape[0], "N": keys.shape[1]}
    check_tensor("indices", indices, "B K", sizes, (torch.int64,), keys)
    check_weight("spatial_weight", spatial_weight)
    check_where(grid, positions, spatial_weight, sizes, keys)
    if sources is not None:
        check_tensor("sources", sources, "B N", sizes, (torch.bool,), keys)
    check_choice("metric", metric, similarity.METRICS)


def fake(keys, indices, **_):
    return keys.new_empty(keys.shape[:2], dtype=torch.int64)


def on_reference(keys, indices, *, mask=None, metric="cosine", **where):
    s, _, _, tier, _ = similarity.with_nearest_on_reference(keys, None, mask, metric=metric)
    return on_s.on_reference(s, indices, tier=tier, **where)


def on_triton(keys, indices, **options):
    from .streamed import assign_from_keys as launch

    return launch(keys, indices, **options)


def flops(keys, indices, *, mask=None, metric="cosine", **where) -> int:
    """The products of the kept tokens' rows, and the assignment."""
    b, n, dk = keys
    return 2 * b * n * indices[1] * dk + on_s.flops((b, n, n), indices, **where)


def look(keys, indices, *, mask=None, positions=None, **_) -> None:
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    check_indices("indices", indices, -1, keys.shape[1])
    check_positions(positions, mask)


def examples(b: int) -> list[Example]:
    keys = random(b, 12, 5) - 0.5
    indices = torch.tensor([1, 4, 6, 11], dtype=torch.int64, device="cpu").expand(b, -1)
    return [
        Example((keys, indices), {"mask": random(b, 12) > 0.2, "grid": [3, 4], "metric": "cosine"}),
        Example((keys.bfloat16(), indices), {"positions": random(12, 2), "spatial_weight": 0.3}),
        Example((keys.double(), indices), {"positions": (9 * random(b, 12, 3)).int()}),
        Example((keys, indices), {"spatial_weight": 0.0, "sources": random(b, 12) < 0.5, "metric": "neg_l2"}),
    ]


def check_varlen(
    keys, indices, cu_seqlens, cu_kept, max_seqlen, *, mask=None, positions=None, spatial_weight=1.0, sources=None,
    metric="cosine",
) -> None:  # fmt: skip
    packed.check(keys, cu_seqlens, max_seqlen, mask=mask, metric=metric)
    sizes = {"T": keys.shape[0], "S+1": cu_seqlens.shape[0]}
    check_tensor("indices", indices, "total_keep", sizes, (torch.int64,), keys)
    check_rows(cu_kept, indices.shape[0], sizes, keys)
    check_weight("spatial_weight", spatial_weight)
    check_places(positions, spatial_weight, sizes, keys)
    if sources is not None:
        check_tensor("sources", sources, "T", sizes, (torch.bool,), keys)


def fake_varlen(keys, indices, cu_seqlens, cu_kept, max_seqlen, **_):
    return keys.new_empty((keys.shape[0],), dtype=torch.int64)


def varlen_on_reference(keys, indices, cu_seqlens, cu_kept, max_seqlen, *, mask=None, metric="cosine", **options):
    s, _, _, tier, _ = packed.on_reference(keys, cu_seqlens, max_seqlen, mask=mask, metric=metric)
    return varlen.on_reference(s, indices, cu_seqlens, cu_kept, max_seqlen, tier=tier, **options)


def varlen_on_triton(*args, **options):
    from .streamed import assign_from_keys_varlen as launch

    return launch(*args, **options)


def varlen_flops(keys, indices, cu_seqlens, cu_kept, max_seqlen, *, mask=None, metric="cosine", **where) -> int:
    s = keys[0], max_seqlen
    products = 2 * max_seqlen * indices[0] * keys[1]
    return products + varlen.flops(s, indices, cu_seqlens, cu_kept, max_seqlen, **where)


def look_at_varlen(keys, indices, cu_seqlens, cu_kept, max_seqlen, *, mask=None, positions=None, **_) -> None:
    lengths = look_at_segments(cu_seqlens, max_seqlen, keys.shape[0])
    look_at_rows(cu_kept, lengths, indices.shape[0])
    check_finite("keys", keys, ("token", "channel"), mask)
    for part in parts_of(cu_seqlens, cu_kept, keys.shape[0], indices.shape[0], max_seqlen):
        of_image = f"image {part.number}".format
        check_indices("indices", indices[part.rows][None], -1, part.num_tokens, of_image)
    if positions is not None:
        check_finite("positions", positions, ("token", "axis"), mask)


def varlen_examples(b: int) -> list[Example]:
    (s, *rest), options = varlen.examples(b)[0]
    keys = random(s.shape[0], 5) - 0.5
    options = {name: value for name, value in options.items() if name != "tier"}
    return [
        Example((keys, *rest), {**options, "mask": random(s.shape[0]) > 0.2, "metric": "cosine"}),
        Example((keys.double(), *rest), {"spatial_weight": 0.0, "metric": "neg_l2"}),
        Example((keys.bfloat16(), *rest), {"spatial_weight": 0.0}),
    ]


backends.register(
    Operator(
        "assign_from_keys",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        shared={"positions": 2},
    )
)
backends.register(
    Operator(
        "assign_from_keys_varlen",
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
