"""What differs between model families: a row each. Everything else reads the model's own config.

A layout brings the encoder's patch scores to the tokens that the language model gets, as the model's own projector
pools patches, and says on which grid each image's tokens lie.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

Inputs = dict[str, Any]  # of the call: input_ids, pixel_values, image_grid_thw, ...
Grid = tuple[int, ...]
Scored = tuple[list[torch.Tensor], list[Grid]]  # [N] of each image, and its token grid
Layout = Callable[[Any, Inputs, torch.Tensor, Sequence[int]], Scored]  # config, inputs, [all patches], N of each image


def window_means(scores: torch.Tensor, grid: Grid, window: int) -> torch.Tensor:
    """[H * W] patches -> [H / window * W / window] tokens."""
    h, w = grid
    return scores.view(h // window, window, w // window, window).mean(dim=(1, 3)).flatten()


def side_of(count: int, what: str) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"model: expected images of a square number of {what}, as this family's are, got {count}. Remedy: family=, "
            "the name of one whose images are of any size; else an issue that names the model."
        )
    return side


def square(config: Any, inputs: Inputs, patch_scores: torch.Tensor, tokens: Sequence[int]) -> Scored:
    """Square images of one size, patches row by row, pooled over square windows: CLIP, SigLIP, pixel shuffles."""
    patches = side_of(len(patch_scores) // max(len(tokens), 1), "patches")
    side = side_of(tokens[0] if len(tokens) else 1, "tokens")
    if patches % side != 0:
        raise ValueError(
            f"model: expected each token to stand for a window of patches, as this family's do, got {side} x {side} "
            f"tokens of {patches} x {patches} patches. Remedy: an issue that names the model."
        )
    images = patch_scores.view(len(tokens), -1)
    scores = [window_means(image, (patches, patches), patches // side) for image in images]
    return scores, [(side, side)] * len(tokens)


def by_frames(config: Any, inputs: Inputs, patch_scores: torch.Tensor, tokens: Sequence[int]) -> Scored:
    """Qwen-VL, GLM-4V: images of any size, the patches of a merge group one after the other."""
    vision, grids = config.vision_config, inputs["image_grid_thw"]
    merge = vision.spatial_merge_size
    scores = patch_scores.view(-1, merge * merge).mean(dim=1)
    if hasattr(vision, "fullatt_block_indexes"):  # the groups come window by window
        order, _ = get_vision_window_index(grids, merge, vision.window_size, vision.patch_size)
        scores = scores[order.argsort().to(scores.device)]
    shapes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    return list(scores.split(list(tokens))), [shape if shape[0] > 1 else shape[1:] for shape in shapes]


def patch_grids(config: Any, inputs: Inputs) -> list[Grid]:
    """Of Pixtral's encoder, which runs all images as one sequence."""
    patch = config.vision_config.patch_size
    return [(int(h) // patch, int(w) // patch) for h, w in inputs["image_sizes"]]


def by_sizes(config: Any, inputs: Inputs, patch_scores: torch.Tensor, tokens: Sequence[int]) -> Scored:
    """Pixtral's encoder: images of any size, patches row by row."""
    window = getattr(config, "spatial_merge_size", 1)
    grids = patch_grids(config, inputs)
    images = patch_scores.split([h * w for h, w in grids])
    scores = [window_means(image, grid, window) for image, grid in zip(images, grids, strict=True)]
    return scores, [(h // window, w // window) for h, w in grids]


def by_positions(config: Any, inputs: Inputs, patch_scores: torch.Tensor, tokens: Sequence[int]) -> Scored:
    """Gemma 4: patches padded to one number, each with its (x, y), averaged over windows."""
    window = config.vision_config.pooling_kernel_size
    positions = inputs["image_position_ids"]  # [B, P, 2], -1 = padding
    scores: list[torch.Tensor] = []
    grids: list[Grid] = []
    for image, xy, count in zip(patch_scores.view(positions.shape[:2]), positions, tokens, strict=True):
        real = (xy >= 0).all(dim=-1)
        x, y = (xy[real] // window).unbind(dim=-1)
        width = (int(xy[real, 0].max()) + 1) // window
        sums = image.new_zeros(count).index_add(0, x + width * y, image[real])
        scores.append(sums / window**2)
        grids.append((count // width, width))
    return scores, grids


@dataclass(frozen=True)
class Family:
    projector: str | None = None  # where features are condensed before it: a module of the base model, token by token
    layout: Layout = square
    segments: Callable[[Any, Inputs], list[Grid]] | None = None  # patch grids of what the encoder runs as one sequence
    planes: tuple[str, ...] = ()  # further features of the same tokens, in the output of get_image_features
    crops: bool = False  # an image is several crops, packed by pack_image_features, and K is for each of them
    tile: Callable[[Any, Inputs], int] | None = None  # tokens of one image, where the output joins those of a prompt
    needs: tuple[str, ...] = ()  # what its processor returns beside input_ids and pixel_values
    refuses: tuple[str, ...] = ()  # what it must not return, as then this is not the model's row
    hands_on: bool = False  # forward hands what it does not name on to get_image_features


def idefics_tile(config: Any, inputs: Inputs) -> int:
    h, w = (side // config.vision_config.patch_size for side in inputs["pixel_values"].shape[-2:])
    return h * w // config.scale_factor**2


GENERIC = Family(  # images of one size, and square
    refuses=("image_grid_thw", "image_grid_hw", "image_grids", "image_position_ids", "image_sizes", "spatial_shapes")
)
LLAVA = Family(projector="multi_modal_projector", hands_on=True)
CROPS = Family(projector="multi_modal_projector", crops=True, needs=("image_sizes",))
PIXTRAL = Family(layout=by_sizes, segments=patch_grids, needs=("image_sizes",))
QWEN = Family(layout=by_frames, needs=("image_grid_thw", "mm_token_type_ids"), hands_on=True)
QWEN3 = replace(QWEN, planes=("deepstack_features",))
FAMILIES = {
    "aya_vision": Family(),
    "cohere2_vision": Family(),
    "deepseek_vl": Family(),
    "exaone4_5": replace(QWEN, needs=("image_grid_thw",)),
    "gemma3": Family(),
    "gemma4": Family(layout=by_positions, needs=("image_position_ids",)),
    "glm46v": QWEN,
    "glm4v": QWEN,
    "glm4v_moe": QWEN,
    "idefics3": Family(tile=idefics_tile),
    "internvl": Family(projector="multi_modal_projector"),
    "llava": LLAVA,
    "llava_next": CROPS,
    "llava_onevision": CROPS,
    "lighton_ocr": PIXTRAL,
    "mistral3": PIXTRAL,
    "ovis2": Family(),
    "paligemma": Family(),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "smolvlm": Family(tile=idefics_tile),
    "vipllava": Family(projector="multi_modal_projector"),
}


def family_of(config: Any) -> Family | None:
    """None: this model has no row. LLaVA's goes by its encoder, too: Pixtral-12B is a LLaVA."""
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    if config.model_type == "llava" and vision == "pixtral":
        return replace(PIXTRAL, hands_on=True)
    return FAMILIES.get(config.model_type)


def layer_of(config: Any, inputs: Inputs) -> int:
    """The encoder's layer whose attention scores the patches: that which the features come from, or the last one that
    attends to the whole image. vision_feature_layer counts the embeddings as 0."""
    vision = getattr(config, "vision_config", None)
    full = getattr(vision, "fullatt_block_indexes", None)
    if full:
        return max(full)
    names = "vision_feature_layer", "vision_feature_layers"  # VipLLaVA's, in older releases of transformers
    layers = *map(inputs.get, names), *(getattr(config, name, None) for name in names), -1
    layer = next(layer for layer in layers if layer is not None)
    if not isinstance(layer, int):
        depth = getattr(vision, "num_hidden_layers", 0) + 1
        layer = max((index for index in layer or [-1]), key=lambda index: index % depth)
    return layer if layer < 0 else layer - 1
