"""select_and_merge against what it replaces, and against the matrix product that every method on S pays."""

from collections.abc import Callable

import baselines
import gates
import torch
from bench_greedy_select import top_k_side
from bench_similarity import half_matmul_side, matmul_side
from harness import Side, Work, main
from shapes import Shape

from condense_kernels.ops.assign.reference import grid_positions

SHAPES = (
    "overhead",
    "llava15-64",
    "llava15-128",
    "llava15-192",
    "llava15-192-projected",
    "llava15-64-batch8",
    "llava-next-crops",
    "llava-next-global",
    "onevision",
    "video-128",
    "long-16384",
)
LONG = ("long-65536",)

STORED = 8192  # tokens; above, nothing is timed that keeps S whole
BLOCK = 1024  # rows of S at a time
VISIONZIP_CONTEXTUAL = 10 / 64  # of the kept tokens, as in its paper


def ours_side(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> Side:
    grid = list(shape.grid)
    pairs = shape.batch * shape.num_tokens * (shape.num_tokens + 1) / 2
    work = Work(2 * pairs * shape.channels, features.nbytes * (1 + shape.kept / shape.num_tokens))
    return Side(
        lambda: torch.ops.condense.select_and_merge(
            features, scores, shape.num_anchors, shape.num_background, grid=grid
        ),
        lambda result: gates.check_condensed(result, features, scores, shape),
        work,
        features.dtype,
        memory=features.dtype == torch.float32 and shape.num_tokens >= 64,
    )


def blocked_matmul_side(shape: Shape, features: torch.Tensor) -> Side:  # [1, N, D]
    z = baselines.unit(features)[0]
    block = features.new_empty(BLOCK, shape.num_tokens)
    last = torch.arange(shape.num_tokens - BLOCK, shape.num_tokens, device=z.device)

    def check(rows: torch.Tensor) -> None:
        one = gates.exact(features, 0)
        gates.hold("s, last block", (rows - one.columns(last).T).abs(), one.bound)

    return Side(
        lambda: baselines.blocked_matmul(z, block),
        check,
        Work(2 * shape.num_tokens**2 * shape.channels, z.nbytes),
        leaves_out="norms; all that follows S, which is not kept",
    )


def visionzip_side(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> Side:
    one, its_scores = baselines.one_or_batch(features, scores)
    contextual = max(1, int(shape.kept * VISIONZIP_CONTEXTUAL))
    counts = shape.kept - contextual, contextual
    return Side(
        lambda: baselines.batched(shape.batch, baselines.visionzip(one, its_scores, *counts)),
        lambda result: gates.check_visionzip(result, features, scores, *counts),
        leaves_out="S, greedy choice, distance; keys are the features",
        capturable=False,
    )


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    ours = {
        "ours fp32": ours_side(shape, features, scores),
        "ours bf16": ours_side(shape, features.bfloat16(), scores.bfloat16()),
    }
    top_k = {"top-k": top_k_side(shape, features, scores)}
    if shape.num_tokens < 64:  # the price of a call
        return ours | top_k
    light = top_k | {"VisionZip": visionzip_side(shape, features, scores)}
    if shape.num_tokens > STORED:
        return {"matmul, blocked": blocked_matmul_side(shape, features)} | ours | light

    at = grid_positions(list(shape.grid)).float().to(features.device)
    one, its_scores = baselines.one_or_batch(features, scores)

    def plain(greedy: Callable, leaves_out: str = "masks, tie rules, NaN; batch-invariant bits", **options) -> Side:
        return Side(
            lambda: baselines.batched(
                shape.batch, baselines.condense(one, its_scores, shape.num_anchors, shape.num_background, at, greedy)
            ),
            lambda result: gates.check_condensed(result, features, scores, shape),
            leaves_out=leaves_out,
            capturable=False,
            **options,
        )

    def selection(select: Callable, define: Callable, *prior: torch.Tensor, leaves_out: str) -> Side:
        return Side(
            lambda: baselines.batched(shape.batch, select(baselines.matmul(baselines.unit(one)), *prior, shape.kept)),
            lambda order: gates.check_loop(order, features, define, *([scores] if prior else [])),
            leaves_out=leaves_out,
            capturable=False,
        )

    result = {"matmul": matmul_side(shape, features)}
    if features.is_cuda:
        result["matmul bf16"] = half_matmul_side(shape, features)
    result |= ours
    result["plain loop"] = plain(baselines.greedy_running_maximum, memory=True)
    if shape.batch * shape.kept < 1024:
        result["plain loop, as printed"] = plain(baselines.greedy_as_printed)
    if shape.batch == 1 and shape.num_tokens in baselines.COMPILED:
        result["plain loop, compiled"] = plain(baselines.greedy_compiled)
    result["DivPrune"] = selection(
        baselines.divprune, gates.divprune_definition, leaves_out="importance, gather, merging"
    )
    result["CDPruner"] = selection(
        baselines.cdpruner, gates.cdpruner_definition, its_scores, leaves_out="relevance from text, gather, merging"
    )
    result["IDPruner"] = selection(
        baselines.idpruner, gates.idpruner_definition, its_scores, leaves_out="gather, merging"
    )
    return result | light


def test_select_and_merge(shape_name, interleaved):
    interleaved("select_and_merge", shape_name, sides)


if __name__ == "__main__":
    main("select_and_merge", sides, SHAPES)
