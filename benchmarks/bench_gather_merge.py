"""gather_merge in PruMerge's shape, each kept token and its 32 nearest, against gather with einsum and a product with
the weights as a matrix."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

SHAPES = ("llava15-192", "llava15-192-projected")  # of 576 tokens, of 1024 and 4096 channels
KEPT, NEAREST = 144, 32


def lists(features: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """neighbours and weights [B, KEPT, NEAREST]."""
    kept = scores.topk(min(KEPT, scores.shape[1])).indices
    z = torch.nn.functional.normalize(features.float(), dim=-1)
    s = z.take_along_dim(kept[..., None], dim=1) @ z.mT
    neighbours = s.topk(min(NEAREST, s.shape[2])).indices
    return neighbours, scores.float()[:, None].expand_as(s).gather(2, neighbours)


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    neighbours, weights = lists(features, scores)
    one, listed, weighed = baselines.one_or_batch(features, neighbours, weights)

    def work(features: torch.Tensor) -> Work:
        rows = shape.num_tokens + neighbours.shape[1]  # read and written
        return Work(2 * neighbours.numel() * features.shape[2], features.nbytes * rows / shape.num_tokens)

    def check(merged: torch.Tensor, features: torch.Tensor = features) -> None:
        for b in gates.ends(shape.batch):
            gates.check_gathered(merged[b], features[b], neighbours[b], weights[b])

    def ours(features: torch.Tensor) -> Side:
        return Side(
            lambda: torch.ops.condense.gather_merge(features, neighbours, weights),
            lambda merged: check(merged, features),
            work(features),
            features.dtype,
        )

    def as_matrix() -> torch.Tensor:
        matrix = torch.zeros(*listed.shape[:-1], shape.num_tokens, device=one.device)
        return baselines.batched(shape.batch, matrix.scatter_(-1, listed, weighed) @ one)

    return {
        "gather, einsum": Side(
            lambda: baselines.batched(shape.batch, baselines.gathered_sum(one, listed, weighed)),
            check,
            work(features),
            leaves_out="neighbours that are none",
        ),
        "scatter, matmul": Side(
            as_matrix, check, work(features), leaves_out="the same; tokens named twice; NaN spreads over all rows"
        ),
        "ours fp32": ours(features),
        "ours bf16": ours(features.bfloat16()),
    }


def test_gather_merge(shape_name, interleaved):
    interleaved("gather_merge", shape_name, sides)


if __name__ == "__main__":
    main("gather_merge", sides, SHAPES)
