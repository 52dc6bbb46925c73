"""SparseVLM (Zhang et al. 2024): "Visual token sparsification for efficient vision-language model inference"."""

import torch

from .._dispatch.checks import FLOATS, check_tensor, is_int
from ..ops.assign import assign
from ..ops.dpc_knn import dpc_knn
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import TEXT, method
from .results import best, rows, selected


@method(
    "SparseVLM", "Zhang et al. 2024, arXiv 2410.04417", primitive="top-k, dpc_knn, assign, merge",
    scores=TEXT, cost="M² D / 2, M = 0.3 (N - K)",
    data_dependent="SparseVLM drops lambda (L - rank of the attention) tokens in a layer, so that the data chooses K.",
)  # fmt: skip
def sparsevlm(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    recycled: int | None = None,
) -> Condensed:
    """The tokens of the highest attention of the text, and of the best others as many means as ``recycled`` says.

    K - recycled tokens stay as they are. Of the n others the floor(0.3 n) + 1 with the highest scores are clustered
    around density peaks (:func:`dpc_knn` with k_nn = recycled, distances over sqrt(D)); each cluster becomes its mean,
    at the place of its peak, and the rest is dropped. mass is the sum of a row's scores.

    Args:
        scores: the mean of the raters' attention rows, as :func:`sparsevlm_scores` computes it.
        recycled: how many of the K rows are clusters, at most the tokens to cluster; 0: top-k alone. None: a tenth of
            those tokens, and one, as published, but at most half of K.

    In the paper this happens in three layers of the language model, each of which takes what the one before has left;
    the published code has lists of counts in place of the rank, (303, 110, 36) for 128, to which clusters are added:
    here K has them. It adds random noise to densities and appends the clusters behind the other tokens; here equal
    densities are ranked by index.

    Raises:
        ValueError: recycled is negative, or more than there is to cluster.
    """
    n = scores.shape[1]
    clusters = min(keep // 2, candidates(n - keep) // 10 + 1) if recycled is None and keep < n else recycled or 0
    check_recycled(clusters, keep, n)
    if clusters == 0:
        return selected(features, scores, best(scores, keep))
    kept, order = keep - clusters, best(scores, n)
    chosen, pooled = order[:, :kept], order[:, kept : kept + candidates(n - kept)].sort().values
    s, _, _, tier = similarity(rows(features.detach(), pooled), metric="neg_l2")
    peaks = dpc_knn(s, clusters, clusters, tier=tier, scale=features.shape[2] ** -0.5).order
    indices = torch.cat([chosen, pooled.gather(1, peaks)], dim=1)
    row = torch.arange(kept, dtype=torch.int64, device=scores.device).expand(chosen.shape)
    assignment = torch.full_like(order, -1).scatter(1, chosen, row)
    assignment = assignment.scatter(1, pooled, kept + assign(s, peaks, spatial_weight=0))
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32))[..., None]
    mass = merge(weights, None, indices, assignment, mode="sum")[0][..., 0]
    return Condensed(merge(features, None, indices, assignment)[0], indices, assignment, mass)


def candidates(dropped: int) -> int:
    """How many of the dropped tokens are clustered."""
    return min(dropped, int(dropped * 0.3) + 1)


def check_recycled(recycled: int, keep: int, n: int) -> None:
    if not is_int(recycled) or not 0 <= recycled <= keep:
        raise ValueError(f"recycled: expected an int from 0 to keep, {keep}, got {recycled!r}. Remedy: None.")
    pool = candidates(n - keep + recycled)
    if recycled > pool:
        raise ValueError(
            f"recycled: expected at most as many clusters as tokens to cluster, {pool} where {keep - recycled} of {n} "
            f"are kept, got {recycled}. Remedy: None."
        )


def sparsevlm_scores(
    attention: torch.Tensor,  # [B, L, N]
    features: torch.Tensor,  # [B, N, D]
    text: torch.Tensor,  # [B, L, D]
) -> torch.Tensor:
    """[B, N], the scores that ``sparsevlm`` reads: the mean attention of the raters to each visual token.

    attention: of L text tokens, in the layer at hand, the mean of its heads. Raters are the text tokens that are like
    the picture: those whose relevance, the softmax over the text of features @ text.T averaged over visual tokens, is
    above the mean relevance. Where all are equally relevant all are raters.

    Raises:
        TypeError, ValueError: wrong shape, dtype or device.
    """
    sizes: dict[str, int] = {}
    for name, value, axes in (
        ("features", features, "B N D"),
        ("attention", attention, "B L N"),
        ("text", text, "B L D"),
    ):
        check_tensor(name, value, axes, sizes, FLOATS, like=features)
    accurate = torch.promote_types(features.dtype, torch.float32)
    relevance = (features.to(accurate) @ text.to(accurate).mT).softmax(dim=2).mean(dim=1)  # [B, L]
    raters = relevance > relevance.mean(dim=1, keepdim=True)
    raters = (raters | ~raters.any(dim=1, keepdim=True)).to(accurate)
    return (raters[:, None] @ attention.to(accurate))[:, 0] / raters.sum(dim=1, keepdim=True)
