"""dpp_select: the loop given S, and the whole call from features, beside CDPruner's loop written in torch."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import dpp_select, similarity

SHAPES = ("llava15-64", "llava15-192", "llava-next-global")


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    s = similarity(features)[0].contiguous()
    relevance = baselines.cdpruner_relevance(scores)
    one_features, one_s, one_relevance = baselines.one_or_batch(features, s, relevance)
    expected = dpp_select(s, relevance, shape.kept, backend="reference")
    b, n, k = shape.batch, shape.num_tokens, shape.kept
    # Products with the picks before, as pairs of a multiplication and a subtraction; the factor is written and read.
    loop = Work(b * n * k * k, 4 * b * n * k * (k + 1) // 2)
    whole = Work(loop.flop + b * n * n * shape.channels, features.nbytes)

    def check(order: torch.Tensor) -> None:
        gates.check_loop(order, features, gates.cdpruner_definition, relevance)

    def torch_side(call, work: Work) -> Side:
        return Side(lambda: baselines.batched(b, call()), check, work, leaves_out="ties, rank", capturable=False)

    return {
        "loop": Side(
            lambda: torch.ops.condense.dpp_select(s, relevance, k),
            lambda order: gates.equal("order", order, expected),
            loop,
        ),
        "loop, CDPruner": torch_side(lambda: baselines.cdpruner(one_s, one_relevance, k), loop),
        "whole": Side(lambda: torch.ops.condense.dpp_select_from_keys(features, relevance, k), check, whole),
        "whole, CDPruner": torch_side(lambda: baselines.cdpruner_from_features(one_features, one_relevance, k), whole),
    }


def test_dpp_select(shape_name, interleaved):
    interleaved("dpp_select", shape_name, sides)


if __name__ == "__main__":
    main("dpp_select", sides, SHAPES)
