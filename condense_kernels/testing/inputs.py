"""Inputs of named kinds, and how a backend runs them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import assign, global_similarity, greedy_select, merge, select_and_merge, select_and_merge_varlen, similarity
from ..ops.select_and_merge import Condensed
from ..ops.select_and_merge.pipeline import suppressions_of
from ..ops.select_and_merge_varlen.reference import for_each_segment
from ..ops.similarity.reference import TAKEN


class Stages(NamedTuple):
    """What the stages of one backend give on the way to a result."""

    s: torch.Tensor  # [B, N, N]
    sbar: torch.Tensor  # [B]
    g: torch.Tensor  # [B, N]
    tier: torch.Tensor  # [B, N] int8
    anchors: torch.Tensor  # [B, num_anchors] int64, in pick order
    background: torch.Tensor  # [B, num_background] int64, in pick order
    condensed: Condensed  # what the stages in a row give


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call of select_and_merge. ``dataclasses.replace(inputs, mask=...)`` gives a variant."""

    features: torch.Tensor  # [B, N, D]
    scores: torch.Tensor  # [B, N]
    num_anchors: int
    num_background: int
    keys: torch.Tensor | None = None  # [B, N, Dk]
    grid: tuple[int, ...] | None = None
    positions: torch.Tensor | None = None  # [N, P] or [B, N, P]
    mask: torch.Tensor | None = None  # [B, N] bool
    suppression: float = 1.0
    spatial_weight: float = 1.0
    background_suppression: float | None = None
    scale_prior: bool = True
    mean_similarity: torch.Tensor | None = None  # [B], packed: [S]

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return self.features, self.scores, self.num_anchors, self.num_background

    @property
    def options(self) -> dict[str, Any]:
        names = ("keys", "grid", "positions", "mask", "suppression", "spatial_weight", "background_suppression")
        return {name: getattr(self, name) for name in (*names, "scale_prior", "mean_similarity")}

    @property
    def suppressions(self) -> tuple[float, float]:
        """The factors of the anchors (Eq. 2) and of the background (Eq. 4)."""
        return suppressions_of(self.suppression, self.background_suppression)

    def to(self, device: torch.device | str) -> "Inputs":
        fields = vars(self).items()
        moved: dict[str, Any] = {name: value.to(device) for name, value in fields if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **moved)

    def image(self, b: int) -> "Inputs":
        """Image ``b`` as a batch of one."""
        shared = self.positions is not None and self.positions.dim() == 2
        tensors: dict[str, Any] = {
            name: value[b : b + 1]
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and not (name == "positions" and shared)
        }
        return dataclasses.replace(self, **tensors)

    def run(self, backend: str = "auto") -> Condensed:
        return select_and_merge(*self.args, **self.options, backend=backend)

    def run_stages(self, backend: str = "auto") -> Stages:
        """The same through the operators of the single stages, which also tell the order of the picks."""
        keys = self.features if self.keys is None else self.keys
        s, sbar, g, tier = similarity(keys, self.scores, self.mask, backend=backend)
        if self.mean_similarity is not None:
            sbar, (g, tier) = (
                self.mean_similarity.to(s),
                global_similarity(keys, self.scores, self.mask, backend=backend),
            )
        picking: dict[str, Any] = {"sbar": sbar if self.scale_prior else None, "backend": backend}
        of_anchors, of_background = self.suppressions
        anchors = greedy_select(s, self.scores, self.num_anchors, tier=tier, suppression=of_anchors, **picking)
        rest = tier.scatter(1, anchors, TAKEN)
        background = greedy_select(s, g, self.num_background, tier=rest, suppression=of_background, **picking)
        indices = torch.cat([anchors, background], dim=1).sort(dim=1).values
        where: dict[str, Any] = {"grid": self.grid, "positions": self.positions, "spatial_weight": self.spatial_weight}
        assignment = assign(s, indices, tier=tier, **where, backend=backend)
        merged, mass = merge(self.features, self.scores, indices, assignment, backend=backend)
        return Stages(s, sbar, g, tier, anchors, background, Condensed(merged, indices, assignment, mass))


