import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import as_count, check_tensor
from ..._dispatch.debug import check_finite
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_rows, check_segments, look_at_rows, look_at_segments
from . import reference
from .op import EPS, check_options, flops_of_picks, look_at_options


def check(
    s, quality, cu_seqlens, cu_kept, total_keep, max_seqlen, *, tier=None, candidates=None, eps=EPS, damping=0.0
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "T max_seqlen", sizes, (torch.float32, torch.float64))
    check_segments(cu_seqlens, max_seqlen, sizes, s)
    if sizes["max_seqlen"] != max_seqlen:
        raise ValueError(
            f"s: expected rows of max_seqlen = {max_seqlen} columns, got {sizes['max_seqlen']}. "
            "Remedy: max_seqlen=s.shape[1]."
        )
    check_rows(cu_kept, total_keep, sizes, s)
    check_options(sizes, s, "T", quality, tier, candidates, eps, damping)


def fake(s, quality, cu_seqlens, cu_kept, total_keep, max_seqlen, **_):
    return s.new_empty((total_keep,), dtype=torch.int64)


def on_reference(*args, **options):
    return reference.dpp_select_varlen(*args, **options)


def on_triton(*args, **options):
    from .kernel import dpp_select_varlen as launch

    return launch(*args, **options)


def flops(s, quality, cu_seqlens, cu_kept, total_keep, max_seqlen, **_) -> int:
    """At most: as if the tokens came in segments of max_seqlen, as the lengths are on the device."""
    segments = max(-(-s[0] // max(max_seqlen, 1)), 1)
    return flops_of_picks(segments, max_seqlen, -(-total_keep // segments))


def look(s, quality, cu_seqlens, cu_kept, total_keep, max_seqlen, *, tier=None, **_) -> None:
    lengths = look_at_segments(cu_seqlens, max_seqlen, s.shape[0])
    look_at_rows(cu_kept, lengths, total_keep)

    def token(t: int) -> str:
        segment = int(torch.searchsorted(cu_seqlens, t, right=True)) - 1
        return f"image {segment}, token {t - int(cu_seqlens[segment])}"

    inside = torch.arange(max_seqlen, dtype=torch.int64, device=s.device) < lengths.repeat_interleave(lengths)[:, None]
    check_finite("s", torch.where(inside, s, 0.0), (token, "token"))
    look_at_options(quality, tier, (token,))


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    cu_seqlens, cu_kept = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths, lengths // 2))
    t, total_keep = int(cu_seqlens[-1]), int(cu_kept[-1])
    s, quality = random(t, 12), random(t)
    place = torch.cat([torch.arange(int(n), dtype=torch.int64, device="cpu") for n in lengths])
    s[torch.arange(t, dtype=torch.int64, device="cpu"), place] += 6  # positive definite
    tier, candidates = (quality < 0.2).to(torch.int8), quality < 0.9
    offsets = cu_seqlens, cu_kept, total_keep, 12
    return [
        Example((s, quality, *offsets), {"tier": tier, "candidates": candidates, "eps": 1e-4, "damping": 1e-6}),
        Example((s.double(), quality.half(), *offsets)),
        Example((s, None, *offsets)),
    ]


backends.register(
    Operator(
        "dpp_select_varlen",
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
def dpp_select_varlen(
    s: torch.Tensor,  # [T, max_seqlen]
    quality: torch.Tensor | None,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    tier: torch.Tensor | None = None,  # [T]
    candidates: torch.Tensor | None = None,  # [T]
    eps: float = EPS,
    damping: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`dpp_select` on a packed batch: S segments of any number of tokens, each to its own number of picks.

    Every segment gets the bits that :func:`dpp_select` gives to it alone. The offsets stay on the device, where no call
    waits for them and none can check them: wrong ones read and write nothing out of bounds.

    Args:
        s: [T, max_seqlen] fp32 or fp64; the row of a token holds its similarities to the n tokens of its segment in
            the first n columns. What is behind them is not used.
        quality: [T] floating, or None.
        cu_seqlens: [S + 1] int32 on the device of s: segment i is tokens cu_seqlens[i] to cu_seqlens[i + 1].
        cu_kept: [S + 1] int32, running sums too: how many tokens are picked of each segment, at most all of them.
        total_keep: int, cu_kept[S].
        max_seqlen: int, the columns of s, at least the tokens of the longest segment.
        tier: [T] int8, or None.
        candidates: [T] bool, or None.
        eps, damping, backend: as in :func:`dpp_select`.

    Returns:
        order: [total_keep] int64 within the segment, its first pick at cu_kept[i]; -1 where there is no token.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, count, eps, damping or backend.
    """
    total_keep, max_seqlen = as_count("total_keep", total_keep), as_count("max_seqlen", max_seqlen)
    args = (s, quality, cu_seqlens, cu_kept, total_keep, max_seqlen)
    options = {"tier": tier, "candidates": candidates, "eps": eps, "damping": damping}
    tracing.checked(check, *args, **options)
    return backends.run("dpp_select_varlen", backend, args, options)
