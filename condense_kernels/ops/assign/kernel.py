"""Every token to the kept token that is most similar and near (Eq. 6, 7), a block of tokens per program."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ..._triton.device import (
    FLOAT32_MAX,
    NOWHERE,
    has_block,
    image_of_block,
    image_rows,
    image_tokens,
    is_finite,
    stored_at,
    tokens_before,
)
from ..._triton.launcher import VARYING, Packed, launch, new, on_device_of, reject_float64, strides_of
from ..._triton.tables import AssignConfig

NO_DISTANCE, GRID, POSITIONS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WHOLE_GRID = tl.constexpr(3)  # of which no token is masked
MASKED = tl.constexpr(2)  # the tier
TOO_WIDE = tl.constexpr(2.0**1021 / 8)


@dataclass(frozen=True)
class Space:
    """Grid or positions, as the kernels take them."""

    tensor: torch.Tensor | None
    strides: tuple[int, int, int]  # of image, token, axis
    height: int
    width: int
    axes: int
    mode: int

    @classmethod
    def of(
        cls, grid: Sequence[int] | None, positions: torch.Tensor | None, spatial_weight: float, *, masked: bool
    ) -> "Space":
        if spatial_weight == 0 or (grid is None and positions is None):
            return cls(None, (0, 0, 0), 1, 1, 1, NO_DISTANCE.value)
        if grid is not None:  # an image is a video of one frame
            return cls(None, (0, 0, 0), grid[-2], grid[-1], 3, (GRID if masked else WHOLE_GRID).value)
        strides = positions.stride() if positions.dim() == 3 else (0, *positions.stride())
        return cls(positions, strides, 1, 1, positions.shape[-1], POSITIONS.value)


@triton.jit
def grid_place(token, HEIGHT, WIDTH):
    """(t, h, w) of tokens in a row-major grid, as fp32. By the middle of the cell, rounding cannot reach an edge."""
    token = token.to(tl.float32)
    row = tl.floor((token + 0.5) / WIDTH)
    frame = tl.floor((row + 0.5) / HEIGHT)
    return frame, row - frame * HEIGHT, token - row * WIDTH


@triton.jit
def frexp_exponent(x):
    """e of the smallest power of two 2**e above x, an fp64; 0 for 0, and -1022 for a subnormal number."""
    return tl.where(x > 0, ((x.to(tl.int64, bitcast=True) >> 52) - 1022), 0)


@triton.jit
def power_of_two_fp64(exponent):
    """2**exponent, for exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def apart(x, origin, shrink_first):
    """x - origin in fp64, rounded once: of int64, which fp64 does not hold, as integers; of fp64 after
    shrinking, as origin has been."""
    if x.dtype == tl.int64:
        return (x - origin).to(tl.uint64, bitcast=True).to(tl.float64)  # masked tokens, which may lie below, wrap
    else:
        return x.to(tl.float64) * shrink_first - origin


@triton.jit
def load_coordinate(where_ptr, token, axis, origin, shrink_first, shrink, stride_n, stride_p):
    """In fp64 until it lies in [0, 1]: fp32 would swallow what is small beside its distance from 0."""
    x = tl.load(where_ptr + token * stride_n + axis * stride_p)
    return (apart(x, origin, shrink_first) * shrink).to(tl.float32)


@triton.jit
def all_coordinates(where_ptr, token, axes, stride_n, stride_p, HEIGHT, WIDTH, MODE: tl.constexpr):
    """[BLOCK_N, AXES], as they are: of a grid fp32, which holds them, of positions int64, or else fp64."""
    if MODE == GRID:
        t, h, w = grid_place(token, HEIGHT, WIDTH)
        return tl.where((axes == 0)[None, :], t[:, None], tl.where((axes == 1)[None, :], h[:, None], w[:, None]))
    else:
        pointers = where_ptr + token[:, None] * stride_n + axes[None, :].to(tl.int64) * stride_p
        x = tl.load(pointers)
        if x.dtype == tl.int64:
            return x
        else:
            return x.to(tl.float64)


