"""What apply_condense costs and saves in models of real size with random weights: python benchmarks/model_costs.py

Writes the table into docs/models.md.

Encoders of full size, a language model of 4 layers of width 1024, one image of 336 to 448 pixels and 40 tokens of text,
fp32, one thread. The sides take turns; medians. Shares are of the encoder's time in the same call.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from rows import ROOT, provenance
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

from condense_kernels.models import apply_condense
from condense_kernels.models.efficiency import in_turn

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- results: written by benchmarks/model_costs.py -->", "<!-- end of results -->"
HEADER = (
    "encoder",
    "method",
    "encoder, ms",
    "scores, ms",
    "operator, ms",
    "share",
    "prefill, ms",
    "prefill, of all tokens'",
)
TEXT, KEEP, IMAGE = 40, 64, 999
LAYERS = dict(
    vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
)  # fmt: skip
SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
    num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False,
)  # fmt: skip
QWEN = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=1024,
)  # fmt: skip


class Case(NamedTuple):
    title: str
    tokens: int  # of the image
    build: Callable[[], Any]
    inputs: Callable[[], dict]


def llava(tower: dict, layer: int, strategy: str) -> Any:
    text = dict(LAYERS, model_type="llama")
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def qwen() -> Any:
    rope = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 8, 8]))
    ids = dict(image_token_id=IMAGE, video_token_id=998, vision_start_token_id=997, vision_end_token_id=996)
    return Qwen(Qwen2_5_VLConfig(vision_config=QWEN, text_config=LAYERS | rope, **ids))


def prompt(tokens: int) -> dict:
    text = torch.arange(1, TEXT + 1)
    ids = torch.cat([text[:5], torch.full((tokens,), IMAGE), text[5:]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def square(side: int) -> dict:
    return {"pixel_values": torch.randn(1, 3, side, side)}


def patches() -> dict:
    """448 x 448: 32 x 32 patches, 16 x 16 tokens."""
    ids = prompt(256)
    types = {"mm_token_type_ids": (ids["input_ids"] == IMAGE).int()}
    return ids | types | {"pixel_values": torch.randn(1024, 1176), "image_grid_thw": torch.tensor([[1, 32, 32]])}


CASES = {
    "clip": Case("CLIP-L/336, [CLS] row", 576, lambda: llava(CLIP, -2, "default"), lambda: prompt(576) | square(336)),
    "siglip": Case(
        "SigLIP-so400m/384, mean", 729, lambda: llava(SIGLIP, -1, "full"), lambda: prompt(729) | square(384)
    ),
    "qwen": Case("Qwen2.5-VL's, 448 px, mean", 256, qwen, patches),
}


METHODS = {"CondenseVLM": "condensevlm", "top-k": "topk", "random": "random", "pooling": "pooling"}


class Times(NamedTuple):
    encoder: float  # ms
    scores: float
    operator: float
    prefill: float


def timed(call: Callable[[], Any]) -> float:
    """CPU time, which what else runs on the machine hardly touches."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def condensed(model: Any, inputs: dict, method: Any) -> Times:
    with apply_condense(model, KEEP, method=method) as handle:
        rewritten = handle.rewritten(dict(inputs), {})
        report = handle.report()
    return Times(report.encoder_ms, report.scores_ms, report.operator_ms, timed(lambda: model(**rewritten)))


def stock(model: Any, inputs: dict) -> Times:
    """All tokens, encoded by the model alone and handed to it as the condensed ones are."""
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    start = time.perf_counter()
    output = model.get_image_features(**images, return_dict=True)
    encoder = 1e3 * (time.perf_counter() - start)
    rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return Times(encoder, 0.0, 0.0, timed(lambda: model(**rest, mm_encoder_outputs={"image": output})))


@torch.no_grad()
def measure(case: Case, methods: dict[str, Any], runs: int) -> list[list[str]]:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    sides = {"all tokens": lambda: stock(model, inputs)}
    sides |= {title: lambda method=method: condensed(model, inputs, method) for title, method in methods.items()}
    for side in sides.values():  # warms up
        side()
    found = in_turn(sides, runs)
    medians = {title: Times(*map(statistics.median, zip(*times, strict=True))) for title, times in found.items()}
    share = (TEXT + KEEP) / (TEXT + case.tokens)
    lines = []
    for title, m in medians.items():
        prefill = m.prefill / medians["all tokens"].prefill
        cells = ["", "", ""]
        if title in methods:
            cells = [f"{m.scores:.2f}", f"{m.operator:.2f}", f"{100 * (m.scores + m.operator) / m.encoder:.2f} %"]
        of_tokens = f"{prefill:.3f}, tokens {share if title in methods else 1:.3f}"
        lines.append([case.title, title, f"{m.encoder:.0f}", *cells, f"{m.prefill:.0f}", of_tokens])
    return lines


def table(names: list[str], runs: int) -> Iterator[str]:
    yield "| " + " | ".join(HEADER) + " |"
    yield "|" + "---|" * len(HEADER)
    for name in names:
        methods = METHODS if name == "clip" else {"CondenseVLM": "condensevlm"}
        for line in measure(CASES[name], methods, runs):
            yield "| " + " | ".join(line) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in table(arguments.cases, arguments.runs):
        print(line, flush=True)
        lines.append(line)
    if arguments.cases == list(CASES):
        run = provenance("cpu")
        versions = (
            f"torch {run['torch']}, transformers {transformers.__version__}, commit {run['commit']}, {run['date']}"
        )
        origin = f"{run['device']}, one thread; {versions}. Medians of {arguments.runs} calls, with the sides in turn."
        before, rest = PAGE.read_text().split(BEGIN)
        results = "\n".join([origin, "", *lines])
        PAGE.write_text(f"{before}{BEGIN}\n\n{results}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
