"""LLaVA-NeXT: K tokens of each crop, crop after crop, as apply_condense has them."""

from checkpoints import answers
from engines import engine, outputs, picture, tokens

from condense_kernels.vllm import condensed

SIZES = [(96, 96), (192, 96), (96, 200), (190, 180)]  # 3, 3, 3 and 5 crops
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
    assert [len(output.prompt_token_ids) for output in found] == [65, 65, 65, 105, 166, 4]


def test_all_tokens_are_the_stock_model(llava_next):
    """Newlines after the rows of the crops' grid included."""
    with engine(llava_next) as llm:
        expected = tokens(llm, REQUESTS)
    with engine(llava_next, hf_overrides=condensed(num_tokens=144)) as llm:
        assert tokens(llm, REQUESTS) == expected
