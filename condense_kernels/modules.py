"""torch.nn: the flagship as a layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ._dispatch.backends import check_backend
from ._dispatch.checks import (
    MAX_TOKENS,
    as_count,
    as_grid,
    check_background_suppression,
    check_budget,
    check_flag,
    check_grid,
    check_weight,
)
from .ops.select_and_merge import Condensed, select_and_merge


class Condense(torch.nn.Module):
    """Condense the visual tokens of each image to num_anchors + num_background; no parameters, no state.

    ``Condense(48, 16, grid=(24, 24))(features, scores).merged`` is [B, 64, D]. See :func:`select_and_merge` for what
    it computes; gradients flow to features and scores.

    Args:
        num_anchors, num_background: int >= 0, together at least 1.
        grid: (H, W) or (T, H, W), row-major, of every image that comes without positions. None: each call says.
        suppression, spatial_weight: finite, >= 0, the factors of Eq. 2, 4 and 6.
        background_suppression: finite, >= 0, a factor of its own for Eq. 4. None: as suppression.
        scale_prior: False takes the priors of Eq. 2 and 4 for utilities as they are.
        backend: "auto" (by device), "cpp", "triton" or "reference".

    Raises:
        TypeError, ValueError: in the constructor and in forward, as :func:`select_and_merge`.
    """

    def __init__(
        self,
        num_anchors: int,
        num_background: int,
        *,
        grid: Sequence[int] | None = None,
        suppression: float = 1.0,
        spatial_weight: float = 1.0,
        background_suppression: float | None = None,
        scale_prior: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_anchors, num_background = as_count("num_anchors", num_anchors), as_count("num_background", num_background)
        grid = as_grid(grid)
        check_budget(num_anchors, num_background, MAX_TOKENS)
        check_weight("suppression", suppression)
        check_weight("spatial_weight", spatial_weight)
        check_background_suppression(background_suppression)
        check_flag("scale_prior", scale_prior)
        check_backend(backend)
        if grid is not None:
            check_grid(grid)
        self.num_anchors, self.num_background = num_anchors, num_background
        self.grid = grid
        self.suppression, self.spatial_weight = suppression, spatial_weight
        self.background_suppression, self.scale_prior = background_suppression, scale_prior
        self.backend = backend

    def forward(
        self,
        features: torch.Tensor,  # [B, N, D]
        scores: torch.Tensor,  # [B, N]
        *,
        keys: torch.Tensor | None = None,  # [B, N, Dk]
        grid: Sequence[int] | None = None,
        positions: torch.Tensor | None = None,  # [N, P] or [B, N, P]
        mask: torch.Tensor | None = None,  # [B, N]
        mean_similarity: float | torch.Tensor | None = None,  # or [B]
    ) -> Condensed:
        """A grid or positions given here take the place of the layer's grid."""
        if grid is None and positions is None:
            grid = self.grid
        return select_and_merge(
            features,
            scores,
            self.num_anchors,
            self.num_background,
            keys=keys,
            grid=grid,
            positions=positions,
            mask=mask,
            suppression=self.suppression,
            spatial_weight=self.spatial_weight,
            background_suppression=self.background_suppression,
            scale_prior=self.scale_prior,
            mean_similarity=mean_similarity,
            backend=self.backend,
        )

    if TYPE_CHECKING:  # to whom Module says that a call takes and returns anything
        __call__ = forward

    def extra_repr(self) -> str:
        """The budget, and what differs from the defaults."""
        weights = {"suppression": 1.0, "spatial_weight": 1.0, "background_suppression": None}
        defaults = {"grid": None, **weights, "scale_prior": True, "backend": "auto"}
        options = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        fields = {"num_anchors": self.num_anchors, "num_background": self.num_background, **options}
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())
