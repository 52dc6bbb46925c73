"""The flagship on a packed batch: the dense operator on each segment alone, and what becomes of wrong offsets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """One image of a packed batch, cut to what exists: at most as many picks as tokens and as rows."""

    number: int
    tokens: slice  # of [T]
    rows: slice  # of [total_keep], one for each pick
    num_anchors: int
    num_background: int


def segments_of(
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_anchors: torch.Tensor,  # [S + 1]
    cu_background: torch.Tensor,  # [S + 1]
    num_tokens: int,
    total_keep: int,
    max_seqlen: int,
) -> Iterator[Segment]:
    """The segments that have a row and a token. One that is longer than max_seqlen counts as empty."""
    offsets, anchors, background = (cu.tolist() for cu in (cu_seqlens, cu_anchors, cu_background))
    rows = [a + b for a, b in zip(anchors, background, strict=True)]
    for s in range(len(offsets) - 1):
        start, stop = (min(max(offset, 0), num_tokens) for offset in offsets[s : s + 2])
        first, last = (min(max(row, 0), total_keep) for row in rows[s : s + 2])
        count = stop - start if stop - start <= max_seqlen else 0
        k = min(last - first, count)
        if k > 0:
            num_anchors = min(max(anchors[s + 1] - anchors[s], 0), k)
            yield Segment(s, slice(start, stop), slice(first, first + k), num_anchors, k - num_anchors)


def for_each_segment(dense: Callable) -> Callable:
    """Build select_and_merge_varlen out of a dense select_and_merge."""

    def select_and_merge_varlen(
        features,  # [T, D]
        scores,  # [T]
        cu_seqlens,  # [S + 1]
        cu_anchors,  # [S + 1]
        cu_background,  # [S + 1]
        total_keep,
        max_seqlen,
        *,
        keys=None,  # [T, Dk]
        positions=None,  # [T, P]
        suppression=1.0,
        spatial_weight=1.0,
        background_suppression=None,
        scale_prior=True,
        mean_similarity=None,  # [S]
    ):
        probe = dense(features[:1, None], scores[:1, None], 1, 0, spatial_weight=0.0)  # for the dtypes
        merged = probe[0].new_zeros(total_keep, features.shape[1])
        indices = torch.full((total_keep,), -1, dtype=torch.int64, device=features.device)
        assignment = torch.full((features.shape[0],), -1, dtype=torch.int64, device=features.device)
        mass = probe[3].new_zeros(total_keep)
        for segment in segments_of(cu_seqlens, cu_anchors, cu_background, features.shape[0], total_keep, max_seqlen):
            alone = {
                name: None if tensor is None else tensor[segment.tokens][None]
                for name, tensor in {"keys": keys, "positions": positions}.items()
            }
            if mean_similarity is not None:
                alone["mean_similarity"] = mean_similarity[segment.number][None]
            results = dense(
                features[segment.tokens][None],
                scores[segment.tokens][None],
                segment.num_anchors,
                segment.num_background,
                **alone,
                suppression=suppression,
                spatial_weight=spatial_weight,
                background_suppression=background_suppression,
                scale_prior=scale_prior,
            )
            merged[segment.rows], indices[segment.rows] = results[0][0], results[1][0]
            assignment[segment.tokens], mass[segment.rows] = results[2][0], results[3][0]
        return merged, indices, assignment, mass

    return select_and_merge_varlen
