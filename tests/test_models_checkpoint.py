"""What a user has: a directory with a model and its processor, a picture, a question; and two lines."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from condense_kernels.models import apply_condense

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "is", "this", "?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    width = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=dict(width, model_type="clip_vision_model", image_size=24, patch_size=4),
        text_config=dict(width, model_type="llama", vocab_size=16, num_key_value_heads=2),
        image_token_index=WORDS.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def inputs(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    pictures = [Image.radial_gradient("L").convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    text = ["<image> what is this ?", "<image> ?"]
    return processor(images=pictures, text=text, padding=True, return_tensors="pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_lines(checkpoint, inputs, dtype):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
    handle = apply_condense(model, num_tokens=9)
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(answer[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert handle.report().images == ((36, 9), (36, 9))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_the_attention_implementation(checkpoint, inputs, attention):
    expected = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation=attention)
    with apply_condense(expected, 9), apply_condense(model, 9):
        found, by_default = (m(**inputs).logits[:, -10:] for m in (model, expected))  # what is padded may be anything
    torch.testing.assert_close(found, by_default, rtol=1e-4, atol=1e-5)
