"""What a model is asked about pictures: by its processor's chat template, or after a plain placeholder."""

from typing import Any

from . import CommandError
from .checkpoint import TINY


def prompt_of(name: str, processor: Any, question: str) -> str:
    """``name``: what --model got."""
    if name == TINY:
        from ..tiny_llava.model import PROMPT

        return PROMPT.format(question)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    placeholder = getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>")
    return f"{placeholder} {question}"


def inputs_of(name: str, model: Any, processor: Any, picture: Any, question: str) -> dict[str, Any]:
    """Of model.generate, for one picture."""
    try:
        text = prompt_of(name, processor, question)
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
    except (TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"--model {name}: its processor takes no picture beside {question!r}: {reason}") from error
    return dict(inputs.to(model.device, model.dtype))
