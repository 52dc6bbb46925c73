"""merge_backward against torch's own gradient of index_add."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import select_and_merge

SHAPES = ("llava15-192", "llava15-64-batch8", "llava-next-global", "llava15-192-projected")


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    counts = shape.num_anchors, shape.num_background

    def gradients_of(merged: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randn(t.shape, generator=generator).to(t.dtype).to(t.device) for t in (merged, mass))

    def ours(features: torch.Tensor, scores: torch.Tensor) -> Side:
        merged, indices, assignment, mass = select_and_merge(features, scores, *counts, grid=shape.grid)
        arguments = (*gradients_of(merged, mass), features, scores, merged, mass, indices, assignment)

        def check(result: tuple) -> None:
            for b in gates.ends(shape.batch):
                gates.check_gradients(*(grad[b] for grad in result), *(t[b : b + 1] for t in arguments))

        work = Work(5 * features.numel(), features.nbytes * (2 + 2 * shape.kept / shape.num_tokens))
        return Side(lambda: torch.ops.condense.merge_backward(*arguments), check, work, features.dtype)

    def by_autograd() -> Side:
        merged, indices, assignment, mass = select_and_merge(features, scores, *counts, grid=shape.grid)
        gradients = gradients_of(merged, mass)
        leaves = features.clone().requires_grad_(), scores.clone().requires_grad_()
        one, its_scores, rows = baselines.one_or_batch(*leaves, assignment)
        results = baselines.batched(shape.batch, baselines.weighted_mean(one, its_scores, rows, shape.kept))

        def check(result: tuple) -> None:
            arguments = (*gradients, features, scores, merged, mass, indices, assignment)
            for b in gates.ends(shape.batch):
                gates.check_gradients(*(grad[b] for grad in result), *(t[b : b + 1] for t in arguments))

        def call() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(results, leaves, gradients, retain_graph=True)

        return Side(call, check, leaves_out="zero mass", capturable=False, inference=False)

    return {
        "index_add, autograd": by_autograd(),
        "ours fp32": ours(features, scores),
        "ours bf16": ours(features.bfloat16(), scores.bfloat16()),
    }


def test_merge_backward(shape_name, interleaved):
    interleaved("merge_backward", shape_name, sides)


if __name__ == "__main__":
    main("merge_backward", sides, SHAPES)
