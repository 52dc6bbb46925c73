import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import (
    FLOATS,
    check_choice,
    check_flag,
    check_not_empty,
    check_num_tokens,
    check_tensor,
)
from ..._dispatch.debug import check_finite, check_scores
from ..._dispatch.declaration import Example, Operator, always, random
from . import reference


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp32 arithmetic whatever the input dtype, fp64 where an input is fp64."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


METRICS = ("cosine", "neg_l2")


def check(keys, scores=None, mask=None, *, metric="cosine") -> None:
    sizes: dict[str, int] = {}
    check_tensor("keys", keys, "B N Dk", sizes, FLOATS)
    check_not_empty("keys", keys, 1, "token")
    check_num_tokens("keys", keys)
    check_not_empty("keys", keys, 2, "channel")
    if scores is not None:
        check_tensor("scores", scores, "B N", sizes, FLOATS, keys)
    if mask is not None:
        check_tensor("mask", mask, "B N", sizes, (torch.bool,), keys)
    check_choice("metric", metric, METRICS)


def fake(keys, scores=None, mask=None):
    b, n, _ = keys.shape
    dtype = compute_dtype(keys, scores)
    return (
        keys.new_empty((b, n, n), dtype=dtype),
        keys.new_empty((b,), dtype=dtype),
        keys.new_empty((b, n), dtype=dtype),
        keys.new_empty((b, n), dtype=torch.int8),
    )


def fake_with_nearest(keys, scores=None, mask=None, *, metric="cosine"):
    s, sbar, g, tier = fake(keys, scores, mask)
    return s, sbar, g, tier, torch.empty_like(g)


def within(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 x as dtype; what is beyond it, the largest or lowest finite number."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def on_reference(keys, scores=None, mask=None):
    s, sbar, g, tier = reference.similarity(keys, scores, mask)
    dtype = compute_dtype(keys, scores)
    return s.to(dtype), sbar.to(dtype), g.to(dtype), tier


def with_nearest_on_reference(keys, scores=None, mask=None, *, metric="cosine"):
    s, sbar, g, tier = reference.similarity(keys, scores, mask, metric)
    nearest = [reference.nearest_of(of, valid) for of, valid in zip(s, tier == reference.VALID, strict=True)]
    found = torch.stack(nearest) if nearest else torch.empty_like(g)
    dtype = compute_dtype(keys, scores)
    return within(s, dtype), within(sbar, dtype), within(g, dtype), tier, within(found, dtype)


def on_triton(keys, scores=None, mask=None):
    from .kernel import similarity as launch

    return launch(keys, scores, mask)


def with_nearest_on_triton(keys, scores=None, mask=None, *, metric="cosine"):
    from .kernel import similarity_and_nearest as launch

    return launch(keys, scores, mask, metric=metric)


def flops(keys, scores=None, mask=None) -> int:
    """Products and additions of the pairs i <= j, each computed once."""
    b, n, dk = keys
    return b * n * (n + 1) * dk


def flops_with_nearest(keys, scores=None, mask=None, *, metric="cosine") -> int:
    """A comparison a pair besides; of distances a difference a channel."""
    b, n, dk = keys
    return b * n * (n + 1) * dk * (2 if metric == "cosine" else 3) // 2 + b * n * n


def look(keys, scores=None, mask=None, *, metric="cosine") -> None:
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    check_scores(scores, ("image", "token"), mask)


def examples(b: int) -> list[Example]:
    keys, scores = random(b, 12, 5) - 0.5, random(b, 12)
    return [Example((keys, scores, scores > 0.1)), Example((keys.bfloat16(),)), Example((keys, scores.double()))]


def examples_with_nearest(b: int) -> list[Example]:
    keys, scores = random(b, 12, 5) - 0.5, random(b, 12)
    return [
        Example((keys, scores, scores > 0.1), {"metric": "cosine"}),
        Example((keys.bfloat16(),), {"metric": "neg_l2"}),
        Example((keys, scores, scores > 0.1), {"metric": "neg_l2"}),
        Example((keys.double(),)),
    ]


CONSTANTS = "selection and assignment, which it is for, are constants"

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
        no_derivatives=CONSTANTS,
        is_traced=always,
    )
)
backends.register(
    Operator(
        "similarity_and_nearest",
        check=check,
        reference=with_nearest_on_reference,
        triton=with_nearest_on_triton,
        fake=fake_with_nearest,
        flops=flops_with_nearest,
        examples=examples_with_nearest,
        look=look,
        no_derivatives=CONSTANTS,
        is_traced=always,
    )
)


@tracing.leaf(tuple, lambda options: 5 if options.get("nearest") else 4)
def similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    scores: torch.Tensor | None = None,  # [B, N]
    mask: torch.Tensor | None = None,  # [B, N]
    *,
    metric: str = "cosine",
    nearest: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Similarity of all token pairs of an image, and what Eq. 2 to 4 of CondenseVLM need of it.

    Args:
        keys: [B, N, Dk] fp32, fp16, bf16 or fp64; finite values of any magnitude.
        scores: [B, N] floating; a token whose score is NaN or infinite goes to tier 1. Not used otherwise.
        mask: [B, N] bool, False = padding.
        metric: "cosine", or "neg_l2", the Euclidean distance with the sign turned. It is computed from differences, so
            that tokens close to each other keep theirs, however far they are from 0.
        nearest: whether to return nearest as well.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        s: [B, N, N], symmetric; cos(key_i, key_j), 0 for a zero-norm key, or -||key_i - key_j||_2, at most the largest
            number in magnitude; 0 wherever a token is not in tier 0.
        sbar: [B], the mean of |s| over the pairs of tier 0, the diagonal included (E[|S|] of Eq. 2 and 4).
        g: [B, N], the sum of s over the row (Eq. 3), the token itself included.
        tier: [B, N] int8: 0 valid, 1 valid with a NaN or infinity in its key or score, 2 masked.
        nearest: [B, N], with nearest=True alone: the largest s_ij over the other tokens j of tier 0; the lowest finite
            number where there is none, or i is not in tier 0.

        s, sbar, g and nearest are fp32 (fp64 where keys or scores are fp64), whatever autocast and the matmul precision
        say.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, metric or backend.
    """
    tracing.checked(check, keys, scores, mask, metric=metric)
    check_flag("nearest", nearest)
    if metric == "cosine" and not nearest:
        return backends.run("similarity", backend, (keys, scores, mask), {})
    results = backends.run("similarity_and_nearest", backend, (keys, scores, mask), {"metric": metric})
    return results if nearest else results[:4]
