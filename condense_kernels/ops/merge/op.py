import math

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import FLOATS, INTEGERS, check_not_empty, check_tensor, check_values
from ..._dispatch.debug import check_finite, check_indices, check_scores, refuse
from ..._dispatch.declaration import Example, Operator, always, random
from ..similarity.op import compute_dtype
from . import reference
from .derivatives import OF_MERGE, OF_MERGE_BACKWARD

WEIGHTS = (*FLOATS, *INTEGERS, torch.bool)  # dtypes of scores here: sizes of clusters, and who counts, weigh as well


def check(features, scores, indices, assignment, *, mode="mean", centre_weight=0.5) -> None:
    check_clusters("features", features, "B N D", scores, indices, assignment)
    check_mode(mode, centre_weight)


def check_clusters(name: str, channels, shape: str, scores, indices, assignment) -> dict[str, int]:
    """The letters' sizes; ``channels`` is the tensor that D and the device are taken from."""
    sizes: dict[str, int] = {}
    check_tensor(name, channels, shape, sizes, FLOATS)
    check_not_empty(name, channels, -1, "channel")
    if scores is not None:
        check_tensor("scores", scores, "B N", sizes, WEIGHTS, channels)
    check_tensor("indices", indices, "B K", sizes, (torch.int64,), channels)
    check_tensor("assignment", assignment, "B N", sizes, (torch.int64,), channels)
    return sizes


def check_mode(mode, centre_weight) -> None:
    if not isinstance(mode, str):
        raise TypeError(f"mode: expected a string, got {type(mode).__name__}: {mode!r}.")
    if mode not in reference.MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, reference.MODES))}, got {mode!r}.")
    if isinstance(centre_weight, bool) or not isinstance(centre_weight, (int, float)):
        got = f"{type(centre_weight).__name__}: {centre_weight!r}"
        raise TypeError(f"centre_weight: expected a number, got {got}. Remedy: float(centre_weight).")
    if not 0 <= centre_weight <= 1:
        raise ValueError(f"centre_weight: expected a number in [0, 1], got {centre_weight}.")


def fake(features, scores, indices, assignment, **_):
    b, _, d = features.shape
    k = indices.shape[1]
    return features.new_empty((b, k, d)), features.new_empty((b, k), dtype=compute_dtype(features, scores))


def on_reference(features, scores, indices, assignment, *, mode="mean", centre_weight=0.5):
    check_values("indices", indices, -1, features.shape[1])
    check_values("assignment", assignment, -1, indices.shape[1])
    merged, mass = reference.merge_as(features, scores, indices, assignment, mode, centre_weight)
    return merged, mass.to(compute_dtype(features, scores))


def on_triton(*args, **options):
    from .kernel import merge as launch

    return launch(*args, **options)


def flops(features, scores, indices, assignment, *, mode="mean", centre_weight=0.5) -> int:
    """A product and an addition a token and channel; a row and channel, of a mean a quotient, of a blend three more."""
    b, n, d = features
    return 2 * b * n * d + {"mean": 1, "sum": 0, "lerp": 4}[mode] * b * indices[1] * d


def look(features, scores, indices, assignment, **_) -> None:
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
    found = [Example((x, scores, indices, assignment)) for x in (features, features.half(), features.double())]
    sizes = torch.arange(12, dtype=torch.int32, device="cpu").expand(b, -1)
    blend = {"mode": "lerp", "centre_weight": 0.3}
    return [
        *found,
        Example((features, None, indices, assignment)),
        Example((features, sizes, indices, assignment), {"mode": "sum"}),
        Example((features, scores, indices, assignment), blend),
        Example((features.bfloat16(), sizes > 0, indices, assignment), blend),
    ]


def check_backward(
    grad_merged, grad_mass, features, scores, merged, mass, indices, assignment, *, mode="mean", centre_weight=0.5
) -> None:
    check_mode(mode, centre_weight)
    if (features is None) != (merged is None) and (mode != "sum" or features is None):  # features alone do for a sum
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


def fake_backward(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment, **_):
    b, n = assignment.shape
    of_scores = scores is not None and scores.is_floating_point()
    grad_scores = scores.new_empty((b, n)) if of_scores else mass.new_empty((b, 0))
    return grad_merged.new_empty((b, n, grad_merged.shape[2])), grad_scores


def backward_on_reference(
    grad_merged, grad_mass, features, scores, merged, mass, indices, assignment, *, mode="mean", centre_weight=0.5
):
    check_values("indices", indices, -1, assignment.shape[1])
    check_values("assignment", assignment, -1, indices.shape[1])
    tensors = grad_merged, grad_mass, features, scores, merged, mass, indices, assignment
    of_features, of_scores = reference.merge_backward(*tensors, mode, centre_weight)
    of_features = reference.rounded_once(of_features, grad_merged.dtype)
    if scores is None or not scores.is_floating_point():
        return of_features, mass.new_empty((mass.shape[0], 0))
    return of_features, reference.rounded_once(of_scores, scores.dtype)


