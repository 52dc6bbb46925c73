import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, check_not_empty, check_num_tokens, check_tensor
from ..._dispatch.debug import check_finite, check_scores
from ..._dispatch.declaration import Example, Operator, always, random
from . import reference


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp32 arithmetic whatever the input dtype, fp64 where an input is fp64."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check(keys, scores=None, mask=None) -> None:
    sizes: dict[str, int] = {}
    check_tensor("keys", keys, "B N Dk", sizes, FLOATS)
    check_not_empty("keys", keys, 1, "token")
    check_num_tokens("keys", keys)
    check_not_empty("keys", keys, 2, "channel")
    if scores is not None:
        check_tensor("scores", scores, "B N", sizes, FLOATS, keys)
    if mask is not None:
        check_tensor("mask", mask, "B N", sizes, (torch.bool,), keys)


def fake(keys, scores=None, mask=None):
    b, n, _ = keys.shape
    dtype = compute_dtype(keys, scores)
    return (
        keys.new_empty((b, n, n), dtype=dtype),
        keys.new_empty((b,), dtype=dtype),
        keys.new_empty((b, n), dtype=dtype),
        keys.new_empty((b, n), dtype=torch.int8),
    )


def on_reference(keys, scores=None, mask=None):
    s, sbar, g, tier = reference.similarity(keys, scores, mask)
    dtype = compute_dtype(keys, scores)
    return s.to(dtype), sbar.to(dtype), g.to(dtype), tier


def on_triton(keys, scores=None, mask=None):
    from .kernel import similarity as launch

    return launch(keys, scores, mask)


def flops(keys, scores=None, mask=None) -> int:
    """Products and additions of the pairs i <= j, each computed once."""
    b, n, dk = keys
    return b * n * (n + 1) * dk


def look(keys, scores=None, mask=None) -> None:
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    check_scores(scores, ("image", "token"), mask)


def examples(b: int) -> list[Example]:
    keys, scores = random(b, 12, 5) - 0.5, random(b, 12)
    return [Example((keys, scores, scores > 0.1)), Example((keys.bfloat16(),)), Example((keys, scores.double()))]


backends.register(
    Operator(
        "similarity",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        no_derivatives="selection and assignment, which it is for, are constants",
        is_traced=always,
    )
)


@tracing.leaf(tuple, 4)
def similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N]
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosine similarity of all token pairs of an image, and what Eq. 2 to 4 of CondenseVLM need of it.

    Args:
        keys: [B, N, Dk] fp32, fp16, bf16 or fp64; finite values of any magnitude.
        scores: [B, N] floating; a token whose score is NaN or infinite goes to tier 1. Not used otherwise.
        mask: [B, N] bool, False = padding.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        s: [B, N, N], cos(key_i, key_j), symmetric; 0 for a zero-norm key and wherever a token is not in tier 0.
        sbar: [B], the mean of |s| over the pairs of tier 0, the diagonal included (E[|S|] of Eq. 2 and 4).
        g: [B, N], the sum of s over the row (Eq. 3), the token itself included.
        tier: [B, N] int8: 0 valid, 1 valid with a NaN or infinity in its key or score, 2 masked.

        s, sbar and g are fp32 (fp64 where keys or scores are fp64), whatever autocast and the matmul precision say.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or backend.
    """
    tracing.checked(check, keys, scores, mask)
    return backends.run("similarity", backend, (keys, scores, mask), {})
