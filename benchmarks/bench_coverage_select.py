"""coverage_select given S and from features, against SCOPE's loop in torch."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape

from condense_kernels import coverage_select

SHAPES = ("llava15-64", "llava15-192", "llava-next-global")


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    op, pairs = torch.ops.condense, shape.batch * shape.num_tokens**2
    s = op.similarity(features)[0].contiguous()
    one, one_features, saliency = baselines.one_or_batch(s, features, scores)
    # Each token's gain has to be known once; how often again depends on the values.
    given = Work(2 * pairs, 4 * pairs)
    whole = Work((shape.channels + 2) * pairs, features.nbytes)

    def check(order: torch.Tensor) -> None:
        gates.check_coverage(order, features, scores)

    def check_bits(order: torch.Tensor) -> None:
        check(order)
        if shape.num_tokens <= gates.EVERY_PICK:  # the reference computes every gain at every step
            gates.equal("order", order, coverage_select(s, shape.kept, weight=scores, backend="reference"))

    result = {
        "ours": Side(lambda: op.coverage_select(s, shape.kept, weight=scores), check_bits, given),
        "ours from features": Side(
            lambda: op.coverage_select(op.similarity(features)[0], shape.kept, weight=scores), check, whole
        ),
    }
    for name, loop in (("SCOPE", baselines.scope), ("in place", baselines.coverage_in_place)):

        def call(s: torch.Tensor, loop=loop) -> torch.Tensor:
            return baselines.batched(shape.batch, loop(s, saliency, shape.kept))

        def from_features(call=call) -> torch.Tensor:
            return call(baselines.matmul(baselines.unit(one_features)))

        result[name] = Side(lambda call=call: call(one), check, given, capturable=False)
        result[f"{name} from features"] = Side(from_features, check, whole, capturable=False)
    return result


def test_coverage_select(shape_name, interleaved):
    interleaved("coverage_select", shape_name, sides)


if __name__ == "__main__":
    main("coverage_select", sides, SHAPES)