def backward_on_triton(*args, **options):
    from .kernel import merge_backward as launch

    return launch(*args, **options)


def backward_flops(
    grad_merged, grad_mass, features, scores, merged, mass, indices, assignment, *, mode="mean", centre_weight=0.5
) -> int:
    """Of features a product, of scores a difference, a product and an addition, a token and channel."""
    (b, n), d = assignment, grad_merged[2]
    return (1 if features is None else 4) * b * n * d


def backward_examples(b: int) -> list[Example]:
    found = []
    for (features, scores, indices, assignment), options in examples(b):
        merged, mass = on_reference(features, scores, indices, assignment, **options)
        grads = torch.sin(merged), torch.cos(mass)
        found.append(Example((*grads, features, scores, merged, mass, indices, assignment), options))
    of_features = Example((*grads, None, scores, None, mass, indices, assignment), options)
    return [*found, of_features, Example((*grads, None, None, None, mass, indices, assignment))]


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
    features: torch.Tensor,  # [B, N, D] or [B, ..., N, D]
    scores: torch.Tensor | None,  # [B, N] or [B, N, 1]
    indices: torch.Tensor,  # [B, K]
    assignment: torch.Tensor,  # [B, N]
    *,
    mode: str = "mean",
    centre_weight: float = 0.5,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge each cluster into the mean of its tokens, weighted by their scores (Eq. 8), into their weighted sum, or
    into that mean blended with the kept token.

    Reusable on other planes of the same tokens: deepstack features, a second encoder's output, the keys and values of a
    cache. The products scores_i * features_i and their sums have to lie in the range of the arithmetic, fp32 unless an
    input is fp64.

    Args:
        features: [B, N, D] fp32, fp16, bf16 or fp64; or planes [B, ..., N, D], such as [B, H, N, d] of a cache, which
            share the clusters. Axes between B and N that do not fold into one are copied.
        scores: [B, N] floating, >= 0; or integers, the sizes of clusters, or bool; [B, N, 1] will do. None: 1 each.
        indices: [B, K] int64, each row's own token, its centre; distinct, in any order; -1 is no row: zeros with
            mass 0.
        assignment: [B, N] int64 in [-1, K), the row of each token; -1 belongs to none.
        mode: "mean", the weighted mean of a row's tokens; "sum", their weighted sum; "lerp", centre_weight * centre +
            (1 - centre_weight) * weighted mean.
        centre_weight: in [0, 1], of "lerp" alone.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        merged: [B, K, D], or [B, ..., K, D], dtype of features: summed in fp32 (fp64 where features or scores are
            fp64), rounded once. A row that holds only its own token, or whose mass is 0, is that token bit for bit; but
            a sum of no tokens is zeros, and a sum of one without scores that one bit for bit.
        mass: [B, K] fp32 (or fp64), the sum of the row's scores; without scores the number of its tokens.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, mode, centre_weight or backend.
        RuntimeError: on CPU, a value of indices or assignment out of range. On a GPU, where values are not read, it
            counts as -1.
    """
    scores = as_column(scores)
    options = {"mode": mode, "centre_weight": centre_weight}
    if isinstance(features, torch.Tensor) and features.dim() > 3:
        tracing.checked(check_planes, features, scores, indices, assignment, **options)
        return merge_planes(features, scores, indices, assignment, backend, options)
    tracing.checked(check, features, scores, indices, assignment, **options)
    given = {} if mode == "mean" else options  # torch takes 2 us to pass on what is the default
    return backends.run("merge", backend, (features, scores, indices, assignment), given)


def as_column(scores):
    """ToMe's sizes [B, N, 1] as [B, N]; all else as it is, to be checked."""
    is_column = isinstance(scores, torch.Tensor) and scores.dim() == 3 and scores.shape[2] == 1
    return scores[..., 0] if is_column else scores


def check_planes(features, scores, indices, assignment, *, mode, centre_weight) -> None:
    axes = [f"P{i}" for i in range(1, features.dim() - 2)]
    check_clusters("features", features, " ".join(["B", *axes, "N", "D"]), scores, indices, assignment)
    for i in range(1, features.dim() - 2):
        check_not_empty("features", features, i, "plane")
    check_mode(mode, centre_weight)


def merge_planes(features, scores, indices, assignment, backend: str, options: dict):
    """Each plane is an image, with the clusters of its own one."""
    b, *planes, _, _ = features.shape
    count = math.prod(planes)

    def shared(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:, None].expand(-1, count, -1).flatten(0, 1)

    args = (features.flatten(0, -3), *map(shared, (scores, indices, assignment)))
    merged, mass = backends.run("merge", backend, args, options)
    return merged.unflatten(0, (b, *planes)), mass.unflatten(0, (b, count))[:, 0]
