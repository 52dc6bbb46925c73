from collections.abc import Sequence
from typing import Any

import torch

from ..._dispatch import autograd, backends, debug, tracing
from ..._dispatch.checks import FLOATS, as_grid, check_flag, check_not_empty, check_tensor, check_values, check_weight
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from ..merge.reference import rounded_once
from ..similarity.op import compute_dtype
from . import forms, gradients, reference
from .derivatives import derivatives_of, refuse_lse


def check(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False) -> None:
    sizes = check_heads(queries, "B Hq M d", keys, "B Hkv N d")
    if rows is not None:
        shape = "B R" if isinstance(rows, torch.Tensor) and rows.dim() == 2 else "R"
        check_tensor("rows", rows, shape, sizes, (torch.int64,), queries)
    if mask is not None:
        check_tensor("mask", mask, "B N", sizes, (torch.bool,), queries)
    if lse is not None:
        check_tensor("lse", lse, "B Hq M", sizes, (torch.float32, torch.float64), queries)
    check_softmax(scale, causal)


def check_heads(queries, shape: str, keys, shape_of_keys: str) -> dict[str, int]:
    """Of the dense and of the packed operator; the letters' sizes."""
    sizes: dict[str, int] = {}
    check_tensor("queries", queries, shape, sizes, FLOATS)
    check_not_empty("queries", queries, -1, "channel")
    check_not_empty("queries", queries, 1, "head")
    check_tensor("keys", keys, shape_of_keys, sizes, (queries.dtype,), queries)
    check_not_empty("keys", keys, 1, "head")
    if sizes["Hq"] % sizes["Hkv"] != 0:
        raise ValueError(
            f"keys: expected a number of heads that divides the Hq = {sizes['Hq']} of queries, got {sizes['Hkv']}. "
            "Remedy: each key head serves Hq / Hkv neighbouring query heads."
        )
    return sizes


def check_softmax(scale, causal) -> None:
    if scale is not None:
        check_weight("scale", scale)
    check_flag("causal", causal)


def fake(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False):
    b, hq = queries.shape[:2]
    return queries.new_empty((b, hq, keys.shape[2]), dtype=compute_dtype(queries))


def on_reference(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False):
    if rows is not None:
        check_values("rows", rows, -1, queries.shape[2])
    scores = reference.attention_scores(queries, keys, rows=rows, mask=mask, lse=lse, scale=scale, causal=causal)
    return scores.to(compute_dtype(queries))


def on_triton(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False):
    from .kernel import attention_scores as launch

    return launch(queries, keys, rows=rows, mask=mask, lse=lse, scale=scale, causal=causal)


def flops(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False) -> int:
    """Of each row and key: a dot product, its scaling, a comparison, a difference, an exponential, a sum of the row, a
    product and a sum over rows. At most: as if every row saw every key."""
    b, hq, m, d = queries
    return b * hq * (m if rows is None else rows[-1]) * keys[2] * (2 * d + 7)


def look(queries, keys, *, rows=None, mask=None, lse=None, scale=None, causal=False) -> None:
    check_finite("queries", queries, ("image", "head", "row", "channel"))
    check_finite("keys", keys, ("image", "head", "token", "channel"), None if mask is None else mask[:, None])
    if isinstance(rows, torch.Tensor):  # of the Python function, it may be an int
        m = queries.shape[2]
        axes = ("image", "entry")[2 - rows.dim() :]
        refuse("rows", rows, (rows < -1) | (rows >= m), f"values in [-1, {m})", axes, "Remedy: rows of queries.")
    if lse is not None:
        refuse("lse", lse, lse.isnan(), "no NaN", ("image", "head", "row"), "Remedy: look where it was computed.")


