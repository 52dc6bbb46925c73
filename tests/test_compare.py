"""python -m condense_kernels compare: what methods are given, text-guided scores against transformers, the tables."""

import argparse
import csv
import sys

import comparison
import pytest
import torch
from transformers import AutoModelForImageTextToText, Dinov2Config, Dinov2Model

from condense_kernels import __main__, methods, metrics, tiny_llava
from condense_kernels.cli import (
    CommandError,
    compare,
    compare_figure,
    compare_table,
    compared,
    compared_dinov2,
    compared_tiny,
    dinov2,
)
from condense_kernels.cli.photographs import HOPPER
from condense_kernels.methods import METHODS
from condense_kernels.methods.registry import NONE, TEXT, Card
from condense_kernels.methods.results import best, selected
from condense_kernels.tiny_llava.answers import Exam, right
from condense_kernels.tiny_llava.model import PATCHES

PICTURES = 4


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        status = __main__.main(["compare", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForImageTextToText.from_pretrained(
        tiny_llava.PATH, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def exam(tiny):
    return Exam.of(tiny, PICTURES)


@pytest.fixture(scope="module")
def photograph_model():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_attention_heads=4, num_hidden_layers=12, image_size=84, patch_size=14)
    return Dinov2Model(config).eval().requires_grad_(False)


def guided_card(scores=TEXT, needs=()) -> Card:
    def guided(features, scores, keep, *, grid=None, attention=None):
        return selected(features, scores, best(scores, keep).sort(dim=1).values)

    return Card("guided", "Guided", "", "", scores, "", guided, needs=tuple(needs))


# What methods are given


def test_methods_by_name_with_options():
    found = compared.entries(["condensevlm:background_ratio=0.5:spatial_weight=0", "topk", "random"])
    assert [entry.name for entry in found[:3]] == list(compared.ALWAYS)
    assert [entry.card.name for entry in found[3:]] == ["condensevlm", "fastervlm"]
    assert found[3].options == {"background_ratio": 0.5, "spatial_weight": 0}
    assert found[3].title == "background_ratio 0.5, spatial_weight 0: CondenseVLM"
    assert {entry.card.name for entry in compared.entries([])} == set(METHODS)
    assert [entry.name for entry in found if entry.drawn] == ["random"]


def test_text_guided_scores_are_a_map_of_transformers(tiny, exam):
    """The last word's attention to the picture's tokens, as the model shows it when the question is asked alone."""
    found = compared_tiny.text_attention(tiny, exam)
    assert compared_tiny.LAYER == 1  # FastV's: the second layer's attention
    tiny.model.language_model.set_attn_implementation("eager")
    try:
        for picture, kind in ((0, 0), (2, 3), (3, 5)):
            words = exam.questions[picture, kind, : exam.last[picture, kind] + 1]
            embed = tiny.get_input_embeddings()
            visual = tiny.model.multi_modal_projector(exam.features[picture : picture + 1])
            x = torch.cat([embed(torch.tensor([[1]])), visual, embed(words[None])], dim=1)
            maps = tiny.model.language_model(inputs_embeds=x, output_attentions=True, use_cache=False).attentions
            row = maps[compared_tiny.LAYER][0].mean(dim=0)[-1, 1 : 1 + PATCHES]
            torch.testing.assert_close(found[picture, kind], row, rtol=1e-4, atol=1e-6)
    finally:
        tiny.model.language_model.set_attn_implementation("sdpa")


def test_the_towers_map_belongs_to_the_exams_pictures(tiny, exam):
    """Its [CLS] row would be the exam's scores; the patches' rows are the softmax of the same layer."""
    maps, keys = compared_tiny.towers_map(tiny, PICTURES)
    tiny.model.vision_tower.set_attn_implementation("eager")
    try:
        drawn = compared_tiny.Scenes("test", compared_tiny.SEED, step=1)
        pixels = compared_tiny.to_input(torch.stack([torch.from_numpy(drawn.scene().pixels) for _ in range(PICTURES)]))
        whole = tiny.model.vision_tower(pixels, output_attentions=True).attentions[-2].mean(dim=1)
    finally:
        tiny.model.vision_tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(maps, whole[:, 1:, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(exam.scores, whole[:, 0, 1:], rtol=1e-4, atol=1e-6)
    assert keys.shape == (PICTURES, PATCHES, 96)


def test_a_text_guided_method_keeps_other_tokens_for_each_question(tiny, exam):
    guide = compared_tiny.text_attention(tiny, exam)
    material = compared.Material(exam.features, exam.scores, (12, 12), guide).by_question()
    entry = compared.Entry("guided", guided_card())
    row = compared_tiny.row_of(tiny, compared_tiny.by_questions(exam), material, entry, 9, seeds=3)
    assert row.seeds == 1
    for kind, name in enumerate(compared_tiny.KINDS):
        kept = selected(exam.features, exam.scores, best(guide[:, kind], 9).sort(dim=1).values)
        assert torch.equal(row.quality[name], 100 * right(tiny, exam, kept)[:, kind].double())


def test_what_is_not_there_is_said():
    x = torch.randn(2, 9, 4)
    material = compared.Material(x, x[..., 0].exp(), (3, 3))
    assert "no text here" in material.lacks(compared.Entry("guided", guided_card()))
    assert "attention" in material.lacks(compared.Entry("guided", guided_card(NONE, ["attention"])))
    assert material.lacks(compared.Entry("guided", guided_card(NONE, ["grid", "generator"]))) == ""


def test_fidelity_of_all_tokens_is_one(photograph_model):
    with torch.no_grad():
        tokens, material = compared_dinov2.seen(photograph_model, HOPPER.path)
        everything = methods.random(tokens.patches, None, 576, generator=torch.Generator().manual_seed(0))
        found = compared_dinov2.fidelity(photograph_model, [tokens], everything)
        assert all(float(value) == pytest.approx(1, abs=1e-5) for value in found.values())
        torch.testing.assert_close(material.attention.sum(dim=2), torch.ones(1, 576), rtol=0, atol=0.1)
        assert material.attention.sum(dim=2).max() < 1  # the rest goes to [CLS]


# Numbers and words


def lines_of(qualities: dict[str, list[float]]) -> list[dict]:
    rows = [
        compared.Row("tiny", compared.entry(name), 16, 144, 1, {
            "accuracy": torch.tensor(values).double(), "without_count": torch.tensor(values).double(),
            **{what: torch.tensor([float(at)] * len(values)) for what in compared.MEASURED},
        }, [1 / 8] * 8, [1.0, 2.0, 3.0], rest_ms=1.0)
        for at, (name, values) in enumerate(qualities.items())
    ]  # fmt: skip
    whole = {"accuracy": torch.ones(4).double() * 90, "without_count": torch.ones(4).double() * 90}
    return compared.lines([*rows, compared.Row("tiny", None, 144, 144, 1, whole, rest_ms=4.0)])


FOUR = {
    "random": [50, 60, 70, 80.0],
    "pooling": [40, 40, 40, 40.0],
    "fastervlm": [51, 60, 71, 79.0],
    "condensevlm": [60, 72, 80, 91.0],
}


def test_differences_are_paired():
    line = next(line for line in lines_of(FOUR) if line["method"] == "condensevlm")
    gap = torch.tensor([10, 12, 10, 11.0])
    assert line["accuracy minus random"] == pytest.approx(float(gap.mean()))
    assert line["accuracy minus random error"] == pytest.approx(float(gap.std()) / 2)
    assert line["ms"] == 2
    assert line["time_left"] == pytest.approx((2 + 1) / 4)
    assert "accuracy minus uniform" not in line


def test_words_name_what_a_simple_baseline_is_as_good_as():
    said = compare_table.words(lines_of(FOUR), "tiny", 16).splitlines()
    assert said[0] == "K = 16, % right: Random is at least as good, within one standard error, as FasterVLM."
    assert not any("CondenseVLM" in line or "Pooling is" in line for line in said)


def test_csv_and_figure_and_page(tmp_path):
    flat = lines_of(FOUR)
    compare.write_csv(tmp_path / "a.csv", flat)
    again = compare.read_csv(tmp_path / "a.csv")
    assert compare_table.words(again, "tiny", 16) == compare_table.words(flat, "tiny", 16)
    compare_figure.draw(tmp_path / "a.png", again)
    assert (tmp_path / "a.png").stat().st_size > 10000
    page = f"before {comparison.BEGIN} old {comparison.END} after"
    text = comparison.replaced(page, comparison.table(again, "tiny", 16) + comparison.places(again, "tiny"))
    assert "before" in text and "after" in text and "old" not in text
    assert "| CondenseVLM | 75.8" in text


# The command


def test_on_the_tiny_llava(capsys, tmp_path):
    arguments = ["--on", "tiny", "--keep", 64, 60, "--pictures", 3, "--seeds", 1, "--rounds", 2]
    status, out, err = run(capsys, *arguments, "--methods", "condensevlm", "--csv", tmp_path / "a.csv")
    assert status == 0, err
    for words in ("K = 16 of 144", "K = 15 of 144", "CondenseVLM", "Random", "Pooling", "all tokens", "% right"):
        assert words in out
    with (tmp_path / "a.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 9  # four methods at two budgets, and all tokens
    assert all(float(line["ms"]) > 0 for line in found[:-1])
    assert float(found[0]["flops_left"]) == pytest.approx(metrics.flops_left(
        metrics.Decoder(2, 96, 192, 96), 144, 16), rel=1e-4)  # fmt: skip


def test_on_dinov2_methods_without_text(capsys, tmp_path, monkeypatch, photograph_model):
    monkeypatch.setattr(dinov2, "load_model", lambda: photograph_model)
    monkeypatch.setitem(METHODS, "guided", guided_card())
    arguments = [HOPPER.path, "--on", "dinov2", "--keep", 61, "--seeds", 1, "--rounds", 1]
    names = ["--methods", "divprune", "guided", "--figure", tmp_path / "a.png"]
    status, out, err = run(capsys, *arguments, *names)
    assert status == 0, err
    assert "left out here: Guided: reads text-to-image attention, and there is no text here" in out
    assert "Pooling" in out and "K = 61" in out  # no product of 61 fits: said, and left out
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "3"], "--keep: expected at least 4, as the tiny LLaVA keeps a quarter of it, got 3"),
        (["--keep", "577", "--on", "dinov2"], "--keep: expected a whole number from 1 to 576, got '577'"),
        (["--pictures", "1"], "--pictures: expected a whole number from 2"),
        (["--methods", "best"], "--methods: expected some of"),
        (["--methods", "divprune:alpha=1"], "expected divprune, which has no options, got 'divprune:alpha=1'"),
        (["--methods", "condensevlm:spatial_weight"], "condensevlm:spatial_weight=..."),
        (["--methods", "condensevlm:spatial_weight=far"], "condensevlm: spatial_weight: expected a number, as its"),
        (["no-such-picture.png", "--on", "dinov2"], "no such file: no-such-picture.png"),
        (["--figure", "a.jpg"], "ends in .png"),
        (["--csv", "no/such/folder/a.csv"], "no such folder"),
        (["a.jpg", "--on", "tiny"], "--on: expected dinov2"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, words):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_missing_extra_is_named_at_once(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    assert "needs onnx: pip install '.[vision]'" in err
    assert "--on tiny" in err
    assert err.count("\n") == 1


def test_help_has_an_example():
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    assert "python -m condense_kernels compare" in compare.__doc__
    with pytest.raises(CommandError, match="expected some of"):
        compared.entry("nothing")
