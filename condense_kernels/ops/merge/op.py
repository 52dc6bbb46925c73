import torch

from ..._dispatch import backends
from ..._dispatch.checks import FLOATS, check_not_empty, check_tensor, check_values
from ..similarity.op import compute_dtype
from . import reference


def check(features, scores, indices, assignment) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, "B N D", sizes, FLOATS)
    check_not_empty("features", features, 2, "channel")
    check_tensor("scores", scores, "B N", sizes, FLOATS, features)
    check_tensor("indices", indices, "B K", sizes, (torch.int64,), features)
    check_tensor("assignment", assignment, "B N", sizes, (torch.int64,), features)


def fake(features, scores, indices, assignment):
    b, _, d = features.shape
    k = indices.shape[1]
    return features.new_empty((b, k, d)), features.new_empty((b, k), dtype=compute_dtype(features, scores))


def on_reference(features, scores, indices, assignment):
    check_values("indices", indices, -1, features.shape[1])
    check_values("assignment", assignment, -1, indices.shape[1])
    merged, mass = reference.merge(features, scores, indices, assignment)
    return reference.rounded_once(merged, features.dtype), mass.to(compute_dtype(features, scores))


def on_triton(features, scores, indices, assignment):
    from .kernel import merge as launch

    return launch(features, scores, indices, assignment)


def check_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment) -> None:
    check(features, scores, indices, assignment)
    sizes = {**dict(zip("BND", features.shape, strict=True)), "K": indices.shape[1]}
    wide = (compute_dtype(features, scores),)
    check_tensor("grad_merged", grad_merged, "B K D", sizes, (features.dtype,), features)
    check_tensor("grad_mass", grad_mass, "B K", sizes, wide, features)
    check_tensor("merged", merged, "B K D", sizes, (features.dtype,), features)
    check_tensor("mass", mass, "B K", sizes, wide, features)


def fake_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment):
    return features.new_empty(features.shape), scores.new_empty(scores.shape)


def backward_on_reference(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment):
    check_values("indices", indices, -1, features.shape[1])
    check_values("assignment", assignment, -1, indices.shape[1])
    grads = reference.merge_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment)
    return tuple(reference.rounded_once(grad, t.dtype) for grad, t in zip(grads, (features, scores), strict=True))


def backward_on_triton(*args):
    from .kernel import merge_backward as launch

    return launch(*args)


backends.register("merge", check=check, reference=on_reference, triton=on_triton, fake=fake)
backends.register(
    "merge_backward",
    check=check_backward,
    reference=backward_on_reference,
    triton=backward_on_triton,
    fake=fake_backward,
)


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
    if not torch.compiler.is_compiling():
        check(features, scores, indices, assignment)
    return backends.run("merge", backend, (features, scores, indices, assignment), {})
