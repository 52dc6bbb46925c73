"""LLaVA-NeXT: K tokens of each crop, crop after crop, as apply_condense has them."""

import types

import pytest
import torch
from checkpoints import answers
from engines import engine, outputs, picture, tokens
from transformers import AutoConfig

from condense_kernels.vllm import condensed
from condense_kernels.vllm.models import CondensedLlavaNextForConditionalGeneration
from condense_kernels.vllm.plan import Plan

SIZES = [(96, 96), (192, 96), (96, 200), (190, 180)]  # width and height: 3, 3, 4 and 5 crops
REQUESTS = [
    *(
        (f"<s> <image> which digit is {place}", [picture(i, *size)])
        for i, (place, size) in enumerate(zip(["top", "left", "3", "7"], SIZES, strict=True))
    ),
    ("<s> <image> <image> what color is the 4", [picture(5, 190, 180), picture(6, 96, 192)]),
    ("<s> how many digits", []),
]


def test_same_tokens(llava_next):
    expected = answers(llava_next, REQUESTS, 20)
    assert len({tuple(answer) for answer in expected}) == len(REQUESTS)
    with engine(llava_next, hf_overrides=condensed(num_tokens=20)) as llm:
        found = outputs(llm, REQUESTS)
    assert [list(output.outputs[0].token_ids) for output in found] == expected
    assert [len(output.prompt_token_ids) for output in found] == [65, 65, 85, 105, 186, 4]


@pytest.mark.parametrize(("size", "crops"), [((96, 192), 3), ((200, 96), 4), ((180, 190), 5)])
def test_crops_of_padding_are_dropped(llava_next, size, crops):
    """Where images of several sizes are one tensor, it has as many crops of each as of the largest."""
    config = AutoConfig.from_pretrained(llava_next)
    model = types.SimpleNamespace(config=config, plan=Plan.of(condensed(20)(config)))
    merge = CondensedLlavaNextForConditionalGeneration._merge_image_patch_embeddings
    features = torch.randn(5, 20, 8)
    found = merge(model, torch.tensor(size), features, strategy="spatial_unpad")
    assert torch.equal(found, features[:crops].reshape(crops * 20, 8))


def test_all_tokens_are_the_stock_model(llava_next):
    """Newlines after the rows of the crops' grid included."""
    with engine(llava_next) as llm:
        expected = tokens(llm, REQUESTS)
    with engine(llava_next, hf_overrides=condensed(num_tokens=144)) as llm:
        assert tokens(llm, REQUESTS) == expected
