"""Small models with random weights, saved for transformers and vLLM."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from zoo import sharpen

from condense_kernels.models import apply_condense
from condense_kernels.tiny_llava.model import processor, untrained
from condense_kernels.tiny_llava.questions import ID
from condense_kernels.tiny_llava.scenes import PATCH, SIDE

NEW = 8  # tokens of an answer


def save(model, processor, folder: Path) -> Path:
    sharpen(model)
    model.generation_config.update(eos_token_id=None, pad_token_id=ID["<pad>"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with_names_of_the_hub(folder)
    return folder


def with_names_of_the_hub(folder: Path) -> None:
    """transformers 5 has shorter ones for the tower's weights, which vLLM does not know."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        longer = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): w for name, w in weights.items()}
        save_file(longer, path, metadata={"format": "pt"})


def config_of_llava() -> LlavaConfig:
    config = untrained(width=64, vision_layers=3, heads=2).config
    config.update({"tie_word_embeddings": False})  # else random weights say each word again
    config.text_config.update({"tie_word_embeddings": False, "max_position_embeddings": 2048})
    return config


def llava(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(LlavaForConditionalGeneration(config_of_llava()), processor(), folder)


def llava_siglip(folder: Path) -> Path:
    torch.manual_seed(2)
    config, of_llava = config_of_llava(), processor()
    clip = config.vision_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config.vision_config = SiglipVisionConfig(**{name: getattr(clip, name) for name in names}, vision_use_head=False)
    config.vision_feature_select_strategy = of_llava.vision_feature_select_strategy = "full"
    of_llava.num_additional_image_tokens = 0  # it has no [CLS]
    return save(LlavaForConditionalGeneration(config), of_llava, folder)


def llava_next(folder: Path) -> Path:
    torch.manual_seed(1)
    of_llava = config_of_llava()
    pinpoints = [[SIDE, 2 * SIDE], [3 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        vision_config=of_llava.vision_config,
        text_config=of_llava.text_config,
        image_token_index=of_llava.image_token_index,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    side = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, image_grid_pinpoints=pinpoints)
    of_next = LlavaNextProcessor(
        images,
        processor().tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return save(LlavaNextForConditionalGeneration(config), of_next, folder)


def answers(folder: Path, requests, keep: int | float | None = None, **options) -> list[list[int]]:
    """Of transformers, request by request: what vLLM is held to."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    if keep is not None:
        apply_condense(model, keep, **options)
    found = []
    for text, pictures in requests:
        inputs = processor(images=pictures or None, text=text, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        found.append(answer[0, inputs["input_ids"].shape[1] :].tolist())
    return found
