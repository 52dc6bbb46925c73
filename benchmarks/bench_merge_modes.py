"""merge's blends and sums, against index_add and against a product with a one-hot matrix, as FastVID merges."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import select_and_merge

SHAPES = ("llava15-192", "llava-next-global", "llava15-192-projected")
CENTRE_WEIGHT = 0.6


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    counts = shape.num_anchors, shape.num_background
    _, indices, assignment, _ = select_and_merge(features, scores, *counts, grid=shape.grid)
    ones = torch.ones_like(scores)
    one, its_ones, its_scores, rows, kept = baselines.one_or_batch(features, ones, scores, assignment, indices)
    blend, total = {"mode": "lerp", "centre_weight": CENTRE_WEIGHT}, {"mode": "sum"}

    def work(features: torch.Tensor) -> Work:
        return Work(2 * features.numel(), features.nbytes * (1 + shape.kept / shape.num_tokens))

    def check(result: tuple, features: torch.Tensor, scores: torch.Tensor, options: dict) -> None:
        merged, mass = result
        for b in gates.ends(shape.batch):
            gates.check_merged(merged[b], mass[b], features[b], scores[b], indices[b], assignment[b], **options)

    def ours(features: torch.Tensor, weights: torch.Tensor | None, options: dict) -> Side:
        return Side(
            lambda: torch.ops.condense.merge(features, weights, indices, assignment, **options),
            lambda result: check(result, features, ones if weights is None else weights, options),
            work(features),
            features.dtype,
        )

    def theirs(call, weights: torch.Tensor, options: dict) -> Side:
        def checked(result: tuple) -> None:
            check(result, features, weights, options)

        return Side(lambda: baselines.batched(shape.batch, call()), checked, work(features), leaves_out="copied rows")

    def blended(mean: torch.Tensor) -> torch.Tensor:
        centres = one.gather(-2, kept[..., None].expand(mean.shape))
        return CENTRE_WEIGHT * centres + (1 - CENTRE_WEIGHT) * mean

    def index_add() -> tuple[torch.Tensor, torch.Tensor]:
        mean, mass = baselines.weighted_mean(one, its_ones, rows, shape.kept)
        return blended(mean), mass

    def one_hot() -> tuple[torch.Tensor, torch.Tensor]:
        members = torch.nn.functional.one_hot(rows, shape.kept).to(one.dtype).mT
        mass = members.sum(dim=-1)
        return blended(members @ one / mass[..., None]), mass

    return {
        "index_add, lerp": theirs(index_add, ones, blend),
        "one-hot matmul, lerp": theirs(one_hot, ones, blend),
        "ours fp32, lerp": ours(features, None, blend),
        "ours bf16, lerp": ours(features.bfloat16(), None, blend),
        "index_add, sum": theirs(lambda: baselines.weighted_sums(one, its_scores, rows, shape.kept), scores, total),
        "ours fp32, sum": ours(features, scores, total),
    }


def test_merge_modes(shape_name, interleaved):
    interleaved("merge_modes", shape_name, sides)


if __name__ == "__main__":
    main("merge_modes", sides, SHAPES)