@dataclasses.dataclass(frozen=True)
class PackedInputs:
    """One call of select_and_merge_varlen. ``dataclasses.replace(inputs, cu_seqlens=...)`` gives a variant."""

    features: torch.Tensor  # [T, D]
    scores: torch.Tensor  # [T]
    cu_seqlens: torch.Tensor  # [S + 1]
    cu_anchors: torch.Tensor  # [S + 1]
    cu_background: torch.Tensor  # [S + 1]
    total_keep: int
    max_seqlen: int
    keys: torch.Tensor | None = None  # [T, Dk]
    positions: torch.Tensor | None = None  # [T, P]
    suppression: float = 1.0
    spatial_weight: float = 1.0
    background_suppression: float | None = None
    scale_prior: bool = True
    mean_similarity: torch.Tensor | None = None  # [B], packed: [S]

    def run(self, backend: str = "auto") -> Condensed:
        return select_and_merge_varlen(**vars(self), backend=backend)

    def segment_by_segment(self, backend: str = "auto") -> Condensed:
        """What the reference says of these offsets, with the dense operator of ``backend``."""
        dense = functools.partial(select_and_merge, backend=backend)
        return Condensed(*for_each_segment(dense)(**vars(self)))


def near_square(num_tokens: int) -> tuple[int, int]:
    """The grid (H, W), H <= W, with product ``num_tokens`` that is nearest to a square; (1, N) for a prime."""
    height = next(h for h in range(math.isqrt(num_tokens), 0, -1) if num_tokens % h == 0)
    return height, num_tokens // height


def _ties(inputs: Inputs) -> Inputs:
    """All tokens equal, all scores equal: only the tie rules decide."""
    return dataclasses.replace(
        inputs,
        features=inputs.features[:, :1].expand_as(inputs.features).contiguous(),
        scores=torch.full_like(inputs.scores, 0.5),
    )


def tokens(inputs: Inputs) -> torch.Tensor:
    """Their places in an image."""
    return torch.arange(inputs.scores.shape[1], dtype=torch.int64, device=inputs.scores.device)


