"""Why the greedy selection took a token or left it: the scores of each step, told from its picks.

Nothing is selected here. The picks are those of greedy_select; their scores are worked out again from the similarities,
in the arithmetic that greedy_select states, so that at every step the pick has the highest of them.
"""

from typing import NamedTuple

import torch

from ..ops.greedy_select.reference import scaled_prior
from ..ops.similarity.reference import TAKEN, VALID
from ..testing import Inputs, Stages


class Tier(NamedTuple):
    """One of the two selections, anchors or background. A score is utility - suppression * likeness."""

    order: torch.Tensor  # [K] the picks, first pick first
    utility: torch.Tensor  # [N]
    likeness: torch.Tensor  # [K, N] before each pick: cosine with the most similar token picked so far, 0 at first
    suppressor: torch.Tensor  # [K, N] that token; -1 at first
    open: torch.Tensor  # [K, N] bool, what could be picked
    suppression: float

    @property
    def scores(self) -> torch.Tensor:  # [K, N]
        return self.utility - self.suppression * self.likeness

    def told(self) -> dict[str, torch.Tensor]:
        """[N] each: of a pick at its step, of the other tokens at the last step, at which they lost."""
        n = len(self.utility)
        step = torch.full((n,), len(self.order) - 1, dtype=torch.int64, device=self.order.device)
        step[self.order] = torch.arange(len(self.order), dtype=torch.int64, device=self.order.device)
        planes = {"score": self.scores, "likeness": self.likeness, "suppressor": self.suppressor}
        return {name: plane.gather(0, step[None])[0] for name, plane in planes.items()}


def followed(
    s: torch.Tensor,  # [N, N]
    prior: torch.Tensor,  # [N]
    sbar: torch.Tensor,  # []
    tier: torch.Tensor,  # [N] int8
    order: torch.Tensor,  # [K]
    suppression: float,
) -> Tier:
    likeness, suppressor, open_ = [], [], []
    most, by = torch.zeros_like(s[0]), torch.full_like(tier, -1, dtype=torch.int64)
    free = tier == VALID
    for step, pick in enumerate(order.tolist()):
        likeness.append(most)
        suppressor.append(by)
        open_.append(free)
        nearer = s[pick] > most if step else torch.ones_like(free)
        most, by = torch.where(nearer, s[pick], most), torch.where(nearer, pick, by)
        free = free.index_fill(0, order[step : step + 1], False)
    prior = prior.to(s.dtype)
    utility = scaled_prior(prior, sbar, tier) if suppression else prior
    return Tier(order, utility, torch.stack(likeness), torch.stack(suppressor), torch.stack(open_), suppression)


def reasons(stages: Stages, inputs: Inputs) -> dict[str, Tier]:
    """Of the first image; a selection of no tokens has no steps, and is left out."""
    s, sbar, tier = stages.s[0], stages.sbar[0], stages.tier[0]
    rest = tier.scatter(0, stages.anchors[0], TAKEN)
    selections = {
        "anchors": (inputs.scores[0], tier, stages.anchors[0]),
        "background": (stages.g[0], rest, stages.background[0]),
    }
    return {
        name: followed(s, prior, sbar, free, order, inputs.suppression)
        for name, (prior, free, order) in selections.items()
        if len(order)
    }
