"""The gradient of the attention scores, in torch and in fp64, on strips of query rows: no M x N map is kept.

One text for every device, dense and packed. In fp64 neither autocast nor the matmul precision has a say in the
products, and what is left of the batch and the threads is below the rounding of the result. What would tell whether a
row counts is on the device, so every row is computed, and those of no weight as zeros.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

STRIP = 1 << 21  # probabilities of a strip, 16 MB; four such maps live at a time


class Rows(NamedTuple):
    """The queries that are averaged over; each comes once."""

    weight: torch.Tensor  # [R] fp64, how often it counts / how many count; 0: not at all
    at: torch.Tensor | None = None  # [R] where it is among the M queries; None: at its own place


def softmax_over(s: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:  # [..., N]
    """Over the keys that are seen; zeros where none is."""
    if seen is None:
        return s.softmax(dim=-1)
    return s.masked_fill(~seen, -torch.inf).softmax(dim=-1).masked_fill(~seen, 0)


def finite(x: torch.Tensor) -> torch.Tensor:
    """Zeros for what is not: whoever sees it has NaN as probabilities, and nobody else shall have 0 * NaN."""
    return torch.where(x.isfinite(), x, 0)


def strip_gradients(
    slope: torch.Tensor,  # [Hkv, G, N]
    q: torch.Tensor,  # [Hkv, G, r, d]
    k: torch.Tensor,  # [Hkv, N, d]
    weight: torch.Tensor,  # [r]
    seen: torch.Tensor | None,  # [r, N] or [N]
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a strip of rows gives: its own gradients, and its part of those of the keys."""
    groups_and_rows, counts = q.shape[1:3], weight[:, None] > 0
    q = q.flatten(1, 2)
    p = softmax_over((q @ k.mT * scale).unflatten(1, groups_and_rows), seen)
    of_p = slope[:, :, None] * weight[:, None]
    of_s = p * (of_p - (p * of_p).sum(dim=-1, keepdim=True)) * scale
    of_s = torch.where(counts if seen is None else counts & seen, of_s, 0).flatten(1, 2)
    return (of_s @ finite(k)).unflatten(1, groups_and_rows), of_s.mT @ finite(q)


def image_gradients(
    slope: torch.Tensor,  # [Hq, N]
    queries: torch.Tensor,  # [Hq, M, d]
    keys: torch.Tensor,  # [Hkv, N, d]
    rows: Rows,
    see: Callable[[slice], tuple[slice, torch.Tensor | None]],  # which keys a strip of rows looks at, and sees
    step: int,  # rows of a strip
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[Hq, M, d] and [Hkv, N, d]."""
    heads, key_heads, m = queries.shape[0], keys.shape[0], queries.shape[1]
    slope = slope.double().unflatten(0, (key_heads, -1))
    q, k = queries.double(), keys.double()
    taken = q if rows.at is None else q.index_select(1, rows.at.clamp(max=m - 1))
    taken = taken.unflatten(0, (key_heads, -1))
    of_rows, of_keys = [], torch.zeros_like(k)
    for start in range(0, taken.shape[2], step):
        strip = slice(start, min(start + step, taken.shape[2]))
        window, seen = see(strip)
        of_strip, of_window = strip_gradients(
            slope[..., window], taken[:, :, strip], k[:, window], rows.weight[strip], seen, scale
        )
        of_rows.append(of_strip.flatten(0, 1))
        of_keys = of_keys + torch.nn.functional.pad(of_window, (0, 0, window.start, k.shape[1] - window.stop))
    if not of_rows:
        return torch.zeros_like(q), of_keys
    of_queries = torch.cat(of_rows, dim=1)
    if rows.at is not None:  # to their places; those of no weight, which are zeros, behind the last
        place = rows.at[:, None].expand_as(of_queries)
        of_queries = q.new_zeros(heads, m + 1, q.shape[2]).scatter(1, place, of_queries)[:, :m]
    return of_queries, of_keys


def distinct_rows(rows: torch.Tensor, num_queries: int) -> Rows:
    """Of a list [R] in which a row may come several times, and -1 is none. Where they would meet, sums of gradients
    took atomics."""
    ordered = rows.sort(stable=True).values
    first = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)[: len(rows)]
    exists = (ordered >= 0) & (ordered < num_queries)
    times = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    weight = torch.where(first & exists, times, 0).double() / exists.sum().clamp(min=1)
    return Rows(weight, torch.where(first & exists, ordered, num_queries))


def attention_scores_backward(
    grad_scores: torch.Tensor,  # [B, Hq, N]
    queries: torch.Tensor,  # [B, Hq, M, d]
    keys: torch.Tensor,  # [B, Hkv, N, d]
    *,
    rows: torch.Tensor | None = None,  # [R] or [B, R]
    mask: torch.Tensor | None = None,  # [B, N]
    scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return grad_queries [B, Hq, M, d] and grad_keys [B, Hkv, N, d] fp64; image by image, so that no bit depends on
    the batch."""
    (batch, heads, m, d), n = queries.shape, keys.shape[2]
    if queries.numel() == 0 or keys.numel() == 0:
        return torch.zeros_like(queries, dtype=torch.float64), torch.zeros_like(keys, dtype=torch.float64)
    scale = 1 / math.sqrt(d) if scale is None else scale
    step = max(1, STRIP // (heads * n))
    position = torch.arange(n, dtype=torch.int64, device=keys.device)
    of_images = []
    for b in range(batch):
        if rows is None:
            listed = Rows(torch.full((m,), 1 / max(m, 1), dtype=torch.float64, device=keys.device))
        else:
            listed = distinct_rows(rows if rows.dim() == 1 else rows[b], m)
        valid = None if mask is None else mask[b]

        def see(strip: slice, listed=listed, valid=valid) -> tuple[slice, torch.Tensor | None]:
            if not causal:
                return slice(0, n), valid
            at = torch.arange(m, dtype=torch.int64, device=keys.device) if listed.at is None else listed.at
            seen = position <= at[strip, None] + (n - m)
            return slice(0, n), seen if valid is None else seen & valid

        of_images.append(image_gradients(grad_scores[b], queries[b], keys[b], listed, see, step, scale))
    of_queries, of_keys = zip(*of_images, strict=True)
    return torch.stack(of_queries), torch.stack(of_keys)
