"""merge given the assignment, against index_add and a product with a one-hot matrix."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import select_and_merge

SHAPES = ("llava15-192", "llava-next-global", "llava15-192-projected")


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    counts = shape.num_anchors, shape.num_background
    _, indices, assignment, _ = select_and_merge(features, scores, *counts, grid=shape.grid)
    one, its_scores, rows = baselines.one_or_batch(features, scores, assignment)

    def work(features: torch.Tensor) -> Work:
        return Work(2 * features.numel(), features.nbytes * (1 + shape.kept / shape.num_tokens))

    def check(result: tuple, features: torch.Tensor = features) -> None:
        merged, mass = result
        for b in gates.ends(shape.batch):
            gates.check_merged(merged[b], mass[b], features[b], scores[b], indices[b], assignment[b])

    def ours(features: torch.Tensor) -> Side:
        return Side(
            lambda: torch.ops.condense.merge(features, scores, indices, assignment),
            lambda result: check(result, features),
            work(features),
            features.dtype,
        )

    def one_hot() -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.zeros(*rows.shape[:-1], shape.kept, shape.num_tokens, device=rows.device)
        weights.scatter_(-2, rows[..., None, :], its_scores[..., None, :])
        mass = weights.sum(dim=-1)
        return baselines.batched(shape.batch, (weights @ one / mass[..., None], mass))

    return {
        "index_add": Side(
            lambda: baselines.batched(shape.batch, baselines.weighted_mean(one, its_scores, rows, shape.kept)),
            check,
            work(features),
            leaves_out="rows copied bit for bit, zero mass",
        ),
        "one-hot matmul": Side(one_hot, check, work(features), leaves_out="the same; NaN spreads over all rows"),
        "ours fp32": ours(features),
        "ours bf16": ours(features.bfloat16()),
    }


def test_merge(shape_name, interleaved):
    interleaved("merge", shape_name, sides)


if __name__ == "__main__":
    main("merge", sides, SHAPES)
