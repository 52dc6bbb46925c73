import math
from collections.abc import Sequence

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, check_not_empty, check_tensor, check_values, is_int
from ..._dispatch.debug import check_finite, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from ..merge.reference import rounded_once
from ..similarity.op import compute_dtype
from . import reference
from .derivatives import OF_GATHER_MERGE, OF_GATHER_MERGE_BACKWARD


def check(x, neighbours, weights=None) -> None:
    sizes: dict[str, int] = {}
    check_tensor("x", x, "B N D", sizes, FLOATS)
    check_not_empty("x", x, 2, "channel")
    check_listed(neighbours, weights, sizes, x)


def check_listed(neighbours, weights, sizes: dict[str, int], like: torch.Tensor) -> None:
    check_tensor("neighbours", neighbours, "B K m", sizes, (torch.int64,), like)
    if weights is not None:
        check_tensor("weights", weights, "B K m", sizes, FLOATS, like)


def fake(x, neighbours, weights=None):
    return x.new_empty((*neighbours.shape[:2], x.shape[2]))


def on_reference(x, neighbours, weights=None):
    check_values("neighbours", neighbours, -1, x.shape[1])
    return reference.gather_merge(x, neighbours, weights)


def on_triton(x, neighbours, weights=None):
    from .kernel import gather_merge as launch

    return launch(x, neighbours, weights)


def flops(x, neighbours, weights=None) -> int:
    """A product, where there are weights, and an addition a neighbour and channel."""
    return (1 if weights is None else 2) * math.prod(neighbours) * x[2]


def look(x, neighbours, weights=None) -> None:
    check_finite("x", x, ("image", "token", "channel"))
    check_finite("weights", weights, ("image", "row", "neighbour"), neighbours >= 0)
    outside = (neighbours < -1) | (neighbours >= x.shape[1])
    expected = f"values in [-1, {x.shape[1]})"
    axes = ("image", "row", "neighbour")
    refuse("neighbours", neighbours, outside, expected, axes, "Remedy: indices of tokens, -1 for none.")


def examples(b: int) -> list[Example]:
    x, weights = random(b, 12, 5) - 0.5, random(b, 4, 3)
    listed = [[1, 4, 6], [11, -1, 0], [2, 2, 3], [-1, -1, 7]]
    neighbours = torch.tensor(listed, dtype=torch.int64, device="cpu").expand(b, -1, -1)
    return [
        Example((x, neighbours, weights)),
        Example((x.half(), neighbours)),
        Example((x, neighbours, weights.double())),
    ]


def check_backward(grad_merged, x, neighbours, weights, sizes) -> None:
    bound: dict[str, int] = {}
    check_tensor("grad_merged", grad_merged, "B K D", bound, FLOATS)
    check_not_empty("grad_merged", grad_merged, 2, "channel")
    d = grad_merged.shape[2]
    if not isinstance(sizes, Sequence) or not all(map(is_int, sizes)):
        raise TypeError(f"sizes: expected [N, D] as ints, got {sizes!r}. Remedy: x.shape[1:].")
    if len(sizes) != 2 or sizes[0] < 0 or sizes[1] != d:
        raise ValueError(f"sizes: expected [N, D] with D = {d}, as grad_merged has, got {list(sizes)}.")
    bound["N"] = sizes[0]
    if x is not None:
        check_tensor("x", x, "B N D", bound, (grad_merged.dtype,), grad_merged)
    check_listed(neighbours, weights, bound, grad_merged)


def weights_dtype(grad_merged, weights) -> torch.dtype:
    return compute_dtype(grad_merged) if weights is None else weights.dtype


def fake_backward(grad_merged, x, neighbours, weights, sizes):
    grad_weights = grad_merged.new_empty(neighbours.shape, dtype=weights_dtype(grad_merged, weights))
    return grad_merged.new_empty((grad_merged.shape[0], *sizes)), grad_weights


def backward_on_reference(grad_merged, x, neighbours, weights, sizes):
    check_values("neighbours", neighbours, -1, sizes[0])
    grad_x, grad_weights = reference.gather_merge_backward(grad_merged, x, neighbours, weights, sizes[0])
    return rounded_once(grad_x, grad_merged.dtype), rounded_once(grad_weights, weights_dtype(grad_merged, weights))


def backward_on_triton(*args):
    from .kernel import gather_merge_backward as launch

    return launch(*args)


def backward_flops(grad_merged, x, neighbours, weights, sizes) -> int:
    """Of x a product, where there are weights, and an addition, of weights both, a neighbour and channel."""
    return ((1 if weights is None else 2) + (0 if x is None else 2)) * math.prod(neighbours) * sizes[1]


def backward_examples(b: int) -> list[Example]:
    (x, neighbours, weights), _ = examples(b)[0]
    grad, sizes = random(b, 4, 5), [12, 5]
    return [
        Example((grad, x, neighbours, weights, sizes)),
        Example((grad.half(), x.half(), neighbours, weights, sizes)),
        Example((grad, None, neighbours, weights, sizes)),
        Example((grad.double(), x.double(), neighbours, None, sizes)),
    ]


backends.register(
    Operator(
        "gather_merge",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        derivatives=OF_GATHER_MERGE,
        is_traced=always,
    )
)
backends.register(
    Operator(
        "gather_merge_backward",
        check=check_backward,
        reference=backward_on_reference,
        triton=backward_on_triton,
        fake=fake_backward,
        flops=backward_flops,
        examples=backward_examples,
        derivatives=OF_GATHER_MERGE_BACKWARD,
        is_traced=always,
    )
)


@tracing.leaf()
def gather_merge(
    x: torch.Tensor,  # [B, N, D]
    neighbours: torch.Tensor,  # [B, K, m]
    weights: torch.Tensor | None = None,  # [B, K, m]
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum the listed tokens of each row, each times its weight: ``sum over j of weights_kj * x[neighbours_kj]``.

    What PruMerge makes of a kept token and its nearest ones, without their [B, K, m, D] copies. A token may be in many
    rows, and in one row more than once.

    Args:
        x: [B, N, D] fp32, fp16, bf16 or fp64. Of a packed batch, [1, T, D] with neighbours counted over all segments.
        neighbours: [B, K, m] int64, tokens; -1 is none, and its weight is not read.
        weights: [B, K, m] floating, of any sign. None: ones.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        merged: [B, K, D], dtype of x, accumulated in fp32 (fp64 where x or weights are fp64) in the order of m, rounded
            once; zeros of a row without a neighbour. Without weights, a row of one neighbour is that token bit for bit.
            Differentiable in x and weights.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or backend.
        RuntimeError: on CPU, a neighbour outside of [-1, N). On a GPU, where values are not read, it counts as -1.
    """
    tracing.checked(check, x, neighbours, weights)
    return backends.run("gather_merge", backend, (x, neighbours, weights), {})
