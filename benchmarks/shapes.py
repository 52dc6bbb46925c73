"""Named shapes of real models, shared by the benchmarks."""

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    batch: int
    grid: tuple[int, int]
    channels: int
    num_anchors: int
    num_background: int

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


SHAPES = {
    "llava15-64": Shape(1, (24, 24), 1024, 48, 16),
    "llava15-128": Shape(1, (24, 24), 1024, 96, 32),
    "llava15-192": Shape(1, (24, 24), 1024, 144, 48),
    "llava15-64-batch8": Shape(8, (24, 24), 1024, 48, 16),
    "llava-next-320": Shape(1, (48, 60), 1024, 240, 80),
}


def make(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, N, D] of random directions around a common one, as encoders give, and softmax scores [B, N]."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(shape.batch, 1, shape.channels, generator=generator)
    features = common + torch.randn(shape.batch, shape.num_tokens, shape.channels, generator=generator)
    scores = torch.randn(shape.batch, shape.num_tokens, generator=generator).softmax(dim=-1)
    return features.to(device, dtype), scores.to(device, dtype)
