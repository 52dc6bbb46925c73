"""OTPrune (Chen et al. 2026): "Distribution-aligned visual token pruning via optimal transport"."""

import torch

from ..ops.dpp_select import dpp_select
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import NONE, method
from .results import at_least_fp32, selected


def gram(x: torch.Tensor) -> torch.Tensor:
    """[B, N, D] -> [B, N, N], x times its transpose. By similarity, whose bits do not depend on the batch."""
    length = torch.linalg.vector_norm(x, dim=2)
    return length[:, :, None] * similarity(x)[0] * length[:, None]


@method(
    "OTPrune", "Chen et al. 2026, arXiv 2602.20205, the log-determinant surrogate", primitive="dpp_select", scores=NONE,
    cost="N² (D + N) / 2 + N K² / 2",
    data_dependent="OTPrune's loop breaks where no gain above 1e-100 is left, and its code then starts anew until it "
    "has as many tokens as the ratio asks for: the nearest is that number.",
)  # fmt: skip
def otprune(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,
    gamma: float = 0.01,
) -> Condensed:
    """The tokens whose covariance is nearest to that of all: by a bound of the 2-Wasserstein distance of two Gaussians,
    those with the largest det of L = I + gamma * (X X^T)^2, greedily. Nothing is merged.

    X: the tokens, each channel divided by its norm over the image's tokens, as in the published code (a channel of
    zeros: 0, where it divides by 0). What is not finite counts as 0. There L has the features after the projector, as
    here without ``keys``, and rounding may end its loop early or pick a token twice, which it
    repairs by further loops; here the gains, which are at least 1, are compared until there are K.
    """
    x = at_least_fp32((features if keys is None else keys).detach()).nan_to_num(0.0, 0.0, 0.0)
    x = torch.nn.functional.normalize(x, dim=1)
    kernel = gamma * gram(gram(x))
    kernel.diagonal(dim1=1, dim2=2).add_(1)
    return selected(features, scores, dpp_select(kernel, None, keep))