def examples(b: int) -> list[Example]:
    queries, keys = random(b, 4, 7, 5) - 0.5, random(b, 2, 12, 5) - 0.5
    shared = torch.tensor([6, 0, -1, 6], dtype=torch.int64, device="cpu")
    rows = (shared + torch.arange(b, dtype=torch.int64, device="cpu")[:, None] + 1) % 8 - 1
    lse, mask = 2 + random(b, 4, 7), random(b, 12) > 0.2
    return [
        Example((queries, keys), {"rows": rows, "mask": mask, "scale": 0.5}),
        Example((queries.bfloat16(), keys.bfloat16()), {"causal": True}),
        Example((queries, keys), {"rows": shared, "lse": lse}),
        Example((queries.double(), keys.double()), {"causal": True, "mask": mask}),
    ]


def check_backward(grad_scores, queries, keys, *, rows=None, mask=None, scale=None, causal=False) -> None:
    check(queries, keys, rows=rows, mask=mask, scale=scale, causal=causal)
    sizes = {"B": queries.shape[0], "Hq": queries.shape[1], "N": keys.shape[2]}
    check_tensor("grad_scores", grad_scores, "B Hq N", sizes, (compute_dtype(queries),), queries)


def fake_backward(grad_scores, queries, keys, *, rows=None, mask=None, scale=None, causal=False):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def backward_on_any(grad_scores, queries, keys, *, rows=None, mask=None, scale=None, causal=False):
    if rows is not None and rows.device.type == "cpu":
        check_values("rows", rows, -1, queries.shape[2])
    options = {"rows": rows, "mask": mask, "scale": scale, "causal": causal}
    grads = gradients.attention_scores_backward(grad_scores, queries, keys, **options)
    return tuple(rounded_once(grad, queries.dtype).contiguous() for grad in grads)


def backward_flops(grad_scores, queries, keys, *, rows=None, mask=None, scale=None, causal=False) -> int:
    """Of each row and key: the probability again, its slope, and a product and a sum a channel for either gradient."""
    b, hq, m, d = queries
    return b * hq * (m if rows is None else rows[-1]) * keys[2] * (6 * d + 11)


def backward_examples(b: int) -> list[Example]:
    found = []
    for (queries, keys), options in examples(b):
        given = {name: value for name, value in options.items() if name != "lse"}
        found.append(Example((torch.sin(9 * on_reference(queries, keys, **given)), queries, keys), given))
    return found


DERIVATIVES, DERIVATIVES_OF_BACKWARD = derivatives_of("attention_scores", gradients.attention_scores_backward)

backends.register(
    Operator(
        "attention_scores",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        derivatives=DERIVATIVES,
        shared={"rows": 1},
        as_operator={"heads": None},
        is_traced=always,
    )
)
backends.register(
    Operator(
        "attention_scores_backward",
        check=check_backward,
        reference=backward_on_any,
        triton=backward_on_any,
        fake=fake_backward,
        flops=backward_flops,
        examples=backward_examples,
        derivatives=DERIVATIVES_OF_BACKWARD,
        shared={"rows": 1},
    )
)


