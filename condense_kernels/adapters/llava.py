"""Forks of LLaVA that prune in ``LlavaMetaForCausalLM.encode_images``, llava/model/llava_arch.py.

FasterVLM, HiPrune and CDPruner return all rows and a mask of those that stay, by which prepare_inputs_labels_for_-
multimodal indexes; VisPruner returns the rows that stay, and their number.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..methods.registry import Method
from .common import in_place, mask_of

Scores = Callable[..., torch.Tensor | None]
RESULTS = ("attentions", "masks", "rows")


def mean_over_heads(features: torch.Tensor, attentions: torch.Tensor, *_: Any) -> torch.Tensor:
    """The [CLS] attention of FasterVLM's tower, [B, H, N] -> [B, N]."""
    return attentions.mean(dim=1)


def relevance(features: torch.Tensor, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Of CDPruner's tower, [B, N, C] and [M, C] -> [B, N] in (0, 1]: minus the mean cosine with the texts.

    Scaled over each image, so that the most relevant has 1 and the least about 1e-6 of the range. The host takes the
    extremes over the batch, so that an image's tokens depend on the others, and has no 1e-6 below the fraction: a
    factor that all tokens share, which changes no pick; of equal cosines it divides by 0.
    """
    images, texts = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (images, texts))
    cosines = -(images @ texts.mean(dim=0))
    low, high = cosines.aminmax(dim=1, keepdim=True)
    return (cosines - low + 1e-6) / (high - low + 1e-6)


def visual_token_num(model: Any) -> int:
    return int(model.get_visual_token_num())


def encode_images(
    method: Method,
    *,
    scores: Scores = mean_over_heads,
    keep: int | Callable[[Any], int] = visual_token_num,
    result: str = "attentions",
    projected: bool = False,
    tower_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[..., tuple[Any, ...]]:
    """A method as ``encode_images(self, images, texts=None)``, to be set on LlavaMetaForCausalLM.

    ``self.get_model().get_vision_tower()(images)`` hands over features [B, N, C] and what scores are made of. The rows
    of the method are projected, and stand at the places of their tokens among zeros, which the mask leaves out: a
    method that merges works where the host selects, and the projector sees K rows for N. Rows come out in picture
    order. What differs from the hosts' own: K distinct tokens, ties to the lowest index, bf16 and fp16 computed as
    fp32, no row depends on the batch, no loop over K on the host.

    Args:
        method: of condense_kernels.methods; ``options`` go to it, such as ``grid=(24, 24)``.
        scores: (features, *what else the tower returned) -> [B, N]: :func:`mean_over_heads` of FasterVLM's
            attentions, :func:`relevance` for CDPruner's embeddings.
        keep: how many stay, or which number ``self`` says: CDPruner's is ``lambda self: self.visual_token_num``.
        result: "attentions" (features [B, N, D], mask [B, N], attentions), FasterVLM; "masks", without the last,
            HiPrune and CDPruner; "rows" (features [B, K, D], K), VisPruner.
        projected: the method reads the projector's output, as CDPruner does.
        tower_options: what the tower is called with besides, VisPruner's with ``{"output_attentions": True}``.

    Raises:
        ValueError: another result. What the method raises: no image, keep outside [1, N].
    """
    if result not in RESULTS:
        raise ValueError(f"result: expected one of {', '.join(RESULTS)}, got {result!r}.")

    def encode(self: Any, images: Any, texts: Any = None) -> tuple[Any, ...]:
        model = self.get_model()
        tower = model.get_vision_tower()
        asked = dict(tower_options or {}) if texts is None else {**(tower_options or {}), "texts": texts}
        features, *rest = tower(images, **asked)
        weights = scores(features, *rest)
        features = model.mm_projector(features) if projected else features
        found = method(features, weights, keep if isinstance(keep, int) else keep(self), **options)
        rows = found.merged if projected else model.mm_projector(found.merged)
        if result == "rows":
            return rows, rows.shape[1]
        n = features.shape[1]
        whole = in_place(rows, found.indices, n), mask_of(found.indices, n)
        return (*whole, rest[0]) if result == "attentions" else whole

    return encode
