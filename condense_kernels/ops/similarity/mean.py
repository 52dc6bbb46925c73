"""mean_similarity: E|S| of Eq. 2 and 4 from a few tokens of each image."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch

from ..._dispatch import tracing
from ..._dispatch.checks import (
    FLOATS,
    MAX_TOKENS,
    as_count,
    as_grid,
    check_count,
    check_grid,
    check_not_empty,
    check_num_tokens,
    check_tensor,
)
from .op import similarity

GOLDEN = (math.sqrt(5) - 1) / 2
TRIED = 32  # steps


@functools.lru_cache
@tracing.constant_in_graphs
def step_of(num_tokens: int, width: int, sample: int) -> int:
    """A step without a factor in common with the number of tokens, so that its multiples meet each token once. Nor has
    it one in common with the width of their grid: a step of 4 on 24 would meet every fourth column alone.

    It is near the golden section of N, whose multiples are far apart along a line; of such steps, the one whose
    multiples are farthest apart on the grid.
    """
    start = round(num_tokens * GOLDEN)
    around = (start + offset for i in itertools.count() for offset in {i, -i})
    inside = itertools.takewhile(lambda step: abs(step - start) <= num_tokens, around)
    coprime = (step for step in inside if 0 < step <= num_tokens and math.gcd(step, num_tokens) == 1)

    def nearest(step: int) -> int:
        """The smallest distance, squared: of tokens that are i apart in the sample, and i * step in the image."""
        apart = []
        for i in range(1, min(sample, num_tokens)):
            for distance in (i * step % num_tokens, -i * step % num_tokens):
                rows, columns = divmod(distance, width)
                apart += [rows**2 + columns**2, (rows + 1) ** 2 + (width - columns) ** 2]
        return min(apart, default=0)

    return max(itertools.islice(coprime, TRIED), key=nearest)


def check(keys, mask, grid, sample) -> None:
    sizes: dict[str, int] = {}
    check_tensor("keys", keys, "B N Dk", sizes, FLOATS)
    check_not_empty("keys", keys, 1, "token")
    check_num_tokens("keys", keys)
    check_not_empty("keys", keys, 2, "channel")
    if mask is not None:
        check_tensor("mask", mask, "B N", sizes, (torch.bool,), keys)
    if grid is not None:
        check_grid(grid, sizes["N"])
    check_count("sample", sample, 2, MAX_TOKENS, "pairs of tokens are compared")


@tracing.leaf()
def mean_similarity(
    keys: torch.Tensor,  # [B, N, Dk]
    sample: int = 128,
    *,
    mask: torch.Tensor | None = None,  # [B, N]
    grid: Sequence[int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:  # [B]
    """Estimate the sbar of :func:`similarity`, E[|S|] of Eq. 2 and 4, from the pairs of ``sample`` tokens an image.

    They are spread over the image by a step that meets all rows and columns of its grid. The diagonal counts as it does
    in the whole. Of at most ``sample`` valid tokens all are taken, and it is no estimate but the mean.

    Args:
        keys: [B, N, Dk] fp32, fp16, bf16 or fp64; a sampled key with a NaN or infinity is left out.
        sample: int >= 2: tokens an image.
        mask: [B, N] bool, False = padding, which is not sampled.
        grid: (H, W) or (T, H, W) with product N. None: as if the image were square.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        [B] fp32 (fp64 where keys are fp64), >= 0: what select_and_merge takes as mean_similarity. An image's does not
        depend on the others, and no value is read on the host.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, sample, grid or backend.
    """
    sample, grid = as_count("sample", sample), as_grid(grid)
    tracing.checked(check, keys, mask, grid, sample)
    keys = keys.detach()
    n = keys.shape[1]
    if n <= sample:
        return similarity(keys, None, mask, backend=backend)[1]
    step = step_of(int(n), int(grid[-1]) if grid is not None else math.isqrt(int(n)), sample)
    order = torch.arange(n, dtype=torch.int64, device=keys.device) * step % n
    if mask is None:
        valid, total = None, torch.full((), n, dtype=torch.int64, device=keys.device)
        sampled = keys[:, order[:sample]]
    else:
        turn = torch.arange(n, dtype=torch.int64, device=keys.device)
        turn = torch.where(mask[:, order], turn, turn + n).topk(sample, dim=1, largest=False).values  # [B, sample]
        valid, total = turn < n, mask.sum(dim=1)
        sampled = keys.gather(1, order[turn % n, None].expand(-1, -1, keys.shape[2]))
    s, sbar, _, tier = similarity(sampled, None, valid, backend=backend)
    count = (tier == 0).sum(dim=1)
    of_itself = (s.diagonal(dim1=1, dim2=2) > 0.5).sum(dim=1)  # 1 of each key but a zero one
    others = (sbar.double() * count * count - of_itself) / (count * (count - 1)).clamp(min=1)  # 0 of no pair
    mean = (of_itself / count.clamp(min=1).double() + (total - 1) * others) / total.clamp(min=1)
    return mean.clamp(0, 1).to(sbar.dtype)
