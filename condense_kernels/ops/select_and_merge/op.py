import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..._dispatch import autograd, backends, tracing
from ..._dispatch.checks import (
    FLOATS,
    WORKING,
    as_count,
    as_each,
    as_grid,
    check_apart,
    check_background_suppression,
    check_budget,
    check_flag,
    check_not_empty,
    check_num_tokens,
    check_output,
    check_tensor,
    check_weight,
    check_where,
)
from ..._dispatch.debug import check_finite, check_positions, check_scores, refuse
from ..._dispatch.declaration import Example, Operator, random
from ..._triton.tables import MAX_STORED
from ..assign import op as assign
from ..greedy_select import op as greedy_select
from ..merge import op as merge
from ..merge.derivatives import OF_MERGE
from ..similarity import op as similarity
from ..similarity import sums
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
    background_suppression=None,
    scale_prior=True,
    mean_similarity=None,
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, "B N D", sizes, FLOATS)
    check_not_empty("features", features, 1, "token")
    check_not_empty("features", features, 2, "channel")
    check_num_tokens("features", features)
    check_tensor("scores", scores, "B N", sizes, FLOATS, features)
    check_budget(num_anchors, num_background, sizes["N"])
    if keys is not None:
        check_tensor("keys", keys, "B N Dk", sizes, FLOATS, features)
        check_not_empty("keys", keys, 2, "channel")
    if mask is not None:
        check_tensor("mask", mask, "B N", sizes, (torch.bool,), features)
    check_weight("suppression", suppression)
    check_weight("spatial_weight", spatial_weight)
    check_background_suppression(background_suppression)
    check_flag("scale_prior", scale_prior)
    if mean_similarity is not None:
        check_tensor("mean_similarity", mean_similarity, "B", sizes, WORKING, features)
    check_where(grid, positions, spatial_weight, sizes, features)


def check_out(features: torch.Tensor, scores: torch.Tensor, num_kept: int, out: Condensed) -> None:
    sizes = {**dict(zip("BND", features.shape, strict=True)), "K": num_kept}
    check_output("out.merged", out.merged, "B K D", sizes, features.dtype, features)
    check_output("out.indices", out.indices, "B K", sizes, torch.int64, features)
    check_output("out.assignment", out.assignment, "B N", sizes, torch.int64, features)
    check_output("out.mass", out.mass, "B K", sizes, similarity.compute_dtype(features, scores), features)


def check_workspace(workspace: torch.Tensor, features: torch.Tensor, needed: int) -> None:
    check_output("workspace", workspace, "bytes", {}, torch.uint8, features)
    if workspace.numel() < needed:
        raise ValueError(
            f"workspace: expected at least {needed} bytes, got {workspace.numel()}. Remedy: ask workspace_bytes of "
            "these arguments; on CPU it depends on torch.get_num_threads()."
        )


def check_memory(
    features, scores, out: Condensed, workspace, *, keys=None, positions=None, mask=None, mean_similarity=None, **_
) -> None:
    written = {f"out.{name}": tensor for name, tensor in out._asdict().items()}
    if workspace is not None:
        written["workspace"] = workspace
    autograd.check_written(written)
    read = {"features": features, "scores": scores, "keys": keys, "positions": positions, "mask": mask}
    check_apart(written, {**read, "mean_similarity": mean_similarity})


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
    Stages(
        similarity.on_reference, sums.on_reference, greedy_select.on_reference, assign.on_reference, merge.on_reference
    )
)


def on_reference_out(*args, workspace=None, merged, indices, assignment, mass, **options):
    for out, result in zip((merged, indices, assignment, mass), on_reference(*args, **options), strict=True):
        out.copy_(result)


def on_triton(*args, **kwargs):
    from .kernel import select_and_merge as launch

    return launch(*args, **kwargs)


def is_traced(features, *args, **options) -> bool:
    """Not where s is not stored: that is up to a hundred launches."""
    return features.shape[1] <= MAX_STORED


def check_raw_out(
    features, scores, num_anchors, num_background, *, workspace=None, merged, indices, assignment, mass, **options
) -> None:
    check(features, scores, num_anchors, num_background, **options)
    out = Condensed(merged, indices, assignment, mass)
    check_out(features, scores, num_anchors + num_background, out)
    if workspace is not None:
        check_workspace(workspace, features, 0)  # enough or not, the kernel will say


def check_raw_memory(
    features, scores, num_anchors, num_background, *, workspace=None, merged, indices, assignment, mass, **options
) -> None:
    check_memory(features, scores, Condensed(merged, indices, assignment, mass), workspace, **options)


def on_triton_out(*args, workspace=None, merged, indices, assignment, mass, **options):
    on_triton(*args, **options, workspace=workspace, out=(merged, indices, assignment, mass))


def bytes_on_reference(*args, **options) -> int:
    return 0


