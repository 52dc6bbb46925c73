"""What the operators are measured against: published methods written from their formulas, as a careful author would.

Everything takes one image [N, ...] or a batch [B, N, ...]: one image alone is spared the batch's indexing, which costs
a fifth of a loop. A selection loop takes s, the cosine similarities, and returns the picks in their order.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Greedy = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def row(s: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:  # [N, N], [] -> [N], or [B, N, N], [B] -> [B, N]
    """Without a look at the value, for which a GPU would have to be waited for."""
    return s.index_select(0, pick.view(1))[0] if s.dim() == 2 else s[torch.arange(len(s), device=s.device), pick]


def strike(values: torch.Tensor, pick: torch.Tensor, value: float = -torch.inf) -> None:  # [N], [] or [B, N], [B]
    """Put a picked token out of reach."""
    values.index_fill_(0, pick, value) if values.dim() == 1 else values.scatter_(1, pick[:, None], value)


def gather(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:  # [N, D], [K] -> [K, D], or the same of [B]
    """Rows of every image."""
    return (
        tokens[indices]
        if tokens.dim() == 2
        else tokens[torch.arange(len(tokens), device=tokens.device)[:, None], indices]
    )


def unit(tokens: torch.Tensor) -> torch.Tensor:
    return F.normalize(tokens, dim=-1)


# The floor that every method on S pays.


def matmul(z: torch.Tensor) -> torch.Tensor:  # [B, N, D] unit vectors -> [B, N, N]
    return torch.matmul(z, z.mT)


def blocked_matmul(z: torch.Tensor, block: torch.Tensor) -> torch.Tensor:  # [N, D], [rows, N]
    """All of S, some rows at a time into the same ``block``, which is left with the last of them."""
    for rows in z.split(len(block)):
        torch.mm(rows, z.T, out=block[: len(rows)])
    return block


# Attention (Eq. 1)


def attention_by_map(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # [B, H, N, d] -> [B, H, N]
    """The mean of every column, from the map; the scale goes to the smaller operand."""
    logits = (queries * queries.shape[-1] ** -0.5) @ keys.mT
    return logits.softmax(dim=-1, dtype=torch.float32).mean(dim=-2)


def log_normalisers(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # [B, H, N, d] -> [B, H, N]
    """What FlashAttention hands out as softmax_lse."""
    logits = queries.float() @ keys.float().mT * queries.shape[-1] ** -0.5
    return logits.logsumexp(dim=-1)


# FasterVLM


def top_k(features: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Its cost: the k largest scores, back in the tokens' order, and a gather."""
    indices = scores.topk(k, dim=-1).indices.sort(dim=-1).values
    return gather(features, indices), indices


# CondenseVLM


def greedy_as_printed(s: torch.Tensor, utility: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N], [.., N]
    """Eq. 2 and 4 to the letter: the maximum over all picks so far, anew at every step."""
    utility, order = utility.clone(), []
    for _ in range(k):
        score = utility - gather(s, torch.stack(order, dim=-1)).amax(dim=-2) if order else utility
        order.append(score.argmax(dim=-1))
        strike(utility, order[-1])
    return torch.stack(order, dim=-1)


def greedy_running_maximum(s: torch.Tensor, utility: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N], [.., N]
    """The same picks from a running maximum."""
    utility, suppressor, order = utility.clone(), None, []
    for _ in range(k):
        pick = (utility if suppressor is None else utility - suppressor).argmax(dim=-1)
        strike(utility, pick)
        order.append(pick)
        suppressor = row(s, pick) if suppressor is None else torch.maximum(suppressor, row(s, pick))
    return torch.stack(order, dim=-1)


UNROLLED = 16  # picks in a compiled graph: 3 seconds to compile; 64 took 18
COMPILED = (576, 2880)  # tokens of the single images for which that is waited for


def more_picks(s, utility, suppressor):
    order = []
    for _ in range(UNROLLED):
        pick = (utility - suppressor).argmax(dim=-1, keepdim=True)
        utility = utility.scatter(-1, pick, -torch.inf)
        order.append(pick)
        suppressor = torch.maximum(suppressor, row(s, pick[..., 0]))
    return torch.cat(order, dim=-1), utility, suppressor


