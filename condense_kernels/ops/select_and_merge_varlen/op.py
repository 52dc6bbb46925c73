import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import (
    FLOATS,
    WORKING,
    as_count,
    as_each,
    check_background_suppression,
    check_count,
    check_flag,
    check_not_empty,
    check_tensor,
    check_weight,
)
from ..._dispatch.debug import check_finite, check_scores, refuse
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, check_places, check_segments
from ..merge.derivatives import OF_MERGE
from ..select_and_merge import Condensed
from ..select_and_merge import op as dense
from ..similarity.op import compute_dtype
from .nested import is_nested, pack, unpack
from .reference import for_each_segment


def check(
    features,
    scores,
    cu_seqlens,
    cu_anchors,
    cu_background,
    total_keep,
    max_seqlen,
    *,
    keys=None,
    positions=None,
    suppression=1.0,
    spatial_weight=1.0,
    background_suppression=None,
    scale_prior=True,
    mean_similarity=None,
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, "T D", sizes, FLOATS)
    check_not_empty("features", features, 1, "channel")
    check_tensor("scores", scores, "T", sizes, FLOATS, features)
    check_segments(cu_seqlens, max_seqlen, sizes, features)
    check_tensor("cu_anchors", cu_anchors, "S+1", sizes, (torch.int32,), features)
    check_tensor("cu_background", cu_background, "S+1", sizes, (torch.int32,), features)
    check_count("total_keep", total_keep, 0, sizes["T"], f"T = {sizes['T']} tokens")
    if keys is not None:
        check_tensor("keys", keys, "T Dk", sizes, FLOATS, features)
        check_not_empty("keys", keys, 1, "channel")
    check_weight("suppression", suppression)
    check_weight("spatial_weight", spatial_weight)
    check_background_suppression(background_suppression)
    check_flag("scale_prior", scale_prior)
    if mean_similarity is not None:
        check_tensor("mean_similarity", mean_similarity, "S", {"S": sizes["S+1"] - 1}, WORKING, features)
    check_places(positions, spatial_weight, sizes, features)


def fake(features, scores, cu_seqlens, cu_anchors, cu_background, total_keep, max_seqlen, **_):
    return (
        features.new_empty((total_keep, features.shape[1])),
        features.new_empty((total_keep,), dtype=torch.int64),
        features.new_empty((features.shape[0],), dtype=torch.int64),
        features.new_empty((total_keep,), dtype=compute_dtype(features, scores)),
    )


on_reference = for_each_segment(dense.on_reference)


def on_triton(*args, **kwargs):
    from .kernel import select_and_merge_varlen as launch

    return launch(*args, **kwargs)


