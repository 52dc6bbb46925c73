"""Layers for kernels.kernelize: each is a forward alone, without state. What one reads of the module whose forward it
takes over stands above it; options that the module does not have are as in the operator."""

from __future__ import annotations

import torch
from torch import nn

from .ops.attention_scores import attention_scores
from .ops.merge import merge
from .ops.select_and_merge import Condensed, select_and_merge


def options_of(module: nn.Module, *names: str) -> dict:
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


class AttentionScores(nn.Module):
    """Eq. 1: how much attention each key gets; of the module ``rows``, ``scale``, ``causal`` and ``heads``, if any."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        queries: torch.Tensor,  # [B, Hq, M, d]
        keys: torch.Tensor,  # [B, Hkv, N, d]
    ) -> torch.Tensor:  # [B, N]
        return attention_scores(queries, keys, **options_of(self, "rows", "scale", "causal", "heads"))


class Condense(nn.Module):
    """Eq. 2 to 8: N tokens to num_anchors + num_background; returns (merged, indices, assignment, mass)."""

    has_backward = True
    can_torch_compile = True

    # Read: num_anchors, num_background and, if there, grid, suppression, spatial_weight, background_suppression,
    # scale_prior. Not annotated: Python 3.14 keeps annotations in members of the class, and kernels refuses those.

    def forward(
        self,
        features: torch.Tensor,  # [B, N, D]
        scores: torch.Tensor,  # [B, N]
    ) -> Condensed:
        weights = "suppression", "spatial_weight", "background_suppression", "scale_prior"
        options = options_of(self, "grid", *weights)
        return select_and_merge(features, scores, self.num_anchors, self.num_background, **options)


class Merge(nn.Module):
    """Eq. 8: each cluster into its weighted mean; returns (merged, mass). ``mode`` and ``centre_weight``, if there."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        features: torch.Tensor,  # [B, N, D]
        scores: torch.Tensor | None,  # [B, N]
        indices: torch.Tensor,  # [B, K]
        assignment: torch.Tensor,  # [B, N]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return merge(features, scores, indices, assignment, **options_of(self, "mode", "centre_weight"))
