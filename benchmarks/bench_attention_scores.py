"""attention_scores: the mean of every column of the attention map, against the map itself."""

import baselines
import gates
import torch
from harness import Side, Work, main
from shapes import Shape, make

SHAPES = ("llava15-192", "llava-next-global", "onevision")
HEAD = 64  # channels


def by_head(tokens: torch.Tensor) -> torch.Tensor:  # [B, N, D] -> [B, H, N, d], as an encoder has them: a view
    head = HEAD if tokens.shape[2] % HEAD == 0 else tokens.shape[2]
    return tokens.unflatten(2, (-1, head)).transpose(1, 2)


def sides(shape: Shape, features: torch.Tensor, scores: torch.Tensor) -> dict[str, Side]:
    other = make(shape, seed=1, device=str(features.device))[0]  # or every token would see itself alone
    queries, keys = by_head(features), by_head(other)
    (b, heads, n, d), lse = queries.shape, baselines.log_normalisers(queries, keys)

    def side(call, q: torch.Tensor, k: torch.Tensor, **options) -> Side:
        work = Work(2 * b * heads * n * n * d, q.nbytes + k.nbytes + 4 * b * heads * n)
        return Side(
            lambda: call(q, k), lambda result: gates.check_attention(result, q, k), work, q.dtype, memory=True, **options
        )

    half = queries.bfloat16(), keys.bfloat16()
    half_lse = baselines.log_normalisers(*half)
    attention_scores = torch.ops.condense.attention_scores
    return {
        "full map": side(baselines.attention_by_map, queries, keys, leaves_out="the same bits in every batch"),
        "ours fp32": side(attention_scores, queries, keys),
        "ours bf16": side(attention_scores, *half),
        "ours fp32, lse given": side(lambda q, k: attention_scores(q, k, lse=lse), queries, keys),
        "ours bf16, lse given": side(lambda q, k: attention_scores(q, k, lse=half_lse), *half),
    }


def test_attention_scores(shape_name, interleaved):
    interleaved("attention_scores", shape_name, sides)


if __name__ == "__main__":
    main("attention_scores", sides, SHAPES)
