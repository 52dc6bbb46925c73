"""VisionZip, visionzip/clip_encoder.py: the vision tower's forward, which hands over K rows and their places."""

from collections.abc import Callable
from typing import Any

import torch

from ..methods.registry import Method
from ..methods.results import rows

Tower = Any  # the host's CLIPVisionTower


def tower_forward(
    method: Method, keep: int, *, use_metric: bool = False, without_place: int = 0, **options: Any
) -> Callable[[Tower, Any], tuple[Any, Any]]:
    """A method as ``forward(self, images) -> (hidden [B, keep, C], places [B, keep - without_place])``.

    Row 0 is [CLS], place 0, as in the host, and counts within ``keep``: the method has keep - 1 of the patches, whose
    places are 1 to N. Scores are the [CLS] attention of ``self.select_layer``, summed over its heads. Rows are in
    picture order. What differs from the host: its dominant rows are in picture order and its places in order of
    attention; its contextual rows have no place; ties; fp16 and bf16 computed as fp32.

    Args:
        method: of condense_kernels.methods; ``options`` go to it.
        keep: rows of an image, [CLS] among them.
        use_metric: the attention keys that the host leaves at the layer as ``metric`` [B, 1 + N, d] are the
            method's keys.
        without_place: so many rows, those of the least mass, come last and have no place, like the host's contextual
            ones. Its LLaVA-NeXT (restore_image_features_sorted in visionzip/llava_arch.py) needs 1 at least: it reads
            them by ``features[:, -count:]``, which is every row where count is 0.

    Returns, of the forward: lists of batches of one where images is a list, as in the host.

    Raises:
        ValueError: without_place outside [0, keep - 1). What the method raises: keep - 1 outside [1, N].
    """
    if not 0 <= without_place < max(keep - 1, 1):
        raise ValueError(f"without_place: expected 0 <= without_place < {keep - 1}, got {without_place}.")

    def condensed(self: Tower, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = images.to(device=self.device, dtype=self.dtype)
        out = self.vision_tower(given, output_hidden_states=True, output_attentions=True)
        hidden, attention = out.hidden_states[self.select_layer], out.attentions[self.select_layer]
        layer = self.vision_tower.vision_model.encoder.layers[self.select_layer] if use_metric else None
        keys = None if layer is None else layer.metric[:, 1:]
        scores = attention[:, :, 0, 1:].sum(dim=1)
        merged, places, _, mass = method(hidden[:, 1:], scores, keep - 1, keys=keys, **options)
        if without_place:
            last = mass.argsort(dim=1, stable=True)[:, :without_place]
            order = torch.zeros_like(mass).scatter(1, last, 1).argsort(dim=1, stable=True)
            merged, places = rows(merged, order), places.gather(1, order)
        places = torch.nn.functional.pad(places + 1, (1, 0))  # [CLS] is 0
        return torch.cat([hidden[:, :1], merged], dim=1).to(images.dtype), places[:, : keep - without_place]

    @torch.no_grad()
    def forward(self: Tower, images: Any) -> tuple[Any, Any]:
        if isinstance(images, list):
            each = [condensed(self, image[None]) for image in images]
            return [hidden for hidden, _ in each], [places for _, places in each]
        return condensed(self, images)

    return forward
