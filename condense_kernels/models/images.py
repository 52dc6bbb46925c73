"""The images of one call: where their features are condensed, and which of their tokens stay in the prompt."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..budget import count_of
from ..ops.select_and_merge import Condensed
from ..tokens import sizes
from .checks import check_count, check_output
from .families import Family, Inputs
from .methods import Condenser, merged_plane
from .scoring import Recorder
from .timing import Stopwatch


class Images:
    """Condenses them while the model encodes them, before its projector, or what the model returned."""

    def __init__(
        self,
        base: Any,
        family: Family,
        keep: int | float,
        condenser: Condenser,
        inputs: Inputs,
        recorder: Recorder,
        watch: Stopwatch,
    ) -> None:
        self.base, self.family, self.keep, self.condenser = base, family, keep, condenser
        self.inputs, self.recorder, self.watch = inputs, recorder, watch
        self.counts: list[tuple[int, int]] = []  # N, K of each image, or of each of its crops
        self.tokens: list[int] = []  # of each image in the prompt, before
        self.kept: list[torch.Tensor] = []  # [K] of each image, of those
        self.condensed: list[Condensed] = []  # of each image, or of each of its crops

    def condense(
        self, features: Sequence[torch.Tensor], planes: Sequence[Sequence[torch.Tensor]] = ()
    ) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """[N, D] of each image -> [K, D]; of each plane likewise."""
        tokens = [len(x) for x in features]
        check_count(self.keep, tokens)
        keeps = [count_of("num_tokens", self.keep, n) for n in tokens]
        scores, grids = self.family.layout(self.base.config, self.inputs, self.recorder.flat(), tokens)
        with self.watch.span("operator"):
            condensed = self.condenser(features, scores, keeps, grids)
            others = [[merged_plane(*of) for of in zip(plane, scores, condensed, strict=True)] for plane in planes]
        self.counts = list(zip(tokens, keeps, strict=True))
        self.tokens, self.kept, self.condensed = tokens, [c.indices for c in condensed], condensed
        return [c.merged for c in condensed], others

    def log_sizes(self) -> torch.Tensor | None:
        """[tokens of all images that are left] fp32, log of how many went into each. None: of each only itself."""
        if all(n == k for n, k in self.counts):
            return None
        counts = torch.cat([sizes(c.assignment[None], c.indices[None])[0] for c in self.condensed])
        return counts.clamp(min=1).float().log() if bool((counts > 1).any()) else None

    def after_projector(self, output: Any) -> None:
        """Condense what get_image_features returned, if the family has it that way."""
        if self.family.projector is not None:
            return
        check_output(output, self.family)
        pooled = output.pooler_output
        whole = isinstance(pooled, torch.Tensor)
        if self.family.tile is not None:
            pooled = torch.cat(list(pooled)).split(self.family.tile(self.base.config, self.inputs))
        layers = [getattr(output, name) for name in self.family.planes]  # each a list over layers
        merged, planes = self.condense(list(pooled), [plane for layer in layers for plane in layer])
        output.pooler_output = torch.stack(merged) if whole else merged
        for name, layer in zip(self.family.planes, layers, strict=True):
            setattr(output, name, [planes.pop(0) for _ in layer])

    @contextlib.contextmanager
    def before_projector(self) -> Iterator[None]:
        """Condense what the projector gets, if the family has it that way: fewer tokens to project, too."""
        if self.family.projector is None:
            yield
            return

        def condensed(module: Any, args: tuple) -> tuple:
            merged, _ = self.condense(list(args[0]))  # [images, N, D]
            return (torch.stack(merged), *args[1:])

        hook = self.base.get_submodule(self.family.projector).register_forward_pre_hook(condensed)
        try:
            with self.packing_crops() if self.family.crops else contextlib.nullcontext():
                yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def packing_crops(self) -> Iterator[None]:
        """LLaVA-NeXT and -OneVision lay crops out by their grids. K tokens of a crop have none: crop follows crop."""
        stock = self.base.pack_image_features

        def packed(image_features: Sequence[torch.Tensor], image_sizes: Any, *args: Any, **kwargs: Any) -> tuple:
            if all(n == k for n, k in self.counts):
                features, lengths = stock(image_features, image_sizes, *args, **kwargs)
                self.tokens, self.kept = lengths.tolist(), [everything(x) for x in features]
                return features, lengths
            n = self.counts[0][0]
            newline = kwargs.get("image_newline")
            blank = dict(kwargs, image_newline=None if newline is None else newline.new_zeros(1))
            blanks = [x.new_zeros(len(x), n, 1) for x in image_features]
            self.tokens = stock(blanks, image_sizes, *args, **blank)[1].tolist()
            features = [x.flatten(0, 1) for x in image_features]  # [crops * K, D]
            check_crops(self.tokens, features)
            self.kept = [everything(x) for x in features]
            lengths = torch.tensor([len(x) for x in features], dtype=torch.int64, device=features[0].device)
            return features, lengths

        self.base.pack_image_features = packed
        try:
            yield
        finally:
            del self.base.pack_image_features


def everything(features: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(features), dtype=torch.int64, device=features.device)


def check_crops(tokens: Sequence[int], features: Sequence[torch.Tensor]) -> None:
    for had, x in zip(tokens, features, strict=True):
        if len(x) > had:
            raise ValueError(
                f"num_tokens: expected at most the {had} tokens that an image has without its padding, got {len(x)} of "
                "all its crops. Remedy: fewer; num_tokens counts those of each crop."
            )


def joined_by_row(features: Any, of_rows: Sequence[int]) -> Any:
    """One entry of features a row of the prompt that has images, where there was one an image: models concatenate them,
    and beam search, which repeats entries, would mix up the images of a row."""
    if isinstance(features, torch.Tensor):
        return features
    if not isinstance(features[0], torch.Tensor):  # a list over layers
        return [joined_by_row(layer, of_rows) for layer in features]
    return list(torch.cat(list(features)).split([count for count in of_rows if count > 0]))
