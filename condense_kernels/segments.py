"""Crops, frames, windows: how many tokens each may keep, and which. In torch alone; the host waits for no value."""

from collections.abc import Sequence
from typing import Any

import torch

from ._dispatch import tracing
from ._dispatch.checks import (
    FLOATS,
    INTEGERS,
    as_count,
    check_choice,
    check_count,
    check_not_empty,
    check_tensor,
    is_int,
    shown,
)

RULES = ("largest_remainder", "floor_largest", "int_clamp", "round_min1")
MOST = torch.iinfo(torch.int32).max  # tokens of a call, as offsets are int32
FRACTION = 20  # bits of a share behind the point: rounding then tells no shares apart that are equal
ONE = 1 << FRACTION


@tracing.leaf()
def allocate_budget(
    weights: torch.Tensor,  # [..., C]
    total: int | torch.Tensor,  # or [...]
    *,
    rule: str = "largest_remainder",
    capacity: int | torch.Tensor | None = None,  # or [C], [..., C]
    minimum: int = 0,
) -> torch.Tensor:
    """Split ``total`` tokens among C segments in proportion to their weights.

    The share of a segment is ``total * weight / sum of the weights``, and a rule makes integers of the shares:

    - "largest_remainder": floors, and one more each for the largest fractions.
    - "floor_largest": floors, and one more each for the largest weights (HoloV).
    - "int_clamp": floors (HiRED). The budgets may sum to less than total.
    - "round_min1": the nearest integers, halves to even, at least 1 (VidCom2). They may sum to less or to more.

    The first two keep the total: their budgets sum to ``min(total, sum of the capacities)``, always. A share is held
    between minimum and capacity, and what that takes from one segment goes to the others in proportion. The last two
    are the published ones: each budget is cut to minimum and capacity by itself.

    Args:
        weights: [..., C] floating or integer, >= 0. NaN and negative ones count as 0; beside an infinite one, finite
            ones do. Where all count as 0, they are equal.
        total: an int, or an integer tensor [...], >= 0 (a negative one in a tensor counts as 0).
        capacity: tokens that a segment has: an int, or an integer tensor that broadcasts to [..., C].
        minimum: an int >= 0; a segment that has fewer tokens gets all of them. Where the total is less than all
            minima together, the first segments get theirs.

    Returns:
        [..., C] int64. Ties, of fractions or of weights, go to the lowest index. Segments of weight 0 get something
        beyond the minimum only where all others are full, in equal shares.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device, rule or number.
    """
    total, capacity, minimum = a_count("total", total), a_count("capacity", capacity), as_count("minimum", minimum)
    tracing.unrecorded(check_allocation, weights, total, rule, capacity, minimum)
    w = usable(weights)
    due = as_counts(total, w)[..., None]
    if rule in ("int_clamp", "round_min1"):
        share = fixed_point(proportional(w, due.double()))
        budget = share // ONE if rule == "int_clamp" else half_to_even(share)
        budget = budget.clamp(min=max(minimum, 1 if rule == "round_min1" else 0))
        return budget if capacity is None else torch.minimum(budget, as_counts(capacity, w))
    high = due.expand(w.shape) if capacity is None else torch.minimum(due, as_counts(capacity, w)).expand(w.shape)
    due = torch.minimum(due, high.sum(dim=-1, keepdim=True))
    if capacity is None and minimum == 0:
        share = fixed_point(proportional(w, due.double()))
    else:
        low = given_in_order(high.clamp(max=minimum), due)
        share = fixed_point(between(w, low.double(), high.double(), due.double()))
    budget = share // ONE
    order = (share % ONE if rule == "largest_remainder" else w).argsort(dim=-1, descending=True, stable=True)
    for at_most in (1, MOST):  # the second time is for what rounding has lost: a floor is less than 1 below its share
        room = (high - budget).clamp(max=at_most).gather(-1, order)
        more = given_in_order(room, due - budget.sum(dim=-1, keepdim=True))
        budget = budget.scatter_add(-1, order, more)
    return budget


def a_count(name: str, value: Any) -> Any:
    """A number of the host as an int; a tensor, whose values it does not read, stays one also without axes."""
    return value if isinstance(value, torch.Tensor) else as_count(name, value)


