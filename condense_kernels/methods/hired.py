"""HiRED (Arif et al. 2024): "Attention-guided token dropping for efficient inference of high-resolution
vision-language models"."""

import torch

from .._dispatch.checks import FLOATS, check_tensor
from ..ops.select_and_merge import Condensed
from ..segments import allocate_budget
from .crops import split, tops
from .importance import check_share
from .registry import CLS, method
from .results import Grid, best, selected


@method(
    "HiRED", "Arif et al. 2024, arXiv 2408.10945", primitive="allocate_budget, segment_topk", scores=CLS,
    cost="-",
)  # fmt: skip
def hired(
    features: torch.Tensor,  # [B, N, D]
    scores: torch.Tensor,  # [B, N]
    keep: int,
    *,
    grid: Grid | None = None,
    crops: tuple[int, int] | None = None,
    alpha: float = 0.5,
    early: torch.Tensor | None = None,  # [B, n]
) -> Condensed:
    """A budget for each crop by where the whole image is attended to, and in each the tokens of the highest attention.

    An image is 1 + rows * columns grids of n tokens, one behind the other: the whole of it in low resolution, then its
    crops row by row; ``crops=(rows, columns)``, ``grid=(1 + crops, height, width)``. The whole image gets
    floor(K alpha), at most n. Of its tokens the floor(n (1 - alpha)) that [CLS] attends to most are counted by crop,
    and the rest of K is split in proportion. Without crops it is one image, and a top-k.

    Args:
        alpha: in [0, 1], the whole image's share.
        early: the whole image's [CLS] attention in an early layer of the vision encoder, by which budgets are given;
            None: that of ``scores``. Those are of a late layer.

    All of the method comes before the language model. Differences from the published code: budgets sum to K, where its
    floors lose some (143 of 144); tokens of the whole image are counted in the rectangle of each crop, where its
    reshape counts runs of consecutive tokens, stripes for 2 x 2 crops; ties go to the lowest index. Where the crops are
    too small for their part, the whole image gets what is left. alpha = 0.5 is assumed.

    Raises:
        TypeError, ValueError: no such crops of this grid, alpha is no number in [0, 1], early of another shape.
    """
    check_share("alpha", alpha)
    if crops is None:
        return selected(features, scores, best(scores, keep))
    of = split(grid, crops)
    if early is not None:
        check_tensor("early", early, "B n", {"B": len(scores), "n": of.size}, FLOATS, like=scores)
    whole = max(min(int(keep * alpha), of.size), keep - of.number * of.size)
    seen = best(scores[:, : of.size] if early is None else early, int(of.size * (1 - alpha)))
    counted = of.regional(torch.zeros_like(scores[:, : of.size]).scatter(1, seen, 1))
    budget = allocate_budget(counted, keep - whole, capacity=of.size)
    budget = torch.nn.functional.pad(budget, (1, 0), value=whole)
    return selected(features, scores, tops(scores.unflatten(1, (-1, of.size)), budget, keep))
