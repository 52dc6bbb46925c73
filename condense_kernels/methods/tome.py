"""ToMe (Bolya et al. 2023): "Token merging: your ViT but faster"."""

import torch

from ..matching import bipartite_match
from ..ops.merge import merge
from ..ops.select_and_merge import Condensed
from .registry import NONE, method
from .results import at_least_fp32


@method(
    "ToMe", "Bolya et al. 2023, arXiv 2210.09461, section 3", primitive="bipartite_match, merge", scores=NONE,
    cost="N² D / 4 a step",
)  # fmt: skip
def tome(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]; theirs: the attention keys, averaged over the heads
) -> Condensed:
    """Bipartite soft matching, again and again: the even token most similar to an odd one is merged into it, weighted
    by how many tokens each stands for, until K are left.

    A step takes away at most half of the tokens, so that their number follows from N and K: log2(N / K), rounded up.
    ToMe itself takes r tokens in every block of the vision encoder, between attention and MLP, and adds log(size) to
    the attention; here all steps come at the end, on tokens and keys merged alike. The scores are not read, but summed
    up as the mass. The index of a row is that of the token that the others were merged into.
    """
    keys = at_least_fp32(features if keys is None else keys).detach()
    merged, sizes = at_least_fp32(features), torch.ones_like(scores, dtype=torch.float32)
    indices = torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device).expand_as(scores)
    assignment = indices
    while (n := merged.shape[1]) > keep:
        stay, into = bipartite_match(keys, min(n - keep, n // 2))
        keys, _ = merge(keys, sizes, stay, into)
        merged, sizes = merge(merged, sizes, stay, into)
        indices, assignment = indices.gather(1, stay), into.gather(1, assignment)
    mass = torch.zeros_like(scores[:, :keep]).scatter_add(1, assignment, scores)
    return Condensed(merged.to(features.dtype), indices, assignment, mass)
