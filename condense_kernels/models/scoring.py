"""Importance of each patch (Eq. 1), from one attention module of a vision encoder, while that runs as it always does.

No attention map is made and no attention implementation replaced: the encoder goes on with its own.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from ..ops.attention_scores import attention_scores
from ..ops.attention_scores_varlen import attention_scores_varlen
from .interface import attention_named
from .timing import Stopwatch

TAPPED = "condense_scores"
CLASS_TOKENS = ("class_embedding", "cls_token")
# Queries and keys are plain projections of the hidden states here: neither rotated nor normalised.
RECOMPUTED = ("CLIPAttention", "SiglipAttention", "SmolVLMVisionAttention", "Idefics3VisionAttention")


def has_class_token(tower: torch.nn.Module) -> bool:
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in tower.named_parameters())


def attention_of(tower: torch.nn.Module, layer: int) -> tuple[str, torch.nn.Module]:
    """The attention module of one layer, and its path: the layers are the longest list of modules in the encoder."""
    lists = [(name, m) for name, m in tower.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0]
    for name, layers in sorted(lists, key=lambda found: -len(found[1])):
        index = layer % len(layers)
        for child, module in layers[index].named_children():
            taken = is_recomputed(module) or hasattr(module, "config")
            if taken and "attention" in type(module).__name__.lower():
                return f"{name}.{index}.{child}", module
    raise ValueError(
        "model: expected a vision encoder with layers of attention modules of transformers, found none in "
        f"{type(tower).__name__}. Remedy: an issue that names the model."
    )


def is_recomputed(attention: torch.nn.Module) -> bool:
    return type(attention).__name__ in RECOMPUTED


Attended = tuple[torch.Tensor, torch.Tensor, float | None, torch.Tensor | None]  # queries, keys, scale, mask


class Recorder:
    """What one attention module attended to in one run of the encoder, and the scores of that."""

    def __init__(self, class_token: bool, segments: Sequence[int] | None, watch: Stopwatch) -> None:
        self.class_token = class_token
        self.segments = segments  # patches of each image, of encoders that run all of them as one sequence
        self.watch = watch
        self.calls: list[Callable[[], Attended]] = []  # of the module

    def flat(self) -> torch.Tensor:
        """[patches of all images]. Not while the layer runs: under gradient checkpointing it runs again in the backward
        pass, where it must do what it did, and no more."""
        if not self.calls:
            raise ValueError(
                "model: expected the attention module that handle.report() names to run, and by transformers' "
                "attention interface, got no call. Remedy: an issue that names the model."
            )
        with self.watch.span("scores"):
            return torch.cat([self.scores(*attended()).flatten() for attended in self.calls])

    def scores(
        self,
        queries: torch.Tensor,  # [B, H, M, d]
        keys: torch.Tensor,  # [B, Hkv, P, d]
        scale: float | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:  # [B, patches]
        if self.class_token:
            return attention_scores(queries[:, :, :1], keys, scale=scale, columns=(1, None))
        if self.segments is not None and len(self.segments) > 1 and sum(self.segments) == keys.shape[2]:
            return packed_means(queries, keys, scale, self.segments)
        return column_means(queries, keys, scale, valid_tokens(mask))


def packed_means(
    queries: torch.Tensor, keys: torch.Tensor, scale: float | None, segments: Sequence[int]
) -> torch.Tensor:  # [1, P]
    ends = torch.tensor([0, *segments], dtype=torch.int32, device=keys.device).cumsum(0, dtype=torch.int32)
    queries, keys = queries[0].transpose(0, 1), keys[0].transpose(0, 1)  # [P, H, d]
    return attention_scores_varlen(queries, keys, ends, max(segments), scale=scale)[None]


def column_means(
    queries: torch.Tensor, keys: torch.Tensor, scale: float | None, valid: torch.Tensor | None
) -> torch.Tensor:  # [B, P]
    if valid is None:
        return attention_scores(queries, keys, scale=scale)
    rows = torch.arange(valid.shape[1], dtype=torch.int64, device=valid.device).expand(valid.shape)
    return attention_scores(queries, keys, rows=rows.masked_fill(~valid, -1), mask=valid, scale=scale)


def valid_tokens(mask: torch.Tensor | None) -> torch.Tensor | None:  # [B, P] bool
    """The keys that some query sees; None where that is all of them."""
    if not isinstance(mask, torch.Tensor):
        return None
    seen = mask if mask.dtype == torch.bool else mask > -1 if mask.is_floating_point() else mask != 0
    valid = seen.any(dim=1).any(dim=1) if seen.dim() == 4 else seen
    return None if bool(valid.all()) else valid


@contextlib.contextmanager
def recording(attention: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    with recomputing(attention, recorder) if is_recomputed(attention) else tapping(attention, recorder):
        yield


@contextlib.contextmanager
def recomputing(attention: Any, recorder: Recorder) -> Iterator[None]:
    """Queries and keys anew from what the module gets and its own weights: of [CLS] alone one query."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, H, P, d]

    def before(module: Any, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]  # [B, P, D]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")

        def attended() -> Attended:
            queries = module.q_proj(x[:, :1] if recorder.class_token else x)
            return heads(queries), heads(module.k_proj(x)), getattr(module, "scale", None), mask

        recorder.calls.append(attended)

    hook = attention.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def tapping(attention: Any, recorder: Recorder) -> Iterator[None]:
    """The module alone gets a copy of its config that names another attention function: ours, which scores the final
    queries and keys and hands on to the function that the module has."""
    own = attention.config
    copied = copy.copy(own)
    copied._attn_implementation = TAPPED
    copied.condense_tap = (own, recorder)
    attention.config = copied
    try:
        yield
    finally:
        attention.config = own


def tapped_attention(
    module: Any,
    query: torch.Tensor,  # [B, H, P, d], after positions and norms
    key: torch.Tensor,  # [B, Hkv, P, d]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tapped = module.config
    own, recorder = tapped.condense_tap
    recorder.calls.append(lambda: (query, key, kwargs.get("scaling"), attention_mask))
    attention = attention_named(module, own)
    module.config = own
    try:
        return attention(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = tapped


AttentionInterface.register(TAPPED, tapped_attention)
