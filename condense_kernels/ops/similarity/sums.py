"""global_similarity: Eq. 3 alone, without s."""

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.declaration import Example, Operator, always, random
from . import reference
from .op import CONSTANTS, check, compute_dtype, look


def fake(keys, scores=None, mask=None):
    tokens = keys.shape[:2]
    return keys.new_empty(tokens, dtype=compute_dtype(keys, scores)), keys.new_empty(tokens, dtype=torch.int8)


def on_reference(keys, scores=None, mask=None):
    g, tier = reference.global_similarity(keys, scores, mask)
    return g.to(compute_dtype(keys, scores)), tier


def on_triton(keys, scores=None, mask=None):
    from .kernel import global_similarity_of as launch

    return launch(keys, scores, mask)


def flops(keys, scores=None, mask=None) -> int:
    """Each key is added to the sum, and multiplied with it."""
    b, n, dk = keys
    return 4 * b * n * dk


def examples(b: int) -> list[Example]:
    keys, scores = random(b, 12, 5) - 0.5, random(b, 12)
    return [Example((keys.bfloat16(),)), Example((keys, scores, scores > 0.1)), Example((keys, scores.double()))]


backends.register(
    Operator(
        "global_similarity",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        no_derivatives=CONSTANTS,
        is_traced=always,
    )
)


@tracing.leaf(tuple, 2)
def global_similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N]
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """How similar each token is to its whole image (Eq. 3 of CondenseVLM), in O(N Dk): z_i . sum_j z_j of unit keys.

    It is the g of :func:`similarity` but for rounding, and what select_and_merge goes by where it is given
    mean_similarity.

    Args:
        keys: [B, N, Dk] fp32, fp16, bf16 or fp64; finite values of any magnitude.
        scores: [B, N] floating; a token whose score is NaN or infinite goes to tier 1. Not used otherwise.
        mask: [B, N] bool, False = padding.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        g: [B, N] fp32 (fp64 where keys or scores are fp64); 0 where a token is not in tier 0, and of a zero key.
        tier: [B, N] int8, as of :func:`similarity`.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or backend.
    """
    tracing.checked(check, keys, scores, mask)
    return backends.run("global_similarity", backend, (keys, scores, mask), {})
