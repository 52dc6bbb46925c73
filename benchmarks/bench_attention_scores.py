"""attention_scores: the mean of every column of the attention map, against the map itself."""

import functools

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
    attention_scores = torch.ops.condense.attention_scores

    def side(call, queries: torch.Tensor, keys: torch.Tensor, leaves_out: str = "") -> Side:
        b, heads, n, d = queries.shape
        return Side(
            lambda: call(queries, keys),
            lambda result: gates.check_attention(result, queries, keys),
            Work(2 * b * heads * n * n * d, queries.nbytes + keys.nbytes + 4 * b * heads * n),
            queries.dtype,
            leaves_out,
            memory=queries.dtype == torch.float32,
        )

    result = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        queries, keys = by_head(features.to(dtype)), by_head(other.to(dtype))
        if not result:
            result["full map"] = side(baselines.attention_by_map, queries, keys, "the same bits in every batch")
        result[f"ours {name}"] = side(attention_scores, queries, keys)
        given = functools.partial(attention_scores, lse=baselines.log_normalisers(queries, keys))
        result[f"ours {name}, lse given"] = side(given, queries, keys)
    return result


def test_attention_scores(shape_name, interleaved):
    interleaved("attention_scores", shape_name, sides)


if __name__ == "__main__":
    main("attention_scores", sides, SHAPES)
