"""What apply_condense and the calls after it refuse, each with what was expected, what came, and the remedy."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .._dispatch.backends import check_backend
from .._dispatch.checks import MAX_TOKENS, check_background_suppression, check_flag, check_weight
from ..budget import count_of, split_budget
from .families import FAMILIES, GENERIC, Family, Inputs, family_of
from .methods import METHODS, Condenser
from .scoring import attention_of

OPTIONS = ("background_ratio", "suppression", "spatial_weight", "background_suppression", "scale_prior", "backend")
CACHES = ("cache", "past_key_values")  # transformers 5.24 has renamed the second to the first


def check_model(model: Any, mark: str) -> None:
    if not isinstance(model, PreTrainedModel):
        remedy = "the model inside: pipeline.model, model.module, model._orig_mod, model.get_base_model()"
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}. Remedy: {remedy}."
        )
    name = type(model).__name__
    if hasattr(model, mark):
        raise ValueError(
            f"model: expected one that is not condensed, got a {name} that is. Remedy: handle.remove() first."
        )
    takes_images = hasattr(model.base_model, "get_image_features") and hasattr(model.config, "image_token_id")
    if not takes_images or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"model: expected one that takes images and mm_encoder_outputs, got {name}. Remedy: the "
            "...ForConditionalGeneration class of a multimodal checkpoint, whose forward has that argument."
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"model: expected weights in a floating dtype, got a quantised {name}. Remedy: load it without "
            "quantization_config."
        )
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1 or (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"model: expected one device, got a {name} on {', '.join(devices) or 'several, by tensor parallelism'}. "
            'Remedy: load it with device_map={"": 0}, and without tp_plan.'
        )


def check_options(num_tokens: Any, condenser: Condenser) -> None:
    count_of("num_tokens", num_tokens, MAX_TOKENS)
    split_budget(1, 1, condenser.background_ratio)
    check_weight("suppression", condenser.suppression)
    check_weight("spatial_weight", condenser.spatial_weight)
    check_background_suppression(condenser.background_suppression)
    check_flag("scale_prior", condenser.scale_prior)
    check_backend(condenser.backend)
    method = condenser.method
    if not callable(method) and not (isinstance(method, str) and method in METHODS):
        raise ValueError(
            f"method: expected one of {', '.join(map(repr, METHODS))} or a callable, got {method!r}. Remedy: a "
            "callable gets (features, scores, keep, grid) and returns Condensed."
        )
    standard = Condenser(method)
    for name in OPTIONS:
        if method != "condensevlm" and getattr(condenser, name) != getattr(standard, name):
            raise ValueError(
                f"{name}: expected the default, {getattr(standard, name)!r}, as method={method!r} has no such option, "
                f"got {getattr(condenser, name)!r}. Remedy: leave it out."
            )


def resolve_family(model: Any, family: str | None) -> Family:
    kind = model.config.model_type
    if family is None:
        found = family_of(model.config)
        if found is None:
            raise ValueError(
                f"model: expected one of the families {', '.join(sorted(FAMILIES))}, got {kind!r}. Remedy: "
                "family='generic', or the name of the family that it is built like."
            )
        return found
    if family == "generic":
        if family_of(model.config) is not None:
            raise ValueError(
                f"family: expected None, as {kind!r} has a row of its own, got 'generic'. Remedy: leave it out."
            )
        tower = type(model.base_model.get_encoder(modality="image")).__name__
        path, attention = attention_of(model.base_model.get_encoder(modality="image"), -1)
        warnings.warn(
            f"{kind!r} has no row in condense_kernels.models. Assumed: {tower}.{path} ({type(attention).__name__}) "
            "attends to the whole image and goes through transformers' attention interface; every entry of "
            "pooler_output is one square image, its tokens row by row, each a square window of patches. "
            "Check handle.report() and the model's answers.",
            UserWarning,
            stacklevel=3,
        )
        return GENERIC
    if family not in FAMILIES:
        raise ValueError(
            f"family: expected one of {', '.join(sorted(FAMILIES))}, 'generic' or None, got {family!r}. Remedy: None, "
            "which goes by config.model_type."
        )
    return FAMILIES[family]


def check_features(config: Any, inputs: Inputs) -> None:
    """Of an encoder with [CLS], whose features are condensed before the projector."""
    strategy = inputs.get("vision_feature_select_strategy")
    strategy = getattr(config, "vision_feature_select_strategy", "default") if strategy is None else strategy
    if strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy: expected 'default', the patches without [CLS], got {strategy!r}. Remedy: "
            "condense a model that was trained without [CLS] among its visual tokens."
        )


def check_output(output: Any, family: Family) -> None:
    """Of get_image_features, where what it returns is condensed: [N, D] of each image."""
    pooled = getattr(output, "pooler_output", None)
    entries = [] if pooled is None else list(pooled)
    shapes = [entry.shape if isinstance(entry, torch.Tensor) else () for entry in entries]
    if not shapes or any(len(shape) != 2 or (shape[0] == 0 and family.tile is None) for shape in shapes):
        got = list(pooled.shape) if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        raise ValueError(
            f"model: expected pooler_output of get_image_features with [N, D] of each image, got {got}. Remedy: "
            "family=, the name of one that the model is built like; else an issue that names the model."
        )
    if getattr(output, "deepstack_features", None) is not None and "deepstack_features" not in family.planes:
        raise ValueError(
            "model: expected no deepstack_features of get_image_features, as this family has none, got some. Remedy: "
            "family=, the name of one that the model is built like: 'qwen3_vl'; else an issue that names the model."
        )


def check_count(keep: int | float, tokens: Sequence[int]) -> None:
    """Of the images of one call, or their crops."""
    for image, count in enumerate(tokens):
        if isinstance(keep, int) and keep > count:
            raise ValueError(
                f"num_tokens: expected at most the {count} tokens of image {image}, got {keep}. Remedy: a ratio of "
                "each image's tokens, as 0.25; or larger images."
            )


def filled_cache(inputs: Inputs) -> tuple[str, int] | None:
    for name in CACHES:
        cache: Any = inputs.get(name)
        tokens = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if tokens:
            return name, int(tokens)
    return None


def check_call(inputs: Inputs, family: Family) -> None:
    """Of a call with images."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        got = f"one of shape {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(
            "input_ids: expected a tensor [B, L] beside pixel_values, as the placeholders of dropped tokens are found "
            f"in it, got {got}. Remedy: input_ids as the processor returned them, and no inputs_embeds."
        )
    if inputs.get("mm_encoder_outputs") is not None:
        raise ValueError("mm_encoder_outputs: expected None beside pixel_values, got some. Remedy: one of the two.")
    for name in family.needs:
        placed = name == "mm_token_type_ids" and inputs.get("position_ids") is not None  # which are made of it
        if inputs.get(name) is None and not placed:
            raise ValueError(
                f"{name}: expected what the processor returned beside pixel_values, got None. Remedy: model(**inputs), "
                "with all that the processor returned."
            )
    for name in family.refuses:
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None with family='generic', which takes all images for squares of one size, got "
                "some. Remedy: family=, the name of one that the model is built like: 'qwen2_vl', 'mistral3'."
            )
    check_cache(inputs)
    if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
        raise ValueError(
            "logits_to_keep: expected an int, as dropped tokens have no logits, got a tensor. Remedy: 0, and the "
            "columns of the result."
        )


def check_cache(inputs: Inputs) -> None:
    filled = filled_cache(inputs)
    if filled is not None:
        name, tokens = filled
        raise ValueError(
            f"{name}: expected none, or an empty one, in a call whose prompt has images, got one of {tokens} tokens, "
            "whose places are those of a condensed prompt. Remedy: the whole conversation in one call, with its images."
        )


def check_continued(inputs: Inputs, image_token_id: int) -> None:
    """Of a call of generate without images: a conversation that goes on from a cache would be cut at the wrong place,
    as the prompt has placeholders which the cache has not."""
    ids = inputs.get("input_ids")
    if isinstance(ids, torch.Tensor) and filled_cache(inputs) is not None and bool((ids == image_token_id).any()):
        check_cache(inputs)