@triton.jit
def bounding_box(
    where_ptr, tier_ptr, axes, stride_where_n, stride_where_p, stride_tier, N, HEIGHT, WIDTH,
    AXES: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    """Lowest and highest coordinates [AXES] of the valid tokens that have a place, as all_coordinates has them; lowest
    > highest without any."""
    if MODE == POSITIONS and where_ptr.dtype.element_ty == tl.int64:
        low = tl.full([BLOCK_N, AXES], 0x7FFFFFFFFFFFFFFF, tl.int64)
        high = ~low
    else:
        low = tl.full([BLOCK_N, AXES], float("inf"), tl.float32 if MODE == GRID else tl.float64)
        high = -low
    start = tl.zeros([], tl.int64)
    while start < N:
        offs_n = start + tl.arange(0, BLOCK_N)
        token = tl.minimum(offs_n, N - 1)
        x = all_coordinates(where_ptr, token, axes, stride_where_n, stride_where_p, HEIGHT, WIDTH, MODE)
        boxed = offs_n < N
        if x.dtype == tl.float64:  # a grid's are finite
            boxed = boxed & (tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1) != 0)
        if HAS_TIER:
            boxed = boxed & (tl.load(tier_ptr + token * stride_tier) != MASKED)
        low = tl.where(boxed[:, None], tl.minimum(low, x), low)
        high = tl.where(boxed[:, None], tl.maximum(high, x), high)
        start += BLOCK_N
    return tl.min(low, axis=0), tl.max(high, axis=0)


