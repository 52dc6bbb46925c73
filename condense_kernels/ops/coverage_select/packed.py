"""coverage_select on the segments of a packed batch, among each segment's own tokens."""

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import as_count, check_tensor
from ..._dispatch.debug import refuse
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_rows, check_segments, look_at_rows, look_at_segments, parts_of
from . import reference
from .op import check_options, look_at_options


def check(c, cu_seqlens, cu_kept, total_keep, max_seqlen, *, weight=None, combine="mul", candidates=None) -> None:
    sizes: dict[str, int] = {}
    check_tensor("c", c, "T M", {}, (torch.float32, torch.float64))
    check_segments(cu_seqlens, max_seqlen, sizes, c)
    check_tensor("c", c, "T max_seqlen", sizes | {"max_seqlen": max_seqlen}, (torch.float32, torch.float64))
    sizes["T"] = c.shape[0]
    check_rows(cu_kept, total_keep, sizes, c)
    check_options(weight, combine, candidates, "T", sizes, c)


def fake(c, cu_seqlens, cu_kept, total_keep, max_seqlen, **options):
    return c.new_empty((total_keep,), dtype=torch.int64)


def on_reference(c, cu_seqlens, cu_kept, total_keep, max_seqlen, *, weight=None, combine="mul", candidates=None):
    order = torch.full((total_keep,), -1, dtype=torch.int64, device=c.device)
    for part in parts_of(cu_seqlens, cu_kept, c.shape[0], total_keep, max_seqlen):
        order[part.rows] = reference.coverage_select(
            c[part.tokens, : part.num_tokens][None],
            part.num_rows,
            weight=None if weight is None else weight[part.tokens][None],
            combine=combine,
            candidates=None if candidates is None else candidates[part.tokens][None],
        )[0]
    return order


def on_triton(*args, **options):
    from .kernel import coverage_select_varlen as launch

    return launch(*args, **options)


def flops(c, cu_seqlens, cu_kept, total_keep, max_seqlen, **options) -> int:
    """At most: as if every segment had max_seqlen tokens."""
    return 3 * max_seqlen**2 * total_keep


def look(c, cu_seqlens, cu_kept, total_keep, max_seqlen, *, weight=None, combine="mul", candidates=None) -> None:
    lengths = look_at_segments(cu_seqlens, max_seqlen, c.shape[0])
    look_at_rows(cu_kept, lengths, total_keep)
    length_of = lengths.repeat_interleave(lengths.long())  # of each token's segment
    inside = torch.arange(max_seqlen, dtype=torch.int64, device=c.device) < length_of[:, None]
    refuse("c", c, inside & ~c.isfinite(), "finite numbers", ("token", "token of its segment"), "Remedy: candidates=.")
    look_at_options(weight, combine, candidates, ("token",))


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    cu_seqlens, cu_kept = (
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int() for counts in (lengths, lengths // 2)
    )
    t = int(cu_seqlens[-1])
    c, weight = random(t, 12), random(t)
    offsets = cu_seqlens, cu_kept, int(cu_kept[-1]), 12
    return [
        Example((c, *offsets), {"weight": weight, "candidates": weight > 0.2}),
        Example((c, *offsets), {"combine": "add"}),
    ]


backends.register(
    Operator(
        "coverage_select_varlen",
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
def coverage_select_varlen(
    c: torch.Tensor,  # [T, max_seqlen]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    weight: torch.Tensor | None = None,  # [T]
    combine: str = "mul",
    candidates: torch.Tensor | None = None,  # [T]
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`coverage_select` on each segment of a packed batch, with the bits of each segment alone.

    Args:
        c: [T, max_seqlen] fp32 or fp64; row i of a segment of n tokens holds how far its token i is covered by its
            tokens 0 to n - 1. What lies behind is never used.
        cu_seqlens: [S + 1] int32 on the device of c: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        cu_kept: [S + 1] int32, running sums too: how many tokens are picked of each segment.
        total_keep: int, the last of cu_kept.
        max_seqlen: int, at least the tokens of the longest segment.
        weight, combine, candidates, backend: as in :func:`coverage_select`, of [T].

    Returns:
        order: [total_keep] int64 within the segment, in pick order; -1 where there is no token to pick.

        Offsets are not checked, as they stay on the device; wrong ones read and write nothing out of bounds.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, total_keep, max_seqlen, combine or backend.
    """
    total_keep, max_seqlen = as_count("total_keep", total_keep), as_count("max_seqlen", max_seqlen)
    args = c, cu_seqlens, cu_kept, total_keep, max_seqlen
    options = {"weight": weight, "combine": combine, "candidates": candidates}
    tracing.checked(check, *args, **options)
    return backends.run("coverage_select_varlen", backend, args, options)
