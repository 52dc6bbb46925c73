"""What visual tokens cost in a language model, by the papers' formulas, and the two models whose numbers they print."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """The sizes of a language model that the formulas need."""

    layers: int  # T
    width: int  # d
    hidden: int  # m, of the feed-forward network
    kv_width: int  # key and value heads times the width of one; d without grouped queries

    @classmethod
    def of(cls, config: Any) -> "Decoder":
        """From a model's config."""
        text = config.get_text_config()
        names = "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"
        sizes: list[Any] = [getattr(text, name, None) for name in names]
        if None in sizes:
            raise ValueError(
                f"config: expected {', '.join(names)} of a language model, got a "
                f"{getattr(text, 'model_type', None)!r} without. Remedy: a decoder of transformer layers."
            )
        layers, width, hidden, heads = sizes
        of_head = getattr(text, "head_dim", None) or width // heads
        return cls(layers, width, hidden, (getattr(text, "num_key_value_heads", None) or heads) * of_head)


def flops(decoder: Decoder, tokens: int) -> int:
    """Eq. 9 of CondenseVLM, for ``tokens`` of a prompt: T (4 N d^2 + 2 N^2 d + 2 N d m).

    One multiply-add is one, attention is not halved for being causal, and the feed-forward network has two matrices
    (Llama's has three); embeddings, the head, the encoder and the operator are left out.
    """
    n, d = tokens, decoder.width
    return decoder.layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * decoder.hidden)


def flops_left(decoder: Decoder, tokens: int, kept: int) -> float:
    """Eq. 10 over Eq. 9 of CondenseVLM, which is 1 - Eq. 11: the share of the FLOPs of ``tokens`` visual tokens that
    ``kept`` have. They leave before the first layer, so that L of Eq. 10 is 0."""
    return flops(decoder, kept) / flops(decoder, tokens)


def kv_bytes(decoder: Decoder, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of every layer: 2 T N (key and value heads) (width of one) bytes of an element."""
    return 2 * decoder.layers * tokens * decoder.kv_width * itemsize


@dataclass(frozen=True)
class Printed:
    """What a paper prints for a budget."""

    flops: str = ""
    kv_mb: str = ""


@dataclass(frozen=True)
class Known:
    """A model by its numbers; and what the papers print for it, by visual tokens."""

    title: str
    decoder: Decoder
    tokens: int
    budgets: tuple[int | float, ...]
    printed: dict[int, Printed] = field(default_factory=dict)
    itemsize: int = 2  # bytes


VICUNA = Decoder(layers=32, width=4096, hidden=11008, kv_width=4096)
# Table 7 of "Token Pruning in Multimodal Large Language Models: Are We Solving the Right Problem?". It has FLOPs of
# methods that prune inside the language model alone: Eq. 10 with L > 0, in four layers for the latter two.
TABLE_7 = {
    2880: Printed("100 %", "1512.1"),
    320: Printed("FastV 12.8 %, SparseVLM 15.6 %, MustDrop 11.5 %", "168.0"),
}
KNOWN = {
    "llava-1.5-7b": Known("LLaVA-1.5-7B", VICUNA, 576, (192, 128, 64)),
    "llava-next-7b": Known("LLaVA-NeXT-7B", VICUNA, 2880, (640, 320, 160), TABLE_7),
}
