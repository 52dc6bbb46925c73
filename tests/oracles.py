"""What a model with condensed images must equal, from the stock model alone: attention maps written out in full,
dropped placeholders hidden by the attention mask, or prompts that never had them."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling
from zoo import IMAGE, PATCH, Case, Rows, one_crop, patches

from condense_kernels.ops.select_and_merge import Condensed

# The attention that scores the patches: of the layer whose output the features are, or the last one before it that
# attends to the whole image. The towers have three layers.
ATTENTION = {
    "llava": "vision_tower.encoder.layers.1.self_attn",  # vision_feature_layer = -2: hidden_states[-2] is its output
    "llava_next": "vision_tower.encoder.layers.1.self_attn",
    "llava_onevision": "vision_tower.encoder.layers.2.self_attn",  # vision_feature_layer = -1
    "internvl": "vision_tower.encoder.layer.2.attention",  # vision_feature_layer = -1: last_hidden_state
    "qwen2_5_vl": "visual.blocks.1.attn",  # fullatt_block_indexes = [0, 1]; block 2 attends within windows
    "smolvlm": "vision_model.encoder.layers.2.self_attn",
    "idefics3": "vision_model.encoder.layers.2.self_attn",
    "mistral3": "vision_tower.transformer.layers.2.attention",
    "pixtral": "vision_tower.transformer.layers.2.attention",
    "lighton_ocr": "vision_encoder.transformer.layers.2.attention",
    "vipllava": "vision_tower.encoder.layers.1.self_attn",  # of -2, -3 and 1 the last
    "deepseek_vl": "vision_model.encoder.layers.2.self_attn",
    "ovis2": "vision_tower.transformer.encoder.layers.2.attention",
    "exaone4_5": "visual.blocks.1.attn",
    **dict.fromkeys(
        ("gemma3", "gemma4", "paligemma", "aya_vision", "cohere2_vision"), "vision_tower.encoder.layers.2.self_attn"
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "glm4v_moe"),
        "visual.blocks.2.attn",
    ),
}
A_TOKEN_A_PATCH = ("llava", "vipllava", "pixtral", "llava_onevision", "paligemma", "deepseek_vl")
PROJECTED_LATER = (
    "llava",
    "vipllava",
    "llava_next",
    "llava_onevision",
    "internvl",
)  # condensed is what the projector gets
Selection = Sequence[torch.Tensor]  # [K] of each image (of each crop), ascending


@dataclass
class Encoded:
    """The images of a batch in order, or their crops."""

    features: list[torch.Tensor]  # [N, D], where they are condensed
    planes: list[list[torch.Tensor]]  # of each further plane likewise
    finish: Callable[[torch.Tensor], torch.Tensor]  # what is left to do until the language model gets them
    container: type  # of get_image_features' result: a tensor or a sequence
    further: dict  # what else of it the language model needs: Ovis's indicators


def encoder_inputs(case: Case, batch: dict) -> dict:
    names = inspect.signature(case.base.get_image_features).parameters
    return {name: batch[name] for name in names if name in batch}


def encode(case: Case, rows: Rows, batch: dict) -> Encoded:
    """By the stock encoder, with what its projector got, where that is what will be condensed."""
    caught: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        if case.name in PROJECTED_LATER:
            hook = case.base.multi_modal_projector.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
            stack.callback(hook.remove)
        output = case.base.get_image_features(**encoder_inputs(case, batch), return_dict=True)
    container = torch.Tensor if isinstance(output.pooler_output, torch.Tensor) else list
    if caught:
        return Encoded(list(caught[0]), [], case.base.multi_modal_projector, container, {})
    pooled = output.pooler_output
    if case.name in ("smolvlm", "idefics3"):  # from some release on one entry a row, not one an image
        pooled = torch.cat(list(pooled)).split(len(case.family.tokens(case, (32, 32), True)) - 2)
    planes = [list(plane) for plane in getattr(output, "deepstack_features", None) or []]
    further = {name: value for name, value in output.items() if name == "visual_indicator_features"}
    return Encoded(list(pooled), planes, lambda features: features, container, further)


# Scores: Eq. 1


def attention_maps(case: Case, batch: dict) -> list[torch.Tensor]:
    """[H, M, N] of each image, or of each sequence that the encoder makes of images: softmax(q k^T) in full, from the
    queries and keys that the module gives to its attention function."""
    module, maps = case.base.get_submodule(ATTENTION[case.name]), []

    def in_full(module, query, key, value, attention_mask=None, scaling=None, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            logits = logits.masked_fill(~visible, float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0)
        maps.extend(weights)
        return (weights @ value).transpose(1, 2), weights

    transformers.AttentionInterface.register("in_full", in_full)
    stock, module.config = module.config, copy.deepcopy(module.config)
    try:
        module.config._attn_implementation = "in_full"
        case.base.get_image_features(**encoder_inputs(case, batch), return_dict=True)
    finally:
        module.config = stock
    return maps


def windows(scores: torch.Tensor, width: int, side: int) -> torch.Tensor:
    """Means over side x side patches, row by row: [P] -> [P / side^2]."""
    grid = scores.view(-1, width)
    return torch.stack([window.mean() for band in grid.split(side) for window in band.split(side, dim=1)])


def scores(case: Case, rows: Rows, batch: dict) -> list[torch.Tensor]:
    """[N] of each image, or of each crop."""
    maps = attention_maps(case, batch)
    name, images = case.name, [image for row in rows for image in row]
    if name in ("llava", "vipllava", "llava_next"):  # CLIP has [CLS] first, the projector gets [:, 1:]
        return [image.mean(0)[0, 1:] for image in maps]
    if name == "internvl":  # likewise; pixel_shuffle puts 2 x 2 patches into one token
        return [windows(image.mean(0)[0, 1:], 8, 2) for image in maps]
    if name in ("mistral3", "lighton_ocr", "pixtral"):  # one sequence of all images; PatchMerger unfolds 2 x 2 patches
        widths = [case.size(image)[1] // PATCH for image in images]
        lengths = [case.size(image)[0] // PATCH * width for image, width in zip(images, widths, strict=True)]
        starts = [sum(lengths[:at]) for at in range(len(lengths))]
        own = [maps[0][:, at : at + n, at : at + n] for at, n in zip(starts, lengths, strict=True)]
        side = 1 if name in A_TOKEN_A_PATCH else 2
        return [windows(image.mean((0, 1)), width, side) for image, width in zip(own, widths, strict=True)]
    if name == "gemma4":  # padded at the end; Gemma4VisionPooler averages by (x, y) // kernel
        grids = [(case.size(image)[0] // PATCH, case.size(image)[1] // PATCH) for image in images]
        real = [image[:, : h * w, : h * w].mean((0, 1)) for image, (h, w) in zip(maps, grids, strict=True)]
        return [windows(image, w, 2) for image, (_, w) in zip(real, grids, strict=True)]
    means = [image.mean((0, 1)) for image in maps]
    if (
        case.family.pixels is patches
    ):  # one map a frame; four patches in a row are a merge group, merger's view(-1, 4 * C)
        groups = [image.view(-1, 4).mean(1) for image in means]
        return [by_rows(case, image, group) for image, group in zip(images, groups, strict=True)]
    if name in A_TOKEN_A_PATCH:  # SigLIP has no [CLS]
        return means
    return [windows(image, 8, 2) for image in means]  # pixel shuffles, and Gemma 3's AvgPool2d


def by_rows(case: Case, image: int, groups: torch.Tensor) -> torch.Tensor:
    """Qwen2.5-VL reorders merge groups by windows, of 2 x 2 of them here, and puts the merged ones back in order."""
    if case.name not in ("qwen2_5_vl", "exaone4_5"):
        return groups
    height, width = (length // (2 * PATCH) for length in case.size(image))
    places = [(y // 2, x // 2, y, x) for y in range(height) for x in range(width)]
    by_window = sorted(range(len(places)), key=places.__getitem__)
    return groups[torch.tensor(by_window).argsort()]


def grids(case: Case, rows: Rows) -> list[tuple[int, int]]:
    """Of the tokens of each image, or of each crop."""
    if case.family.crops is not one_crop:
        return [(4, 4)] * sum(sum(case.crops(row)) for row in rows)
    pixels = PATCH if case.name in A_TOKEN_A_PATCH else 2 * PATCH
    return [(case.size(image)[0] // pixels, case.size(image)[1] // pixels) for row in rows for image in row]


def best(scores: Sequence[torch.Tensor], keep: int | float) -> Selection:
    counts = [keep if isinstance(keep, int) else max(1, round(keep * len(image))) for image in scores]
    return [image.topk(count).indices.sort().values for image, count in zip(scores, counts, strict=True)]


# Prompts


def staying(batch: dict, selection: Selection, counts: Sequence[int]) -> torch.Tensor:
    """[B, L]: everything but the placeholders of what was not selected. Placeholders are read row by row."""
    stays = torch.ones_like(batch["input_ids"]).bool()
    places = (batch["input_ids"] == IMAGE).nonzero()
    for indices, count in zip(selection, counts, strict=True):
        of_image, places = places[:count], places[count:]
        dropped = sorted(set(range(count)) - set(indices.tolist()))
        stays[tuple(of_image[dropped].T)] = False
    assert len(places) == 0
    return stays


def mrope(case: Case, batch: dict) -> torch.Tensor:
    """[3, B, L], of the prompt with all tokens."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return case.base.get_rope_index(**{name: batch.get(name) for name in names})[0]


