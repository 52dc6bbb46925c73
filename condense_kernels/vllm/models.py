"""LLaVA and LLaVA-NeXT as vLLM has them, but that each image's tokens are condensed before the projector.

One layer of the vision tower is listened to while it runs: the last that vLLM keeps, which the features come from. vLLM
imports this module for a process that has such a model, and for no other.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from ..budget import condense
from ..ops.attention_scores import attention_scores
from .plan import Plan

logger = init_logger("vllm.condense_kernels")  # vLLM shows what is logged below its own name


class Info:
    """Before there is a model: how many tokens will stand for an image in the prompt."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        self.plan = Plan.of(self.get_hf_config())


class Processor:
    def _get_mm_hashes(self, inputs: Any) -> Any:
        """The keys under which vLLM keeps what it has computed of an image, also where several engines share it."""
        hashes = super()._get_mm_hashes(inputs)
        return {modality: [f"{key}-{self.info.plan.options}" for key in keys] for modality, keys in hashes.items()}


class Model:
    supports_tower_connector_lora = False  # vLLM counts the tower's tokens, for its adapters, by those of the prompt

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.plan = Plan.of(self.config)
        logger.info("%d of %d visual tokens an image: %s", self.plan.keep, self.plan.side**2, self.plan.options)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, N, D], or of images' crops -> [images, K, D]"""
        if self.plan.keeps_all:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        vision = vision_tower.vision_model
        attention = vision.encoder.layers[-1].self_attn
        with outputs_of(attention.qkv_proj) as projected:
            features = super()._image_pixels_to_features(vision_tower, pixel_values)
        class_token = hasattr(vision.embeddings, "class_embedding")
        scores = scores_of(attention, *projected, class_token=class_token)
        side, options = self.plan.side, self.plan.options
        return condense(features, scores, self.plan.keep, grid=(side, side), **options.of_operator()).merged


@contextlib.contextmanager
def outputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    found: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        yield found
    finally:
        hook.remove()


def scores_of(
    attention: Any,  # vLLM's CLIPAttention or SiglipAttention
    projected: torch.Tensor,  # [B, P, 3 * H * d]: its queries, keys and values
    *,
    class_token: bool,
) -> torch.Tensor:  # [B, N]
    heads = attention.num_heads_per_partition
    queries, keys, _ = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected.chunk(3, dim=-1))
    if class_token:
        scores = attention_scores(queries[:, :, :1], keys, scale=attention.scale, columns=(1, None))
    else:
        scores = attention_scores(queries, keys, scale=attention.scale)
    if attention.tp_size > 1:  # each rank has its heads; all must keep the same tokens
        scores = tensor_model_parallel_all_reduce(scores) / attention.tp_size
    return scores


class LlavaInfo(Info, LlavaProcessingInfo):
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.plan.keep


class LlavaProcessor(Processor, LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=LlavaDummyInputsBuilder)
class CondensedLlavaForConditionalGeneration(Model, LlavaForConditionalGeneration):
    pass


def crops_of(config: Any, height: int, width: int) -> int:
    rows, columns = get_anyres_image_grid_shape(
        (height, width), config.image_grid_pinpoints, config.vision_config.image_size
    )
    return 1 + rows * columns  # the first is the whole image


class LlavaNextInfo(Info, LlavaNextProcessingInfo):
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        if self.plan.keeps_all:
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.plan.keep * crops_of(self.get_hf_config(), image_height, image_width)


class LlavaNextProcessor(Processor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder)
class CondensedLlavaNextForConditionalGeneration(Model, LlavaNextForConditionalGeneration):
    def _merge_image_patch_embeddings(
        self, image_size: torch.Tensor, patch_embeddings: torch.Tensor, *, strategy: str
    ) -> torch.Tensor:
        """[crops, K, D] -> [crops * K, D]. K tokens of a crop lie on no grid, which has a newline after each row."""
        if self.plan.keeps_all:
            return super()._merge_image_patch_embeddings(image_size, patch_embeddings, strategy=strategy)
        crops = crops_of(self.config, *image_size.tolist())  # what follows pads it, to the crops of other images
        return patch_embeddings[:crops].flatten(0, 1)
