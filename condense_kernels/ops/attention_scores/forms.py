"""The forms in which published code takes its scores, around the operator and in plain torch: a single row, heads,
windows of tokens. All are differentiable."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..._dispatch import debug
from ..._dispatch.checks import FLOATS, as_count, check_grid, check_tensor, check_values, is_int
from ..similarity.op import compute_dtype
from .gradients import softmax_over

OVER_HEADS = ("mean", "sum", "max")
OVER_ROWS = ("mean", "sum", "mean_query")


def as_rows(rows: Any) -> Any:
    """A tensor, an int, or a tuple of ints; all else as it is, to be checked."""
    if isinstance(rows, torch.Tensor) and rows.dim() > 0:
        return rows
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        rows = tuple(as_count("rows", row) for row in rows)
        return rows[0] if len(rows) == 1 else rows
    return as_count("rows", rows)


def as_pool(pool: Any) -> Any:
    """An int, or a tuple of ints; all else as it is, to be checked."""
    if isinstance(pool, Sequence) and not isinstance(pool, str):
        return tuple(as_count("pool", size) for size in pool)
    return as_count("pool", pool)


def check_rows(rows: Any, num_queries: int) -> None:
    if rows is None or isinstance(rows, torch.Tensor):  # checked as the operator's argument
        return
    for row in rows if isinstance(rows, tuple) else (rows,):
        if not is_int(row):
            raise TypeError(
                f"rows: expected an int, ints, or a tensor [R] or [B, R] int64, got {type(row).__name__}: {row!r}. "
                "Remedy: torch.tensor(rows)."
            )
        if not 0 <= row < num_queries:
            raise ValueError(
                f"rows: expected 0 <= row < M = {num_queries} queries, got {row}. Remedy: M - 1 is the last row; -1 is "
                "no row, in a tensor alone."
            )


def check_heads(heads: Any, queries: torch.Tensor) -> None:
    if isinstance(heads, torch.Tensor):
        check_tensor("heads", heads, "Hq", {"Hq": queries.shape[-2 if queries.dim() == 3 else 1]}, FLOATS, queries)
    elif heads is not None and heads not in OVER_HEADS:
        raise ValueError(f"heads: expected 'mean', 'sum', 'max', weights [Hq] or None, got {heads!r}.")


def check_over_rows(over_rows: Any, lse: torch.Tensor | None, causal: bool) -> None:
    if over_rows not in OVER_ROWS:
        raise ValueError(f"over_rows: expected one of {', '.join(map(repr, OVER_ROWS))}, got {over_rows!r}.")
    if over_rows == "mean_query" and (lse is not None or causal):
        name, given = ("lse", "one") if lse is not None else ("causal", "True")
        raise ValueError(
            f"{name}: expected {'None' if name == 'lse' else 'False'} with over_rows='mean_query', got {given}: a mean "
            f"of queries is no row that has a {'normaliser' if name == 'lse' else 'place'}. Remedy: over_rows='mean'."
        )


def check_columns(columns: Any, num_keys: int) -> None:
    if columns is None:
        return
    if not isinstance(columns, Sequence) or len(columns) != 2:
        raise TypeError(f"columns: expected (start, stop) or (start, None), got {columns!r}. Remedy: (1, None).")
    start, stop = columns[0], num_keys if columns[1] is None else columns[1]
    if not (is_int(start) and is_int(stop) and 0 <= start <= stop <= num_keys):
        raise ValueError(
            f"columns: expected 0 <= start <= stop <= N = {num_keys} keys, got {tuple(columns)}. Remedy: (start, None) "
            "for all from start on."
        )


def check_pool(pool: Any, grid: Any, num_tokens: int) -> None:
    if pool is None:
        if grid is not None:
            raise ValueError("grid: expected None without pool, got one. Remedy: pool=(2, 2), or leave out grid.")
        return
    sizes = pool if isinstance(pool, tuple) and len(pool) == 2 else (pool,)
    if not all(map(is_int, sizes)) or min(sizes) < 1:
        raise ValueError(f"pool: expected an int >= 1 or (ph, pw), got {pool!r}. Remedy: pool=2 for windows of 2 x 2.")
    if grid is not None:
        check_grid(grid, num_tokens)
        windows = (*sizes, sizes[0])[:2]
        if any(axis % size for axis, size in zip(grid[-2:], windows, strict=True)):
            raise ValueError(f"grid: expected H and W that the windows {windows} divide, got {tuple(grid)}.")
    elif len(sizes) == 2:
        raise ValueError(f"grid: expected (H, W) for windows {tuple(sizes)}, got None. Remedy: grid=, or one int.")
    elif num_tokens % sizes[0]:
        raise ValueError(f"pool: expected a number that divides the {num_tokens} tokens, got {sizes[0]}.")


def number_of_columns(columns: Any, num_keys: int) -> int:
    return num_keys if columns is None else len(range(num_keys)[slice(*columns)])


# A single row


def is_one_row(rows: Any, queries: torch.Tensor) -> bool:
    if isinstance(rows, torch.Tensor):
        return rows.shape[-1] == 1 and queries.shape[2] > 0
    return queries.shape[2] == 1 if rows is None else is_int(rows)


def exists(rows: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Which entries of a list are rows. What is out of range is an error on a CPU, as in the operator, else none."""
    wrapped = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(rows)
    if rows.device.type == "cpu" and not wrapped and debug.has_values(rows):
        check_values("rows", rows, -1, num_queries)
    return (rows >= 0) & (rows < num_queries)


