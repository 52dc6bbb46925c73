"""A tiny LLaVA on language models of other types than the zoo's: learned positions, none, sinks, soft caps."""

import torch
import transformers
import zoo


def llava_on(text: str, **config) -> zoo.Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = zoo._llava(text, **zoo._clip, image_size=24)
        given["text_config"] |= config
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**given)).eval()
        zoo.sharpen(model)
    model.generation_config.update(eos_token_id=None, pad_token_id=zoo.PAD)
    return zoo.Case(zoo.case("llava").family, model.requires_grad_(False))