@tracing.leaf()
def attention_scores(
    queries: torch.Tensor,  # [B, Hq, M, d]
    keys: torch.Tensor,  # [B, Hkv, N, d]
    *,
    rows: int | Sequence[int] | torch.Tensor | None = None,  # [R] or [B, R]
    mask: torch.Tensor | None = None,  # [B, N]
    lse: torch.Tensor | None = None,  # [B, Hq, M]
    scale: float | None = None,
    causal: bool = False,
    columns: tuple[int, int | None] | None = None,
    heads: str | torch.Tensor | None = "mean",  # [Hq]
    over_rows: str = "mean",
    grid: Sequence[int] | None = None,
    pool: int | Sequence[int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """How much attention each key gets (Eq. 1), as importance scores, without an M x N map.

    ``softmax(scale q k^T)``, averaged over query rows and heads: all rows, chosen ones (text, [CLS]), or a single one.
    A single row is two lines of torch, and is computed so.

    Args:
        queries: [B, Hq, M, d] fp32, fp16, bf16 or fp64 (fp64 on CPU).
        keys: [B, Hkv, N, d], dtype of queries; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
            The softmax runs over these keys: ``keys[:, :, 1:]`` leaves out [CLS].
        rows: which queries are averaged over. None: all M. An int, or ints: in [0, M). A tensor, [R] or [B, R] int64
            on the device of queries: in [-1, M), -1 being none, for images with fewer rows. A row that comes twice
            counts twice.
        mask: [B, N] bool, False = padding, whose probability is 0.
        lse: [B, Hq, M] fp32 or fp64, log-sum-exp of each row from outside (FlashAttention's softmax_lse): the
            probabilities are exp(scale q k - lse), also where they ran over further keys that are not passed here.
        scale: finite, >= 0. None: 1 / sqrt(d).
        causal: query m sees the keys n <= m + N - M.
        columns: (start, stop) or (start, None): which keys' scores are returned; the softmax runs over all.
        heads: "mean", "sum", "max" (of the rows' means), weights [Hq] to sum with, or None: a score a head.
        over_rows: "mean", "sum", or "mean_query": the chosen queries are averaged before the softmax.
        grid: (H, W) or (T, H, W) of the returned tokens, for windows of ``pool``.
        pool: an int or (ph, pw): the mean over windows of the grid. Without a grid an int: the mean over so many
            consecutive tokens, as Qwen-VL orders them.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        [B, N'] fp32 (fp64 where queries are fp64), >= 0; with ``heads=None`` [B, Hq, N']. N' is N, less what columns
        leave out, divided by what pool takes together. A row that sees no key counts, with zeros; of no rows the
        scores are zeros. Differentiable in queries and keys.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, rows, scale, columns, heads, over_rows, grid, pool or
            backend; lse where queries or keys require grad, or with "mean_query"; causal with "mean_query".
        RuntimeError: on CPU, a value of a rows tensor outside [-1, M). On a GPU, where values are not read, it is none.
    """
    rows, grid, pool = forms.as_rows(rows), as_grid(grid), forms.as_pool(pool)
    options: dict[str, Any] = {"rows": rows, "mask": mask, "lse": lse, "scale": scale, "causal": causal}
    tracing.checked(check_call, queries, keys, options, columns, heads, over_rows, grid, pool)
    if isinstance(rows, tuple):
        options["rows"] = rows = torch.tensor(rows, dtype=torch.int64, device=queries.device)
    backends.kernel_of("attention_scores", backend, queries.device)  # a backend that cannot run is an error
    if forms.is_one_row(rows, queries) or over_rows == "mean_query":
        one = forms.one_row if forms.is_one_row(rows, queries) else forms.mean_query
        scores = (debug.checked("attention_scores", one) if debug.is_on() else one)(queries, keys, **options)
    else:
        scores = backends.run("attention_scores", backend, (queries, keys), options)
    if over_rows == "sum":
        scores = scores * forms.number_of_rows(rows, queries.shape[2])
    if columns is not None:
        scores = scores[..., slice(*columns)]
    return forms.over_windows(forms.combine_heads(scores, heads, 1), pool, grid)


def check_call(queries, keys, options, columns, heads, over_rows, grid, pool) -> None:
    """What check finds, and what is wrong in the arguments that the operator does not have."""
    rows, lse = options["rows"], options["lse"]
    check(queries, keys, **{**options, "rows": rows if isinstance(rows, torch.Tensor) else None})
    forms.check_rows(rows, queries.shape[2])
    forms.check_columns(columns, keys.shape[2])
    forms.check_heads(heads, queries)
    forms.check_over_rows(over_rows, lse, options["causal"])
    forms.check_pool(pool, grid, forms.number_of_columns(columns, keys.shape[2]))
    check_constant(lse, queries, keys)


def check_constant(lse: torch.Tensor | None, queries: torch.Tensor, keys: torch.Tensor) -> None:
    if lse is not None and autograd.needs_derivative([queries, keys]):
        refuse_lse(lse)
