"""select_and_merge as the five stages in a row. Every backend's flagship equals this, bit for bit."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..similarity.reference import TAKEN


class Stages(NamedTuple):
    similarity: Callable
    global_similarity: Callable
    greedy_select: Callable
    assign: Callable
    merge: Callable


def suppressions_of(suppression: float, background_suppression: float | None) -> tuple[float, float]:
    """The factors of Eq. 2 and of Eq. 4."""
    return suppression, suppression if background_suppression is None else background_suppression


def compose(stages: Stages) -> Callable:
    """Build select_and_merge out of one backend's stages."""

    def select_and_merge(
        features,  # [B, N, D]
        scores,  # [B, N]
        num_anchors,
        num_background,
        *,
        keys=None,  # [B, N, Dk]
        grid=None,
        positions=None,  # [N, P] or [B, N, P]
        mask=None,  # [B, N] bool
        suppression=1.0,
        spatial_weight=1.0,
        background_suppression=None,
        scale_prior=True,
        mean_similarity=None,  # [B]
    ):
        of_anchors, of_background = suppressions_of(suppression, background_suppression)
        keys = features if keys is None else keys
        s, sbar, g, tier = stages.similarity(keys, scores, mask)  # Eq. 3
        if mean_similarity is not None:  # then s is needed for the picks and the assignment alone
            sbar, (g, tier) = mean_similarity.to(s.dtype), stages.global_similarity(keys, scores, mask)
        scale = sbar if scale_prior else None
        anchors = stages.greedy_select(s, scores, num_anchors, sbar=scale, tier=tier, suppression=of_anchors)  # Eq. 2
        rest = tier.scatter(1, anchors, TAKEN)  # an anchor is no candidate for the background
        background = stages.greedy_select(
            s, g, num_background, sbar=scale, tier=rest, suppression=of_background
        )  # Eq. 4
        indices = torch.cat([anchors, background], dim=1).sort(dim=1).values  # [B, K]
        assignment = stages.assign(
            s, indices, tier=tier, grid=grid, positions=positions, spatial_weight=spatial_weight
        )  # Eq. 6, 7
        merged, mass = stages.merge(features, scores, indices, assignment)  # Eq. 8
        return merged, indices, assignment, mass

    return select_and_merge