def as_counts(value: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.long().clamp(0, MOST)
    return torch.full((), value, dtype=torch.int64, device=like.device)


def usable(weights: torch.Tensor) -> torch.Tensor:
    """In fp64, below 1, not all of them 0 along the last axis."""
    w = torch.where(weights > 0, weights, 0).double()  # a comparison with NaN is False
    infinite = w.isinf()
    w = torch.where(infinite.any(dim=-1, keepdim=True), infinite.double(), w)
    top = w.amax(dim=-1, keepdim=True)
    _, exponent = torch.frexp(top)  # a power of two, so that quotients of integers stay exact
    half = exponent // 2
    return torch.where(top > 0, torch.ldexp(torch.ldexp(w, -half), half - exponent), 1.0)


def proportional(w: torch.Tensor, due: torch.Tensor) -> torch.Tensor:
    return w * due / w.sum(dim=-1, keepdim=True)


def fixed_point(share: torch.Tensor) -> torch.Tensor:
    return (share * ONE).round().long()


def half_to_even(share: torch.Tensor) -> torch.Tensor:
    whole, rest = share // ONE, share % ONE
    return whole + ((rest > ONE // 2) | ((rest == ONE // 2) & (whole % 2 == 1))).long()


def given_in_order(wanted: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """What each gets of ``left`` when the first come first."""
    before = wanted.cumsum(dim=-1) - wanted
    return torch.minimum((left - before).clamp(min=0), wanted)


def between(w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, due: torch.Tensor) -> torch.Tensor:
    """Shares in [low, high] that are in proportion to w where no bound holds them, and sum to due."""
    share = level(w, low, high, due)
    return level((w == 0).double(), share, torch.where(w == 0, high, share), due)  # what the others have no room for


def level(w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, due: torch.Tensor) -> torch.Tensor:
    """clamp(water * w, low, high), the water as high as due allows.

    Their sum rises with the water, and bends only where a segment leaves its low or reaches its high: all these places
    are tried at once, and from the last that is low enough on it is a straight line.
    """
    leaves = torch.where(w > 0, low / w, torch.inf)
    fills = torch.where(w > 0, high / w, torch.inf)
    bends = torch.cat([leaves, fills], dim=-1)[..., None]  # [..., 2 C, 1]
    held = torch.where(fills[..., None, :] <= bends, high[..., None, :], low[..., None, :])
    free = (leaves[..., None, :] < bends) & (bends < fills[..., None, :])
    total = torch.where(free, bends * w[..., None, :], held).sum(dim=-1)  # [..., 2 C]
    water = torch.where(bends[..., 0].isfinite() & (total <= due), bends[..., 0], 0).amax(dim=-1, keepdim=True)
    held = torch.where(fills <= water, high, low)
    free = (leaves <= water) & (water < fills)
    moving = torch.where(free, w, 0)
    left = due - torch.where(free, 0, held).sum(dim=-1, keepdim=True)
    share = moving * left / moving.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    return torch.where(free, share.clamp(low, high), held)


@tracing.leaf()
def segment_topk(
    scores: torch.Tensor,  # [..., N], or packed [T]
    k: int | Sequence[int] | torch.Tensor,  # [...], packed [S]
    *,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    mask: torch.Tensor | None = None,  # as scores
    largest: bool = True,
) -> torch.Tensor:
    """The k tokens of each segment with the largest scores, as a mask: True where a token is kept.

    Args:
        scores: [..., N] floating, each row a segment; or [T], all segments in a row, with ``cu_seqlens``. A NaN comes
            last in its segment.
        k: an int for all segments; or for each of them, [...] or [S], a list, or an integer tensor where scores are,
            whose values the host does not read. A segment of fewer tokens keeps all of them.
        cu_seqlens: [S + 1] int32 or int64, where the segments begin and end in [T].
        mask: bool, as scores; False is never kept, and takes nobody's place.
        largest: False keeps the smallest scores.

    Returns:
        bool, as scores. Ties go to the lowest index.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device or number.
    """
    keep, _ = kept_tokens(scores, k, cu_seqlens, mask, largest)
    return keep


@tracing.leaf(tuple, 2)
def segment_topk_indices(
    scores: torch.Tensor,  # [..., N], or packed [T]
    k: int | Sequence[int] | torch.Tensor,  # [...], packed [S]
    total_keep: int,
    *,
    cu_seqlens: torch.Tensor | None = None,  # [S + 1]
    mask: torch.Tensor | None = None,  # as scores
    largest: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k tokens of each segment with the largest scores, as indices: packed as of :func:`select_and_merge_varlen`.

    Args:
        scores, k, cu_seqlens, mask, largest: as of :func:`segment_topk`.
        total_keep: the sum of k, an int on the host, so that nothing waits for the device: as
            :func:`allocate_budget` was given it.

    Returns:
        indices: [total_keep] int64, each segment's in ascending order, counted from its beginning; -1 behind the last
            where fewer were kept. What goes beyond total_keep is left out.
        cu_kept: [S + 1] int32, where each segment's begin and end in indices: with [..., N], S is the number of rows.

    Raises:
        TypeError, ValueError: as :func:`segment_topk`; no such total.
    """
    total_keep = as_count("total_keep", total_keep)
    keep, bounds = kept_tokens(scores, k, cu_seqlens, mask, largest)
    tracing.unrecorded(check_count, "total_keep", total_keep, 0, keep.numel(), f"{keep.numel()} tokens")
    keep = keep.flatten()
    so_far = torch.nn.functional.pad(keep.cumsum(0), (1, 0))  # [T + 1]: kept before each token
    token = torch.arange(keep.shape[0], dtype=torch.int64, device=keep.device)
    segment = torch.bucketize(token, bounds, right=True) - 1
    within = token - bounds[segment.clamp(min=0)]
    place = torch.where(keep, so_far[:-1], total_keep).clamp(max=total_keep)  # the last one is for all the others
    indices = within.new_full((total_keep + 1,), -1).scatter(0, place, within)[:total_keep]
    return indices, so_far[bounds].clamp(max=total_keep).int()


def kept_tokens(
    scores: torch.Tensor,
    k: int | Sequence[int] | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    largest: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool as scores, and where the segments begin and end in all tokens [S + 1]."""
    k = a_count("k", k)
    tracing.unrecorded(check_topk, scores, k, cu_seqlens, mask, largest)
    n = scores.shape[-1]
    if cu_seqlens is None:
        group, start = None, torch.zeros((), dtype=torch.int64, device=scores.device)
        counts = counts_of(k, scores, scores.shape[:-1])[..., None]
        bounds = torch.arange(scores.shape[:-1].numel() + 1, dtype=torch.int64, device=scores.device) * n
    else:
        # Offsets are data that nobody has checked: held to the tokens there are, and kept from decreasing.
        bounds = cu_seqlens.long().clamp(0, n).cummax(dim=0).values
        group = torch.bucketize(
            torch.arange(n, dtype=torch.int64, device=scores.device), bounds, right=True
        )  # 0 before the first
        start = torch.nn.functional.pad(bounds, (1, 0))[group]
        counts = torch.nn.functional.pad(counts_of(k, scores, bounds[1:].shape), (1, 1))[group]  # 0 outside of all
    keep = places(scores, group, mask, largest) - start < counts
    return keep if mask is None else keep & mask, bounds


def counts_of(k: int | Sequence[int] | torch.Tensor, scores: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if isinstance(k, torch.Tensor):
        return k.long()
    if not isinstance(k, Sequence):
        return torch.full(shape, k, dtype=torch.int64, device=scores.device)
    counts = torch.tensor(k, dtype=torch.int64, device="cpu").reshape(shape)
    if scores.device.type == "cuda":
        counts = counts.pin_memory()
    return counts.to(scores.device, non_blocking=True)


def places(
    scores: torch.Tensor, group: torch.Tensor | None, mask: torch.Tensor | None, largest: bool
) -> torch.Tensor:  # as scores
    """Where each token comes when the groups are sorted one after the other, each by score, what is masked last."""
    value = scores.detach() if largest else -scores.detach()
    value = torch.where(value.isnan(), -torch.inf, value) + 0.0  # no -0, which a sort might tell from 0
    order = value.argsort(dim=-1, descending=True, stable=True)
    if mask is not None:
        group = (~mask).long() if group is None else 2 * group + (~mask).long()
    if group is not None:
        order = order.gather(-1, group.expand(order.shape).gather(-1, order).argsort(dim=-1, stable=True))
    place = torch.arange(order.shape[-1], dtype=torch.int64, device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter(-1, order, place)


def check_allocation(weights: Any, total: Any, rule: Any, capacity: Any, minimum: Any) -> None:
    check_rows("weights", weights, "... C", FLOATS + INTEGERS)
    check_not_empty("weights", weights, -1, "segment")
    check_choice("rule", rule, RULES)
    check_counts("total", total, weights.shape[:-1], weights)
    if capacity is not None:
        check_counts("capacity", capacity, weights.shape, weights)
    check_count("minimum", minimum, 0, MOST, "tokens of a call")


def check_topk(scores: Any, k: Any, cu_seqlens: Any, mask: Any, largest: Any) -> None:
    packed = cu_seqlens is not None
    check_rows("scores", scores, "T" if packed else "... N", FLOATS)
    if packed:
        if scores.dim() != 1:
            raise ValueError(
                f"scores: expected 1 axis [T] beside cu_seqlens, got {list(scores.shape)}. "
                "Remedy: scores.flatten(), or no cu_seqlens where every row is a segment."
            )
        check_tensor("cu_seqlens", cu_seqlens, "S+1", {}, (torch.int32, torch.int64), scores)
        check_not_empty("cu_seqlens", cu_seqlens, 0, "offset")
    if mask is not None:
        check_rows("mask", mask, "as scores", (torch.bool,), scores)
        if mask.shape != scores.shape:
            raise ValueError(f"mask: expected the shape of scores, {list(scores.shape)}, got {list(mask.shape)}.")
    if not isinstance(largest, bool):
        raise TypeError(f"largest: expected True or False, got {type(largest).__name__}: {largest!r}.")
    segments = (cu_seqlens.shape[0] - 1,) if packed else tuple(scores.shape[:-1])
    if isinstance(k, Sequence) and not isinstance(k, str):
        for count in k:
            if not is_int(count) or not 0 <= count <= MOST:
                raise ValueError(f"k: expected ints >= 0, got {shown(count)} among them.")
        if (len(k),) != segments:
            raise ValueError(f"k: expected one for each of the segments {list(segments)}, got {len(k)}.")
    else:
        check_counts("k", k, torch.Size(segments), scores, broadcast=False)


def check_rows(name: str, value: Any, axes: str, dtypes: tuple, like: torch.Tensor | None = None) -> None:
    """A tensor of any number of axes, but one at least."""
    rank = value.dim() if isinstance(value, torch.Tensor) else 1
    letters = " ".join(f"({i})" for i in range(rank))
    if isinstance(value, torch.Tensor) and rank == 0:
        raise ValueError(f"{name}: expected axes [{axes}], got a number. Remedy: {name}[None].")
    check_tensor(name, value, letters if isinstance(value, torch.Tensor) else axes, {}, dtypes, like)


def check_counts(name: str, value: Any, shape: torch.Size, like: torch.Tensor, broadcast: bool = True) -> None:
    """An int, or an integer tensor of this shape beside ``like``."""
    if not isinstance(value, torch.Tensor):
        check_count(name, value, 0, MOST, "tokens of a call")
        return
    if value.dtype not in INTEGERS:
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected an int or an integer tensor, got {got}. Remedy: {name}.long().")
    fits = value.shape == shape or (
        broadcast
        and value.dim() <= len(shape)
        and all(a in (1, b) for a, b in zip(reversed(value.shape), reversed(shape), strict=False))
    )
    if not fits:
        raise ValueError(f"{name}: expected an int, or a tensor {list(shape)}, got {list(value.shape)}.")
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device}, as of the first argument, got {value.device}. "
            f"Remedy: {name}.to({str(like.device)!r})."
        )
