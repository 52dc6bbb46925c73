"""dpc_knn given negated distances and from features, against the published function in torch."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

SHAPES = ("llava15-64", "llava15-192", "llava-next-global")


def negated_distances(features: torch.Tensor) -> torch.Tensor:  # [B, N, D] -> [B, N, N]
    return torch.ops.condense.similarity_and_nearest(features, metric="neg_l2")[0]


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    s, scale = negated_distances(features), shape.channels**-0.5
    distances = torch.cdist(features, features)
    pairs = shape.batch * shape.num_tokens**2
    given = Work(2 * pairs, 4 * pairs)  # every distance is compared with the nearest so far, and with a denser one's
    whole = Work((2 * shape.channels + 2) * pairs, features.nbytes)
    op = torch.ops.condense.dpc_knn
    result = {}
    for k_nn in (5, shape.kept):

        def check(found, k_nn: int = k_nn) -> None:
            order = found[0] if isinstance(found, tuple) else found
            gates.check_density_peaks(order, features, k_nn, scale)

        def side(call, work: Work, check=check, **options) -> Side:
            return Side(call, check, work, **options)

        leaves_out = {"leaves_out": "ties, masks"}
        result |= {
            f"ours, k_nn = {k_nn}": side(lambda k_nn=k_nn: op(s, shape.kept, k_nn, scale=scale), given),
            f"published, k_nn = {k_nn}": side(
                lambda k_nn=k_nn: baselines.dpc_knn(distances * scale, shape.kept, k_nn), given, **leaves_out
            ),
            f"ours from features, k_nn = {k_nn}": side(
                lambda k_nn=k_nn: op(negated_distances(features), shape.kept, k_nn, scale=scale), whole
            ),
            f"published from features, k_nn = {k_nn}": side(
                lambda k_nn=k_nn: baselines.dpc_knn(torch.cdist(features, features) * scale, shape.kept, k_nn),
                whole,
                **leaves_out,
            ),
        }
    return result


def test_dpc_knn(shape_name, interleaved):
    interleaved("dpc_knn", shape_name, sides)


if __name__ == "__main__":
    main("dpc_knn", sides, SHAPES)