compiled_picks = torch.compile(more_picks, dynamic=False)


def greedy_compiled(s: torch.Tensor, utility: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N], [.., N]
    """The running maximum under torch.compile, several picks a graph; picks beyond k are cut off."""
    first = utility.argmax(dim=-1)
    utility, suppressor, order = utility.clone(), row(s, first), [first[..., None]]
    strike(utility, first)
    for _ in range(1, k, UNROLLED):
        picks, utility, suppressor = compiled_picks(s, utility, suppressor)
        order.append(picks)
    return torch.cat(order, dim=-1)[..., :k]


def condense(
    features: torch.Tensor,  # [.., N, D]
    scores: torch.Tensor,  # [.., N]
    num_anchors: int,
    num_background: int,
    at: torch.Tensor,  # [N, 2] positions
    greedy: Greedy = greedy_running_maximum,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """CondenseVLM, Eq. 2 to 8, the whole of it; both weights 1."""
    z = unit(features)
    s = torch.matmul(z, z.mT)
    sbar, g = s.abs().mean(dim=(-2, -1))[..., None], s.sum(dim=-1)
    anchors = greedy(s, sbar / scores.mean(dim=-1, keepdim=True) * scores, num_anchors)
    global_utility = (sbar / g.abs().mean(dim=-1, keepdim=True) * g).scatter(-1, anchors, -torch.inf)
    background = greedy(s, global_utility, num_background)
    indices = torch.cat([anchors, background], dim=-1).sort(dim=-1).values
    assignment = nearest_kept(s, indices, at)
    merged, mass = weighted_mean(features, scores, assignment, num_anchors + num_background)
    return merged, indices, assignment, mass


def nearest_kept(s: torch.Tensor, indices: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Eq. 6 and 7."""
    kept = at[indices]  # [.., K, 2]
    distance = torch.cdist(at.expand(*kept.shape[:-2], -1, -1), kept, compute_mode="donot_use_mm_for_euclid_dist")
    affinity = gather(s, indices).mT - distance / (at.amax(dim=0) - at.amin(dim=0)).norm()  # [.., N, K]
    own = torch.arange(indices.shape[-1], device=s.device).expand_as(indices)
    return affinity.argmax(dim=-1).scatter(-1, indices, own)


def weighted_sums(
    features: torch.Tensor,  # [.., N, D]
    weights: torch.Tensor,  # [.., N]
    rows: torch.Tensor,  # [.., N] in [0, k)
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the weighted features of each row [.., k, D], and of the weights [.., k]."""
    weighted = features * weights[..., None]
    sums = features.new_zeros(*weights.shape[:-1], k, features.shape[-1])
    if sums.dim() == 2:
        sums.index_add_(0, rows, weighted)
    else:
        image = torch.arange(len(rows), device=rows.device)[:, None] * k
        sums.view(-1, sums.shape[-1]).index_add_(0, (rows + image).flatten(), weighted.flatten(0, 1))
    return sums, weights.new_zeros(sums.shape[:-1]).scatter_add(-1, rows, weights)


def weighted_mean(
    features: torch.Tensor,  # [.., N, D]
    scores: torch.Tensor,  # [.., N]
    rows: torch.Tensor,  # [.., N] in [0, k)
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 8."""
    sums, mass = weighted_sums(features, scores, rows, k)
    return sums / mass[..., None], mass


def gathered_sum(
    features: torch.Tensor,  # [.., N, D]
    neighbours: torch.Tensor,  # [.., K, m]
    weights: torch.Tensor,  # [.., K, m]
) -> torch.Tensor:  # [.., K, D]
    """Each row's listed tokens, copied, times their weights: PruMerge."""
    if features.dim() == 2:
        copies = features[neighbours]
    else:
        copies = features[torch.arange(len(features), device=features.device)[:, None, None], neighbours]
    return torch.einsum("...km,...kmd->...kd", weights.to(copies.dtype), copies)


# DivPrune


def divprune(s: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N]
    """argmax of the distance 1 - s to the nearest pick; first the token whose nearest neighbour is farthest.

    Leaves out importance, which the method does not use, and merging.
    """
    apart = s.clone()
    apart.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    pick = apart.amax(dim=-1).argmin(dim=-1)
    closeness, order = row(s, pick), [pick]
    for _ in range(1, k):
        strike(closeness, order[-1], torch.inf)
        order.append(closeness.argmin(dim=-1))
        closeness = torch.maximum(closeness, row(s, order[-1]))
    return torch.stack(order, dim=-1)


def divprune_as_published(s: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N]
    """The same in the steps of the authors' code: the nearest of all picks so far, anew at every step."""
    distance = 1 - s
    nearest_other = distance.topk(2, dim=-2, largest=False).values[..., 1, :]  # the nearest is the token itself
    order = [nearest_other.argmax(dim=-1)]
    for _ in range(1, k):
        order.append(gather(distance, torch.stack(order, dim=-1)).amin(dim=-2).argmax(dim=-1))
    return torch.stack(order, dim=-1)


# Density peaks


def dpc_knn(distances: torch.Tensor, k: int, k_nn: int) -> torch.Tensor:  # [B, N, N]
    """The function of TCFormer, Chat-UniVi, SparseVLM, PruneVid, FastVID and HoliTom.

    It adds noise so that no two densities are equal: left out, so that the result can be checked. Leaves out masks, and
    the assignment of tokens to the centres.
    """
    nearest = distances.topk(k_nn, dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    denser = (density[:, None, :] > density[:, :, None]).to(distances.dtype)
    farthest = distances.flatten(1).amax(dim=-1)[:, None, None]
    peak = (distances * denser + farthest * (1 - denser)).amin(dim=-1)
    return (peak * density).topk(k, dim=-1).indices


# SCOPE and MMTok


def scope(s: torch.Tensor, saliency: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N], [.., N]
    """argmax of the coverage that a token adds, times its saliency, in the steps of the published code.

    These are a masked copy of s, the difference, its positive part, the sum. The method merges nothing.
    """
    covered, free, order = torch.zeros_like(saliency), torch.ones_like(saliency, dtype=torch.bool), []
    zero = s.new_zeros(1)
    for _ in range(k):
        more = s.masked_fill(~free[..., None, :], 0) - covered[..., :, None]
        gain = torch.maximum(zero, more).sum(dim=-2) * saliency
        order.append(gain.masked_fill(~free, -torch.inf).argmax(dim=-1))
        strike(free, order[-1], False)
        covered = torch.maximum(covered, row(s, order[-1]))
    return torch.stack(order, dim=-1)


def coverage_in_place(s: torch.Tensor, saliency: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N], [.., N]
    """The same picks with one matrix that is written over and over: MMTok's loop without its allocations."""
    covered, left, order, more = torch.zeros_like(saliency), torch.zeros_like(saliency), [], torch.empty_like(s)
    for _ in range(k):
        gain = torch.sub(s, covered[..., :, None], out=more).relu_().sum(dim=-2)
        order.append((gain * saliency + left).argmax(dim=-1))
        strike(left, order[-1])
        covered = torch.maximum(covered, row(s, order[-1]))
    return torch.stack(order, dim=-1)


# CDPruner


def cdpruner(s: torch.Tensor, relevance: torch.Tensor, k: int) -> torch.Tensor:  # [.., N, N], [.., N]
    """Greedy MAP of a determinantal point process with kernel r_i s_ij r_j, by incremental Cholesky.

    Leaves out merging, and how relevance comes from the text: the scores stand in.
    """
    kernel = relevance[..., :, None] * s * relevance[..., None, :]
    gain = kernel.diagonal(dim1=-2, dim2=-1).clone()  # what a token adds to the determinant, as a factor
    factor = s.new_empty(*gain.shape[:-1], k, gain.shape[-1])  # [.., k, N] of the Cholesky decomposition
    order = []
    for i in range(k):
        pick = gain.argmax(dim=-1, keepdim=True)
        so_far = factor[..., :i, :]
        at_pick = so_far.gather(-1, pick[..., None, :].expand(*so_far.shape[:-1], 1))  # [.., i, 1]
        new = row(kernel, pick[..., 0]) - (at_pick.mT @ so_far)[..., 0, :]
        factor[..., i, :] = new / gain.gather(-1, pick).sqrt()
        gain -= factor[..., i, :].square()
        strike(gain, pick[..., 0])
        order.append(pick)
    return torch.cat(order, dim=-1)


def cdpruner_relevance(scores: torch.Tensor) -> torch.Tensor:  # [.., N]
    """Scaled to [0, 1] as CDPruner does; of their logarithms, which are spread as cosines with a text are."""
    x = scores.log()
    low, high = x.aminmax(dim=-1, keepdim=True)
    return (x - low + 1e-6) / (high - low)


def cdpruner_from_features(features: torch.Tensor, relevance: torch.Tensor, k: int) -> torch.Tensor:
    """The loop with what comes before it: norms, the product of all tokens."""
    z = unit(features)
    return cdpruner(torch.matmul(z, z.mT), relevance, k)


# IDPruner


def idpruner(s: torch.Tensor, importance: torch.Tensor, k: int, balance: float = 0.5) -> torch.Tensor:
    """argmax of balance * importance - (1 - balance) * the largest s to a pick; s [.., N, N], importance [.., N].

    Both terms divided by 1 - balance, so that it is one loop with CondenseVLM's. Leaves out merging.
    """
    low, high = importance.aminmax(dim=-1, keepdim=True)
    return greedy_running_maximum(s, balance / (1 - balance) * (importance - low) / (high - low), k)


def idpruner_as_published(s: torch.Tensor, importance: torch.Tensor, k: int, balance: float = 0.5) -> torch.Tensor:
    """The same in the steps of AngelSlim's code: scores and mask anew, a top-k of one, which the host waits for."""
    low, high = importance.aminmax(dim=-1, keepdim=True)
    scaled, order = (importance - low) / (high - low), []
    closeness, free = torch.full_like(scaled, -2), torch.ones_like(scaled, dtype=torch.bool)
    score = scaled.clone()
    for _ in range(k):
        score[~free] = -torch.inf
        order.append(score.topk(1, dim=-1).indices[..., 0])
        order[-1].tolist()
        strike(free, order[-1], False)
        closeness = torch.maximum(closeness, row(s, order[-1]))
        score = balance * scaled - (1 - balance) * closeness
    return torch.stack(order, dim=-1)


# VisionZip


def visionzip(
    features: torch.Tensor,  # [.., N, D]
    scores: torch.Tensor,  # [.., N]
    dominant: int,
    contextual: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dominant tokens by attention; strided centres among the rest, each plus the mean of the tokens nearest to it.

    Leaves out the keys' average over heads: the features stand in for keys. It needs no N x N matrix and makes no
    greedy choice. Returns merged [.., dominant + contextual, D] with the dominant tokens first, in their order, their
    indices [.., dominant + contextual], and the row of each token [.., N].
    """
    n, k = scores.shape[-1], dominant + contextual
    order = scores.argsort(dim=-1, descending=True)
    chosen, rest = order[..., :dominant].sort(dim=-1).values, order[..., dominant:].sort(dim=-1).values
    stride = (n - dominant) // contextual
    centres = rest[..., : stride * contextual : stride]
    z = unit(features)
    nearest = (gather(z, rest) @ gather(z, centres).mT).argmax(dim=-1)  # [.., N - dominant] in [0, contextual)
    indices = torch.cat([chosen, centres], dim=-1)  # [.., K]
    rows = torch.full_like(order, -1).scatter(-1, rest, dominant + nearest)
    rows = rows.scatter(-1, indices, torch.arange(k, device=scores.device).expand_as(indices))
    others = torch.ones_like(scores).scatter(-1, indices, 0)  # 1 for a token that is neither dominant nor centre
    sums, count = weighted_sums(features, others, rows, k)
    return gather(features, indices) + sums / count.clamp(min=1)[..., None], indices, rows


# Between the operators' batches and the above.


def one_or_batch(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A batch of one as one image."""
    return tuple(tensor[0] for tensor in tensors) if len(tensors[0]) == 1 else tensors


def batched(batch: int, result):  # a tensor or a tuple of tensors
    """The other way round."""
    if batch > 1:
        return result
    return result[None] if isinstance(result, torch.Tensor) else tuple(tensor[None] for tensor in result)