def bytes_on_triton(features, scores, num_anchors, num_background, *, keys=None, mean_similarity=None, **_) -> int:
    from .kernel import workspace_bytes as count

    batch, n = features.shape[:2]
    keys = features if keys is None else keys
    given = mean_similarity is not None
    return count(batch, n, num_anchors + num_background, keys.shape[2], keys.dtype, given)


def count_bytes(backend: str, args: tuple, options: dict) -> int:
    """As workspace_bytes, of arguments that are checked."""
    if args[0].device.type == "meta":
        return 0  # nothing will run
    return backends.run("workspace_bytes", backend, args, options)


def flops(
    features,
    scores,
    num_anchors,
    num_background,
    *,
    keys=None,
    grid=None,
    positions=None,
    spatial_weight=1.0,
    mean_similarity=None,
    **_,
) -> int:
    """Of the four stages; given the mean, of the similarities those of the kept tokens, and twice a sum of all keys."""
    (b, n, _), k = features, num_anchors + num_background
    s, indices = (b, n, n), (b, k)
    keys = features if keys is None else keys
    pairs = similarity.flops(keys)
    if mean_similarity is not None:
        pairs = min(pairs, 2 * b * n * k * keys[2]) + sums.flops(keys)
    where = {"grid": grid, "positions": positions, "spatial_weight": spatial_weight}
    return (
        pairs
        + greedy_select.flops(s, scores, num_anchors)
        + greedy_select.flops(s, scores, num_background)
        + assign.flops(s, indices, **where)
        + merge.flops(features, scores, indices, scores)
    )


def look_at_mean(mean_similarity) -> None:
    check_finite("mean_similarity", mean_similarity, ("image",))
    if mean_similarity is not None:
        remedy = "Remedy: condense_kernels.mean_similarity(keys)."
        refuse("mean_similarity", mean_similarity, mean_similarity < 0, "numbers >= 0", ("image",), remedy)


def look(
    features, scores, num_anchors, num_background, *, keys=None, positions=None, mask=None, mean_similarity=None, **_
) -> None:
    check_finite("features", features, ("image", "token", "channel"), mask)
    check_scores(scores, ("image", "token"), mask)
    check_finite("keys", keys, ("image", "token", "channel"), mask)
    check_positions(positions, mask)
    look_at_mean(mean_similarity)
    if mask is not None:
        k, count = num_anchors + num_background, mask.sum(dim=1)
        remedy = "Remedy: keep fewer tokens, or let fewer be padding."
        refuse("mask", count, count < k, f"at least K = {k} valid tokens an image", ("image",), remedy)


def examples(b: int) -> list[Example]:
    features, scores, keys = random(b, 12, 5) - 0.5, random(b, 12), random(b, 12, 3) - 0.5
    weights = {"suppression": 0.5, "spatial_weight": 0.7, "background_suppression": 0.0, "scale_prior": False}
    on_grid = {"grid": [3, 4], "keys": keys, "mask": random(b, 12) > 0.1, **weights}
    given = {"mean_similarity": random(b)}
    return [
        Example((features, scores, 3, 2), on_grid | given),
        Example((features.double(), scores, 3, 2), {"positions": random(12, 2)}),
        Example((features.half(), scores, 3, 1), {"positions": random(b, 12, 2), **given}),
        Example((features.bfloat16(), scores, 0, 12), {"spatial_weight": 0.0}),
    ]


def out_examples(b: int) -> list[Example]:
    found = []
    for args, options in examples(b):
        out = Condensed(*(t.new_empty(t.shape) for t in fake(*args)))
        found += [Example(args, {**options, **out._asdict()})]
    return found


backends.register(
    Operator(
        "select_and_merge",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        derivatives=OF_MERGE,
        shared={"positions": 2},
        is_traced=is_traced,
    )
)
NOT_IN_PLACE = "condense_kernels.select_and_merge without out= and workspace="
backends.register(
    Operator(
        "select_and_merge_out",
        check=check_raw_out,
        check_memory=check_raw_memory,
        reference=on_reference_out,
        triton=on_triton_out,
        fake=lambda *args, **kwargs: None,
        flops=lambda *args, workspace=None, merged, indices, assignment, mass, **options: flops(*args, **options),
        examples=out_examples,
        look=lambda *args, workspace=None, merged, indices, assignment, mass, **options: look(*args, **options),
        no_derivatives="it writes into tensors of the caller",
        no_vmap=NOT_IN_PLACE,
        no_shards="out= and workspace= are memory of one rank",
    )
)
backends.register(
    Operator(
        "workspace_bytes",
        check=check,
        reference=bytes_on_reference,
        triton=bytes_on_triton,
        fake=None,
        flops=lambda *args, **options: 0,
        examples=examples,
        no_vmap=NOT_IN_PLACE,
        no_shards="a workspace is memory of one rank",
    )
)


