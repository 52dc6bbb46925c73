"""What the paper printed, and how lmms-eval measures it. The rows that are run: table_*.yaml, beside this file."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..tiny_llava import KINDS

HERE = Path(__file__).parent
NOT_OURS = ("pretrained", "num_tokens", "method", "dtype")  # model_args that are no option of a method


class Benchmark(NamedTuple):
    name: str  # in the paper
    task: str  # of lmms-eval
    metrics: tuple[str, ...]  # which are added up
    scale: float = 100.0
    dataset: str = ""  # on the hub, where it does not come with the package


class Row(NamedTuple):
    num_tokens: str | None  # None: all
    method: str | None
    options: tuple[tuple[str, str], ...]
    config: dict[str, Any]  # of lmms-eval

    @property
    def label(self) -> str:
        if self.num_tokens is None:
            return "all tokens"
        return ", ".join([f"{self.method}", self.num_tokens, *(f"{name} {value}" for name, value in self.options)])


class Table(NamedTuple):
    title: str
    file: str
    model_type: str
    benchmarks: tuple[Benchmark, ...]
    paper: dict[str, tuple[float, ...]]  # by the row's label, in the order of the benchmarks

    def rows(self) -> list[Row]:
        import yaml

        rows = [row_of(config) for config in yaml.safe_load((HERE / self.file).read_text(encoding="utf-8"))]
        return sorted(rows, key=lambda row: row.num_tokens is not None)  # the upper bound comes first

    def printed(self, row: Row, benchmark: Benchmark) -> float:
        """What the paper printed; NaN where it printed nothing."""
        values = self.paper.get(row.label)
        return math.nan if values is None else values[self.benchmarks.index(benchmark)]


def arguments_of(config: dict[str, Any]) -> dict[str, str]:
    """lmms-eval's model_args, by name."""
    return dict(part.split("=", 1) for part in config["model_args"].split(","))


def row_of(config: dict[str, Any]) -> Row:
    arguments = arguments_of(config)
    num_tokens = arguments.get("num_tokens", "none")
    options = tuple((name, value) for name, value in arguments.items() if name not in NOT_OURS)
    return Row(None if num_tokens in ("0", "none") else num_tokens, arguments.get("method"), options, config)


TABLES = {
    "2": Table(
        title="CondenseVLM, Table 2: LLaVA-1.5-7B, 576 tokens",
        file="table_2.yaml",
        model_type="llava",
        benchmarks=(
            Benchmark("GQA", "gqa", ("exact_match",), dataset="lmms-lab-encoder/GQA"),
            Benchmark("MMB", "mmbench_en_dev", ("gpt_eval_score",), 1.0, "lmms-lab-encoder/MMBench"),
            Benchmark("MMB-CN", "mmbench_cn_dev", ("gpt_eval_score",), 1.0, "lmms-lab-encoder/MMBench"),
            Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score"), 1.0, "lmms-lab-encoder/MME"),
            Benchmark("POPE", "pope", ("pope_f1_score",), dataset="lmms-lab-encoder/POPE"),
            Benchmark("SQA", "scienceqa_img", ("exact_match",), dataset="lmms-lab-encoder/ScienceQA"),
            Benchmark("VQAv2", "vqav2_val", ("exact_match",), dataset="lmms-lab-encoder/VQAv2"),
            Benchmark("VQAText", "textvqa_val", ("exact_match",), dataset="lmms-lab-encoder/textvqa"),
            Benchmark("VizWiz", "vizwiz_vqa_val", ("exact_match",), dataset="lmms-lab-encoder/VizWiz-VQA"),
        ),
        paper={
            "all tokens": (61.9, 64.7, 58.1, 1862, 85.9, 69.5, 78.4, 58.2, 50.0),
            "condensevlm, 192": (59.8, 65.3, 57.3, 1794, 87.1, 69.6, 77.7, 57.5, 51.7),
            "condensevlm, 128": (58.9, 64.5, 56.3, 1747, 86.2, 69.7, 76.3, 57.1, 52.9),
            "condensevlm, 64": (56.5, 63.1, 55.1, 1695, 82.8, 70.1, 74.2, 55.6, 54.1),
        },
    ),
    "tiny": Table(
        title="the tiny LLaVA of this package, 144 tokens, by kind of question",
        file="table_tiny.yaml",
        model_type="llava",
        benchmarks=tuple(Benchmark(kind, "tiny_llava", (kind,)) for kind in ("all", *KINDS)),
        paper={},
    ),
}
