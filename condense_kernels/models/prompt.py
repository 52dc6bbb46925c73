"""A prompt with fewer image placeholders: which columns stay, and every tensor that has those columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED_LABEL = -100  # of transformers' losses
# What runs along the prompt, its last axis, and what is written where a row has been padded.
FILLS = {
    "attention_mask": 0,
    "labels": IGNORED_LABEL,
    "position_ids": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
}


def kept_columns(
    input_ids: torch.Tensor,  # [B, L]
    image_token_id: int,
    tokens: Sequence[int],  # of each image, as they are in the prompt
    kept: Sequence[torch.Tensor],  # [K] each, ascending, of the image's tokens
) -> torch.Tensor:  # [B, L] bool
    """All columns but the placeholders of what was dropped. Images follow each other in the order (row, column)."""
    placeholder = input_ids == image_token_id
    found = int(placeholder.sum())
    if found != sum(tokens):
        raise ValueError(
            f"input_ids: expected {sum(tokens)} image placeholders (token {image_token_id}), as the {len(tokens)} "
            f"images of this call have {shown_counts(tokens)} tokens, got {found}. Remedy: the processor that belongs "
            "to the model makes input_ids and pixel_values together; apply_condense takes them as it returned them."
        )
    stays = torch.zeros(found, dtype=torch.bool, device=input_ids.device)
    start = 0
    for count, indices in zip(tokens, kept, strict=True):
        stays[start + indices.to(input_ids.device)] = True
        start += count
    if int(stays.sum()) != sum(map(len, kept)):
        raise ValueError("method: expected distinct indices in [0, N) of each image, got some twice. Remedy: topk.")
    columns = ~placeholder
    columns[placeholder] = stays
    return columns


def shown_counts(counts: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(map(str, counts[:most]))
    return f"[{shown}, ...]" if len(counts) > most else f"[{shown}]"


@dataclass(frozen=True)
class Columns:
    """Where each column of the shorter prompt comes from."""

    source: torch.Tensor  # [B, L'] int64, 0 where padded
    real: torch.Tensor  # [B, L'] bool, False where padded

    @classmethod
    def of(cls, stays: torch.Tensor, attention_mask: torch.Tensor | None) -> "Columns":
        """Rows shorter than the longest are padded on the side that was padded before; on the left, where none was, so
        that logits[:, -1] is the last token's. What was padding goes with the dropped tokens."""
        if attention_mask is not None:
            stays = stays & (attention_mask != 0)
        counts = stays.sum(dim=1)  # [B]
        length = int(counts.max()) if len(counts) else 0
        right = attention_mask is not None and bool(
            (attention_mask[:, -1] == 0).any() & (attention_mask[:, 0] != 0).all()
        )
        target = stays.cumsum(dim=1) - 1  # [B, L]
        if not right:
            target = target + (length - counts)[:, None]
        row, column = stays.nonzero(as_tuple=True)
        source = torch.zeros(len(stays), length, dtype=torch.int64, device=stays.device)
        real = torch.zeros(len(stays), length, dtype=torch.bool, device=stays.device)
        source[row, target[row, column]] = column
        real[row, target[row, column]] = True
        return cls(source, real)

    def take(self, tensor: torch.Tensor, fill: int) -> torch.Tensor:
        """[..., B, L] -> [..., B, L']."""
        at = self.source.to(tensor.device).expand(*tensor.shape[:-2], *self.source.shape)
        batch = tensor.expand(*tensor.shape[:-2], *self.source.shape[:1], tensor.shape[-1])  # positions may be [1, L]
        return batch.gather(-1, at).masked_fill(~self.real.to(tensor.device), fill)


def shortened(inputs: dict[str, Any], stays: torch.Tensor, pad_token_id: int) -> dict[str, Any]:
    """``inputs`` with the columns that stay. An attention mask comes into being where rows were padded."""
    b, length = stays.shape
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (b, length)):
        got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected [{b}, {length}], as input_ids is, got {got}. Remedy: the processor's mask; one "
            "with a query axis cannot follow dropped tokens."
        )
    if bool(stays.all()):
        return inputs
    for name, tensor in inputs.items():
        if name not in {"input_ids", *FILLS} and isinstance(tensor, torch.Tensor) and tensor.shape == (b, length):
            raise ValueError(
                f"{name}: expected no tensor [{b}, {length}], as input_ids is, beside {', '.join(FILLS)}, as it is not "
                "known what becomes of its columns, got one. Remedy: labels, of whose columns it is known; or none."
            )
    columns = Columns.of(stays, mask)
    result = dict(inputs, input_ids=columns.take(inputs["input_ids"], pad_token_id))
    for name, fill in FILLS.items():
        tensor = inputs.get(name)
        if tensor is not None:
            if not isinstance(tensor, torch.Tensor) or tensor.shape[-1] != length:
                got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: expected a tensor with {length} columns, as input_ids has, got {got}.")
            result[name] = columns.take(tensor, fill)
    if mask is None and not bool(columns.real.all()):
        result["attention_mask"] = columns.real.long()
    return result


def text_positions(attention_mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """[B, L'] contiguous positions of what is not padded, as transformers counts them."""
    if attention_mask is None:
        return torch.arange(like.shape[1], dtype=torch.int64, device=like.device).expand(like.shape)
    return (attention_mask.long().cumsum(dim=-1) - 1).masked_fill(attention_mask == 0, 0)


def pad_token_of(config: Any) -> int:
    """Any id that has an embedding and is no placeholder: padded columns are masked."""
    text = config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < text.vocab_size and pad != config.image_token_id:
        return pad
    return 0 if config.image_token_id != 0 else 1
