"""assign on the similarities of keys, of which the kept tokens' rows alone are computed."""

import torch

from ..._dispatch import backends
from ..._dispatch.checks import check_choice, check_tensor, check_weight, check_where
from ..._dispatch.debug import check_finite, check_indices, check_positions
from ..._dispatch.declaration import Example, Operator, random
from ..similarity import op as similarity
from . import op as on_s

METRICS = ("cosine",)


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
    check_choice("metric", metric, METRICS)


def fake(keys, indices, **_):
    return keys.new_empty(keys.shape[:2], dtype=torch.int64)


def on_reference(keys, indices, *, mask=None, metric="cosine", **where):
    s, _, _, tier = similarity.on_reference(keys, None, mask)
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
        Example((keys, indices), {"spatial_weight": 0.0, "sources": random(b, 12) < 0.5}),
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
