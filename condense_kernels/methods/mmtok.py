"""MMTok (Dong et al. 2025): "Multimodal coverage maximization for efficient inference of VLMs"."""

import torch

from .._dispatch.checks import FLOATS, check_not_empty, check_tensor
from ..ops.coverage_select import coverage_select
from ..ops.select_and_merge import Condensed
from ..ops.similarity import similarity
from .registry import NONE, method
from .results import at_least_fp32, selected


@method(
    "MMTok", "Dong et al. 2025, arXiv 2508.18264, maximum coverage of words and tokens", primitive="coverage_select",
    scores=NONE, cost="(N + L)² D / 2 + N² Dk / 2 + (N + L) N K", needs=["text"],
)  # fmt: skip
def mmtok(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N], or None
    keep: int,
    *,
    keys: torch.Tensor | None = None,
    text: torch.Tensor,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    temperature: float = 0.2,
) -> Condensed:
    """The next token covers most of what is not covered yet of the question's words and of the picture's tokens.
    Nothing is merged.

    text: [B, L, D], the words' embeddings in the space of ``features``. How far token j covers word i: the softmax over
    j of cos_ij / text_temperature, divided by L; how far it covers token i: that of cos_ij / temperature, times alpha,
    divided by N. The cosines among tokens are those of ``keys``, in the published code the vision encoder's output.
    Its text_temperature is 0.02 for LLaVA, 0.01 for Qwen-VL and InternVL.
    """
    n, sizes = features.shape[1], {"B": len(features), "D": features.shape[2]}
    check_tensor("text", text, "B L D", sizes, FLOATS, like=features)
    check_not_empty("text", text, 1, "word")
    x = at_least_fp32(features.detach())
    among = similarity(x if keys is None else keys.detach())[0]
    together = similarity(torch.cat([x, text.detach().to(x.dtype)], dim=1))[0]  # bits that do not depend on the batch
    of_words = (together[:, n:, :n] / text_temperature).softmax(dim=2) / text.shape[1]
    of_tokens = (among / temperature).softmax(dim=2) * (alpha / n)
    return selected(features, scores, coverage_select(torch.cat([of_words, of_tokens], dim=1), keep))
