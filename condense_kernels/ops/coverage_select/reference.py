"""Greedy facility location: the definition.

It works in the dtype of its inputs (fp32, or fp64 where one of them is), one rounded operation at a time, and adds a
gain up in one order: the contract fixes the picks bit for bit for a given c.
"""

import torch

LANES = 128  # partial sums of a gain: row i is added to number i % LANES


def sum_of_rows(x: torch.Tensor) -> torch.Tensor:  # [M, N] -> [N]
    """Each lane adds up its rows, first row first; then the lanes are added in pairs of neighbours, and so on."""
    rows = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % LANES)).unflatten(0, (-1, LANES))
    lanes = x.new_zeros(LANES, x.shape[1])
    for block in rows:
        lanes = lanes + block
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    return lanes[0]


def clamped(weight: torch.Tensor, combine: str) -> torch.Tensor:
    """NaN is the lowest, an infinity the largest or lowest finite number; as a factor, at least 0."""
    limit = torch.finfo(weight.dtype).max
    weight = weight.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    return weight.clamp(min=0) if combine == "mul" else weight


def coverage_select_one(
    c: torch.Tensor,  # [M, N]
    k: int,
    weight: torch.Tensor | None,  # [N]
    combine: str,
    candidates: torch.Tensor | None,  # [N] bool
) -> list[int]:
    limit = torch.finfo(c.dtype).max
    c = c.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    covered = c.new_zeros(len(c))
    open_ = c.new_ones(c.shape[1], dtype=torch.bool) if candidates is None else candidates.clone()
    order: list[int] = []
    while len(order) < k and bool(open_.any()):
        gain = sum_of_rows((c - covered[:, None]).clamp(min=0)).clamp(max=limit)
        if weight is None:
            score = gain
        elif combine == "mul":
            score = gain * clamped(weight, combine)
        else:
            score = gain + clamped(weight, combine)
        best = score[open_].amax()
        pick = int((open_ & (score == best)).nonzero()[0])  # a tie goes to the lowest index
        order.append(pick)
        open_[pick] = False
        covered = torch.maximum(covered, c[:, pick])
    return order + [-1] * (k - len(order))


def coverage_select(
    c: torch.Tensor,  # [B, M, N]
    k: int,
    *,
    weight: torch.Tensor | None = None,  # [B, N]
    combine: str = "mul",
    candidates: torch.Tensor | None = None,  # [B, N] bool
) -> torch.Tensor:
    """Return order [B, k] int64: the picked tokens, first pick first."""
    wide = c.dtype == torch.float64 or (weight is not None and weight.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    order = torch.empty(c.shape[0], k, dtype=torch.int64, device=c.device)
    for b in range(c.shape[0]):
        of_image = (
            None if weight is None else weight[b].to(dtype),
            combine,
            None if candidates is None else candidates[b],
        )
        picks = coverage_select_one(c[b].to(dtype), k, *of_image)
        order[b] = torch.tensor(picks, dtype=torch.int64, device=c.device)
    return order