@triton.jit
def grid_extent(
    tier_ptr, axes, stride_tier, N, HEIGHT, WIDTH,
    AXES: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    """Extent [AXES] of the box of a grid's valid tokens."""
    if MODE == WHOLE_GRID:
        frames = N // (HEIGHT * WIDTH)
        return (tl.where(axes == 0, frames, tl.where(axes == 1, HEIGHT, WIDTH)) - 1).to(tl.float32)
    else:
        lowest, highest = bounding_box(
            tier_ptr, tier_ptr, axes, 0, 0, stride_tier, N, HEIGHT, WIDTH, AXES, BLOCK_N, MODE, HAS_TIER
        )
        return tl.where(lowest < highest, highest - lowest, 0.0)


@triton.jit
def distance_frame(
    where_ptr, tier_ptr, spatial_weight, stride_where_n, stride_where_p, stride_tier, N, HEIGHT, WIDTH,
    P: tl.constexpr, AXES: tl.constexpr, BLOCK_N: tl.constexpr, MODE: tl.constexpr, HAS_TIER: tl.constexpr,
):  # fmt: skip
    """Where the origin of one image's coordinates is moved to, two powers of two to scale them with, one before that
    and one after it, and spatial_weight / dmax. A grid's coordinates are taken as they are."""
    axes = tl.minimum(tl.arange(0, AXES), P - 1)  # padding repeats the last axis
    shrink_first = 1.0
    if MODE == POSITIONS:
        lowest, highest = bounding_box(
            where_ptr, tier_ptr, axes, stride_where_n, stride_where_p, stride_tier, N, HEIGHT, WIDTH,
            AXES, BLOCK_N, MODE, HAS_TIER,
        )  # fmt: skip
        origin = lowest
        if lowest.dtype == tl.float64:  # an eighth where the extent, or 2**-exponent, has no fp64
            widest = tl.max(tl.where(lowest < highest, highest * 0.125 - lowest * 0.125, 0.0), axis=0)
            shrink_first = tl.where(widest < TOO_WIDE, 1.0, 0.125)
            origin = lowest * shrink_first
        extent = tl.where(lowest < highest, apart(highest, origin, shrink_first), 0.0)
        shrink = power_of_two_fp64(-frexp_exponent(tl.max(extent, axis=0)))
        box = (extent * shrink).to(tl.float32)
    else:
        origin = tl.zeros([AXES], tl.float64)
        shrink = 1.0
        box = grid_extent(tier_ptr, axes, stride_tier, N, HEIGHT, WIDTH, AXES, BLOCK_N, MODE, HAS_TIER)
    square = 0.0
    for p in range(P):  # in order, each operation rounded alone
        side = tl.sum(tl.where(tl.arange(0, AXES) == p, box, 0.0), axis=0)
        square += side * side
    factor = tl.div_rn(spatial_weight, tl.sqrt_rn(tl.where(square > 0, square, 1.0)))
    return origin, shrink_first, shrink, tl.where(square > 0, tl.minimum(factor, FLOAT32_MAX), 0.0)


@triton.jit
def add_square(square, x, y):
    """square [BLOCK_K, BLOCK_N] + (x [BLOCK_K] - y [BLOCK_N])**2"""
    step = x[:, None] - y[None, :]
    return square + step * step


@triton.jit
def rows_of(
    indices_ptr, tier_ptr, start, stride_index, stride_tier, N, K, BLOCK_K: tl.constexpr, HAS_TIER: tl.constexpr
):
    """BLOCK_K rows, their kept tokens and whether they take anybody."""
    offs_k = start + tl.arange(0, BLOCK_K)
    kept = tl.load(indices_ptr + offs_k.to(tl.int64) * stride_index, mask=offs_k < K, other=-1)
    takes = (kept >= 0) & (kept < N)
    kept = tl.where(takes, kept, 0)
    if HAS_TIER:
        takes = takes & (tl.load(tier_ptr + kept * stride_tier) != MASKED)
    return offs_k, kept, takes


@triton.jit
def compare_rows(
    best, row, own, s, offs_k, kept, takes, tokens, where_ptr, origin, shrink_first, shrink, factor,
    stride_where_n, stride_where_p, HEIGHT, WIDTH,
    P: tl.constexpr, AXES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Best score, best row and own row of BLOCK_N tokens, now that s [BLOCK_K, BLOCK_N] is known of more rows."""
    score = s
    if MODE != NO_DISTANCE:
        square = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
        if MODE != POSITIONS:
            t, h, w = grid_place(tokens, HEIGHT, WIDTH)
            kept_t, kept_h, kept_w = grid_place(kept, HEIGHT, WIDTH)
            square = add_square(square, kept_t, t)
            square = add_square(square, kept_h, h)
            square = add_square(square, kept_w, w)
        else:
            for p in range(P):
                axis = tl.full([], p, tl.int64)
                low = tl.sum(tl.where(tl.arange(0, AXES) == p, origin, 0), axis=0)
                x = load_coordinate(where_ptr, kept, axis, low, shrink_first, shrink, stride_where_n, stride_where_p)
                y = load_coordinate(where_ptr, tokens, axis, low, shrink_first, shrink, stride_where_n, stride_where_p)
                square = add_square(square, x, y)
        # Coordinates in the box are at most 1: only one without a place makes the square non-finite: distance 0.
        distance = tl.sqrt_rn(tl.where(is_finite(square), square, 0.0))
        score = score - factor * distance  # Eq. 6
    score = tl.where(takes[:, None], score, float("-inf"))
    top = tl.max(score, axis=0)
    first = tl.min(tl.where(takes[:, None] & (score == top[None, :]), offs_k[:, None], NOWHERE), axis=0)
    better = (first != NOWHERE) & ((best != best) | (top > best))  # Eq. 7; a tie stays with the lowest row
    itself = takes[:, None] & (kept[:, None] == tokens[None, :])
    own = tl.minimum(own, tl.min(tl.where(itself, offs_k[:, None], NOWHERE), axis=0))
    return tl.where(better, top, best), tl.where(better, first, row), own


@triton.jit
def nearest_rows(
    s_ptr, indices_ptr, tier_ptr, where_ptr, offs_n, origin, shrink_first, shrink, factor,
    stride_s_i, stride_s_j, stride_index, stride_tier, stride_where_n, stride_where_p, N, K, HEIGHT, WIDTH,
    P: tl.constexpr, AXES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MODE: tl.constexpr,
    HAS_TIER: tl.constexpr, SANITISE: tl.constexpr,
):  # fmt: skip
    """The row of each of BLOCK_N tokens of one image: its own, else the best one; NOWHERE if no row takes anybody."""
    tokens = tl.minimum(offs_n, N - 1).to(tl.int64)
    best = tl.full([BLOCK_N], float("nan"), tl.float32)  # every score beats "none yet", -infinity too
    row = tl.full([BLOCK_N], NOWHERE, tl.int32)
    own = tl.full([BLOCK_N], NOWHERE, tl.int32)
    start = tl.zeros([], tl.int32)
    while start < K:
        offs_k, kept, takes = rows_of(indices_ptr, tier_ptr, start, stride_index, stride_tier, N, K, BLOCK_K, HAS_TIER)
        s = tl.load(s_ptr + kept[:, None] * stride_s_i + tokens[None, :] * stride_s_j)  # [BLOCK_K, BLOCK_N]
        if SANITISE:
            s = tl.where(is_finite(s), s, 0.0)
        best, row, own = compare_rows(
            best, row, own, s, offs_k, kept, takes, tokens, where_ptr, origin, shrink_first, shrink, factor,
            stride_where_n, stride_where_p, HEIGHT, WIDTH, P, AXES, BLOCK_N, BLOCK_K, MODE,
        )  # fmt: skip
        start += BLOCK_K
    return tl.where(own != NOWHERE, own, row)


@triton.jit
def may_move(sources_ptr, indices_ptr, row, offs_n, stride_source, stride_index, N):
    """Which of BLOCK_N tokens that have a row are sources, or, being kept, their row's own."""
    source = tl.load(sources_ptr + offs_n.to(tl.int64) * stride_source, mask=offs_n < N, other=0) != 0
    kept = tl.load(indices_ptr + row.to(tl.int64) * stride_index, mask=row != NOWHERE, other=-1)
    return source | (kept == offs_n)


@triton.jit(do_not_specialize=VARYING)
def assign_kernel(
    s_ptr,  # [B, N, N]
    indices_ptr,  # [B, K]
    tier_ptr,  # [B, N]
    sources_ptr,  # [B, N] or None
    where_ptr,  # [N, P] or [B, N, P]
    assignment_ptr,  # [B, N]
    spatial_weight,
    stride_s_b, stride_s_i, stride_s_j,
    stride_index_b, stride_index_k,
    stride_tier_b, stride_tier_n,
    stride_source_b, stride_source_n,
    stride_where_b, stride_where_n, stride_where_p,
    N, K, HEIGHT, GRID_WIDTH, num_parts, packed,
    P: tl.constexpr, AXES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_BOX: tl.constexpr,
    MODE: tl.constexpr, HAS_TIER: tl.constexpr, SANITISE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pid_b, part = image_of_block(packed, pid, num_parts, BLOCK_N)
    at_b, N = image_tokens(packed, pid_b, N)
    if has_block(packed, N, part, BLOCK_N) == 0:
        return
    stored = stored_at(packed, pid_b, at_b)
    if packed is None:
        indices_ptr += pid_b * stride_index_b
    else:
        if stored < 0:
            return
        first_k, K, _anchors = image_rows(packed, pid_b, N, K, 0)
        indices_ptr += first_k * stride_index_k
    offs_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    tier_ptr += at_b * stride_tier_b
    where_ptr += at_b * stride_where_b
    origin, shrink_first, shrink, factor = tl.zeros([AXES], tl.float64), 1.0, 1.0, 0.0
    if MODE != NO_DISTANCE:
        origin, shrink_first, shrink, factor = distance_frame(
            where_ptr, tier_ptr, spatial_weight, stride_where_n, stride_where_p, stride_tier_n, N, HEIGHT, GRID_WIDTH,
            P, AXES, BLOCK_BOX, MODE, HAS_TIER,
        )  # fmt: skip
    row = nearest_rows(
        s_ptr + stored * stride_s_b, indices_ptr, tier_ptr, where_ptr, offs_n,
        origin, shrink_first, shrink, factor,
        stride_s_i, stride_s_j, stride_index_k, stride_tier_n, stride_where_n, stride_where_p, N, K, HEIGHT, GRID_WIDTH,
        P, AXES, BLOCK_N, BLOCK_K, MODE, HAS_TIER, SANITISE,
    )  # fmt: skip
    assigned = row != NOWHERE
    if HAS_TIER:
        tier = tl.load(tier_ptr + offs_n.to(tl.int64) * stride_tier_n, mask=offs_n < N, other=MASKED)
        assigned = assigned & (tier != MASKED)
    if sources_ptr is not None:
        sources_ptr += at_b * stride_source_b
        assigned = assigned & may_move(sources_ptr, indices_ptr, row, offs_n, stride_source_n, stride_index_k, N)
    assignment_ptr += tokens_before(packed, at_b, N)
    tl.store(assignment_ptr + offs_n, tl.where(assigned, row, -1).to(tl.int64), mask=offs_n < N)


def launch_assign(s, indices, tier, space, spatial_weight, assignment, *, sanitise, sources=None, packed=None):
    """The kernel on s [B, N, >= N], into assignment [B, N]; packed: s [T, >= max_seqlen], into assignment [T]."""
    if assignment.shape[0] == 0:
        return
    n = assignment.shape[1] if packed is None else packed.max_seqlen
    k = indices.shape[1] if packed is None else packed.max_keep
    config = AssignConfig.for_shape(k)
    axes = triton.next_power_of_2(space.axes)
    parts = triton.cdiv(n, config.block_n)
    programs = assignment.shape[0] * parts if packed is None else packed.num_slots(config.block_n)
    launch(
        assign_kernel, (programs,),
        s, indices, s if tier is None else tier, sources, s if space.tensor is None else space.tensor, assignment,
        float(spatial_weight),
        *strides_of(s, 3), *strides_of(indices, 2), *strides_of(tier, 2), *strides_of(sources, 2), *space.strides,
        n, k, space.height, space.width, parts, packed,
        P=space.axes, AXES=axes, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_BOX=max(1024 // axes, 1),
        MODE=space.mode, HAS_TIER=tier is not None, SANITISE=sanitise,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def assign(
    s: torch.Tensor,  # [B, N, N]
    indices: torch.Tensor,  # [B, K] int64, -1 = no such row
    *,
    tier: torch.Tensor | None = None,  # [B, N] int8
    grid: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [B, N] bool
) -> torch.Tensor:
    """Return assignment [B, N] int64: the row of each token; -1 where masked, and where neither a source nor kept."""
    reject_float64(s=s)
    assignment = new(s, s.shape[:2], torch.int64)
    with on_device_of(s):
        space = Space.of(grid, positions, spatial_weight, masked=tier is not None)
        launch_assign(s, indices, tier, space, spatial_weight, assignment, sanitise=True, sources=sources)
    return assignment


def assign_varlen(
    s: torch.Tensor,  # [T, >= max_seqlen]
    indices: torch.Tensor,  # [total_keep] int64
    cu_seqlens: torch.Tensor,  # [S + 1]
    cu_kept: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    tier: torch.Tensor | None = None,  # [T] int8
    positions: torch.Tensor | None = None,  # [T, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [T] bool
) -> torch.Tensor:
    """Return assignment [T] int64."""
    reject_float64(s=s)
    (num_tokens, _), (total_keep,) = s.shape, indices.shape
    max_seqlen = min(max_seqlen, num_tokens)
    assignment = new(s, (num_tokens,), torch.int64, fill=-1)  # and -1 it stays in segments without rows
    if cu_seqlens.shape[0] == 1 or total_keep == 0 or max_seqlen == 0:
        return assignment
    space = replace(
        Space.of(None, positions, spatial_weight, masked=tier is not None), strides=strides_of(positions, 3)
    )
    with on_device_of(s):
        packed = Packed.kept(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen)
        launch_assign(
            s, indices, tier, space, spatial_weight, assignment, sanitise=True, sources=sources, packed=packed
        )
    return assignment
