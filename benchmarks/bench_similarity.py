"""similarity: S with its means, against the bare matrix product and against all of it in torch; with the nearest
tokens, and of distances."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels.testing import unit_roundoff

SHAPES = ("llava15-192", "llava-next-global", "onevision")


def matmul_side(shape: Shape, features: torch.Tensor) -> Side:  # [B, N, D]
    z = baselines.unit(features)
    work = Work(
        2 * shape.batch * shape.num_tokens**2 * shape.channels, z.nbytes + 4 * shape.batch * shape.num_tokens**2
    )
    return Side(
        lambda: baselines.matmul(z),
        lambda s: gates.check_gram(s, features),
        work,
        leaves_out="norms; all that follows S",
    )


def half_matmul_side(shape: Shape, features: torch.Tensor) -> Side:  # [B, N, D]
    z = baselines.unit(features).bfloat16()
    work = Work(
        2 * shape.batch * shape.num_tokens**2 * shape.channels, z.nbytes + 2 * shape.batch * shape.num_tokens**2
    )
    rounding = 2 * unit_roundoff(torch.bfloat16)
    return Side(
        lambda: baselines.matmul(z),
        lambda s: gates.check_gram(s, z, rounding),
        work,
        torch.bfloat16,
        leaves_out="norms; all that follows S, which has 8 bits",
    )


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    pairs = shape.batch * shape.num_tokens * (shape.num_tokens + 1) / 2

    def ours(features: torch.Tensor) -> Side:
        def check(result: tuple) -> None:
            s, sbar, g, tier = result
            gates.check_gram(s, features)
            gates.check_means(sbar, g, features)
            gates.equal("tier", tier, torch.zeros_like(tier))

        work = Work(2 * pairs * shape.channels, features.nbytes + 4 * shape.batch * shape.num_tokens**2)
        return Side(lambda: torch.ops.condense.similarity(features, scores), check, work, features.dtype)

    def with_nearest(metric: str) -> Side:
        def check(result: tuple) -> None:
            check_s(result[0], features)
            gates.check_nearest(result[4], result[0])

        check_s = gates.check_gram if metric == "cosine" else gates.check_distances
        work = Work(
            (2 if metric == "cosine" else 3) * pairs * shape.channels,
            features.nbytes + 4 * shape.batch * shape.num_tokens**2,
        )
        call = torch.ops.condense.similarity_and_nearest
        return Side(lambda: call(features, scores, metric=metric), check, work, features.dtype)

    def nearest_in_torch(s: torch.Tensor) -> torch.Tensor:
        itself = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
        return s.masked_fill(itself, -torch.inf).amax(dim=2)

    def distances_in_torch() -> tuple:
        s = -torch.cdist(features, features)
        return s, nearest_in_torch(s)

    def check_distances_in_torch(result: tuple) -> None:
        gates.check_distances(result[0], features, cancels=True)
        gates.check_nearest(result[1], result[0])

    def cosines_and_nearest_in_torch() -> tuple:
        s = in_torch()[0]
        return s, nearest_in_torch(s)

    def check_nearest_in_torch(result: tuple) -> None:
        gates.check_gram(result[0], features)
        gates.check_nearest(result[1], result[0])

    def in_torch() -> tuple:
        s = baselines.matmul(baselines.unit(features))
        return s, s.abs().mean(dim=(1, 2)), s.sum(dim=2)

    def check_torch(result: tuple) -> None:
        gates.check_gram(result[0], features)
        gates.check_means(*result[1:], features)

    return {
        "matmul": matmul_side(shape, features),
        **({"matmul bf16": half_matmul_side(shape, features)} if features.is_cuda else {}),
        "ours fp32": ours(features),
        "ours bf16": ours(features.bfloat16()),
        "torch": Side(in_torch, check_torch, leaves_out="tiers; the same bits in every batch"),
        "ours fp32 nearest": with_nearest("cosine"),
        "torch nearest": Side(cosines_and_nearest_in_torch, check_nearest_in_torch, leaves_out="tiers"),
        "ours fp32 neg_l2": with_nearest("neg_l2"),
        "torch cdist": Side(
            distances_in_torch, check_distances_in_torch, leaves_out="tiers, means; tokens close to each other"
        ),
    }


def test_similarity(shape_name, interleaved):
    interleaved("similarity", shape_name, sides)


if __name__ == "__main__":
    main("similarity", sides, SHAPES)
