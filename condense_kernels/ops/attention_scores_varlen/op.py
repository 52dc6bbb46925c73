import torch

from ..._dispatch import backends, debug, tracing
from ..._dispatch.checks import as_count, check_tensor
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, random
from ..._dispatch.packing import NO_SHARDS, REMEDY, check_segments, look_at_segments
from ..attention_scores import forms
from ..attention_scores.derivatives import derivatives_of
from ..attention_scores.op import check_constant, check_heads, check_softmax
from ..merge.reference import rounded_once
from ..similarity.op import compute_dtype
from . import gradients, reference


def check(queries, keys, cu_seqlens, max_seqlen, *, lse=None, scale=None, causal=False) -> None:
    sizes = check_heads(queries, "T Hq d", keys, "T Hkv d")
    check_segments(cu_seqlens, max_seqlen, sizes, queries)
    if lse is not None:
        check_tensor("lse", lse, "Hq T", sizes, (torch.float32, torch.float64), queries)
    check_softmax(scale, causal)


def fake(queries, keys, cu_seqlens, max_seqlen, *, lse=None, scale=None, causal=False):
    return queries.new_empty((queries.shape[1], queries.shape[0]), dtype=compute_dtype(queries))


def on_reference(queries, keys, cu_seqlens, max_seqlen, *, lse=None, scale=None, causal=False):
    options = {"lse": lse, "scale": scale, "causal": causal}
    scores = reference.attention_scores_varlen(queries, keys, cu_seqlens, max_seqlen, **options)
    return scores.to(compute_dtype(queries))


def on_triton(queries, keys, cu_seqlens, max_seqlen, *, lse=None, scale=None, causal=False):
    from .kernel import attention_scores_varlen as launch

    return launch(queries, keys, cu_seqlens, max_seqlen, lse=lse, scale=scale, causal=causal)


