from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _backend, _library
from .._checks import FLOATS, check_budget, check_not_empty, check_tensor, check_weight, check_where
from ..assign import op as assign
from ..greedy_select import op as greedy_select
from ..merge import op as merge
from ..similarity import op as similarity
from .pipeline import Stages, compose


class Condensed(NamedTuple):
    """What select_and_merge returns; see there."""

    merged: torch.Tensor  # [B, K, D]
    indices: torch.Tensor  # [B, K]
    assignment: torch.Tensor  # [B, N]
    mass: torch.Tensor  # [B, K]


def check(
    features,
    scores,
    num_anchors,
    num_background,
    *,
    keys=None,
    grid=None,
    positions=None,
    mask=None,
    suppression=1.0,
    spatial_weight=1.0,
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, "B N D", sizes, FLOATS)
    check_not_empty("features", features, 1, "token")
    check_not_empty("features", features, 2, "channel")
    check_tensor("scores", scores, "B N", sizes, FLOATS, features)
    check_budget(num_anchors, num_background, sizes["N"])
    if keys is not None:
        check_tensor("keys", keys, "B N Dk", sizes, FLOATS, features)
        check_not_empty("keys", keys, 2, "channel")
    if mask is not None:
        check_tensor("mask", mask, "B N", sizes, (torch.bool,), features)
    check_weight("suppression", suppression)
    check_weight("spatial_weight", spatial_weight)
    check_where(grid, positions, spatial_weight, sizes, features)


def fake(features, scores, num_anchors, num_background, **_):
    b, n, d = features.shape
    k = num_anchors + num_background
    return (
        features.new_empty((b, k, d)),
        features.new_empty((b, k), dtype=torch.int64),
        features.new_empty((b, n), dtype=torch.int64),
        features.new_empty((b, k), dtype=similarity.compute_dtype(features, scores)),
    )


# Each stage's result is rounded to its own dtype on the way, so that the stages called one by one give the same bits.
on_reference = compose(
    Stages(similarity.on_reference, greedy_select.on_reference, assign.on_reference, merge.on_reference)
)


def on_triton(*args, **kwargs):
    from .kernel import select_and_merge as launch

    return launch(*args, **kwargs)


_library.register(
    "select_and_merge", cpu_fallback=_backend.raw(check, on_reference), cuda=_backend.raw(check, on_triton), fake=fake
)


def select_and_merge(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    num_anchors: int,
    num_background: int,
    *,
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    grid: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    mask: torch.Tensor | None = None,  # [B, N]
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    backend: str = "auto",
) -> Condensed:
    """Condense N visual tokens of each image to K = num_anchors + num_background (CondenseVLM, section 3).

    Anchors are picked greedily by score (Eq. 2), background tokens by global similarity (Eq. 3 and 4), each pick
    suppressing what is similar to it; every other token goes to the kept token that is most similar and near
    (Eq. 6 and 7), and each cluster is merged into its score-weighted mean (Eq. 8). The images of a batch do not
    influence each other, and the result does not depend on the batch, the layout or the number of threads.

    Args:
        features: [B, N, D] fp32, fp16, bf16 or fp64 (fp64 on CPU): the tokens that are merged.
        scores: [B, N] floating, >= 0: importance, e.g. [CLS] attention (Eq. 1).
        num_anchors, num_background: int >= 0, 1 <= K <= N.
        keys: [B, N, Dk] floating: what the cosine similarity is computed on. None: features.
        grid: (H, W) or (T, H, W) with product N, row-major. Grid or positions is required unless spatial_weight is 0.
        positions: [N, P] or [B, N, P] coordinates of a float or signed integer dtype (or uint8).
        mask: [B, N] bool, False = padding: not a candidate, never merged, in no mean.
        suppression: finite, >= 0: factor on the similarity term of Eq. 2 and 4; 0 gives plain top-k.
        spatial_weight: finite, >= 0: factor on the distance term of Eq. 6; 0 gives assignment by similarity alone.
        backend: "auto" (by device), "cpp", "triton" (on CPU tensors under TRITON_INTERPRET=1) or "reference".

    Returns:
        A named tuple
        merged: [B, K, D], dtype of features; a row of one token, or of zero mass, is its kept token bit for bit.
        indices: [B, K] int64, ascending, distinct: the kept tokens' original positions.
        assignment: [B, N] int64 in [0, K): the row of ``merged`` that each token went to; -1 where masked.
        mass: [B, K] fp32 (fp64 where features or scores are fp64): the sum of the scores merged into each row.

    Raises:
        TypeError, ValueError: a wrong rank, shape, dtype, device, count, grid, weight or backend, with the argument's
            name. The values of tensors are not inspected.
    """
    options = {
        "keys": keys,
        "grid": grid,
        "positions": positions,
        "mask": mask,
        "suppression": suppression,
        "spatial_weight": spatial_weight,
    }
    args = (features, scores, num_anchors, num_background)
    if not torch.compiler.is_compiling():
        check(*args, **options)
    return Condensed(*_backend.run("select_and_merge", backend, on_reference, on_triton, args, options))