@tracing.leaf(Condensed._make, 4)
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
    background_suppression: float | None = None,
    scale_prior: bool = True,
    mean_similarity: float | torch.Tensor | None = None,  # or [B]
    backend: str = "auto",
    out: Condensed | None = None,
    workspace: torch.Tensor | None = None,  # [bytes] uint8
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
        suppression: finite, >= 0: factor on the similarity term of Eq. 2 and 4; 0 gives plain top-k
            of the scores, unscaled.
        spatial_weight: finite, >= 0: factor on the distance term of Eq. 6; 0 gives assignment by similarity alone.
        background_suppression: finite, >= 0: factor on the similarity term of Eq. 4, suppression then being that of
            Eq. 2 alone; 0 gives plain top-k of the global similarity. None: as suppression.
        scale_prior: False takes the scores (Eq. 2) and the global similarities (Eq. 4) for utilities as they are, not
            brought to the scale of the similarities.
        mean_similarity: finite, >= 0, of every image, or fp32 or fp64 [B]: what E[|S|] of Eq. 2 and 4 is taken for, as
            :func:`mean_similarity` estimates it. Then the global similarities are those of :func:`global_similarity`,
            and few others than the kept tokens' are computed: O(N K) products of keys, not O(N^2). None: computed.
        backend: "auto" (by device), "cpp", "triton" (on CPU tensors under TRITON_INTERPRET=1) or "reference".
        out: the four results of an earlier call of the same shapes and dtypes, contiguous, to write into. Their
            addresses must overlap neither each other's nor those of an argument, from first to last, and none may
            require grad where gradients are recorded. None: new tensors.
        workspace: [bytes] uint8 on the device of features, workspace_bytes(...) of them at least: then no other
            working memory is taken. What it holds before and after means nothing; it is apart from all others, as out
            is. None: the operator allocates.

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
        "grid": as_grid(grid),
        "positions": positions,
        "mask": mask,
        "suppression": suppression,
        "spatial_weight": spatial_weight,
        "background_suppression": background_suppression,
        "scale_prior": scale_prior,
        "mean_similarity": as_each("mean_similarity", mean_similarity, features),
    }
    num_anchors, num_background = as_count("num_anchors", num_anchors), as_count("num_background", num_background)
    args = (features, scores, num_anchors, num_background)
    if out is None and workspace is None:
        return backends.looked_at(
            functools.partial(tracing.checked, check, *args, **options),
            lambda: Condensed(*backends.run("select_and_merge", backend, args, options)),
            backend,
            features,
        )

    def look() -> None:
        tracing.checked(check, *args, **options)
        if out is not None and not (isinstance(out, tuple) and len(out) == 4):
            raise TypeError(
                f"out: expected (merged, indices, assignment, mass), got {type(out).__name__}. Remedy: the result of "
                "an earlier call."
            )
        written = Condensed(*(fake(*args) if out is None else out))
        tracing.checked(check_out, features, scores, num_anchors + num_background, written)
        if workspace is not None and not torch.compiler.is_compiling():
            tracing.checked(check_workspace, workspace, features, count_bytes(backend, args, options))
        tracing.checked(check_memory, features, scores, written, workspace, **options)

    def run() -> Condensed:
        written = Condensed(*(fake(*args) if out is None else out))
        backends.run("select_and_merge_out", backend, args, {**options, "workspace": workspace, **written._asdict()})
        if not torch.compiler.is_compiling():  # torch does not see what a kernel writes, and autograd has to
            torch.autograd.graph.increment_version(written)
        return written

    return backends.looked_at(look, run, backend, features)


@tracing.leaf()
def workspace_bytes(
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
    background_suppression: float | None = None,
    scale_prior: bool = True,
    mean_similarity: float | torch.Tensor | None = None,  # or [B]
    backend: str = "auto",
) -> int:
    """Return how many bytes of ``workspace`` select_and_merge needs for these arguments, which it has exactly as here.

    Only shapes, dtypes and the device are looked at. On CPU the number depends on torch.get_num_threads(). An operator
    that runs on the reference needs none, and allocates as it pleases. Ask outside of what torch.compile compiles: the
    answer is a number and no tensor.

    Raises:
        TypeError, ValueError: as select_and_merge.
    """
    options = {
        "keys": keys,
        "grid": as_grid(grid),
        "positions": positions,
        "mask": mask,
        "suppression": suppression,
        "spatial_weight": spatial_weight,
        "background_suppression": background_suppression,
        "scale_prior": scale_prior,
        "mean_similarity": as_each("mean_similarity", mean_similarity, features),
    }
    args = features, scores, as_count("num_anchors", num_anchors), as_count("num_background", num_background)
    tracing.unrecorded(check, *args, **options)
    return count_bytes(backend, args, options)