def pairs(queries, max_seqlen) -> int:
    """At most: as if the tokens came in segments of max_seqlen, as the lengths are on the device."""
    return queries[1] * -(-queries[0] // max(max_seqlen, 1)) * max_seqlen**2


def flops(queries, keys, cu_seqlens, max_seqlen, *, lse=None, scale=None, causal=False) -> int:
    return pairs(queries, max_seqlen) * (2 * queries[2] + 7)


def look(queries, keys, cu_seqlens, max_seqlen, *, lse=None, scale=None, causal=False) -> None:
    look_at_segments(cu_seqlens, max_seqlen, queries.shape[0])
    check_finite("queries", queries, ("token", "head", "channel"))
    check_finite("keys", keys, ("token", "head", "channel"))
    if lse is not None:
        refuse("lse", lse, lse.isnan(), "no NaN", ("head", "token"), "Remedy: look where it was computed.")


def examples(b: int) -> list[Example]:
    """Of b segments and an empty one."""
    lengths = torch.tensor([7, 12][:b] + [5] * (b - 2) + [0], dtype=torch.int64, device="cpu")
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    t = int(cu_seqlens[-1])
    queries, keys = random(t, 4, 5) - 0.5, random(t, 2, 5) - 0.5
    return [
        Example((queries, keys, cu_seqlens, 12), {"scale": 0.5}),
        Example((queries.bfloat16(), keys.bfloat16(), cu_seqlens, 12), {"causal": True}),
        Example((queries, keys, cu_seqlens, 12), {"lse": 2 + random(4, t)}),
        Example((queries.double(), keys.double(), cu_seqlens, 12)),
    ]


def check_backward(grad_scores, queries, keys, cu_seqlens, max_seqlen, *, scale=None, causal=False) -> None:
    check(queries, keys, cu_seqlens, max_seqlen, scale=scale, causal=causal)
    sizes = {"Hq": queries.shape[1], "T": queries.shape[0]}
    check_tensor("grad_scores", grad_scores, "Hq T", sizes, (compute_dtype(queries),), queries)


def fake_backward(grad_scores, queries, keys, cu_seqlens, max_seqlen, *, scale=None, causal=False):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def backward_on_any(grad_scores, queries, keys, cu_seqlens, max_seqlen, *, scale=None, causal=False):
    grads = gradients.attention_scores_varlen_backward(
        grad_scores, queries, keys, cu_seqlens, max_seqlen, scale=scale, causal=causal
    )
    return tuple(rounded_once(grad, queries.dtype).contiguous() for grad in grads)


def backward_flops(grad_scores, queries, keys, cu_seqlens, max_seqlen, *, scale=None, causal=False) -> int:
    return pairs(queries, max_seqlen) * (6 * queries[2] + 11)


def backward_examples(b: int) -> list[Example]:
    found = []
    for args, options in examples(b):
        given = {name: value for name, value in options.items() if name != "lse"}
        found.append(Example((torch.sin(9 * on_reference(*args, **given)), *args), given))
    return found


DERIVATIVES, DERIVATIVES_OF_BACKWARD = derivatives_of(
    "attention_scores_varlen", gradients.attention_scores_varlen_backward
)

backends.register(
    Operator(
        "attention_scores_varlen",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        derivatives=DERIVATIVES,
        looped=True,
        no_shards=NO_SHARDS,
        as_operator={"heads": None},
    )
)
backends.register(
    Operator(
        "attention_scores_varlen_backward",
        check=check_backward,
        reference=backward_on_any,
        triton=backward_on_any,
        fake=fake_backward,
        flops=backward_flops,
        examples=backward_examples,
        derivatives=DERIVATIVES_OF_BACKWARD,
        looped=True,
        no_shards=NO_SHARDS,
    )
)


@tracing.leaf()
def attention_scores_varlen(
    queries: torch.Tensor,  # [T, Hq, d]
    keys: torch.Tensor,  # [T, Hkv, d]
    cu_seqlens: torch.Tensor,  # [S + 1]
    max_seqlen: int,
    *,
    lse: torch.Tensor | None = None,  # [Hq, T]
    scale: float | None = None,
    causal: bool = False,
    heads: str | torch.Tensor | None = "mean",  # [Hq]
    pool: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """How much attention each key of a packed batch gets from all queries of its own segment (Eq. 1).

    Every segment gets the bits that :func:`attention_scores` gives to it alone. The offsets stay on the device, and
    are not checked: wrong ones read nothing out of bounds.

    Args:
        queries: [T, Hq, d] fp32, fp16, bf16 or fp64 (fp64 on CPU), as variable-length attention takes them.
        keys: [T, Hkv, d], dtype of queries; Hkv divides Hq.
        cu_seqlens: [S + 1] int32 on the device of queries: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: int, at least the tokens of the longest segment: sizes what is launched.
        lse: [Hq, T] fp32 or fp64, log-sum-exp of each row from outside.
        scale, causal, heads, backend: as in :func:`attention_scores`.
        pool: an int that divides T and the length of each segment: the mean over so many consecutive tokens.

    Returns:
        [T] fp32 (fp64 where queries are fp64), with ``pool`` [T / pool]; with ``heads=None`` [Hq, ...]. The tokens of
        no segment, or of one that is longer than max_seqlen, have zeros. Differentiable in queries and keys.

    Raises:
        TypeError, ValueError: a wrong rank, shape, dtype, device, count, scale, heads, pool or backend; lse where
            queries or keys require grad.
    """
    max_seqlen, pool = as_count("max_seqlen", max_seqlen), as_count("pool", pool)
    args, options = (queries, keys, cu_seqlens, max_seqlen), {"lse": lse, "scale": scale, "causal": causal}
    tracing.checked(check_call, args, options, heads, pool)
    if pool is not None and debug.is_on() and debug.has_values(cu_seqlens):
        check_groups(cu_seqlens, pool)
    scores = backends.run("attention_scores_varlen", backend, args, options)
    return forms.over_windows(forms.combine_heads(scores, heads, 0), pool, None)


def check_groups(cu_seqlens: torch.Tensor, pool: int) -> None:
    """Under the debug switch: no group of tokens is in two segments."""
    refuse("cu_seqlens", cu_seqlens, cu_seqlens % pool != 0, f"multiples of pool = {pool}", ("offset",), REMEDY)


def check_call(args, options, heads, pool) -> None:
    check(*args, **options)
    queries, keys = args[:2]
    forms.check_heads(heads, queries)
    forms.check_pool(pool, None, queries.shape[0])
    check_constant(options["lse"], queries, keys)
