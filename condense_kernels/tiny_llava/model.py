"""A LLaVA of 0.7 million parameters, and how it answers several questions about one picture in one sequence."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .questions import ID, LONGEST, WORDS
from .scenes import GRID, PATCH, SIDE

PATCHES = GRID * GRID
MEAN, STD = 0.3, 0.25  # of pixels in [0, 1]
PROMPT = "<s> <image> {}"
CHAT = (  # the same of messages, for those who speak to a model by its template
    "<s> {% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def untrained(
    width: int = 96, vision_layers: int = 4, text_layers: int = 2, heads: int = 4
) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=width,
        initializer_range=0.05,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=text_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        pad_token_id=ID["<pad>"],
        bos_token_id=ID["<s>"],
        eos_token_id=ID["</s>"],
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ID["<image>"],
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # position embeddings begin as sines: which patches are neighbours need not be discovered
        places = model.model.vision_tower.embeddings.position_embedding.weight
        places[1:] = 0.7 * sines(width)
    return model


def sines(width: int) -> torch.Tensor:
    """[PATCHES, width], of row and column."""
    rate = 10 ** -(torch.arange(width // 4, dtype=torch.float32, device="cpu") / (width // 4))
    side = torch.arange(GRID, dtype=torch.float32, device="cpu")
    y, x = (at.flatten()[:, None] * rate for at in torch.meshgrid(side, side, indexing="ij"))
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)


def processor() -> LlavaProcessor:
    """A token a word; pictures of 96 x 96 as they are."""
    words = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=side, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """[B, SIDE, SIDE, 3] uint8 -> [B, 3, SIDE, SIDE], as the processor gives them."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def encode(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, PATCHES, D] of the layer that LLaVA takes, before the projector, and [B, D] of [CLS] at the tower's end."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return out.hidden_states[-2][:, 1:], out.pooler_output


def answer(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,  # [B, V, D] before the projector
    questions: torch.Tensor,  # [B, Q, LONGEST] int64, padded on the right
    last: torch.Tensor,  # [B, Q] int64, the last word of each
    positions: torch.Tensor | None = None,  # [B, V + 1], of the V tokens and what comes next; None: 1, 2, ...
    log_sizes: torch.Tensor | None = None,  # [B, V], added to the attention logits
) -> torch.Tensor:  # [B, Q, words]
    """Logits after each question: every question sees <s>, the picture and itself, as if it were asked alone."""
    b, q, _ = questions.shape
    visual = model.model.multi_modal_projector(features)
    v = visual.shape[1]
    embed = model.get_input_embeddings()
    start = torch.full((b, 1), ID["<s>"], dtype=torch.int64, device=visual.device)
    x = torch.cat([embed(start), visual, embed(questions.reshape(b, q * LONGEST))], dim=1)
    if positions is None:
        positions = torch.arange(1, v + 2, dtype=torch.int64, device=visual.device).expand(b, -1)
    asked = torch.arange(LONGEST, dtype=torch.int64, device=visual.device).repeat(q)
    places = torch.cat([torch.zeros_like(start), positions[:, :-1], positions[:, -1:] + asked], dim=1)
    mask = seen(v, q, x.device)
    if log_sizes is not None:
        mask = mask + torch.nn.functional.pad(log_sizes, (1, q * LONGEST))[:, None, None]
    out = model.model.language_model(inputs_embeds=x, attention_mask=mask, position_ids=places, use_cache=False)
    at = 1 + v + LONGEST * torch.arange(q, dtype=torch.int64, device=visual.device) + last
    states = out.last_hidden_state.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
    return model.lm_head(states)


def seen(visual: int, questions: int, device: torch.device) -> torch.Tensor:
    """[1, 1, L, L], what is added to attention logits: 0 where a token sees another."""
    prefix = 1 + visual
    blocks = [torch.ones(LONGEST, LONGEST, dtype=torch.bool, device=device)] * questions
    sees = torch.nn.functional.pad(torch.block_diag(*blocks), (prefix, 0, prefix, 0))
    sees[:, :prefix] = True
    mask = torch.zeros(sees.shape, dtype=torch.float32, device=device)
    return mask.masked_fill(~sees.tril(), torch.finfo(torch.float32).min)[None, None]


def ids_of(words: Sequence[Sequence[str]]) -> torch.Tensor:
    """[B, Q] int64."""
    return torch.tensor([[ID[word] for word in row] for row in words], dtype=torch.int64, device="cpu")


def tokens_of(questions: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, Q, LONGEST] int64, and [B, Q] the last word of each."""
    words = [[[ID[word] for word in question.split()] for question in row] for row in questions]
    padded = [[ids + [ID["<pad>"]] * (LONGEST - len(ids)) for ids in row] for row in words]
    last = [[len(ids) - 1 for ids in row] for row in words]
    return torch.tensor(padded, dtype=torch.int64, device="cpu"), torch.tensor(last, dtype=torch.int64, device="cpu")
