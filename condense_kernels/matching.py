"""Bipartite matching of tokens, the step of ToMe. In torch and :func:`similarity`; the host waits for no value."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._dispatch import tracing
from ._dispatch.checks import MAX_TOKENS, as_count, check_count, check_tensor, is_int, shown
from .ops.similarity import similarity
from .ops.similarity.op import check as check_keys

APART = -2.0  # below every cosine: a token with a NaN or infinity is merged after all others
NEVER = -torch.inf
INT64 = (torch.int64,)


class Matching(NamedTuple):
    """The last two arguments of merge."""

    indices: torch.Tensor  # [B, N - r] int64, ascending: the tokens that stay
    assignment: torch.Tensor  # [B, N] int64: the row of each token


@tracing.leaf(Matching._make, 2)
def bipartite_match(
    keys: torch.Tensor,  # [B, N, Dk]
    r: int,
    *,
    dst: torch.Tensor | None = None,  # [M] or [B, M]
    protected: int | Sequence[int] = 0,
    backend: str = "auto",
) -> Matching:
    """The r tokens to merge away, and into which: one step of ToMe's bipartite soft matching.

    Tokens are split in two, src and dst. Each src token has an edge to the dst token most similar to it, by cosine;
    the r src tokens with the strongest edges are merged into their dst token. With the sizes of the tokens as scores,
    ``merge(features, sizes, *bipartite_match(keys, r))`` does the rest: its mass is the new sizes.

    Args:
        keys: [B, N, Dk] fp32, fp16, bf16 or fp64, N >= 1: in ToMe, the mean of the attention keys over the heads.
        r: an int >= 0, cut to what can be merged: to ``(N - protected) // 2``, as in ToMe, and to the src tokens that
            are not protected; with dst to ``N - M - protected``, protected being their number.
        dst: [M] or [B, M] int64, distinct tokens; src are all others. None: the odd tokens, as in ToMe. tomesd picks
            one of every 2 x 2 window, see the page.
        protected: tokens that are neither merged nor merged into: the first so many (ToMe's class and distillation
            tokens), or a list of indices on the host. Where all dst are, the first of them is merged into.
        backend: of :func:`similarity`.

    Returns:
        The named tuple (indices [B, N - r], assignment [B, N]), r as cut. Ties go to the lowest index. A token with a
        NaN or an infinity in its key comes last, as src and as dst.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, r, protected or backend.
    """
    r, protected = as_count("r", r), as_count("protected", protected)
    tracing.unrecorded(check, keys, r, dst, protected)
    b, n, _ = keys.shape
    r = tracing.unrecorded(most_merged, r, n, dst, protected)
    token = torch.arange(n, dtype=torch.int64, device=keys.device)
    if r == 0:
        return Matching(token.repeat(b, 1), token.repeat(b, 1))
    fixed = marked(on_device_of(keys, protected), n) if isinstance(protected, Sequence) else token < protected
    s, _, _, tier = similarity(keys.detach(), backend=backend)
    src, targets = (part.expand(b, -1) for part in split(dst, token))
    edge = s[:, ::2, 1::2] if dst is None else between(s, src, targets)
    broken, fixed = tier != 0, fixed.expand(b, -1)
    apart = broken.gather(1, src)[:, :, None] | broken.gather(1, targets)[:, None, :]
    never = fixed.gather(1, src)[:, :, None] | fixed.gather(1, targets)[:, None, :]
    edge = torch.where(never, NEVER, torch.where(apart, APART, edge + 0.0))  # no -0, which a sort might tell from 0
    strength, best = edge.max(dim=-1)  # of equal ones the first
    merged = strength.argsort(dim=-1, descending=True, stable=True)[:, :r]
    away = marked(src.gather(1, merged), n)
    into = token.repeat(b, 1).scatter(1, src, targets.gather(1, best))
    row = (~away).cumsum(dim=1) - 1
    indices = away.long().argsort(dim=1, stable=True)[:, : n - r]
    return Matching(indices, torch.where(away, row.gather(1, into), row))


def on_device_of(keys: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    made = torch.tensor(list(tokens), dtype=torch.int64, device="cpu")
    return (made.pin_memory() if keys.device.type == "cuda" else made).to(keys.device, non_blocking=True)


def marked(tokens: torch.Tensor, n: int) -> torch.Tensor:
    """[..., n] bool: True at these tokens [..., M]. One that does not exist marks nothing."""
    inside = torch.where((tokens >= 0) & (tokens < n), tokens, n)
    marks = torch.zeros((*tokens.shape[:-1], n + 1), dtype=torch.bool, device=tokens.device)
    return marks.scatter(-1, inside, True)[..., :n]


def split(dst: torch.Tensor | None, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """src [1 or B, N - M] and dst [1 or B, M], ascending."""
    if dst is None:
        return token[None, ::2], token[None, 1::2]
    n, m = token.shape[0], dst.shape[-1]
    order = marked(dst.reshape(-1, m), n).long().argsort(dim=1, stable=True)
    return order[:, : n - m], order[:, n - m :]


def between(s: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """s [B, N, N] at these rows and columns [B, ...]."""
    chosen = s.gather(1, rows[:, :, None].expand(-1, -1, s.shape[2]))
    return chosen.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def most_merged(r: int, n: int, dst: torch.Tensor | None, protected: int | Sequence[int]) -> int:
    tokens = set(protected) if isinstance(protected, Sequence) else set(range(protected))
    if dst is not None:
        return max(0, min(r, n - dst.shape[-1] - len(tokens)) if dst.shape[-1] > 0 else 0)
    even = sum(1 for token in tokens if token % 2 == 0)
    if len(tokens) - even == n // 2:  # nothing to merge into
        return 0
    return max(0, min(r, (n - len(tokens)) // 2, (n + 1) // 2 - even))


def check(keys: Any, r: Any, dst: Any, protected: Any) -> None:
    check_keys(keys)
    b, n, _ = keys.shape
    check_count("r", r, 0, MAX_TOKENS, "tokens of one image")
    if dst is not None:
        sizes = {"B": b}
        check_tensor("dst", dst, "B M" if isinstance(dst, torch.Tensor) and dst.dim() == 2 else "M", sizes, INT64, keys)
        if dst.shape[-1] > n:
            raise ValueError(f"dst: expected at most N = {n} tokens, got {dst.shape[-1]}.")
    if is_int(protected):
        check_count("protected", protected, 0, n, f"N = {n} tokens")
    elif not isinstance(protected, Sequence) or isinstance(protected, str):
        raise TypeError(
            f"protected: expected an int, or a list of ints on the host, got {type(protected).__name__}. "
            "Remedy: protected.tolist(), which waits for the device."
        )
    else:
        for token in protected:
            if not is_int(token) or not 0 <= token < n:
                raise ValueError(f"protected: expected ints in [0, {n}), got {shown(token)} among them.")
