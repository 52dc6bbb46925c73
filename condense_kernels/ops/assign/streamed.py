"""Every token to the kept token that is most similar and near, without s: the cosines to kept tokens are computed where
they are needed, to the bit those of s. Memory is O(B N).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..._triton.device import NOWHERE, has_block, image_of_block, image_rows, image_tokens, tokens_before
from ..._triton.launcher import VARYING, Packed, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import FusedConfig, SimilarityConfig, StreamConfig
from ..._triton.workspace import Pieces, carve
from ..similarity.kernel import num_blocks_of
from ..similarity.kernel import similarity_varlen as packed_similarities
from ..similarity.measure import check_is_cosine, cosines_of, dense_similarities, launch_measure, tile_options
from .kernel import MASKED, NO_DISTANCE, Space, compare_rows, distance_frame, may_move, rows_of
from .kernel import assign as on_s
from .kernel import assign_varlen as on_packed_s

BLOCK = SimilarityConfig.block  # tokens of a tile


@triton.jit(do_not_specialize=VARYING)
def assign_streamed_kernel(
    keys_ptr,  # [B, N, Dk]
    scale_ptr,  # [B, N]
    inverse_ptr,  # [B, N]
    indices_ptr,  # [B, K]
    tier_ptr,  # [B, N]
    sources_ptr,  # [B, N] or None
    where_ptr,  # [N, P] or [B, N, P]
    assignment_ptr,  # [B, N]
    tile_ptr,  # [B, blocks, BLOCK, BLOCK] where a program keeps its tile of s
    spatial_weight,
    stride_key_b, stride_key_n, stride_key_d,
    stride_index_b, stride_index_k,
    stride_source_b, stride_source_n,
    stride_where_b, stride_where_n, stride_where_p,
    N, K, num_blocks, num_channels, HEIGHT, GRID_WIDTH, packed,
    P: tl.constexpr, AXES: tl.constexpr, DK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_BOX: tl.constexpr, MODE: tl.constexpr, CAN_OVERFLOW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Every token to the kept token that is most similar and near, a block of tokens per program."""
    pid = tl.program_id(0)
    pid_b, pid_n = image_of_block(packed, pid, num_blocks, BLOCK)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, pid_n, BLOCK) == 0:
        return
    if packed is None:
        indices_ptr += pid_b * stride_index_b
    else:
        first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
        indices_ptr += first_k * stride_index_k
    first = tokens_before(packed, at_b, N)
    keys_ptr += at_b * stride_key_b
    scale_ptr += first
    inverse_ptr += first
    tier_ptr += first
    where_ptr += at_b * stride_where_b
    offs_n = pid_n * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.minimum(offs_n, N - 1).to(tl.int64)
    tier = tl.load(tier_ptr + tokens)
    origin, shrink_first, shrink, factor = tl.zeros([AXES], tl.float64), 1.0, 1.0, 0.0
    if MODE != NO_DISTANCE:
        origin, shrink_first, shrink, factor = distance_frame(
            where_ptr, tier_ptr, spatial_weight, stride_where_n, stride_where_p, 1, N, HEIGHT, GRID_WIDTH,
            P, AXES, BLOCK_BOX, MODE, True,
        )  # fmt: skip
    best = tl.full([BLOCK], float("nan"), tl.float32)
    row = tl.full([BLOCK], NOWHERE, tl.int32)
    own = tl.full([BLOCK], NOWHERE, tl.int32)
    tile_ptr += pid.to(tl.int64) * BLOCK * BLOCK
    start = tl.zeros([], tl.int32)
    while start < K:
        _, tile_kept, _ = rows_of(indices_ptr, tier_ptr, start, stride_index_k, 1, N, K, BLOCK, True)
        tile = cosines_of(
            keys_ptr, scale_ptr, inverse_ptr, tokens, tile_kept, stride_key_n, stride_key_d, num_channels,
            DK, BLOCK, BLOCK_D, CAN_OVERFLOW, INTERPRETED,
        )  # fmt: skip
        tile = tl.where((tier == 0)[:, None] & (tl.load(tier_ptr + tile_kept) == 0)[None, :], tile, 0.0)
        tl.store(tile_ptr + tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :] * BLOCK, tile)
        tl.debug_barrier()
        part = tl.zeros([], tl.int32)
        while part < BLOCK:  # from memory and few rows at a time: the whole tile would spill
            offs_k, kept, takes = rows_of(indices_ptr, tier_ptr, start + part, stride_index_k, 1, N, K, BLOCK_K, True)
            s = tl.load(tile_ptr + (part + tl.arange(0, BLOCK_K))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
            best, row, own = compare_rows(
                best, row, own, s, offs_k, kept, takes, tokens, where_ptr, origin, shrink_first, shrink, factor,
                stride_where_n, stride_where_p, HEIGHT, GRID_WIDTH, P, AXES, BLOCK, BLOCK_K, MODE,
            )  # fmt: skip
            part += BLOCK_K
        tl.debug_barrier()
        start += BLOCK
    row = tl.where(own != NOWHERE, own, row)
    assigned = (row != NOWHERE) & (tier != MASKED)
    if sources_ptr is not None:
        sources_ptr += at_b * stride_source_b
        assigned = assigned & may_move(sources_ptr, indices_ptr, row, offs_n, stride_source_n, stride_index_k, N)
    tl.store(assignment_ptr + first + offs_n, tl.where(assigned, row, -1).to(tl.int64), mask=offs_n < N)


def tiles_of(blocks: int) -> Pieces:
    return {"tile": ((blocks, BLOCK, BLOCK), torch.float32)}


def launch_assign(w, keys, indices, space, spatial_weight, assignment, packed=None, sources=None):
    """Into assignment [B, N], packed: [T], from tiers and factors in w."""
    n, dk = keys.shape[-2:]
    if packed is not None:
        n = packed.max_seqlen
    blocks, _ = num_blocks_of(n)
    axes = triton.next_power_of_2(space.axes)
    launch(
        assign_streamed_kernel, (w.tile.shape[0],),
        keys, w.scale, w.inverse, indices, w.tier, sources, w.tier if space.tensor is None else space.tensor,
        assignment, w.tile, float(spatial_weight),
        *strides_of(keys, 3), *strides_of(indices, 2), *strides_of(sources, 2), *space.strides,
        n, indices.shape[-1], blocks, dk, space.height, space.width, packed,
        P=space.axes, AXES=axes, BLOCK_K=StreamConfig.for_shape().block_k, BLOCK_BOX=max(1024 // axes, 1),
        MODE=space.mode, **tile_options(keys),
    )  # fmt: skip


def pieces_of(tokens: int, blocks: int) -> Pieces:
    factors = {name: ((tokens,), torch.float32) for name in ("scale", "inverse")}
    return {"tier": ((tokens,), torch.int32), **factors, **tiles_of(blocks)}


def assign_from_keys(
    keys: torch.Tensor,  # [B, N, Dk]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    *,
    mask: torch.Tensor | None = None,  # [B, N] bool
    grid: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [B, N] bool
    metric: str = "cosine",
) -> torch.Tensor:
    """Return assignment [B, N] int64: the row of each token; -1 where masked, and where neither a source nor kept."""
    reject_float64(keys=keys)
    b, n, _ = keys.shape
    if metric != "cosine" and FusedConfig.for_shape(n).store_s:
        s, _, _, tier, *_ = dense_similarities(keys, None, mask, metric)
        where = {"grid": grid, "positions": positions, "spatial_weight": spatial_weight}
        return on_s(s, indices, tier=tier, sources=sources, **where)
    check_is_cosine(metric)
    assignment = new(keys, (b, n), torch.int64)
    if b > 0:
        space = Space.of(grid, positions, spatial_weight, masked=mask is not None)
        w = carve(pieces_of(b * n, b * num_blocks_of(n)[0]), None, keys.device)
        with on_device_of(keys):
            launch_measure(keys, None, mask, w.tier, w.scale, w.inverse)
            launch_assign(w, keys, indices, space, spatial_weight, assignment, sources=sources)
    return assignment


def assign_from_keys_varlen(
    keys: torch.Tensor,  # [T, Dk]
    indices: torch.Tensor,  # [total_keep] int64
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    mask: torch.Tensor | None = None,  # [T] bool
    positions: torch.Tensor | None = None,  # [T, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [T] bool
    metric: str = "cosine",
) -> torch.Tensor:
    """Return assignment [T] int64."""
    reject_float64(keys=keys)
    (num_tokens, _), (total_keep,) = keys.shape, indices.shape
    max_seqlen, segments = min(max_seqlen, num_tokens), cu_seqlens.shape[0] - 1
    if segments == 0 or total_keep == 0 or max_seqlen == 0:
        return new(keys, (num_tokens,), torch.int64, fill=-1)
    config = FusedConfig.for_packed(num_tokens, segments, max_seqlen)
    if metric != "cosine" and config.store_s and config.grouping is None:
        s, _, _, tier, _ = packed_similarities(keys, cu_seqlens, max_seqlen, mask=mask, metric=metric)
        where = {"positions": positions, "spatial_weight": spatial_weight, "sources": sources}
        return on_packed_s(s, indices, cu_seqlens, cu_kept, max_seqlen, tier=tier, **where)
    check_is_cosine(metric)
    assignment = new(keys, (num_tokens,), torch.int64, fill=-1)  # and -1 it stays in segments without rows
    space = replace(
        Space.of(None, positions, spatial_weight, masked=mask is not None), strides=strides_of(positions, 3)
    )
    with on_device_of(keys):
        packed = Packed.kept(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen)
        w = carve(pieces_of(num_tokens, packed.num_slots(BLOCK)), None, keys.device)
        launch_measure(keys, None, mask, w.tier, w.scale, w.inverse, packed)
        launch_assign(w, keys, indices, space, spatial_weight, assignment, packed, sources)
    return assignment
