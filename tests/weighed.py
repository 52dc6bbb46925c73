"""Oracles of proportional attention, from stock models alone: tokens repeated as often as there are tokens in them, and
eager attention with the bias added to its mask."""

import copy
import math
import sys

import oracles
import torch
import transformers
import zoo
from zoo import IMAGE

import condense_kernels


class Condensed:
    """What the paper's method makes of a batch: condensed features, and how many tokens went into each."""

    def __init__(self, case: zoo.Case, rows: zoo.Rows, keep: int):
        self.case, self.rows = case, rows
        batch = case.inputs(rows)
        encoded = oracles.encode(case, rows, batch)
        scores, grids = oracles.scores(case, rows, batch), oracles.grids(case, rows)
        results = [
            condense_kernels.condense(features[None], score[None], keep, grid=grid)
            for features, score, grid in zip(encoded.features, scores, grids, strict=True)
        ]
        self.selection = [result.indices[0] for result in results]
        self.features = [result.merged[0] for result in results]
        self.sizes = [[result.assignment[0].tolist().count(row) for row in range(keep)] for result in results]
        self.planes = [
            [weighted_mean(*of) for of in zip(plane, scores, results, strict=True)] for plane in encoded.planes
        ]

    def prompts(self):
        """Of each row alone the arguments of the stock model, and log(size) of its tokens: [1, L']."""
        given = oracles.removed(self.case, self.rows, self.selection, self.features, self.planes)
        sizes = iter(self.sizes)
        for row, alone in zip(self.rows, given, strict=True):
            visual = [size for _ in range(sum(self.case.crops(row))) for size in next(sizes)]
            logs = torch.zeros(alone["input_ids"].shape)
            logs[alone["input_ids"] == IMAGE] = torch.tensor([math.log(size) for size in visual])
            yield alone, logs


def weighted_mean(features, scores, result):
    """Eq. 8."""
    rows = (result.assignment[0] == torch.arange(result.merged.shape[1])[:, None]).float() * scores
    return rows / rows.sum(1, keepdim=True) @ features


def with_bias(model: transformers.PreTrainedModel, logs: torch.Tensor) -> transformers.PreTrainedModel:
    """A copy whose language model attends by its own eager function, with the bias in the mask: sinks and soft caps
    are what they were. For calls of the whole prompt and what follows, without a cache."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")

    def biased(module, query, key, value, attention_mask, **kwargs):
        bias = torch.nn.functional.pad(logs, (0, key.shape[2] - logs.shape[1]))[:, None, None]
        bias = bias.expand(len(key) // len(logs) * len(logs), -1, -1, -1)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, bias if attention_mask is None else attention_mask + bias, **kwargs)

    transformers.AttentionInterface.register("biased_eager", biased)
    for module in model.base_model.get_decoder().modules():
        if type(module).__name__.endswith("Attention"):
            module.config = copy.deepcopy(module.config)
            module.config._attn_implementation = "biased_eager"
    return model


def followed_by(case: zoo.Case, alone: dict, tokens: torch.Tensor) -> dict:
    """The arguments of the stock model for the prompt and ``tokens`` [1, n] in one call."""
    n = tokens.shape[1]
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    more |= {name: torch.full_like(tokens, text) for name, (text, _) in case.family.types.items() if name in alone}
    result = {**alone, **{name: torch.cat([alone[name], values], 1) for name, values in more.items()}}
    if "position_ids" in alone:  # M-RoPE, and the text's own
        positions = alone["position_ids"]
        last = positions.amax(-1, keepdim=True)
        last[1:] = positions[1:].amax()
        result["position_ids"] = torch.cat([positions, last + 1 + torch.arange(n)], -1)
    return result


def repeated(case: zoo.Case, alone: dict, logs: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Of a model with positions along one axis: each token as often as its size, at one position, where copies see each
    other, so that they stay alike. And where the first of each is."""
    sizes = logs[0].exp().round().long()
    token = torch.arange(len(sizes)).repeat_interleave(sizes)
    image = alone["mm_encoder_outputs"]["image"]
    visual = alone["input_ids"][0] == IMAGE
    features = torch.cat(list(image.pooler_output)).repeat_interleave(sizes[visual], 0)
    given = {
        "input_ids": alone["input_ids"][:, token],
        "position_ids": token[None],
        "attention_mask": (token[:, None] >= token)[None, None],
        "mm_encoder_outputs": {"image": type(image)(pooler_output=[features])},
    }
    return given, sizes.cumsum(0) - sizes
