"""The attention that each key gets, averaged over query rows (Eq. 1): the definition, in fp64, row by row."""

import math

import torch


def chosen_rows(rows: torch.Tensor | None, image: int, num_queries: int) -> list[int]:
    """Which queries of an image are averaged over; a row may come twice, -1 is none."""
    if rows is None:
        return list(range(num_queries))
    listed = rows if rows.dim() == 1 else rows[image]
    return [row for row in listed.tolist() if row >= 0]


def row_probabilities(
    query: torch.Tensor,  # [d] fp64
    keys: torch.Tensor,  # [N, d] fp64
    seen: torch.Tensor,  # [N] bool
    lse: torch.Tensor | None,  # [], the row's normaliser where it comes from outside
    scale: float,
) -> torch.Tensor:  # [N]
    s = scale * (keys * query).sum(dim=-1)[seen]  # not matmul, whose bits depend on a key's place
    p = torch.zeros_like(keys[:, 0])
    if lse is None:
        p[seen] = s.softmax(dim=0)
    elif not lse.isinf():  # of a row that saw no key, where it comes from
        p[seen] = (s - lse).exp()
    return p


def attention_scores(
    queries: torch.Tensor,  # [B, Hq, M, d]
    keys: torch.Tensor,  # [B, Hkv, N, d]
    *,
    rows: torch.Tensor | None = None,  # [R] or [B, R] int64 in [-1, M)
    mask: torch.Tensor | None = None,  # [B, N] bool
    lse: torch.Tensor | None = None,  # [B, Hq, M]
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Return scores [B, Hq, N] fp64: the mean over the rows of softmax(scale q k^T), a head each."""
    (batch, heads, m, d), (_, key_heads, n, _) = queries.shape, keys.shape
    scale = 1 / math.sqrt(d) if scale is None else scale
    scores = torch.zeros(batch, heads, n, dtype=torch.float64, device=keys.device)
    position = torch.arange(n, dtype=torch.int64, device=keys.device)
    for b in range(batch):
        chosen = chosen_rows(rows, b, m)
        for h in range(heads):
            q = queries[b, h].double().contiguous()
            k = keys[b, h * key_heads // heads].double().contiguous()  # heads / key_heads query heads share one
            for row in chosen:
                seen = position <= row + n - m if causal else torch.ones_like(position, dtype=torch.bool)
                if mask is not None:
                    seen = seen & mask[b]
                outside = None if lse is None else lse[b, h, row].double()
                scores[b, h] += row_probabilities(q[row], k, seen, outside, scale)
        scores[b] /= max(len(chosen), 1)
    return scores
