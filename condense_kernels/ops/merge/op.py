import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, check_not_empty, check_tensor, check_values
from ..._dispatch.debug import check_finite, check_indices, check_scores, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from ..similarity.op import compute_dtype
from . import reference
from .derivatives import OF_MERGE, OF_MERGE_BACKWARD


def check(features, scores, indices, assignment) -> None:
    check_clusters("features", features, "B N D", scores, indices, assignment)


def check_clusters(name: str, channels, shape: str, scores, indices, assignment) -> dict[str, int]:
    """The letters' sizes; ``channels`` is the tensor that D and the device are taken from."""
    sizes: dict[str, int] = {}
    check_tensor(name, channels, shape, sizes, FLOATS)
    check_not_empty(name, channels, 2, "channel")
    check_tensor("scores", scores, "B N", sizes, FLOATS, channels)
    check_tensor("indices", indices, "B K", sizes, (torch.int64,), channels)
    check_tensor("assignment", assignment, "B N", sizes, (torch.int64,), channels)
    return sizes


def fake(features, scores, indices, assignment):
    b, _, d = features.shape
    k = indices.shape[1]
    return features.new_empty((b, k, d)), features.new_empty((b, k), dtype=compute_dtype(features, scores))


def on_reference(features, scores, indices, assignment):
    check_values("indices", indices, -1, features.shape[1])
    check_values("assignment", assignment, -1, indices.shape[1])
    merged, mass = reference.merge_as(features, scores, indices, assignment)
    return merged, mass.to(compute_dtype(features, scores))


def on_triton(features, scores, indices, assignment):
    from .kernel import merge as launch

    return launch(features, scores, indices, assignment)


def flops(features, scores, indices, assignment) -> int:
    """A product and an addition a token and channel, a quotient a row and channel."""
    b, n, d = features
    return 2 * b * n * d + b * indices[1] * d


def look(features, scores, indices, assignment) -> None:
    member = assignment >= 0
    check_finite("features", features, ("image", "token", "channel"), member)
    check_scores(scores, ("image", "token"), member)
    check_indices("indices", indices, -1, features.shape[1])
    outside = (assignment < -1) | (assignment >= indices.shape[1])
    expected = f"rows in [-1, {indices.shape[1]})"
    refuse("assignment", assignment, outside, expected, ("image", "token"), "Remedy: what assign returns.")


def examples(b: int) -> list[Example]:
    features, scores = random(b, 12, 5) - 0.5, random(b, 12)
    indices = torch.tensor([1, 4, 6, 11], dtype=torch.int64, device="cpu").expand(b, -1)
    assignment = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, -1, 2, 3, 3], dtype=torch.int64, device="cpu").expand(b, -1)
    return [Example((x, scores, indices, assignment)) for x in (features, features.half(), features.double())]


def check_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment) -> None:
    if (features is None) != (merged is None):
        alone = "features" if merged is None else "merged"
        raise ValueError(
            f"features, merged: expected both or neither, got {alone} alone. Remedy: give both for the gradient of "
            "scores, none for that of features."
        )
    name, like, shape = ("grad_merged", grad_merged, "B K D") if features is None else ("features", features, "B N D")
    sizes = check_clusters(name, like, shape, scores, indices, assignment)
    wide = (compute_dtype(like, scores),)
    check_tensor("grad_merged", grad_merged, "B K D", sizes, (like.dtype,), like)
    check_tensor("grad_mass", grad_mass, "B K", sizes, wide, like)
    if merged is not None:
        check_tensor("merged", merged, "B K D", sizes, (like.dtype,), like)
    check_tensor("mass", mass, "B K", sizes, wide, like)


def fake_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment):
    return grad_merged.new_empty((*scores.shape, grad_merged.shape[2])), scores.new_empty(scores.shape)


def backward_on_reference(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment):
    check_values("indices", indices, -1, scores.shape[1])
    check_values("assignment", assignment, -1, indices.shape[1])
    grads = reference.merge_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment)
    return tuple(reference.rounded_once(grad, t.dtype) for grad, t in zip(grads, (grad_merged, scores), strict=True))


def backward_on_triton(*args):
    from .kernel import merge_backward as launch

    return launch(*args)


def backward_flops(grad_merged, grad_mass, features, scores, *_) -> int:
    """Of features a product, of scores a difference, a product and an addition, a token and channel."""
    (b, n), d = scores, grad_merged[2]
    return (1 if features is None else 4) * b * n * d


def backward_examples(b: int) -> list[Example]:
    found = []
    for (features, scores, indices, assignment), _ in examples(b):
        merged, mass = on_reference(features, scores, indices, assignment)
        grads = torch.sin(merged), torch.cos(mass)
        found.append(Example((*grads, features, scores, merged, mass, indices, assignment)))
    return [*found, Example((*grads, None, scores, None, mass, indices, assignment))]


backends.register(
    Operator(
        "merge",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        derivatives=OF_MERGE,
        is_traced=always,
    )
)
backends.register(
    Operator(
        "merge_backward",
        check=check_backward,
        reference=backward_on_reference,
        triton=backward_on_triton,
        fake=fake_backward,
        flops=backward_flops,
        examples=backward_examples,
        derivatives=OF_MERGE_BACKWARD,
        is_traced=always,
    )
)


@tracing.leaf(tuple, 2)
def merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge each cluster into the mean of its tokens, weighted by their scores (Eq. 8).

    Reusable on other planes of the same tokens: positions, deepstack features, a second encoder's output. The products
    scores_i * features_i and their sums have to lie in the range of the arithmetic, fp32 unless an input is fp64.

    Args:
        features: [B, N, D] fp32, fp16, bf16 or fp64.
        scores: [B, N] floating, >= 0.
        indices: [B, K] int64, each row's own token; -1 is no row: zeros with mass 0.
        assignment: [B, N] int64 in [-1, K), the row of each token; -1 belongs to none.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        merged: [B, K, D], dtype of features: sum of scores_i * features_i over the row's tokens / mass, accumulated
            in fp32 (fp64 where features or scores are fp64), rounded once. A row that holds only its own token, or
            whose mass is 0, is that token bit for bit.
        mass: [B, K] fp32 (or fp64), the sum of the row's scores.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device or backend.
        RuntimeError: on CPU, a value of indices or assignment out of range. On a GPU, where values are not read, it
            counts as -1.
    """
    tracing.checked(check, features, scores, indices, assignment)
    return backends.run("merge", backend, (features, scores, indices, assignment), {})
