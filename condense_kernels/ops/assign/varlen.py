"""The same on a packed batch: every segment as :func:`assign` on it alone."""

from typing import Any

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import as_count, check_s_or_keys, check_tensor, check_tier, check_weight
from ..._dispatch.debug import check_finite
from ..._dispatch.declaration import OPERATORS, Example, Operator, random
from ..._dispatch.packing import (
    NO_SHARDS,
    check_places,
    check_rows,
    check_segments,
    look_at_rows,
    look_at_segments,
    parts_of,
)
from . import op as dense


def check(
    s, indices, cu_seqlens, cu_kept, max_seqlen, *, tier=None, positions=None, spatial_weight=1.0, sources=None
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "T M", sizes, (torch.float32, torch.float64))
    check_tensor("indices", indices, "total_keep", sizes, (torch.int64,), s)
    check_segments(cu_seqlens, max_seqlen, sizes, s)
    check_rows(cu_kept, indices.shape[0], sizes, s)
    if s.shape[1] < max_seqlen:
        raise ValueError(
            f"s: expected rows of at least max_seqlen = {max_seqlen} similarities, got {list(s.shape)}. Remedy: [T, "
            "max_seqlen], row t with those to the tokens of its segment."
        )
    check_tier(tier, "T", sizes, s)
    check_weight("spatial_weight", spatial_weight)
    check_places(positions, spatial_weight, sizes, s)
    if sources is not None:
        check_tensor("sources", sources, "T", sizes, (torch.bool,), s)


def fake(s, indices, cu_seqlens, cu_kept, max_seqlen, **_):
    return s.new_empty((s.shape[0],), dtype=torch.int64)


def on_reference(
    s, indices, cu_seqlens, cu_kept, max_seqlen, *, tier=None, positions=None, spatial_weight=1.0, sources=None
):
    assignment = torch.full((s.shape[0],), -1, dtype=torch.int64, device=s.device)
    for part in parts_of(cu_seqlens, cu_kept, s.shape[0], indices.shape[0], max_seqlen):
        of_tokens = {"tier": tier, "positions": positions, "sources": sources}
        alone = {name: None if t is None else t[part.tokens][None] for name, t in of_tokens.items()}
        square = s[part.tokens, : part.num_tokens]
        rows = dense.on_reference(square[None], indices[part.rows][None], spatial_weight=spatial_weight, **alone)
        assignment[part.tokens] = rows[0]
    return assignment


def on_triton(*args, **kwargs):
    from .kernel import assign_varlen as launch

    return launch(*args, **kwargs)


def flops(
    s, indices, cu_seqlens, cu_kept, max_seqlen, *, tier=None, positions=None, spatial_weight=1.0, sources=None
) -> int:
    """At most: as if the tokens came in segments of max_seqlen, as the lengths are on the device."""
    segments = -(-s[0] // max(max_seqlen, 1))
    kept = -(-indices[0] // max(segments, 1))
    images = segments, max_seqlen, max_seqlen
    return dense.flops(images, (segments, kept), positions=positions, spatial_weight=spatial_weight)


def look(s, indices, cu_seqlens, cu_kept, max_seqlen, *, tier=None, positions=None, **_) -> None:
    lengths = look_at_segments(cu_seqlens, max_seqlen, s.shape[0])
    look_at_rows(cu_kept, lengths, indices.shape[0])
    for part in parts_of(cu_seqlens, cu_kept, s.shape[0], indices.shape[0], max_seqlen):
        of_image = f"image {part.number}".format
        square = s[part.tokens, : part.num_tokens]
        dense.look_at_similarities(square[None], indices[part.rows][None], of_image)
        if positions is not None:
            valid = None if tier is None else tier[part.tokens][None] != 2
            check_finite("positions", positions[part.tokens][None], (of_image, "token", "axis"), valid)


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    cu_seqlens, cu_kept = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths, lengths // 3))
    t = int(cu_seqlens[-1])
    s = random(t, 12)
    for part in parts_of(cu_seqlens, None, t, 0, 12):
        square = s[part.tokens, : part.num_tokens]
        s[part.tokens, : part.num_tokens] = square + square.mT.clone()
    indices = torch.cat([torch.arange(n, dtype=torch.int64, device="cpu") for n in (lengths // 3).tolist()])
    given = s, indices, cu_seqlens, cu_kept, 12
    tier = (random(t) < 0.2).to(torch.int8) * 2
    return [
        Example(given, {"tier": tier, "positions": random(t, 2), "spatial_weight": 0.5, "sources": random(t) < 0.5}),
        Example((s.double(), *given[1:]), {"spatial_weight": 0.0}),
    ]


backends.register(
    Operator(
        "assign_varlen",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        looped=True,
        no_shards=NO_SHARDS,
    )
)


@tracing.leaf()
def assign_varlen(
    s: torch.Tensor | None = None,  # [T, max_seqlen]
    indices: torch.Tensor | None = None,  # [total_keep]
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    cu_kept: torch.Tensor | None = None,  # [S + 1]
    max_seqlen: int | None = None,
    *,
    tier: torch.Tensor | None = None,  # [T]
    positions: torch.Tensor | None = None,  # [T, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [T]
    keys: torch.Tensor | None = None,  # [T, Dk]
    mask: torch.Tensor | None = None,  # [T]
    metric: str = "cosine",
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`assign` on a packed batch: S images of any number of tokens, one after the other.

    Every segment gets the bits that :func:`assign` gives to it alone. The offsets stay on the device: no call waits for
    it, and none can check them. Offsets that are wrong read and write nothing out of bounds.

    Args:
        s: [T, max_seqlen] fp32 or fp64, or longer rows: row t of a segment of n tokens holds its similarities to the
            segment's tokens 0 to n - 1. What lies behind is not used.
        indices: [total_keep] int64, the kept tokens of all segments, counted within the segment, distinct there; -1 is
            a row that takes nobody.
        cu_seqlens: [S + 1] int32 on the device of s: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        cu_kept: [S + 1] int32, running sums too: how many rows each segment has, at most its tokens.
        max_seqlen: int, at least the tokens of the longest segment: sizes what is launched.
        tier, positions, sources: [T], [T, P], [T] as in :func:`assign`. dmax is that of the segment's own positions.
        keys, mask: [T, Dk], [T], instead of s and tier, as in :func:`assign`. The raw operator is
            assign_from_keys_varlen.
        spatial_weight, metric, backend: as in :func:`assign`.

    Returns:
        assignment: [T] int64, the row of each token within its segment; -1 as in :func:`assign`, and for the tokens
            of a segment without rows or longer than max_seqlen.

    Raises:
        TypeError, ValueError: a wrong rank, shape, dtype, device, count, spatial_weight or backend.
        RuntimeError: on CPU, an index outside of [-1, the tokens of its segment). On a GPU it is a row that takes
            nobody.
    """
    check_s_or_keys(s, keys, {"tier": tier}, {"mask": (mask, None), "metric": (metric, "cosine")})
    options: dict[str, Any] = {"positions": positions, "spatial_weight": spatial_weight, "sources": sources}
    if keys is None:
        op, on, options = "assign_varlen", s, {"tier": tier, **options}
    else:
        op, on, options = "assign_from_keys_varlen", keys, {"mask": mask, **options, "metric": metric}
    args = (on, indices, cu_seqlens, cu_kept, as_count("max_seqlen", max_seqlen))
    tracing.checked(OPERATORS[op].check, *args, **options)
    return backends.run(op, backend, args, options)
