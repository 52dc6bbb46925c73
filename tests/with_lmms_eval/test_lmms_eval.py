"""Run by `make lmms-eval`, in an environment of its own: the whole chain on the tiny LLaVA, offline."""

import json
from importlib.metadata import entry_points

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from condense_kernels.__main__ import main
from condense_kernels.cli import CommandError, reproduce
from condense_kernels.lmms import STOCK, local, tables
from condense_kernels.models import apply_condense
from condense_kernels.tiny_llava import KINDS, PATH
from condense_kernels.tiny_llava.model import PROMPT

LIMIT = 18


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)


def answered(num_tokens: int | None) -> list[tuple[str, bool]]:
    """Kind, and whether the answer is right, of the task's first questions: by apply_condense and generate alone."""
    model = AutoModelForImageTextToText.from_pretrained(PATH, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(PATH)
    if num_tokens is not None:
        apply_condense(model, num_tokens)
    found = []
    for example in local.examples(50)[:LIMIT]:
        text = PROMPT.format(example["question"])
        inputs = processor(images=example["picture"], text=text, return_tensors="pt")
        said = processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :])
        found.append((example["kind"], said.strip() == example["answer"]))
    return found


def test_the_table_is_what_apply_condense_answers(tmp_path, capsys):
    arguments = ["reproduce", "--table", "tiny", "--limit", str(LIMIT), "--keep", "16", "--output", str(tmp_path)]
    assert main(arguments) == 0
    for name, num_tokens in (("all_tokens", None), ("condensevlm-16", 16)):
        metrics = json.loads((tmp_path / f"{name}-tiny_llava.json").read_text())["metrics"]
        expected = answered(num_tokens)
        assert metrics["all"] == pytest.approx(sum(right for _, right in expected) / LIMIT)
        for kind in KINDS:
            of_kind = [right for k, right in expected if k == kind]
            assert metrics[kind] == pytest.approx(sum(of_kind) / len(of_kind))
    printed = capsys.readouterr().out
    assert "not run" in printed and "a trial" in printed  # other budgets
    before = (tmp_path / "all_tokens-tiny_llava.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (tmp_path / "all_tokens-tiny_llava.json").stat().st_mtime_ns == before  # kept


def evaluated(model_args: str, folder) -> dict[str, float]:
    config = {**tables.TABLES["tiny"].rows()[0].config, "tasks": "tiny_llava"}
    return reproduce.evaluate({**config, "model_args": model_args}, "tiny_llava", 2, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "num_tokens=200",
            "lmms-eval",
        ),  # more than there are: generate fails, which lmms-eval would call empty answers
        ("num_tokens=16,supression=0.5", "lmms-eval"),
        ("num_tokens=none,method=topk", "lmms-eval"),
    ],
)
def test_failures_are_refused(options, message, tmp_path):
    device = "" if torch.cuda.is_available() else ",device=cpu"
    with pytest.raises(CommandError, match=message):
        evaluated(f"pretrained={PATH},dtype=float32,{options}{device}", tmp_path)


def test_the_entry_point_has_every_model():
    (found,) = entry_points(group="lmms_eval.models", name="condense_kernels")
    manifests = found.load()()
    assert [manifest.model_id for manifest in manifests] == [f"condense_{stock}" for stock in STOCK]
    for manifest in manifests:  # lmms-eval has a class of that kind
        assert manifest.chat_class_path or manifest.simple_class_path