def compact(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def masked(case: Case, rows: Rows, side: str, selection: Selection, original: bool = False) -> dict:
    """Arguments of the stock model: all tokens are there, those not selected are hidden from all others. Positions are
    those of the condensed prompt, or those that the tokens have. Invalid with linear attention, whose state a hidden
    token changes."""
    batch = case.inputs(rows, side, unpacked=True)
    encoded = encode(case, rows, batch)
    stays = staying(batch, selection, [len(image) for image in encoded.features])
    positions = mrope(case, batch) if case.family.mrope and "image_grid_thw" in batch else None
    mask = batch["attention_mask"] * stays
    counted = compact(batch["attention_mask"] if original else mask)
    batch["attention_mask"], batch["position_ids"] = mask, counted
    if positions is not None:
        batch["position_ids"] = torch.cat([compact(mask)[None], positions])
    if case.family.crops is not one_crop and any(rows):
        crops = iter(encoded.finish(image) for image in encoded.features)
        features = [torch.cat([next(crops) for _ in range(sum(case.crops(row)))]) for row in rows if row]
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        batch["mm_encoder_outputs"] = outputs(encoded, features, [])
    return batch


def outputs(encoded: Encoded, features: list[torch.Tensor], planes: list[list[torch.Tensor]]) -> dict:
    held = torch.stack(features) if encoded.container is torch.Tensor else features
    output = BaseModelOutputWithPooling(pooler_output=held)
    for name, value in encoded.further.items():
        setattr(output, name, value)
    if planes:
        output.deepstack_features = planes
    return {"image": output}


def removed(
    case: Case,
    rows: Rows,
    selection: Selection,
    condensed: Sequence[torch.Tensor] | None = None,
    planes: Sequence[Sequence[torch.Tensor]] | None = None,
) -> Iterator[dict]:
    """Arguments of the stock model, a row at a time and without padding: a prompt that never had the other
    placeholders, and features [K, D] for those that it has: what was selected, unless something else is given."""
    batch = case.inputs(rows, unpacked=True)
    encoded = encode(case, rows, batch)
    lengths = [len(image) for image in encoded.features]

    def selected(images: list[torch.Tensor]) -> list[torch.Tensor]:
        return [image[indices] for image, indices in zip(images, selection, strict=True)]

    features = [encoded.finish(image) for image in condensed or selected(encoded.features)]
    planes = planes or [selected(plane) for plane in encoded.planes]
    at = 0
    for row in rows:
        count = sum(case.crops(row))
        span = slice(at, at + count)
        at += count
        alone = case.inputs([row], unpacked=True)
        stays = staying(alone, selection[span], lengths[span])[0]
        given = {
            name: alone[name][:, stays] for name in ("input_ids", "attention_mask", *case.family.types) if name in alone
        }
        if case.family.mrope and row:
            positions = mrope(case, alone)[..., stays]
            given["position_ids"] = torch.cat([compact(given["attention_mask"])[None], positions])
        if row:
            own = [plane[span] for plane in planes]
            given["mm_encoder_outputs"] = outputs(encoded, features[span], own)
        yield given


def of_rows(logits: torch.Tensor, lengths: Sequence[int], side: str) -> list[torch.Tensor]:
    """[length, V] of each row of what was padded on that side."""
    return [row[len(row) - n :] if side == "left" else row[:n] for row, n in zip(logits, lengths, strict=True)]


def pick(features: torch.Tensor, scores: torch.Tensor, keep: int, grid: tuple) -> Condensed:
    """A method that keeps the tokens of the highest scores as they are: nothing is merged."""
    indices = scores.topk(keep).indices.sort().values
    merged = features.gather(1, indices[..., None].expand(-1, -1, features.shape[2]))
    kept = torch.full(scores.shape, -1).scatter(1, indices, torch.arange(keep).expand_as(indices))
    return Condensed(merged, indices, kept, scores.gather(1, indices))


def row_lengths(case: Case, rows: Rows, keep: int) -> list[int]:
    """Text and ``keep`` tokens of each image, or of each of its crops."""
    return [
        len(prompt) - prompt.count(IMAGE) + keep * sum(case.crops(row))
        for row, prompt in ((row, case.prompt(row)) for row in rows)
    ]


@contextlib.contextmanager
def language_model_positions(case: Case) -> Iterator[list[torch.Tensor]]:
    """position_ids of each call of the language model."""
    seen = []
    text = getattr(case.base, "language_model", None) or case.base.text_model
    hook = text.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
