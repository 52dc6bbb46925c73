"""vLLM's engine, and what it is asked."""

import contextlib

import numpy as np
from checkpoints import NEW
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1)


def picture(number: int, width: int = 96, height: int = 96) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


REQUESTS = [
    *((f"<s> <image> which digit is {place}", [picture(i)]) for i, place in enumerate(["top", "left", "3", "7"])),
    ("<s> how many digits", []),
    ("<s> <image> <image> what color is the 4", [picture(0), picture(5)]),
    ("<s> what is <image> there a <image> 8", [picture(6), picture(1)]),
]


@contextlib.contextmanager
def engine(folder, **options):
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "limit_mm_per_prompt": {"image": 2}}
    llm = LLM(str(folder), **{**usual, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def outputs(llm: LLM, requests):
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": pictures}} if pictures else {"prompt": text}
        for text, pictures in requests
    ]
    return llm.generate(prompts, GREEDY, use_tqdm=False)


def tokens(llm: LLM, requests) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs(llm, requests)]
