"""GlobalCom² (Liu et al. 2025): "Compression with global guidance: towards training-free high-resolution MLLMs
acceleration"."""

import torch

from .._dispatch.checks import check_weight
from ..ops.select_and_merge import Condensed
from ..segments import allocate_budget
from .crops import Crops, split, tops
from .registry import CLS, method
from .results import Grid, best, selected


@method(
    "GlobalCom2", "Liu et al. 2025, arXiv 2501.05179", primitive="allocate_budget, segment_topk",
    scores=CLS, cost="-",
)  # fmt: skip
def globalcom2(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid | None = None,
    crops: tuple[int, int] | None = None,
    temperature: float = 10.0,
) -> Condensed:
    """The whole image says how many tokens each crop keeps, and has a say in which.

    Tokens are as for ``hired``: the whole image, then its crops row by row; ``crops=(rows, columns)``,
    ``grid=(1 + crops, height, width)``. With S_c the sum of the whole image's [CLS] attention over the region of crop
    c and p = softmax(S / temperature), a crop's share is in proportion to 1 + p_c - mean(p), the whole image's to 1.
    The whole image keeps its top tokens, a crop those of the highest a / ||a|| + g / ||g||: a is its own attention, g
    the whole image's, enlarged bilinearly to the crops and cut. Without crops it is one image, and a top-k.

    All of the method comes before the language model. Differences from the published code: it floors each crop's
    count, here they sum to K (largest remainder); it leaves out what is padding of the resized image, which here are
    tokens like any other. temperature is that of its code.

    Raises:
        TypeError, ValueError: no such crops of this grid, a temperature that is no number above 0.
    """
    check_weight("temperature", temperature)
    if temperature == 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}. Remedy: 10.0.")
    if crops is None:
        return selected(features, scores, best(scores, keep))
    of = split(grid, crops)
    at = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).unflatten(1, (-1, of.size))
    p = (of.regional(at[:, 0]) / temperature).softmax(dim=1)
    worth = torch.nn.functional.pad(1 + p - p.mean(dim=1, keepdim=True), (1, 0), value=1.0)
    mixed = unit(at[:, 1:]) + unit(enlarged(at[:, 0], of))
    budget = allocate_budget(worth, keep, capacity=of.size)
    return selected(features, scores, tops(torch.cat([at[:, :1], mixed], dim=1), budget, keep))


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def enlarged(attention: torch.Tensor, of: Crops) -> torch.Tensor:
    """[B, size] of the whole image -> [B, crops, size]."""
    large = torch.nn.functional.interpolate(
        attention.unflatten(1, (1, of.height, of.width)), scale_factor=(of.rows, of.columns), mode="bilinear"
    )  # [B, 1, rows * height, columns * width]
    tiles = large.unflatten(3, (of.columns, of.width)).unflatten(2, (of.rows, of.height))
    return tiles.transpose(3, 4).reshape(len(attention), of.number, of.size)
