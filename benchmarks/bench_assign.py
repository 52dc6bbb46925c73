"""assign given S and the kept tokens, against the same in torch."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import select_and_merge, similarity
from condense_kernels.ops.assign.reference import grid_positions

SHAPES = ("llava15-192", "llava-next-global")


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    s, _, _, tier = similarity(features, scores)
    indices = select_and_merge(features, scores, shape.num_anchors, shape.num_background, grid=shape.grid).indices
    at = grid_positions(list(shape.grid)).float().to(s.device)
    one, kept = baselines.one_or_batch(s, indices)
    # A token and a kept one: the distance is 6 operations and the affinity 2; 4 bytes of S.
    work = Work(8 * indices.numel() * shape.num_tokens, 4 * indices.numel() * shape.num_tokens)

    products = 2 * indices.numel() * shape.num_tokens * shape.channels
    whole = Work(work.flop + products, features.nbytes)

    def with_similarity() -> torch.Tensor:
        of_all, _, _, its_tier = similarity(features)
        return torch.ops.condense.assign(of_all, indices, tier=its_tier, grid=list(shape.grid))

    def check(assignment: torch.Tensor) -> None:
        for b in gates.ends(shape.batch):
            one = gates.exact(features, b)
            gates.check_assignment(assignment[b], one.columns(indices[b]), indices[b], shape.grid, one.bound)

    return {
        "torch": Side(
            lambda: baselines.batched(shape.batch, baselines.nearest_kept(one, kept, at)),
            check,
            work,
            leaves_out="masks, tie rule",
        ),
        "ours": Side(lambda: torch.ops.condense.assign(s, indices, tier=tier, grid=list(shape.grid)), check, work),
        "ours, with similarity": Side(with_similarity, check, whole),
        "ours, from keys": Side(
            lambda: torch.ops.condense.assign_from_keys(features, indices, grid=list(shape.grid)), check, whole
        ),
    }


def test_assign(shape_name, interleaved):
    interleaved("assign", shape_name, sides)


if __name__ == "__main__":
    main("assign", sides, SHAPES)
