"""Proportional attention (ToMe): a visual token counts as often in the language model as there are tokens in it.

log(size) is added to the logits of its key, in each layer, by an attention function that hands on to the one that the
model has. The cache holds the model's own keys.
"""

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Cache

from .interface import attention_named, goes_by_interface

PROPORTIONAL = "condense_proportional"  # the attention function's name
BIAS = "condense_bias"  # its argument, which the language model hands on to each layer
MASKED = ("eager", "sdpa")  # functions that add a mask to the logits; others may take none, or one of their own
FOLDED = 8  # channels more: flash attention wants a multiple
PARTS = 3  # numbers in bfloat16 which sum up to one in float32
WIDEST = 256  # of a head in flash attention


class KeyBias:
    """log(size) of the tokens of a condensed prompt, 0 of text, for the layers of one call of forward."""

    def __init__(self, logs: torch.Tensor, total: int) -> None:
        self.logs = logs  # [B, L'] fp32
        self.total = total  # tokens so far, with those of this call, where layers forget some; else 0
        self.asked = False
        self.masks: list[tuple] = []  # made once for all layers of one kind

    def of_keys(self, rows: int, count: int) -> torch.Tensor | None:
        """[rows, count] of a layer's keys: the first tokens of all, or the last where it holds a window of them. None:
        no token of the prompt is among them."""
        self.asked = True
        start = max(self.total - count, 0)
        if start >= self.logs.shape[1]:
            return None
        part = self.logs[:, start : start + count]
        return F.pad(part, (0, count - part.shape[1])).repeat_interleave(rows // len(part), dim=0)

    def mask(
        self, attention_mask: torch.Tensor | None, logs: torch.Tensor, query: torch.Tensor, causal: bool
    ) -> torch.Tensor:  # [B, 1, M or 1, N]
        """What is added to the logits, with what the model hides: by a mask, or where causal without one."""
        m, n, dtype = query.shape[2], logs.shape[1], query.dtype
        for mask, *sizes, made in self.masks:
            if mask is attention_mask and sizes == [m, n, dtype]:
                return made
        made = logs[:, None, None].to(dtype)
        visible = attention_mask
        if attention_mask is None and causal and m > 1:
            visible = torch.ones(m, n, dtype=torch.bool, device=query.device).tril()
        if visible is not None:
            visible = visible[..., :n]
            made = torch.where(visible, made, -torch.inf) if visible.dtype == torch.bool else visible + made
        self.masks.append((attention_mask, m, n, dtype, made))
        return made


def key_bias(logs: torch.Tensor, cache: Cache | None, count: int) -> KeyBias:
    """For ``count`` tokens behind what is in the cache."""
    windows = [] if cache is None else [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return KeyBias(logs, int(windows[0].get_seq_length()) + count if windows else 0)


def folded(
    logs: torch.Tensor,  # [B, N]
    query: torch.Tensor,  # [B, H, M, d]
    key: torch.Tensor,  # [B, Hkv, N, d]
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of d + 8 channels, whose products have the bias in them: for functions that take no mask."""
    rest = logs / scaling
    columns = []
    for _ in range(PARTS):
        columns.append(rest.bfloat16().float())
        rest = rest - columns[-1]
    more = F.pad(torch.stack(columns, dim=-1), (0, FOLDED - PARTS)).to(key.dtype)  # [B, N, 8]
    ones = F.pad(torch.ones_like(query[..., :PARTS]), (0, FOLDED - PARTS))
    wide = torch.cat([key, more[:, None].expand(-1, key.shape[1], -1, -1)], dim=-1)
    return torch.cat([query, ones], dim=-1), wide


def proportional_attention(
    module: Any,
    query: torch.Tensor,  # [B, H, M, d]
    key: torch.Tensor,  # [B, Hkv, N, d]
    value: torch.Tensor,
    attention_mask: Any,
    *,
    condense_bias: KeyBias | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    config = module.config.condense_own
    attention, name = attention_named(module, config), config._attn_implementation
    stock = Stock(module, config)
    logs = None if condense_bias is None else condense_bias.of_keys(len(key), key.shape[2])
    if condense_bias is None or logs is None:
        return attention(stock, query, key, value, attention_mask, **kwargs)
    if name in MASKED:
        told = kwargs.get("is_causal")
        causal = name == "sdpa" and (getattr(module, "is_causal", True) if told is None else told)
        mask = condense_bias.mask(attention_mask, logs, query, causal)
        return attention(stock, query, key, value, mask, **kwargs)
    check_foldable(name, query, kwargs)
    width = value.shape[-1]
    if width == query.shape[-1]:
        value = F.pad(value, (0, FOLDED))
    scaling = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5
    query, key = folded(logs, query, key, scaling)
    output, weights = attention(stock, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output[..., :width], weights


AttentionInterface.register(PROPORTIONAL, proportional_attention)


class Stock:
    """A module as its attention function expects it: with its own config. The module itself is not touched, as another
    thread may be in it."""

    def __init__(self, module: torch.nn.Module, config: Any) -> None:
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Weighed:
    """The attention modules of a language model, each with a copy of its config that names our function."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        for module in self.modules:
            own, module.config = module.config, copy.copy(module.config)
            module.config._attn_implementation = PROPORTIONAL
            module.config.condense_own = own

    def remove(self) -> None:
        for module in self.modules:
            module.config = module.config.condense_own


def attentions_of(model: Any) -> list[torch.nn.Module]:
    """Of its language model, all of them."""
    base = model.base_model
    decoder = base.get_decoder()
    modules = dict(decoder.named_modules())
    found = [path for path, module in modules.items() if goes_by_interface(module)]
    named = [path for path, module in modules.items() if "attention" in type(module).__name__.lower()]
    others = [path for path in named if not any(path.startswith(f"{own}.") or own.startswith(path) for own in found)]
    if not found or others:
        lacking = f"whose {type(modules[others[0]]).__name__} does not" if others else "which has no such attention"
        raise ValueError(
            "proportional: expected a language model whose attention goes by transformers' attention interface, got "
            f"{type(decoder).__name__}, {lacking}. Remedy: proportional=False."
        )
    layers = {path.rpartition(".")[0] for path in found} - {""}
    for part in (model, base, decoder, *(modules[path] for path in [*layers, *found])):
        kinds = {p.kind for p in inspect.signature(type(part).forward).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(
                "proportional: expected a language model that hands on what it does not name, as the bias of its keys, "
                f"got {type(part).__name__}, whose forward takes no **kwargs. Remedy: proportional=False."
            )
    return [modules[path] for path in found]


def check_arrived(bias: KeyBias) -> None:
    """After a call: a class may take **kwargs and keep them for itself."""
    if not bias.asked:
        raise ValueError(
            "proportional: expected a language model that hands on what it does not name, as the bias of its keys, got "
            "one whose attention was not given it. Remedy: proportional=False."
        )


def check_foldable(name: str, query: torch.Tensor, options: dict[str, Any]) -> None:
    remedy = "Remedy: model.set_attn_implementation('eager')"
    if options.get("softcap") is not None:
        raise ValueError(
            f"proportional: expected no softcap of {name}, under which the bias of a key cannot be, got "
            f"{options['softcap']}. {remedy}."
        )
    if "flash" in name and query.shape[-1] + FOLDED > WIDEST:
        raise ValueError(
            f"proportional: expected heads of at most {WIDEST - FOLDED} channels with {name}, as the bias takes "
            f"{FOLDED}, got {query.shape[-1]}. {remedy}, or 'sdpa'."
        )