def flops(
    features, scores, cu_seqlens, cu_anchors, cu_background, total_keep, max_seqlen, *, keys=None, **where
) -> int:
    """At most: as if the tokens came in segments of max_seqlen, as the lengths are on the device."""
    t, d = features
    segments = -(-t // max(max_seqlen, 1))
    images = segments, max_seqlen, d
    kept = -(-total_keep // max(segments, 1))
    keys = None if keys is None else (segments, max_seqlen, keys[1])
    return dense.flops(images, images[:2], kept, 0, keys=keys, **where)


def look(
    features,
    scores,
    cu_seqlens,
    cu_anchors,
    cu_background,
    total_keep,
    max_seqlen,
    *,
    keys=None,
    positions=None,
    mean_similarity=None,
    **_,
) -> None:
    ends = {"cu_seqlens": (cu_seqlens, features.shape[0], "T"), "cu_anchors": (cu_anchors, None, "")}
    ends |= {"cu_background": (cu_background, None, "")}
    for name, (offsets, last, letter) in ends.items():
        decreasing = torch.nn.functional.pad(offsets.diff() < 0, (1, 0))
        refuse(name, offsets, decreasing, "running sums", ("offset",), "Remedy: torch.cumsum of counts.")
        if offsets[0] != 0 or (last is not None and offsets[-1] != last):
            until = "" if last is None else f" up to {letter} = {last}"
            ends_at = f"{offsets[0].item()} ... {offsets[-1].item()}"
            raise ValueError(f"{name}: expected running sums from 0{until}, got {ends_at}. Remedy: varlen_budget.")
    kept, lengths = (cu_anchors.long() + cu_background).diff(), cu_seqlens.diff()
    remedy = "Remedy: varlen_budget."
    refuse("cu_anchors + cu_background", kept, kept > lengths, "at most the tokens of a segment", ("image",), remedy)
    refuse("cu_seqlens", lengths, lengths > max_seqlen, f"at most max_seqlen = {max_seqlen}", ("image",), remedy)
    if kept.sum() != total_keep:
        raise ValueError(
            f"total_keep: expected {kept.sum().item()}, as the offsets have it, got {total_keep}. {remedy}"
        )

    def token(t: int) -> str:
        segment = int(torch.searchsorted(cu_seqlens, t, right=True)) - 1
        return f"image {segment}, token {t - int(cu_seqlens[segment])}"

    check_finite("features", features, (token, "channel"))
    check_scores(scores, (token,))
    check_finite("keys", keys, (token, "channel"))
    check_finite("positions", positions, (token, "axis"))
    dense.look_at_mean(mean_similarity)


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    cu_seqlens, cu_anchors, cu_background = (
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int() for counts in (lengths, lengths // 3, lengths // 5)
    )
    t, total_keep = int(cu_seqlens[-1]), int(cu_anchors[-1] + cu_background[-1])
    offsets = cu_seqlens, cu_anchors, cu_background, total_keep, 12
    features, scores = random(t, 5) - 0.5, random(t)
    placed = {"keys": random(t, 3) - 0.5, "positions": random(t, 2), "suppression": 0.0}
    placed |= {"background_suppression": 2.0, "scale_prior": False, "mean_similarity": random(b + 1)}
    return [
        Example((features, scores, *offsets), placed),
        Example(
            (features.bfloat16(), scores, *offsets), {"spatial_weight": 0.0, "mean_similarity": random(b + 1).double()}
        ),
        Example((features, scores, *offsets), {"spatial_weight": 0.0}),
    ]


backends.register(
    Operator(
        "select_and_merge_varlen",
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


@tracing.leaf(Condensed._make, 4)
def select_and_merge_varlen(
    features: torch.Tensor,  # [T, D]
    scores: torch.Tensor,  # [T]
    cu_seqlens: torch.Tensor | None,  # [S + 1]
    cu_anchors: torch.Tensor,  # [S + 1]
    cu_background: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int | None = None,
    *,
    keys: torch.Tensor | None = None,  # [T, Dk]
    positions: torch.Tensor | None = None,  # [T, P]
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    background_suppression: float | None = None,
    scale_prior: bool = True,
    mean_similarity: float | torch.Tensor | None = None,  # or [S]
    backend: str = "auto",
) -> Condensed:
    """Condense a packed batch: S images of any number of tokens, one after the other, each to its own budget.

    Every segment gets the bits that :func:`select_and_merge` gives to it alone. The offsets stay on the device: no
    call waits for it, and none can check them. Offsets that are wrong read and write nothing out of bounds.
    :func:`varlen_budget` makes them from the lengths of the images.

    Jagged nested tensors do as well: features [S, j, D], and scores, keys and positions with the same offsets. Then
    cu_seqlens and max_seqlen may be None, and the results are jagged. Where a nested tensor does not know its longest
    segment, torch waits for the device to tell; max_seqlen spares that.

    Args:
        features: [T, D] fp32, fp16, bf16 or fp64 (fp64 on CPU): the tokens of all segments.
        scores: [T] floating, >= 0: importance.
        cu_seqlens: [S + 1] int32 on the device of features: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        cu_anchors, cu_background: [S + 1] int32, running sums too: how many of each kind segment s keeps, together at
            most its tokens. Empty segments and segments that keep nothing are legal.
        total_keep: int, (cu_anchors + cu_background)[S]: the rows of all segments.
        max_seqlen: int, at least the tokens of the longest segment: sizes what is launched.
        keys: [T, Dk] floating: what the cosine similarity is computed on. None: features.
        positions: [T, P] coordinates of a float or signed integer dtype (or uint8), each segment's own. Required
            unless spatial_weight is 0.
        suppression, spatial_weight, background_suppression, scale_prior, backend: as in :func:`select_and_merge`.
        mean_similarity: a number, or fp32 or fp64 [S], for segments without tokens too; as there.

    Returns:
        The named tuple of :func:`select_and_merge`, packed:
        merged: [total_keep, D], dtype of features; the rows of segment s begin at (cu_anchors + cu_background)[s].
        indices: [total_keep] int64 within the segment, ascending there.
        assignment: [T] int64 within the segment's rows.
        mass: [total_keep] fp32 (fp64 where features or scores are fp64).

        A row for which there is no token is zeros with index -1 and mass 0. The tokens of a segment that keeps nothing,
        or is longer than max_seqlen, have assignment -1.

    Raises:
        TypeError, ValueError: a wrong rank, shape, dtype, device, count, weight or backend, with the argument's name.
    """
    if is_nested(features):
        values, others, cu_seqlens, max_seqlen = unpack(
            features, cu_seqlens, max_seqlen, scores=scores, keys=keys, positions=positions
        )
        packed = select_and_merge_varlen(
            values,
            others.pop("scores"),
            cu_seqlens,
            cu_anchors,
            cu_background,
            total_keep,
            max_seqlen,
            **others,
            suppression=suppression,
            spatial_weight=spatial_weight,
            background_suppression=background_suppression,
            scale_prior=scale_prior,
            mean_similarity=mean_similarity,
            backend=backend,
        )
        return pack(packed, features, cu_anchors + cu_background)
    num_segments = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, torch.Tensor) and cu_seqlens.dim() == 1 else 0
    total_keep, max_seqlen = as_count("total_keep", total_keep), as_count("max_seqlen", max_seqlen)
    args = (features, scores, cu_seqlens, cu_anchors, cu_background, total_keep, max_seqlen)
    options = {
        "keys": keys,
        "positions": positions,
        "suppression": suppression,
        "spatial_weight": spatial_weight,
        "background_suppression": background_suppression,
        "scale_prior": scale_prior,
        "mean_similarity": as_each("mean_similarity", mean_similarity, features, num_segments),
    }
    tracing.checked(check, *args, **options)
    return Condensed(*backends.run("select_and_merge_varlen", backend, args, options))
