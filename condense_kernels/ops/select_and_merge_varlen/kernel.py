"""The flagship on a packed batch: the same kernels, which find the segment that a program works for by themselves.

The host knows how many tokens, segments and rows there are at most, and launches enough programs for any offsets; a
program that finds no work returns. Nothing waits for the device.
"""

import dataclasses

import torch

from ..._triton.launcher import Packed, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import FusedConfig, SimilarityConfig
from ..._triton.workspace import Pieces, carve
from ..assign.kernel import Space, launch_assign
from ..assign.streamed import launch_assign as assign_streamed
from ..merge.kernel import launch_merge
from ..select_and_merge import streamed
from ..select_and_merge.kernel import launch_select
from ..select_and_merge.pipeline import suppressions_of
from ..similarity.kernel import launch_tiles, num_blocks_of


def pieces_of(num_tokens: int, packed: Packed, config: FusedConfig, dk: int | None = None) -> Pieces:
    """What the launches of a call hand to each other; dk: of keys whose mean similarity is given."""
    if not config.store_s:
        return streamed.pieces_of(packed.num_segments, num_tokens, packed.num_slots(SimilarityConfig.block), dk)
    blocks, _ = num_blocks_of(packed.max_seqlen)
    group = next(packed.groups(config.grouping))
    rows = num_tokens if config.grouping is None else config.grouping.rows(packed.max_seqlen)
    pieces = {
        "s": ((rows, config.width), torch.float32),
        "tier": ((num_tokens,), torch.int32),
        "priors": ((num_tokens, 2), torch.float32),
        "members": ((num_tokens,), torch.int32),
    }
    if dk is not None:
        return pieces | streamed.given_of(packed.num_segments, num_tokens, dk)
    return pieces | {
        "row_sums": ((rows, blocks), torch.int32),
        "abs_sums": ((group.num_slots(SimilarityConfig.block), blocks // 2 + 1), torch.int64),
    }


def select_and_merge_varlen(
    features: torch.Tensor,  # [T, D]
    scores: torch.Tensor,  # [T]
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_anchors: torch.Tensor,  # [S + 1]
    cu_background: torch.Tensor,  # [S + 1]
    total_keep: int,
    max_seqlen: int,
    *,
    keys: torch.Tensor | None = None,  # [T, Dk]
    positions: torch.Tensor | None = None,  # [T, P]
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    background_suppression: float | None = None,
    scale_prior: bool = True,
    mean_similarity: torch.Tensor | None = None,  # [S]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return merged [total_keep, D], indices [total_keep], assignment [T], mass [total_keep]."""
    reject_float64(features=features, scores=scores, keys=keys)
    num_tokens, d = features.shape
    max_seqlen = min(max_seqlen, num_tokens)
    if keys is None:
        keys = features
    merged = new(features, (total_keep, d))
    indices = new(features, (total_keep,), torch.int64, fill=-1)  # and -1 it stays where there is no token,
    assignment = new(features, (num_tokens,), torch.int64, fill=-1)  # or no row
    mass = new(features, (total_keep,), torch.float32)
    if cu_seqlens.shape[0] == 1 or total_keep == 0 or max_seqlen == 0:
        return merged.zero_(), indices, assignment, mass.zero_()
    packed = Packed.of(cu_seqlens, cu_anchors, cu_background, num_tokens, total_keep, max_seqlen)
    config = FusedConfig.for_packed(num_tokens, packed.num_segments, max_seqlen)
    space = Space.of(None, positions, spatial_weight, masked=False)
    space = dataclasses.replace(space, strides=strides_of(positions, 3))
    suppressions = suppressions_of(suppression, background_suppression)
    given = mean_similarity is not None
    w = carve(pieces_of(num_tokens, packed, config, keys.shape[1] if given else None), None, features.device)
    with on_device_of(features):
        sums = (None, None) if given else (w.row_sums, w.abs_sums)
        if given:
            streamed.launch_given(w, keys, scores, None, packed)
        if config.store_s:
            for group in packed.groups(config.grouping):
                launch_tiles(keys, scores, None, w.tier, *sums, w.s, packed=group)
                launch_select(
                    w, scores, indices, assignment, 0, space, suppressions, spatial_weight, scale_prior,
                    mean_similarity, config, group,
                )  # fmt: skip
                if not config.assign_in_select:
                    launch_assign(w.s, indices, w.tier, space, spatial_weight, assignment, sanitise=False, packed=group)
        else:
            if not given:
                launch_tiles(keys, scores, None, w.tier, *sums, scale=w.scale, inverse=w.inverse, packed=packed)
            streamed.launch_select(w, keys, scores, indices, 0, suppressions, scale_prior, mean_similarity, packed)
            assign_streamed(w, keys, indices, space, spatial_weight, assignment, packed)
        launch_merge(features, scores, indices, assignment, w.members, merged, mass, packed)
    return merged, indices, assignment, mass
