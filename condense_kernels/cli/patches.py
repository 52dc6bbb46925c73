"""A picture as tokens: cut into patches, with a score for each, and put together again."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..testing import Inputs
from . import CommandError

PATCH = 14  # pixels a side, as in CLIP ViT-L/14-336, which LLaVA-1.5 uses: 24 x 24 patches of a 336 x 336 picture
# Achanta et al., "Frequency-tuned salient region detection" (CVPR 2009), with patches in the place of pixels.
SCORE = "distance from the mean patch: what is unlike the rest of the picture stands out"


def read_picture(path: Path) -> Any:
    """A Pillow image in RGB, as it is to be seen; transparency is laid on white."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = getattr(error, "strerror", None) or str(error)  # without errno and the name once more
        raise CommandError(f"not a picture that Pillow can read: {path} ({reason})".replace("\n", " ")) from None
    image = in_eight_bits(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_pictures(paths: Sequence[Path]) -> None:
    """Each can be read: to be told before any takes its time."""
    for path in paths:
        read_picture(path)


def in_eight_bits(image: Any) -> Any:
    """Of 16 bits or more a pixel, which Pillow's convert() would clip: white is the highest level, or 255 if no level
    is above; of floats 1 if none is above. What is no number is black."""
    import numpy
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    levels = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64), posinf=0, neginf=0)
    white = max(levels.max(), 1 if image.mode == "F" and levels.max() <= 1 else 255)
    return Image.fromarray((255 * levels / white).clip(0).astype(numpy.uint8))


def open_picture(path: Path, pixels: int) -> torch.Tensor:  # [pixels, pixels, 3] in [0, 1]
    """Read, centre-crop to a square and resize."""
    import numpy
    from PIL import Image, ImageOps

    image = ImageOps.fit(read_picture(path), (pixels, pixels), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image)).float() / 255


def cut(picture: torch.Tensor) -> torch.Tensor:  # [H W 3] -> [N, D]
    from einops import rearrange

    return rearrange(picture, "(h p) (w q) c -> (h w) (p q c)", p=PATCH, q=PATCH)


def put_together(patches: torch.Tensor, side: int) -> torch.Tensor:  # [N, D] -> [H W 3]
    from einops import rearrange

    return rearrange(patches, "(h w) (p q c) -> (h p) (w q) c", h=side, p=PATCH, q=PATCH)


def side_of(inputs: Inputs) -> int:
    """How many patches a side of the picture has, in what make_inputs made."""
    return cast(tuple[int, ...], inputs.grid)[0]


def make_inputs(picture: torch.Tensor, num_anchors: int, num_background: int) -> Inputs:
    """Features: pixels in [0, 1]. Keys: patch minus mean patch, as raw pixels are nearly parallel. Scores: SCORE."""
    patches = cut(picture)
    # The mean in fp64: a picture of one colour has keys of exactly 0, not of rounding noise.
    keys = patches - patches.double().mean(dim=0).float()
    side = picture.shape[0] // PATCH
    return Inputs(
        features=patches[None],  # [1, N, D], D = 14 * 14 * 3
        scores=keys.square().mean(dim=1).sqrt()[None],
        num_anchors=num_anchors,
        num_background=num_background,
        keys=keys[None],
        grid=(side, side),
    )
