"""Where ``show`` has its tokens from: DINOv2 half-way, or any model that apply_condense takes."""

from pathlib import Path
from typing import Any

import torch

from ..models import apply_condense
from ..ops.select_and_merge import Condensed
from . import CommandError, waiting
from .patches import PATCH, open_picture
from .selection import Kept, Seen, keep_tokens

ANY = "what is this"  # where only the picture matters
SIDE = 24  # patches of DINOv2's picture
STRETCHED = 336  # pixels a side
NEW_TOKENS, OF_TINY = 24, 1  # of an answer: the tiny LLaVA was taught one word, and no end


def seen_by_dinov2(path: Path) -> Seen:
    from .dinov2 import encode, load_model

    picture, model = open_picture(path, SIDE * PATCH), load_model()
    with torch.no_grad(), waiting("encoding the picture"):
        tokens = encode(model, picture)
    return Seen(path.name, picture, tokens.patches, tokens.scores, (SIDE, SIDE))


def scene(seed: int) -> Any:
    """A picture of the tiny LLaVA's, with four digits, that it was not trained on."""
    from PIL import Image

    from ..tiny_llava.scenes import Scenes

    return Image.fromarray(Scenes("test", seed).scene(crowded=True).pixels)


class Answering:
    """A model, its processor and a picture, asked one question with all tokens and with fewer."""

    def __init__(
        self, model: Any, processor: Any, picture: Any, inputs: dict[str, Any], words: int = NEW_TOKENS
    ) -> None:
        self.model, self.processor, self.picture, self.inputs, self.words = model, processor, picture, inputs, words

    def answer(self) -> str:
        with torch.no_grad():
            found = self.model.generate(**self.inputs, max_new_tokens=self.words, do_sample=False)
        new = found[0, self.inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    def answer_on(self, kept: Kept, seed: int) -> str:
        def method(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: tuple[int, ...]) -> Condensed:
            images = (Seen("", features, features[i : i + 1], scores[i : i + 1], grid) for i in range(len(features)))
            found = [keep_tokens(kept.method, image, keep, seed).condensed for image in images]
            return Condensed(*map(torch.cat, zip(*found, strict=True)))

        with apply_condense(self.model, kept.size, method=method):
            return self.answer()

    def seen(self, name: str) -> Seen:
        """What comes before the language model: of the first image, or of the first crop of several."""
        found: list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]] = []

        def method(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: tuple[int, ...]) -> Condensed:
            found.append((features[:1], scores[:1], grid))
            everything = torch.arange(keep, dtype=torch.int64, device=features.device).expand(len(features), -1)
            return Condensed(features, everything, everything, scores)

        with torch.no_grad(), apply_condense(self.model, 1.0, method=method):
            self.model(**self.inputs)
        features, scores, grid = found[0]
        if len(grid) == 3 and grid[0] == 1:
            grid = grid[1:]
        if len(grid) != 2:
            raise CommandError(f"{name}: expected an image whose tokens are rows and columns, got the grid {grid}")
        return Seen(name, self.pixels(), features.detach(), scores.detach(), grid)

    def pixels(self) -> torch.Tensor:  # [H, W, 3] in [0, 1]
        """What the encoder gets, without its normalisation; stretched to a square where that is packed otherwise."""
        pixels = self.inputs["pixel_values"]
        if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
            return as_pixels(self.picture.resize((STRETCHED, STRETCHED)))
        first = pixels.flatten(0, -4)[0].permute(1, 2, 0).float().cpu()
        images = self.processor.image_processor
        mean, std = (first.new_tensor(getattr(images, f"image_{name}", None) or default)
                     for name, default in (("mean", 0.0), ("std", 1.0)))  # fmt: skip
        return (first * std + mean).clamp(0, 1)


def as_pixels(picture: Any) -> torch.Tensor:  # [H, W, 3] in [0, 1]
    import numpy

    return torch.from_numpy(numpy.array(picture.convert("RGB"))).float() / 255
