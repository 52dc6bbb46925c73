"""A packed batch of pictures of different sizes, against padding them to one size and against one call each."""

import functools
import itertools

import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import Condensed, varlen_budget
from condense_kernels.ops.assign.reference import grid_positions

SHAPES = ("llava-next-crops", "llava15-64-batch8", "tiny-4096")


def lengths_of(shape: Shape) -> list[int]:
    """Whole rows of the grid, between a quarter of them and all; the first picture is full."""
    height, width = shape.grid
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-(-height // 4), height + 1, (shape.batch,), generator=generator).tolist()
    return [height * width, *(n * width for n in rows[1:])]


class Packed:
    """A packed batch, and each of its pictures alone."""

    def __init__(self, shape: Shape, features: torch.Tensor, scores: torch.Tensor):  # [B, N, D], [B, N]
        lengths = lengths_of(shape)
        self.budget = varlen_budget(lengths, keep=shape.kept / shape.num_tokens, device=features.device)
        places = torch.arange(shape.num_tokens, device=features.device)
        self.valid = places < torch.tensor(lengths, device=features.device)[:, None]  # [B, N]
        grid = grid_positions(list(shape.grid)).to(features.device)
        self.features, self.scores = features[self.valid], scores[self.valid]  # [T, D], [T]
        self.positions = grid.expand(shape.batch, -1, -1)[self.valid]  # [T, 2]
        anchors, background = (cu.diff().tolist() for cu in self.budget[1:3])
        cu_kept = self.budget.cu_anchors + self.budget.cu_background
        self.tokens = [slice(*ends) for ends in itertools.pairwise(self.budget.cu_seqlens.tolist())]
        self.rows = [slice(*ends) for ends in itertools.pairwise(cu_kept.tolist())]
        self.counts = list(zip(anchors, background, strict=True))
        self.pairs = sum(n * (n + 1) / 2 for n in lengths)

    def at_once(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.condense.select_and_merge_varlen(features, self.scores, *self.budget, positions=self.positions)

    def alone(self, features: torch.Tensor, b: int) -> tuple[torch.Tensor, ...]:
        image = self.tokens[b]
        return torch.ops.condense.select_and_merge(
            features[None, image], self.scores[None, image], *self.counts[b], positions=self.positions[image]
        )

    def one_by_one(self) -> tuple[torch.Tensor, ...]:
        results = [self.alone(self.features, b) for b in range(len(self.tokens))]
        return tuple(torch.cat(column, dim=1)[0] for column in zip(*results, strict=True))

    def check(self, features: torch.Tensor, result: tuple) -> None:
        """The dense operator, picture by picture, is held to the definition in its own benchmark."""
        merged, indices, assignment, mass = result
        for b in gates.ends(len(self.tokens)):
            image, rows = self.tokens[b], self.rows[b]
            found = merged[rows], indices[rows], assignment[image], mass[rows]
            for name, whole, part in zip(Condensed._fields, found, self.alone(features, b), strict=True):
                gates.equal(name, whole, part[0])


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    packed = Packed(shape, features, scores)

    def work(features: torch.Tensor) -> Work:
        return Work(2 * packed.pairs * shape.channels, features.nbytes * (1 + shape.kept / shape.num_tokens))

    def ours(features: torch.Tensor) -> Side:
        check = functools.partial(packed.check, features)
        return Side(lambda: packed.at_once(features), check, work(features), features.dtype)

    def padded() -> tuple[torch.Tensor, ...]:
        return torch.ops.condense.select_and_merge(
            features, scores, shape.num_anchors, shape.num_background, grid=list(shape.grid), mask=packed.valid
        )

    def check_padded(result: tuple) -> None:  # keeps as many of every picture, so other tokens
        gates.equal("assignment", result[2] >= 0, packed.valid)

    return {
        "ours, padded": Side(padded, check_padded, leaves_out="budgets by size: it keeps as many of each"),
        "ours, one by one": Side(
            packed.one_by_one, functools.partial(packed.check, packed.features), work(packed.features)
        ),
        "ours fp32": ours(packed.features),
        "ours bf16": ours(packed.features.bfloat16()),
    }


def test_select_and_merge_varlen(shape_name, interleaved):
    interleaved("select_and_merge_varlen", shape_name, sides)


if __name__ == "__main__":
    main("select_and_merge_varlen", sides, SHAPES)