def _duplicates(inputs: Inputs) -> Inputs:
    """Every token three times (i, i + third, i + 2 third), scores included."""
    third = -(-inputs.scores.shape[1] // 3)
    source = tokens(inputs) % third
    return dataclasses.replace(inputs, features=inputs.features[:, source], scores=inputs.scores[:, source])


def _parallel(inputs: Inputs) -> Inputs:
    """Five directions, each token at its own length: cosines that are 1 up to rounding."""
    length = torch.linspace(0.5, 2, inputs.scores.shape[1], dtype=torch.float64, device=inputs.scores.device)[:, None]
    source = tokens(inputs) % 5  # of the first five tokens
    return dataclasses.replace(inputs, features=inputs.features[:, source] * length)


def _negative(inputs: Inputs) -> Inputs:
    """Tokens on both sides of the origin: half of the cosines are about -0.9."""
    side = 1 - tokens(inputs)[:, None] % 2 * 2
    centre = 3 * inputs.features[:, :1]
    return dataclasses.replace(inputs, features=side * (centre + inputs.features))


def _clustered(inputs: Inputs) -> Inputs:
    """Eight neighbourhoods with cosines of about 0.9 inside, and scores with a long tail, as attention has."""
    token = tokens(inputs)
    source = token - token % -(-len(token) // 8)
    features = inputs.features[:, source] + 0.3 * inputs.features
    return dataclasses.replace(inputs, features=features, scores=inputs.scores**8)


def _zero_keys(inputs: Inputs) -> Inputs:
    """Every fourth key is all zeros: its cosine with everything is 0."""
    keys = inputs.features.clone()
    keys[:, ::4] = 0
    return dataclasses.replace(inputs, keys=keys)


def _zero_scores(inputs: Inputs) -> Inputs:
    """All scores are 0 in the first image, every second one in the others: rows of zero mass."""
    scores = inputs.scores.clone()
    scores[:1] = 0
    scores[:, ::2] = 0
    return dataclasses.replace(inputs, scores=scores)


def _nan(inputs: Inputs) -> Inputs:
    """NaN and infinities in features, scores and keys, each in another token."""
    n = inputs.scores.shape[1]
    features, scores, keys = inputs.features.clone(), inputs.scores.clone(), inputs.features.clone()
    features[:, 0 % n, 0] = math.nan
    features[:, 1 % n, -1] = math.inf
    scores[:, 3 % n] = math.nan
    scores[:, 5 % n] = math.inf
    keys[:, 7 % n, 0] = math.nan
    keys[:, 11 % n, -1] = -math.inf
    return dataclasses.replace(inputs, features=features, scores=scores, keys=keys)


def _masked(inputs: Inputs) -> Inputs:
    """One valid token in the first image, fewer than are kept; about two thirds valid in the others."""
    n = inputs.scores.shape[1]
    mask = tokens(inputs).expand(inputs.scores.shape) % 3 != 1
    mask[:1] = tokens(inputs) == n // 2
    return dataclasses.replace(inputs, mask=mask)


def _magnitudes(inputs: Inputs) -> Inputs:
    """Keys from very small to very large, whose squares leave fp32's range."""
    exponent = torch.linspace(-30, 30, inputs.scores.shape[1], dtype=torch.float64, device=inputs.scores.device)[
        :, None
    ]
    return dataclasses.replace(inputs, keys=inputs.features * 10**exponent)


def _keys(inputs: Inputs) -> Inputs:
    """Keys of another width than the features."""
    return dataclasses.replace(inputs, keys=inputs.features[..., : max(1, inputs.features.shape[2] // 2)].cos())


def _positions(inputs: Inputs) -> Inputs:
    """Scattered coordinates, other ones in each image, instead of a grid."""
    b, n = inputs.scores.shape
    place = torch.arange(b * n, dtype=torch.float32, device=inputs.scores.device)
    at = torch.stack([place * 0.618 % 1 * 100, place * 0.7549 % 1 * 40], dim=-1)
    return dataclasses.replace(inputs, grid=None, positions=at.reshape(b, n, 2))


def _video(inputs: Inputs) -> Inputs:
    """A grid T x H x W."""
    frames = 2 if inputs.scores.shape[1] % 2 == 0 else 1
    return dataclasses.replace(inputs, grid=(frames, *near_square(inputs.scores.shape[1] // frames)))


def _similarity_only(inputs: Inputs) -> Inputs:
    """No grid and no positions: assignment by similarity alone."""
    return dataclasses.replace(inputs, grid=None, spatial_weight=0.0)


def _top_k(inputs: Inputs) -> Inputs:
    """suppression = 0: plain top-k by score."""
    return dataclasses.replace(inputs, suppression=0.0)


def _two_factors(inputs: Inputs) -> Inputs:
    """The background is suppressed more than the anchors are."""
    return dataclasses.replace(inputs, suppression=0.5, background_suppression=2.0)


def _unscaled(inputs: Inputs) -> Inputs:
    """The scores, and then the global similarities, are utilities as they are."""
    return dataclasses.replace(inputs, scale_prior=False)


KINDS: dict[str, Callable[[Inputs], Inputs]] = {
    "random": lambda inputs: inputs,
    "clustered": _clustered,
    "ties": _ties,
    "duplicates": _duplicates,
    "parallel": _parallel,
    "negative": _negative,
    "zero_keys": _zero_keys,
    "zero_scores": _zero_scores,
    "nan": _nan,
    "masked": _masked,
    "magnitudes": _magnitudes,
    "keys": _keys,
    "positions": _positions,
    "video": _video,
    "similarity_only": _similarity_only,
    "top_k": _top_k,
    "two_factors": _two_factors,
    "unscaled": _unscaled,
}


def make_inputs(
    kind: str = "random",
    *,
    batch: int = 2,
    num_tokens: int = 24,
    channels: int = 16,
    num_anchors: int | None = None,  # None: a quarter of the tokens
    num_background: int | None = None,  # None: an eighth of the tokens
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **options: Any,  # further fields of Inputs, e.g. suppression=0.5; they have the last word
) -> Inputs:
    """Inputs of a named kind (the keys of ``KINDS``): normal features, uniform scores, the grid nearest to a square.

    The same on every machine, as the generator runs on the CPU. ``magnitudes`` leaves its keys in fp32 where dtype
    is fp16, which cannot hold them.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
    generator = torch.Generator("cpu").manual_seed(seed)
    base = Inputs(
        features=torch.randn(batch, num_tokens, channels, generator=generator, dtype=torch.float64, device="cpu"),
        scores=torch.rand(batch, num_tokens, generator=generator, dtype=torch.float64, device="cpu"),
        num_anchors=max(1, num_tokens // 4) if num_anchors is None else num_anchors,
        num_background=num_tokens // 8 if num_background is None else num_background,
        grid=near_square(num_tokens),
    )
    made = dataclasses.replace(KINDS[kind](base), **options)
    keys_dtype = torch.float32 if kind == "magnitudes" and dtype == torch.float16 else dtype
    return dataclasses.replace(
        made,
        features=made.features.to(dtype),
        scores=made.scores.to(dtype),
        keys=None if made.keys is None else made.keys.to(keys_dtype),
    ).to(device)
