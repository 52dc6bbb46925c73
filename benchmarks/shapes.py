"""Named shapes of real models, shared by the benchmarks and the tests, and inputs like those of a vision tower."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Shape(NamedTuple):
    batch: int
    grid: tuple[int, int]
    channels: int
    num_anchors: int
    num_background: int
    back_to_back: int = 1  # calls that are timed together, for one that is shorter than a clock's worth

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def kept(self) -> int:
        return self.num_anchors + self.num_background

    def __str__(self) -> str:
        return f"{self.batch} x {self.num_tokens} x {self.channels}, K = {self.kept}"


def keeping(batch: int, grid: tuple[int, int], kept: int, channels: int = 1024) -> Shape:
    """A quarter of the kept tokens is background, as in ``condense``."""
    background = (kept + 2) // 4
    return Shape(batch, grid, channels, kept - background, background)


SHAPES = {
    "overhead": Shape(1, (4, 4), 16, 3, 1, back_to_back=1000),
    "llava15-64": keeping(1, (24, 24), 64),
    "llava15-128": keeping(1, (24, 24), 128),
    "llava15-192": keeping(1, (24, 24), 192),
    "llava15-192-projected": keeping(1, (24, 24), 192, channels=4096),  # after the projector of a 7B model
    "llava15-64-batch8": keeping(8, (24, 24), 64),
    "llava-next-crops": keeping(5, (24, 24), 64),  # each crop of a picture on its own
    "llava-next-global": keeping(1, (48, 60), 320),  # all crops together
    "onevision": keeping(1, (27, 27), 243, channels=1152),
    "video-128": keeping(128, (24, 24), 64),
    "tiny-4096": keeping(4096, (4, 4), 4, channels=64),
    "long-16384": keeping(1, (128, 128), 640),
    "long-65536": keeping(1, (256, 256), 1024),
}

# One size varies, the others are those of LLaVA-1.5; for the plots.
SWEEPS = {
    "N": {f"sweep-n-{side * side}": keeping(1, (side, side), side * side // 9) for side in (8, 12, 16, 24, 32, 48, 64)},
    "K": {f"sweep-k-{kept}": keeping(1, (24, 24), kept) for kept in (16, 32, 64, 128, 192, 256, 384, 512)},
    "B": {f"sweep-b-{batch}": keeping(batch, (24, 24), 64) for batch in (1, 2, 4, 8, 16, 32)},
}
SWEPT = tuple(name for sweep in SWEEPS.values() for name in sweep)
ALL = SHAPES | {name: shape for sweep in SWEEPS.values() for name, shape in sweep.items()}


def make(
    shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, N, D] and scores [B, N]; the generator runs on the CPU, so they are the same on every machine.

    A feature is a common direction (encoders have one), a part that varies slowly over the picture, a part of its own,
    and a length. Scores are a softmax with a long tail, as attention has, that also varies slowly.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    b, d, (height, width) = shape.batch, shape.channels, shape.grid

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")

    def slow(channels: int) -> torch.Tensor:  # [B, N, channels]
        coarse = normal(b, channels, max(2, height // 6), max(2, width // 6))
        fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        return fine.flatten(2).mT

    features = normal(b, 1, d) + slow(d) + normal(b, height * width, d)
    features = features * (0.2 * normal(b, height * width, 1)).exp()
    scores = (2 * slow(1)[..., 0] + normal(b, height * width)).softmax(dim=-1)
    return features.to(device, dtype).contiguous(), scores.to(device, dtype).contiguous()