def take_queries(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, Hq, R, ...] of x [B, Hq, M, ...]: an index that is none takes some row."""
    at = rows.clamp(0, x.shape[2] - 1).expand(x.shape[0], -1)  # [B, R]
    at = at.reshape(len(at), 1, -1, *[1] * (x.dim() - 3))
    return x.take_along_dim(at.expand(-1, x.shape[1], -1, *x.shape[3:]), dim=2)


def probabilities(
    query: torch.Tensor,  # [B, Hq, d]
    keys: torch.Tensor,  # [B, Hkv, N, d]
    seen: torch.Tensor | None,  # [B or 1, 1, N]
    lse: torch.Tensor | None,  # [B, Hq]
    scale: float | None,
) -> torch.Tensor:  # [B, Hq, N]
    """The two lines. In fp64, where neither autocast nor torch's matmul precision has a say."""
    q = query.double().unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, d]
    s = (q @ keys.double().mT).flatten(1, 2) * (1 / math.sqrt(keys.shape[3]) if scale is None else scale)
    if lse is None:
        p = softmax_over(s, seen)
    else:
        p = (s - lse.double()[..., None]).exp().masked_fill(lse.isinf()[..., None], 0)
        p = p if seen is None else p.masked_fill(~seen, 0)
    return p.to(compute_dtype(keys))


def one_row(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False) -> torch.Tensor:
    """The operator where there is one row; ``rows`` may be an int as well."""
    m, n = queries.shape[2], keys.shape[2]
    row = 0 if rows is None else rows if is_int(rows) else rows.reshape(-1, 1, 1)
    seen = None if mask is None else mask[:, None]
    if causal:
        before = torch.arange(n, dtype=torch.int64, device=keys.device)[None, None] <= row + (n - m)
        seen = before if seen is None else seen & before
    if is_int(row):
        return probabilities(queries[:, :, row], keys, seen, None if lse is None else lse[:, :, row], scale)
    there = exists(rows, m).reshape(-1, 1, 1)
    query = take_queries(queries, rows)[:, :, 0]
    normaliser = None if lse is None else take_queries(lse, rows)[:, :, 0]
    return probabilities(query, keys, seen, normaliser, scale).masked_fill(~there, 0)


def mean_query(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False) -> torch.Tensor:
    """One row, the mean of those that are chosen; lse and causal are refused before."""
    if queries.shape[2] == 0:
        return torch.zeros_like(keys[:, :1, :, 0].expand(-1, queries.shape[1], -1), dtype=compute_dtype(keys))
    seen = None if mask is None else mask[:, None]
    if rows is None:
        return probabilities(queries.double().mean(dim=2), keys, seen, None, scale)
    counts = exists(rows, queries.shape[2]).reshape(-1, 1, rows.shape[-1], 1)  # [B or 1, 1, R, 1]
    number = counts.sum(dim=2)
    chosen = take_queries(queries, rows).double()
    query = torch.where(counts, chosen, 0).sum(dim=2) / number.clamp(min=1)
    return probabilities(query, keys, seen, None, scale).masked_fill(number == 0, 0)


# After the rows


def number_of_rows(rows: Any, num_queries: int) -> Any:
    """An int, or of a tensor [B or 1, 1, 1]."""
    if rows is None:
        return num_queries
    if is_int(rows):
        return 1
    return exists(rows, num_queries).sum(dim=-1).reshape(-1, 1, 1)


def combine_heads(scores: torch.Tensor, heads: str | torch.Tensor | None, axis: int) -> torch.Tensor:
    if isinstance(heads, torch.Tensor):
        weights = heads.to(scores.dtype).reshape(-1, *[1] * (scores.dim() - 1 - axis))
        return (scores * weights).sum(dim=axis)
    if heads == "max":
        return scores.amax(dim=axis)
    if heads == "sum":
        return scores.sum(dim=axis)
    return scores if heads is None else scores.mean(dim=axis)


def over_windows(scores: torch.Tensor, pool: Any, grid: Sequence[int] | None) -> torch.Tensor:
    """The last axis: means over windows of the grid, or over groups of consecutive tokens."""
    if pool is None:
        return scores
    if grid is None:
        return scores.unflatten(-1, (-1, pool)).mean(dim=-1)
    h, w = pool if isinstance(pool, tuple) else (pool, pool)
    windows = scores.unflatten(-1, (-1, grid[-2] // h, h, grid[-1] // w, w))  # [..., T, H / ph, ph, W / pw, pw]
    return windows.mean(dim=(-3, -1)).flatten(-3)
