"""The merge of a packed batch."""

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, as_count, check_not_empty, check_tensor
from ..._dispatch.debug import check_finite, check_scores, refuse
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_rows, check_segments, look_at_rows, look_at_segments
from ..similarity.op import compute_dtype
from . import reference
from .derivatives import OF_MERGE
from .op import WEIGHTS, check_mode


def check(
    features,
    scores,
    indices,
    assignment,
    cu_seqlens,
    cu_kept,
    max_seqlen,
    *,
    mode="mean",
    centre_weight=0.5,
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, "T D", sizes, FLOATS)
    check_not_empty("features", features, 1, "channel")
    if scores is not None:
        check_tensor("scores", scores, "T", sizes, WEIGHTS, features)
    check_tensor("indices", indices, "total_keep", sizes, (torch.int64,), features)
    check_tensor("assignment", assignment, "T", sizes, (torch.int64,), features)
    check_segments(cu_seqlens, max_seqlen, sizes, features)
    check_rows(cu_kept, sizes["total_keep"], sizes, features)
    check_mode(mode, centre_weight)


def fake(features, scores, indices, *_, **options):
    total_keep = indices.shape[0]
    merged = features.new_empty((total_keep, features.shape[1]))
    return merged, features.new_empty((total_keep,), dtype=compute_dtype(features, scores))


def on_reference(features, scores, indices, assignment, cu_seqlens, cu_kept, max_seqlen, **options):
    merged, mass = reference.merge_varlen(
        features, scores, indices, assignment, cu_seqlens, cu_kept, max_seqlen, **options
    )
    return merged, mass.to(compute_dtype(features, scores))


def on_triton(*args, **options):
    from .kernel import merge_varlen as launch

    return launch(*args, **options)


def flops(features, scores, indices, *_, mode="mean", centre_weight=0.5) -> int:
    (t, d), (total_keep,) = features, indices
    return 2 * t * d + {"mean": 1, "sum": 0, "lerp": 4}[mode] * total_keep * d


def look(features, scores, indices, assignment, cu_seqlens, cu_kept, max_seqlen, **_) -> None:
    lengths = look_at_segments(cu_seqlens, max_seqlen, features.shape[0])
    kept = look_at_rows(cu_kept, lengths, indices.shape[0])
    member = assignment >= 0
    check_finite("features", features, ("token", "channel"), member)
    check_scores(scores, ("token",), member)
    segments = torch.arange(len(lengths), dtype=torch.int64, device=lengths.device)
    of_rows, of_tokens = segments.repeat_interleave(kept), segments.repeat_interleave(lengths)
    outside = (indices < -1) | (indices >= lengths[of_rows])
    refuse("indices", indices, outside, "tokens of the row's image, or -1", ("row",), "Remedy: indices of tokens.")
    token = torch.where(indices >= 0, indices + cu_seqlens[of_rows], -1)
    again = torch.triu(token == token[:, None], diagonal=1).any(dim=0) & (token >= 0)
    refuse("indices", indices, again, "distinct tokens", ("row",), "Remedy: those that greedy_select returns.")
    outside = (assignment < -1) | (assignment >= kept[of_tokens])
    refuse(
        "assignment",
        assignment,
        outside,
        "rows of the token's image, or -1",
        ("token",),
        "Remedy: what assign returns.",
    )


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    kept = lengths // 3
    cu_seqlens, cu_kept = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths, kept))
    t = int(cu_seqlens[-1])
    indices = torch.cat([torch.arange(int(k), dtype=torch.int64, device="cpu") * 2 for k in kept])
    places = torch.cat([torch.arange(int(n), dtype=torch.int64, device="cpu") for n in lengths])
    assignment = (places * 5 + 1) % (kept.repeat_interleave(lengths) + 1) - 1
    packed = indices, assignment, cu_seqlens, cu_kept, 12
    features, scores = random(t, 5) - 0.5, random(t)
    return [
        Example((features, scores, *packed)),
        Example((features.bfloat16(), scores, *packed), {"mode": "lerp", "centre_weight": 0.3}),
        Example((features.double(), scores, *packed)),
        Example((features, None, *packed)),
        Example((features, places, *packed), {"mode": "sum"}),
    ]


backends.register(
    Operator(
        "merge_varlen",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        derivatives=OF_MERGE,
        looped=True,
        no_shards=NO_SHARDS,
    )
)


@tracing.leaf(tuple, 2)
def merge_varlen(
    features: torch.Tensor,  # [T, D]
    scores: torch.Tensor | None,  # [T]
    indices: torch.Tensor,  # [total_keep]
    assignment: torch.Tensor,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    mode: str = "mean",
    centre_weight: float = 0.5,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the clusters of a packed batch: S images of any number of tokens, one after the other.

    Every segment gets the bits that :func:`merge` gives to it alone. No call reads a value on the host: what is wrong
    with offsets, indices or assignment is harmless, and :func:`debug` finds it.

    Args:
        features: [T, D] fp32, fp16, bf16 or fp64: the tokens of all segments.
        scores: [T] floating, >= 0; or integers, or bool. None: 1 each.
        indices: [total_keep] int64 within the segment, each row's own token; -1, or a token that its segment does not
            have, is no row: zeros with mass 0.
        assignment: [T] int64 within the segment, the row of each token; -1, or a row that its segment does not have,
            belongs to none.
        cu_seqlens: [S + 1] int32, running sums: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        cu_kept: [S + 1] int32, running sums: its rows.
        max_seqlen: at least the longest segment's tokens; a longer one counts as empty.
        mode, centre_weight: as of :func:`merge`.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        merged: [total_keep, D], dtype of features.
        mass: [total_keep] fp32 (fp64 where features or scores are fp64).

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, max_seqlen, mode, centre_weight or backend.
    """
    max_seqlen = as_count("max_seqlen", max_seqlen)
    args = (features, scores, indices, assignment, cu_seqlens, cu_kept, max_seqlen)
    options = {"mode": mode, "centre_weight": centre_weight}
    tracing.checked(check, *args, **options)
    return backends.run("merge_varlen", backend, args, options)
