"""What visual tokens cost in a language model, by the papers' formulas, and the two models whose numbers they print."""

from dataclasses import dataclass, field

from ..metrics import Decoder as Decoder
from ..metrics import flops as flops
from ..metrics import flops_left as flops_left
from ..metrics import kv_bytes as kv_bytes


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
