"""similarity on the segments of a packed batch."""

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, as_count, check_choice, check_not_empty, check_tensor
from ..._dispatch.debug import check_finite, check_scores
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_segments, look_at_segments, parts_of
from .op import CONSTANTS, METRICS, compute_dtype, flops_with_nearest, with_nearest_on_reference
from .reference import MASKED


def check(keys, cu_seqlens, max_seqlen, *, scores=None, mask=None, metric="cosine") -> None:
    sizes: dict[str, int] = {}
    check_tensor("keys", keys, "T Dk", sizes, FLOATS)
    check_not_empty("keys", keys, 1, "channel")
    check_segments(cu_seqlens, max_seqlen, sizes, keys)
    if scores is not None:
        check_tensor("scores", scores, "T", sizes, FLOATS, keys)
    if mask is not None:
        check_tensor("mask", mask, "T", sizes, (torch.bool,), keys)
    check_choice("metric", metric, METRICS)


def fake(keys, cu_seqlens, max_seqlen, *, scores=None, mask=None, metric="cosine"):
    dtype, tokens = compute_dtype(keys, scores), keys.shape[0]
    return (
        keys.new_empty((tokens, max_seqlen), dtype=dtype),
        keys.new_empty((cu_seqlens.shape[0] - 1,), dtype=dtype),
        keys.new_empty((tokens,), dtype=dtype),
        keys.new_empty((tokens,), dtype=torch.int8),
        keys.new_empty((tokens,), dtype=dtype),
    )


def on_reference(keys, cu_seqlens, max_seqlen, *, scores=None, mask=None, metric="cosine"):
    s, sbar, g, tier, nearest = fake(keys, cu_seqlens, max_seqlen, scores=scores)
    for zeros in (s, sbar, g):
        zeros.zero_()
    tier.fill_(MASKED)
    nearest.fill_(torch.finfo(nearest.dtype).min)
    for part in parts_of(cu_seqlens, None, keys.shape[0], 0, max_seqlen):
        of_tokens = [None if t is None else t[part.tokens][None] for t in (keys, scores, mask)]
        results = with_nearest_on_reference(*of_tokens, metric=metric)
        s[part.tokens, : part.num_tokens], sbar[part.number] = results[0][0], results[1][0]
        for whole, of_part in zip((g, tier, nearest), results[2:], strict=True):
            whole[part.tokens] = of_part[0]
    return s, sbar, g, tier, nearest


def on_triton(*args, **options):
    from .kernel import similarity_varlen as launch

    return launch(*args, **options)


def flops(keys, cu_seqlens, max_seqlen, *, scores=None, mask=None, metric="cosine") -> int:
    """At most: as if the tokens came in segments of max_seqlen, as the lengths are on the device."""
    return flops_with_nearest((-(-keys[0] // max(max_seqlen, 1)), max_seqlen, keys[1]), metric=metric)


def look(keys, cu_seqlens, max_seqlen, *, scores=None, mask=None, metric="cosine") -> None:
    look_at_segments(cu_seqlens, max_seqlen, keys.shape[0])
    check_finite("keys", keys, ("token", "channel"), mask)
    check_scores(scores, ("token",), mask)


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    t = int(cu_seqlens[-1])
    keys, scores = random(t, 5) - 0.5, random(t)
    return [
        Example((keys, cu_seqlens, 12), {"scores": scores, "mask": scores > 0.1}),
        Example((keys.bfloat16(), cu_seqlens, 12), {"metric": "neg_l2"}),
    ]


backends.register(
    Operator(
        "similarity_varlen",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        looped=True,
        no_shards=NO_SHARDS,
        no_derivatives=CONSTANTS,
    )
)


@tracing.leaf(tuple, 5)
def similarity_varlen(
    keys: torch.Tensor,  # [T, Dk]
    cu_seqlens: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    scores: torch.Tensor | None = None,  # [T]
    mask: torch.Tensor | None = None,  # [T]
    metric: str = "cosine",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`similarity` on each segment of a packed batch, with the bits of each segment alone.

    Args:
        keys: [T, Dk] fp32, fp16, bf16 or fp64: the tokens of all segments.
        cu_seqlens: [S + 1] int32 on the device of keys: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: int, at least the tokens of the longest segment: the length of a row of s.
        scores, mask, metric, backend: as in :func:`similarity`, of [T].

    Returns:
        s: [T, max_seqlen]; row i of a segment of n tokens holds its similarities to tokens 0 to n - 1, then zeros. This
            is what greedy_select_varlen and assign_varlen take.
        sbar: [S]; g, tier, nearest: [T], as in :func:`similarity`.

        Tokens of no segment, or of one longer than max_seqlen, have zeros, tier 2 and the lowest finite nearest.
        Offsets are not checked, as they stay on the device; wrong ones read and write nothing out of bounds.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, max_seqlen, metric or backend.
    """
    max_seqlen = as_count("max_seqlen", max_seqlen)
    options = {"scores": scores, "mask": mask, "metric": metric}
    tracing.checked(check, keys, cu_seqlens, max_seqlen, **options)
    return backends.run("similarity_varlen", backend, (keys, cu_seqlens, max_seqlen), options)
