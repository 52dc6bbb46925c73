from collections.abc import Callable, Sequence

import torch

from ..._dispatch import backends, tracing
from ..._dispatch.checks import (
    as_grid,
    check_s_or_keys,
    check_tensor,
    check_tier,
    check_values,
    check_weight,
    check_where,
)
from ..._dispatch.debug import check_finite, check_indices, check_positions, refuse
from ..._dispatch.declaration import OPERATORS, Example, Operator, always, random
from ...tokens import take_rows
from . import reference


def check(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0, sources=None) -> None:
    sizes: dict[str, int] = {}
    check_tensor("s", s, "B N N", sizes, (torch.float32, torch.float64))
    check_tensor("indices", indices, "B K", sizes, (torch.int64,), s)
    check_tier(tier, "B N", sizes, s)
    check_weight("spatial_weight", spatial_weight)
    check_where(grid, positions, spatial_weight, sizes, s)
    if sources is not None:
        check_tensor("sources", sources, "B N", sizes, (torch.bool,), s)


def fake(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0, sources=None):
    return s.new_empty((s.shape[0], s.shape[1]), dtype=torch.int64)


def on_reference(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0, sources=None):
    check_values("indices", indices, -1, s.shape[1])
    options = {"grid": grid, "positions": positions, "spatial_weight": spatial_weight}
    return reference.assign(s, indices, tier=tier, sources=sources, **options)


def on_triton(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0, sources=None):
    from .kernel import assign as launch

    options = {"grid": grid, "positions": positions, "spatial_weight": spatial_weight}
    return launch(s, indices, tier=tier, sources=sources, **options)


def flops(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0, sources=None) -> int:
    """Each token and row: a comparison; with a distance of P axes, P squares of differences, a root and its use too."""
    axes = 0 if spatial_weight == 0 else len(grid) if grid is not None else positions[-1]
    return s[0] * s[1] * indices[1] * (1 + (3 * axes + 2 if axes else 0))


def look(s, indices, *, tier=None, grid=None, positions=None, spatial_weight=1.0, sources=None) -> None:
    check_positions(positions, None if tier is None else tier != 2)
    look_at_similarities(s, indices)


def look_at_similarities(s: torch.Tensor, indices: torch.Tensor, of_image: Callable = "image {}".format) -> None:
    """What is not finite, names no token or two rows; and an s that was filled the other way around, which would give
    another assignment in silence."""
    check_finite("s", s, (of_image, "token", "token"))
    check_indices("indices", indices, -1, s.shape[1], of_image)
    rows, columns = take_rows(s, indices), take_rows(s.mT, indices)
    apart = (rows - columns).abs() > 1e-3 * torch.maximum(rows.abs(), columns.abs()).clamp(min=1)
    remedy = "Remedy: s.mT if s[i, j] is of token i and kept j; condense_kernels.debug(False) for a call that means it."
    refuse("s", rows, apart, "rows of kept tokens that are as their columns", (of_image, "row", "token"), remedy)


def examples(b: int) -> list[Example]:
    s = random(b, 12, 12)
    s = (s + s.mT) / 2
    indices = torch.tensor([1, 4, 6, 11], dtype=torch.int64, device="cpu").expand(b, -1)
    return [
        Example((s, indices), {"tier": (random(b, 12) < 0.2).to(torch.int8) * 2, "grid": [3, 4]}),
        Example((s, indices), {"positions": random(12, 2), "spatial_weight": 0.3}),
        Example((s.double(), indices), {"positions": (9 * random(b, 12, 3)).int()}),
        Example((s, indices), {"spatial_weight": 0.0, "sources": random(b, 12) < 0.5}),
    ]


backends.register(
    Operator(
        "assign",
        check=check,
        reference=on_reference,
        triton=on_triton,
        fake=fake,
        flops=flops,
        examples=examples,
        look=look,
        shared={"positions": 2},
        is_traced=always,
    )
)


@tracing.leaf()
def assign(
    s: torch.Tensor | None = None,  # [B, N, N]
    indices: torch.Tensor | None = None,  # [B, K]
    *,
    tier: torch.Tensor | None = None,  # [B, N]
    grid: Sequence[int] | None = None,
    positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
    spatial_weight: float = 1.0,
    sources: torch.Tensor | None = None,  # [B, N]
    keys: torch.Tensor | None = None,  # [B, N, Dk]
    mask: torch.Tensor | None = None,  # [B, N]
    metric: str = "cosine",
    backend: str = "auto",
) -> torch.Tensor:
    """Send every token to the kept token that is most similar and near (Eq. 6 and 7).

    The row of token i maximises ``s[j, i] - spatial_weight * d_ij / dmax`` over the kept tokens j; d is the Euclidean
    distance, dmax the diagonal of the valid tokens' bounding box. A tie goes to the lowest row. A kept token goes to
    its own row.

    Args:
        s: [B, N, N] fp32 or fp64 similarities; NaN and infinities count as 0. Only the rows of kept tokens are read,
            s[kept, token], so it need not be symmetric.
        indices: [B, K] int64, the kept tokens, distinct, in any order; -1 is a row that takes nobody.
        tier: [B, N] int8; a token of tier 2 (masked) is not assigned, and its row takes nobody.
        grid: (H, W) or (T, H, W) with product N, row-major. Grid or positions is required unless spatial_weight is 0.
        positions: [N, P] or [B, N, P] coordinates of a float or signed integer dtype (or uint8); a non-finite one makes
            its token's distances 0.
        spatial_weight: finite, >= 0; 0 gives assignment by similarity alone.
        sources: [B, N] bool, who may be merged: a token that is not a source goes nowhere, -1. Kept tokens go to
            their own rows whatever it says.
        keys: [B, N, Dk] floating, instead of s: the assignment is that on the s and tier of
            :func:`similarity(keys, mask=mask)`, of which the kept tokens' rows alone are computed. The raw operator is
            assign_from_keys.
        mask: [B, N] bool, False = padding; with keys.
        metric: of keys, "cosine".
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Returns:
        assignment: [B, N] int64 in [0, K), the row of each token; -1 where masked, where neither a source nor kept,
            and where no row takes tokens.

    Raises:
        TypeError, ValueError: wrong rank, shape, dtype, device, grid, spatial_weight or backend.
        RuntimeError: on CPU, an index outside [-1, N). On a GPU, where values are not read, it is a row that takes
            nobody.
    """
    grid = as_grid(grid)
    check_s_or_keys(s, keys, {"tier": tier}, {"mask": (mask, None), "metric": (metric, "cosine")})
    options = {"grid": grid, "positions": positions, "spatial_weight": spatial_weight, "sources": sources}
    if keys is None:
        op, on, options = "assign", s, {"tier": tier, **options}
    else:
        op, on, options = "assign_from_keys", keys, {"mask": mask, **options, "metric": metric}
    tracing.checked(OPERATORS[op].check, on, indices, **options)
    return backends.run(op, backend, (on, indices), options)
