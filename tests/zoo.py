"""Tiny models of transformers, one row a family, with random weights and inputs made by hand: no processor, tokenizer
or network. What is drawn follows from the number of an image and from its row, not from the batch around it."""

import functools
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here comes from the hub

import torch
import transformers
from transformers.image_processing_utils import select_best_resolution

PAD, IMAGE, VIDEO, AUDIO, START, END, BREAK = 0, 90, 91, 92, 93, 94, 95
VOCABULARY = 96
TEXT = range(5, 80)
PATCH, SIDE = 4, 32  # pixels; an image of fixed size has 8 x 8 patches
CROP = 16  # tokens of a crop of LLaVA-NeXT and LLaVA-OneVision, and pixels of its side
Rows = Sequence[Sequence[int]]  # of a batch: the numbers of the images in each row
MIXED = ((0,), (), (1, 2))  # one image, none, two

_text = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)  # fmt: skip
_tower = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH, image_size=SIDE
)
_qwen_tower = dict(depth=3, hidden_size=32, num_heads=4, patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=2)
_qwen_ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_mrope = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2]))
_grids = [[16, 32], [32, 16], [32, 32]]  # of tiles of 16 x 16 pixels


def one_crop(size: tuple[int, int], alone: bool) -> int:
    return 1


@dataclass(frozen=True)
class Family:
    name: str
    architecture: str  # ...ForConditionalGeneration
    config: Callable[[], dict]
    pixels: Callable[["Case", Rows], dict[str, torch.Tensor]]
    tokens: Callable[
        ["Case", tuple[int, int], bool], list[int]
    ]  # what stands for an image of a size, alone in its row or not
    sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),)  # height and width in pixels; images take them in turn
    crops: Callable[[tuple[int, int], bool], int] = one_crop
    types: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # further inputs: what they say of text, of an image
    mrope: bool = False
    recurrent: bool = False  # linear attention: what is masked still changes its state


@dataclass(frozen=True)
class Case:
    family: Family
    model: transformers.PreTrainedModel

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def base(self) -> torch.nn.Module:
        return self.model.model

    def size(self, image: int) -> tuple[int, int]:
        return self.family.sizes[image % len(self.family.sizes)]

    def inputs(
        self, rows: Rows = ((0,),), side: str = "left", labels: bool = False, unpacked: bool = False
    ) -> dict[str, torch.Tensor]:
        """What the processor of the family would return for this batch; without images it returns no pixels. Unpacked:
        as if an image of several crops were all tokens of each crop, one crop after the other."""
        prompts = [self.prompt(row, unpacked) for row in rows]
        length = max(map(len, prompts))
        masks = [[1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor([_padded(row, length, side) for row in rows]) for rows in (prompts, masks))
        batch = {"input_ids": ids, "attention_mask": mask}
        for name, (text, image) in self.family.types.items():
            batch[name] = torch.where(ids == IMAGE, image, text)
        if labels:  # of text; of a row's first token none: behind padding on the left it would be predicted from that
            predicted = torch.isin(ids, torch.tensor(TEXT)) & (mask.cumsum(-1) > 1)
            batch["labels"] = torch.where(predicted, ids, -100)
        return batch | (self.family.pixels(self, rows) if any(rows) else {})

    def crops(self, row: Sequence[int]) -> list[int]:
        """How many of them each image of the row has."""
        return [self.family.crops(self.size(image), len(row) == 1) for image in row]

    def prompt(self, row: Sequence[int], unpacked: bool = False) -> list[int]:
        draw = torch.Generator().manual_seed(zlib.crc32(repr(tuple(row)).encode()))

        def text() -> list[int]:
            length = int(torch.randint(3, 7, (), generator=draw))
            return torch.randint(TEXT.start, TEXT.stop, (length,), generator=draw).tolist()

        if unpacked and self.family.crops is not one_crop:
            images = [[IMAGE] * (CROP * count) for count in self.crops(row)]
        else:
            images = [self.family.tokens(self, self.size(image), len(row) == 1) for image in row]
        return sum(([*image, *text()] for image in images), text())


def _padded(row: list[int], length: int, side: str) -> list[int]:
    padding = [PAD] * (length - len(row))
    return padding + row if side == "left" else row + padding


def flat(rows: Rows) -> list[int]:
    return [image for row in rows for image in row]


def draw(image: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + image))


