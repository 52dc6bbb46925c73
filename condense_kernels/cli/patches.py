"""A picture as tokens: cut into patches, with a score for each, and put together again."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch

from ..testing import Inputs
from . import CommandError

PATCH = 14  # pixels a side, as in CLIP ViT-L/14-336, which LLaVA-1.5 uses: 24 x 24 patches of a 336 x 336 picture
# Achanta et al., "Frequency-tuned salient region detection" (CVPR 2009), with patches in the place of pixels.
SCORE = "distance from the mean patch: what is unlike the rest of the picture stands out"


def read_picture(path: Path) -> Any:  # PIL.Image in RGB
    """Read and turn upright; transparency is laid on white."""
    import numpy
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(path))
            image.load()
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CommandError(f"not a picture that Pillow can read: {path} ({error})".replace("\n", " ")) from None
    if image.mode.startswith(("I", "F")):  # 16 bits or more a pixel, which convert() would clip
        levels = numpy.asarray(image, dtype=numpy.float64)
        image = Image.fromarray((255 * levels / max(levels.max(), 255)).clip(0).astype(numpy.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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