# What stands for an image


def one_for(pixels: int) -> Callable[[Case, tuple[int, int], bool], list[int]]:
    """A placeholder for each square of this many pixels a side, between two tokens of text."""
    return lambda case, size, alone: [START, *[IMAGE] * (size[0] // pixels * (size[1] // pixels)), END]


def rows_broken(pixels: int) -> Callable[[Case, tuple[int, int], bool], list[int]]:
    """Pixtral's: each row of placeholders ends with a token of its own."""
    return lambda case, size, alone: [*([*[IMAGE] * (size[1] // pixels), BREAK] * (size[0] // pixels))[:-1], END]


def as_packed(case: Case, size: tuple[int, int], alone: bool) -> list[int]:
    """LLaVA-NeXT's: the base and the tiles, unpadded, a newline after each row; counted by packing them."""
    crops = torch.zeros(case.family.crops(size, alone), CROP, case.model.config.text_config.hidden_size)
    packing = {"llava_next": {"vision_feature_select_strategy": "default"}}.get(case.name, {})
    newline = case.base.image_newline.detach()
    packed, _ = case.base.pack_image_features([crops], torch.tensor([size]), image_newline=newline, **packing)
    return [IMAGE] * len(packed[0])


def tiles(size: tuple[int, int], alone: bool) -> int:
    """And the base."""
    height, width = select_best_resolution(size, _grids)
    return 1 + height // CROP * (width // CROP)


def tiles_if_alone(size: tuple[int, int], alone: bool) -> int:
    return tiles(size, alone) if alone else 1


# What the tower gets


def plain(case: Case, rows: Rows) -> dict:
    return {"pixel_values": torch.stack([draw(image, 3, SIDE, SIDE) for image in flat(rows)])}


def tiled(case: Case, rows: Rows) -> dict:
    """As many tiles as the image of the most has, the rest zero."""
    images = flat(rows)
    counts = [tiles(case.size(image), True) for image in images]
    pixels = torch.zeros(len(images), max(counts), 3, CROP, CROP)
    for at, (image, count) in enumerate(zip(images, counts, strict=True)):
        pixels[at, :count] = draw(image, count, 3, CROP, CROP)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([case.size(image) for image in images])}


def tiled_if_alone(case: Case, rows: Rows) -> dict:
    """LLaVA-OneVision's: batch_num_images tells which rows have one image: several are not cut into tiles."""
    return tiled(case, rows) | {"batch_num_images": torch.tensor([len(row) for row in rows])}


def patches(case: Case, rows: Rows) -> dict:
    """Qwen's: patches of all images in a row, in groups that will be merged."""
    images = flat(rows)
    grids = torch.tensor([(1, *(length // PATCH for length in case.size(image))) for image in images])
    pixels = [draw(image, int(grid.prod()), 3 * 2 * PATCH**2) for image, grid in zip(images, grids, strict=True)]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": grids}


def patches_with_positions(case: Case, rows: Rows) -> dict:
    """Gemma 4's: patches row by row, and where each of them is, -1 where there is none."""
    images = flat(rows)
    grids = [tuple(length // PATCH for length in case.size(image)) for image in images]
    longest = max(height * width for height, width in grids)
    pixels = torch.zeros(len(images), longest, 3 * PATCH**2)
    positions = torch.full((len(images), longest, 2), -1)
    for at, (image, (height, width)) in enumerate(zip(images, grids, strict=True)):
        pixels[at, : height * width] = draw(image, height * width, 3 * PATCH**2).sigmoid()
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        positions[at, : height * width] = torch.stack([x, y], -1).flatten(0, 1)
    return {"pixel_values": pixels, "image_position_ids": positions}


def by_row(case: Case, rows: Rows) -> dict:
    """Idefics' and SmolVLM's: as many images a row as the row of the most has, the rest zero."""
    pixels = torch.zeros(len(rows), max(map(len, rows)), 3, SIDE, SIDE)
    for at, row in enumerate(rows):
        for place, image in enumerate(row):
            pixels[at, place] = draw(image, 3, SIDE, SIDE)
    return {"pixel_values": pixels}


def with_sizes(case: Case, rows: Rows) -> dict:
    """Pixtral's: padded to the largest on the right and below, with the size of each."""
    images = flat(rows)
    sizes = torch.tensor([case.size(image) for image in images])
    pixels = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
    for at, (image, (height, width)) in enumerate(zip(images, sizes.tolist(), strict=True)):
        pixels[at, :, :height, :width] = draw(image, 3, height, width)
    return {"pixel_values": pixels, "image_sizes": sizes}


# The families


def _llava(text: str, **tower) -> dict:
    return dict(
        vision_config=_tower | tower, text_config=_text | dict(model_type=text), image_token_index=IMAGE
    )  # fmt: skip


def _glm(kind: str, text: dict, **further) -> dict:
    return dict(
        vision_config=_qwen_tower
        | dict(model_type=f"{kind}_vision", intermediate_size=48, out_hidden_size=64, image_size=SIDE),
        text_config=_text | dict(model_type=f"{kind}_text") | text | further, image_token_id=IMAGE,
        video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
    )  # fmt: skip


def _qwen3(tower: dict, text: dict) -> dict:
    return dict(
        vision_config=_qwen_tower | dict(intermediate_size=48, out_hidden_size=64, num_position_embeddings=64) | tower,
        text_config=_text | dict(head_dim=16) | _mrope | text,
        **_qwen_ids,
    )


_windows = dict(intermediate_size=48, out_hidden_size=64, window_size=16, fullatt_block_indexes=[0, 1])
_clip = dict(model_type="clip_vision_model")
_siglip = dict(model_type="siglip_vision_model", vision_use_head=False)
_experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_linear = dict(
    num_hidden_layers=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"] * 2,
    rope_parameters=_mrope["rope_parameters"] | dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.5),
)  # fmt: skip
_gemma = dict(head_dim=16, sliding_window=512, layer_types=["sliding_attention", "full_attention"])
_gemma4_rope = dict(
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
    full_attention=dict(rope_type="proportional", rope_theta=10000.0, partial_rotary_factor=0.25),
)
_token_types = dict(mm_token_type_ids=(0, 1))
_three_sizes = ((32, 32), (16, 32), (24, 40))
_qwen = dict(pixels=patches, tokens=one_for(2 * PATCH), sizes=_three_sizes, types=_token_types, mrope=True)

FAMILIES = [
    Family(
        "llava", "Llava", lambda: _llava("llama", **_clip, image_size=24),
        lambda case, rows: {"pixel_values": torch.stack([draw(image, 3, 24, 24) for image in flat(rows)])},
        one_for(PATCH), sizes=((24, 24),),
    ),
    Family(
        "vipllava", "VipLlava",
        lambda: _llava("llama", **_clip, image_size=24) | dict(vision_feature_layers=[-2, -3, 1]),
        lambda case, rows: {"pixel_values": torch.stack([draw(image, 3, 24, 24) for image in flat(rows)])},
        one_for(PATCH), sizes=((24, 24),),
    ),
    Family(
        "pixtral", "Llava",  # Pixtral-12B
        lambda: _llava("mistral", model_type="pixtral", head_dim=8)
        | dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
        with_sizes, rows_broken(PATCH), sizes=_three_sizes,
    ),
    Family(
        "llava_next", "LlavaNext",
        lambda: _llava("llama", **_clip, image_size=CROP) | dict(image_grid_pinpoints=_grids),
        tiled, as_packed, sizes=((32, 32), (16, 32), (20, 30)), crops=tiles,
    ),
    Family(
        "llava_onevision", "LlavaOnevision",
        lambda: _llava("qwen2", **_siglip, image_size=CROP)
        | dict(image_grid_pinpoints=_grids, video_token_index=VIDEO),
        tiled_if_alone, as_packed, sizes=((32, 32), (16, 32), (20, 30)), crops=tiles_if_alone,
    ),
    Family(
        "internvl", "InternVL",
        lambda: dict(
            vision_config=_tower | dict(use_qk_norm=True), text_config=_text | dict(model_type="qwen2"),
            image_token_id=IMAGE, image_seq_length=16,
        ),
        plain, one_for(2 * PATCH),
    ),
    Family(
        "qwen2_vl", "Qwen2VL",
        lambda: dict(
            vision_config=_qwen_tower | dict(embed_dim=32, hidden_size=64), text_config=_text | _mrope, **_qwen_ids
        ),
        **_qwen,
    ),
    Family(
        "qwen2_5_vl", "Qwen2_5_VL",
        lambda: dict(
            vision_config=_qwen_tower | _windows, text_config=_text | _mrope, **_qwen_ids,
        ),
        **_qwen,
    ),
    Family(
        "qwen3_vl", "Qwen3VL", lambda: _qwen3(dict(deepstack_visual_indexes=[0, 1]), dict(num_hidden_layers=3)), **_qwen
    ),
    Family(
        "qwen3_vl_moe", "Qwen3VLMoe",
        lambda: _qwen3(dict(deepstack_visual_indexes=[0, 1]), dict(num_hidden_layers=3) | _experts), **_qwen,
    ),
    Family("qwen3_5", "Qwen3_5", lambda: _qwen3({}, _linear), **_qwen, recurrent=True),
    Family(
        "qwen3_5_moe", "Qwen3_5Moe",
        lambda: _qwen3({}, _linear | _experts | dict(shared_expert_intermediate_size=32)), **_qwen, recurrent=True,
    ),
    Family(
        "gemma3", "Gemma3",
        lambda: dict(
            vision_config=_tower | _siglip, text_config=_text | _gemma | dict(query_pre_attn_scalar=16),
            mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
        ),
        plain, one_for(2 * PATCH), types=dict(token_type_ids=(0, 1)),
    ),
    Family(
        "gemma4", "Gemma4",
        lambda: dict(
            vision_config=_tower
            | dict(num_key_value_heads=4, head_dim=8, pooling_kernel_size=2, position_embedding_size=16),
            text_config=_text | _gemma | dict(
                global_head_dim=16, rope_parameters=_gemma4_rope, use_bidirectional_attention="vision",
                vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
            ),
            image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=START, eoi_token_id=END,
        ),
        patches_with_positions, one_for(2 * PATCH), sizes=_three_sizes, types=_token_types,
    ),
    Family(
        "paligemma", "PaliGemma",
        lambda: dict(
            vision_config=_tower | _siglip | dict(projection_dim=64),
            text_config=_text | dict(model_type="gemma", head_dim=16), image_token_index=IMAGE, projection_dim=64,
            hidden_size=64,
        ),
        plain, one_for(PATCH), types=dict(token_type_ids=(0, 0)),
    ),
    Family(
        "smolvlm", "SmolVLM",
        lambda: dict(vision_config=_tower, text_config=_text | dict(model_type="llama"), image_token_id=IMAGE),
        by_row, one_for(2 * PATCH),
    ),
    Family(
        "idefics3", "Idefics3",
        lambda: dict(vision_config=_tower, text_config=_text | dict(model_type="llama"), image_token_id=IMAGE),
        by_row, one_for(2 * PATCH),
    ),
    Family(
        "mistral3", "Mistral3",
        lambda: dict(
            vision_config=_tower | dict(model_type="pixtral", head_dim=8),
            text_config=_text | dict(model_type="mistral", head_dim=16, sliding_window=None), image_token_index=IMAGE,
        ),
        with_sizes, rows_broken(2 * PATCH), sizes=_three_sizes,
    ),
    Family(
        "lighton_ocr", "LightOnOcr",
        lambda: dict(
            vision_config=_tower | dict(model_type="pixtral", head_dim=8),
            text_config=_text | dict(model_type="qwen3", head_dim=16), image_token_id=IMAGE,
        ),
        with_sizes, rows_broken(2 * PATCH), sizes=_three_sizes,
    ),
    Family(
        "aya_vision", "AyaVision",
        lambda: dict(
            vision_config=_tower | _siglip, text_config=_text | dict(model_type="cohere2", sliding_window=512),
            image_token_index=IMAGE,
        ),
        plain, one_for(2 * PATCH),
    ),
    Family(
        "cohere2_vision", "Cohere2Vision",
        lambda: dict(
            vision_config=_tower | _siglip, text_config=_text | dict(model_type="cohere2", sliding_window=512),
            image_token_id=IMAGE,
        ),
        plain, one_for(2 * PATCH),
    ),
    Family(
        "deepseek_vl", "DeepseekVL",
        lambda: dict(
            vision_config=_tower | _siglip, text_config=_text | dict(model_type="llama"), image_token_id=IMAGE
        ),
        plain, one_for(PATCH),
    ),
    Family(
        "ovis2", "Ovis2",
        lambda: dict(
            vision_config=_tower | dict(hidden_stride=2, vocab_size=40, num_visual_indicator_tokens=5),
            text_config=_text | dict(model_type="qwen2"), image_token_id=IMAGE, vocab_size=VOCABULARY, hidden_size=64,
            visual_indicator_token_ids=[80, 81, 82, 83, 84],
        ),
        plain, one_for(2 * PATCH),
    ),
    Family(
        "exaone4_5", "Exaone4_5_",
        lambda: dict(
            vision_config=_qwen_tower | _windows | dict(num_key_value_heads=2),
            text_config=_text | dict(model_type="exaone4", head_dim=16), image_token_id=IMAGE, video_token_id=VIDEO,
        ),
        patches, one_for(2 * PATCH), sizes=_three_sizes,
    ),
    Family("glm4v", "Glm4v", lambda: _glm("glm4v", _mrope), **_qwen),
    Family("glm46v", "Glm46V", lambda: _glm("glm4v", _mrope), **_qwen),
    Family(
        "glm4v_moe", "Glm4vMoe",
        lambda: _glm(
            "glm4v_moe", dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1),
            rope_parameters=_mrope["rope_parameters"] | dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.5),
        ),
        **_qwen,
    ),
]  # fmt: skip
NAMES = [family.name for family in FAMILIES]


@functools.cache
def case(name: str) -> Case:
    """Shared by all tests of a process: who changes the model takes a copy."""
    family = next(family for family in FAMILIES if family.name == name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family.architecture}Config")(**family.config(), tie_word_embeddings=False)
        model = getattr(transformers, f"{family.architecture}ForConditionalGeneration")(config).eval()
        sharpen(model)
    model.generation_config.update(eos_token_id=None, pad_token_id=PAD, suppress_tokens=[PAD, *range(80, VOCABULARY)])
    return Case(family, model.requires_grad_(False))


@torch.no_grad()
def sharpen(model: torch.nn.Module) -> None:
    """Weights under which activations keep their scale and attention is far from uniform: else any token is as good as
    another, and a wrong selection goes unseen."""
    for name, weight in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            continue
        if weight.ndim >= 2:
            embeds = "embed" in name and "proj" not in name and "patch_embed" not in name
            spread = 1.0 if embeds or "position" in name or "token" in name else weight[0].numel() ** -0.5
            weight.normal_(std=spread)
            if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.linear.weight", "k_proj.linear.weight")):
                weight.mul_(3)
            elif name.endswith("qkv.weight"):
                weight[: 2 * len(weight) // 3].mul_(3)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.add_(1.0)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
