"""The tiny LLaVA: its pictures and questions, packed answers against transformers' own, and the table of methods."""

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from condense_kernels import tiny_llava
from condense_kernels.__main__ import main
from condense_kernels.models import apply_condense
from condense_kernels.tiny_llava import answers, questions, scenes, table
from condense_kernels.tiny_llava.model import PATCHES, PROMPT

PICTURES = 60


@pytest.fixture(scope="module")
def trained():
    return AutoModelForImageTextToText.from_pretrained(
        tiny_llava.PATH, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(tiny_llava.PATH, local_files_only=True)


@pytest.fixture(scope="module")
def exam(trained):
    return answers.Exam.of(trained, PICTURES)


def asked(exam: answers.Exam, picture: int, kind: int) -> str:
    ids = exam.questions[picture, kind, : exam.last[picture, kind] + 1]
    return " ".join(questions.WORDS[i] for i in ids)


def drawn(pictures: int) -> list[scenes.Scene]:
    """The exam's."""
    row = scenes.Scenes("test", answers.SEED, step=1)
    return [row.scene() for _ in range(pictures)]


# Pictures and questions


def test_a_scene_is_what_it_says():
    row = scenes.Scenes("train", 3)
    for _ in range(20):
        scene = row.scene()
        labels, colours, quarters = (
            [getattr(d, name) for d in scene.digits] for name in ("label", "colour", "quarter")
        )
        assert 1 <= len(scene.digits) <= 4
        for values in (labels, colours, quarters):
            assert len(set(values)) == len(values)  # a question has one answer
        for number, digit in enumerate(scene.digits):
            middle = (digit.top + digit.size // 2) // 48 * 2 + (digit.left + digit.size // 2) // 48
            assert middle == digit.quarter
            patches = np.flatnonzero(scene.owner == number)
            y, x = patches // scenes.GRID * scenes.PATCH, patches % scenes.GRID * scenes.PATCH
            assert len(patches) > 0
            assert (y > digit.top - 8).all() and (y < digit.top + digit.size).all()
            assert (x > digit.left - 8).all() and (x < digit.left + digit.size).all()


def test_training_and_test_share_neither_digits_nor_pixels_of_photographs(monkeypatch):
    hands = scenes.alphabet("train")[1].shape[0], scenes.alphabet("test")[1].shape[0]
    assert hands == (1297, 500)
    width = 300
    ramp = np.broadcast_to(np.arange(width, dtype=np.float32)[None, :, None], (120, width, 3))  # a column's number
    monkeypatch.setattr(scenes, "photograph", lambda name: ramp)
    monkeypatch.setattr(np.random, "default_rng", np.random.default_rng)
    seen = {}
    for split in ("train", "test"):
        row = scenes.Scenes(split, 0)
        row.rng = Dimmed(row.rng)
        seen[split] = {float(x) for _ in range(50) for x in row.canvas(0).flat}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


class Dimmed:
    """A generator that darkens nothing."""

    def __init__(self, rng):
        self.rng = rng

    def uniform(self, *_):
        return 1.0

    def __getattr__(self, name):
        return getattr(self.rng, name)


def test_digits_lie_on_the_patch_grid_or_anywhere():
    places = {step: scenes.Scenes("train", 0, step).scene(crowded=True).digits for step in (1, scenes.PATCH)}
    assert all(d.top % 8 == 0 and d.left % 8 == 0 for d in places[scenes.PATCH])
    assert any(d.top % 8 or d.left % 8 for d in places[1])


@pytest.mark.parametrize("kind", range(len(questions.KINDS)))
def test_answers_are_true(kind):
    row, rng = scenes.Scenes("test", 5), np.random.default_rng(5)
    said = set()
    for _ in range(60):
        scene = row.scene()
        question, answer = questions.ask(scene, kind, rng)
        *_, what = question.split()
        by = {
            0: {c: str(d.label) for d in scene.digits for n, c in enumerate(scenes.COLOURS) if n == d.colour},
            1: {str(d.label): list(scenes.COLOURS)[d.colour] for d in scene.digits},
            2: {scenes.QUARTERS[d.quarter]: str(d.label) for d in scene.digits},
            3: {"digits": questions.COUNTS[len(scene.digits) - 1]},
            4: {str(n): "yes" if n in {d.label for d in scene.digits} else "no" for n in range(10)},
            5: {"background": scenes.BACKGROUNDS[scene.background]},
        }[kind]
        assert by[what] == answer
        assert {*question.split(), answer} <= {*questions.WORDS}
        said.add(answer)
    assert len(said) > 1


def test_every_picture_names_its_terms():
    readme = (scenes.ASSETS / "README.md").read_text()
    files = {path.name for path in scenes.ASSETS.iterdir()} - {"README.md"}
    assert files == {f"{name}.jpg" for name in scenes.CREDITS} | {"digits.npz"}
    for name, credit in scenes.CREDITS.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| {name}.jpg"))
        assert credit in line.replace("[", "")
    assert "CC BY 4.0" in next(line for line in readme.splitlines() if line.startswith("| digits.npz"))


# The model


def test_the_model_is_small_and_answers(trained, exam):
    folder = tiny_llava.PATH
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    right = answers.right(trained, exam, None).double().mean()
    assert right > 0.88  # 93.2 % of 6000 questions; of these 360 with an error of 1.4


def test_packed_answers_are_those_of_generate(trained, processor, exam):
    pictures = drawn(8)
    said = answers.right(trained, exam, None)[:8]
    for kind in range(len(questions.KINDS)):
        text = [PROMPT.format(asked(exam, row, kind)) for row in range(8)]
        inputs = processor(images=[s.pixels for s in pictures], text=text, return_tensors="pt", padding=True)
        new = trained.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        assert new.shape == (8, 1)  # a word
        assert torch.equal(new[:, 0] == exam.answers[:8, kind], said[:, kind])


@pytest.mark.parametrize("options", [{}, {"positions": "original"}, {"proportional": True}])
@pytest.mark.parametrize("method", ["condensevlm", "maxmin", "pooling"])
def test_packed_answers_are_those_of_apply_condense(trained, processor, exam, method, options):
    """End to end: tap, selection, placeholders, positions, generate."""
    chosen = answers.METHODS[{"condensevlm": answers.OURS, "maxmin": "max-min"}.get(method, method)]
    condensed = chosen(exam.features, exam.scores, 16)
    expected = answers.said(trained, exam, condensed, "positions" in options, "proportional" in options)
    pictures, kinds = drawn(24), (0, 2, 5)
    text = [PROMPT.format(asked(exam, row, kinds[row % 3])) for row in range(24)]
    inputs = processor(images=[s.pixels for s in pictures], text=text, return_tensors="pt", padding=True)
    with apply_condense(trained, 16, method=method, **options):
        logits = trained(**inputs).logits[:, -1]
        new = trained.generate(**inputs)[:, -1]
    expected = torch.stack([expected[row, kinds[row % 3]] for row in range(24)])
    torch.testing.assert_close(
        logits, expected, rtol=1e-4, atol=1e-4
    )  # answers alone hide a position that is off by one
    assert torch.equal(new, expected.argmax(dim=-1))


# The table


def test_compare_counts_what_was_right(trained, exam):
    methods = {name: answers.METHODS[name] for name in (answers.OURS, "random")}
    found = answers.compare(trained, exam, methods, budgets=(16,), seeds=2)
    assert {key: tuple(runs.shape) for key, runs in found.items()} == {
        (answers.OURS, 16): (1, PICTURES, 6),
        ("random", 16): (2, PICTURES, 6),
    }
    torch.manual_seed(1)
    again = answers.right(trained, exam, methods["random"](exam.features, exam.scores, 16))
    assert torch.equal(found["random", 16][1], again)
    assert not torch.equal(*found["random", 16])


def test_shares_and_differences_by_hand():
    ours = torch.tensor([[[True, True], [True, False], [False, False]]])  # 1 seed, 3 pictures, 2 kinds
    other = torch.tensor([[[True, False], [True, True], [False, False]]])
    share = answers.Share.of(answers.mean_of_kinds(ours))
    assert share.value == pytest.approx(50) and share.error == pytest.approx(50 / math.sqrt(3))
    ahead = answers.difference(ours, other)  # 1/2, -1/2, 0
    assert ahead.value == pytest.approx(0) and ahead.error == pytest.approx(50 / math.sqrt(3))
    rest = answers.difference(ours, other, without=(1,))
    assert rest.value == 0 and rest.error == 0
    assert answers.Share.of(answers.mean_of_kinds(ours, without=(0,))).value == pytest.approx(100 / 3)


def test_what_is_better_is_said():
    runs = torch.zeros(1, 400, 6, dtype=torch.bool)
    better = runs.clone()
    better[:, ::2, 0] = True
    little = runs.clone()
    little[:, 0, 0] = True
    found = {(answers.OURS, 16): runs, ("random", 16): better, ("pooling", 16): little, ("random", 8): runs}
    first, second = table.in_words(found, 16).splitlines()
    assert (
        first
        == f"Better than {answers.OURS} of all six kinds: random by 8.3 ± 0.4; pooling by 0.0 ± 0.0, within chance."
    )
    assert second.startswith(f"Better than {answers.OURS} without the count question: random by 10.0")
    assert "random" not in table.in_words({**found, ("random", 16): runs}, 16)


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "cells.csv"
    assert main(["compare-answers", "--pictures", "12", "--keep", "16", "--seeds", "1", "--csv", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("all tokens", *answers.METHODS)) and "Better than" in out
    lines = list(csv.DictReader(file.open()))
    assert [line["method"] for line in lines] == ["all tokens", *answers.METHODS]
    for line in lines:
        mean = sum(float(line[kind]) for kind in questions.KINDS) / 6
        assert float(line["mean"]) == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep: expected a whole number from 1 to 144, got '0'"),
        (["--keep", "145"], "--keep: expected a whole number from 1 to 144, got '145'"),
        (["--pictures", "1"], "--pictures: expected a whole number from 2"),
        (["--seeds", "0"], "--seeds: expected a whole number from 1"),
        (["--model", "nowhere"], "--model nowhere: expected 'tiny' or a directory with config.json"),
        (["--csv", "no/such/cells.csv"], "--csv: no such folder: no/such"),
        (["--keep", "13", "--pictures", "2"], "--keep: expected for pooling and uniform a product"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, capsys):
    assert main(["compare-answers", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_model_that_knows_other_words_is_refused(tmp_path, capsys):
    config = json.loads((tiny_llava.PATH / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    for path in tiny_llava.PATH.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_config(
        AutoModelForImageTextToText.from_pretrained(tiny_llava.PATH).config.__class__(**config)
    )
    model.save_pretrained(tmp_path)
    assert main(["compare-answers", "--model", str(tmp_path)]) == 2
    assert "knows these questions' words" in capsys.readouterr().err


def test_show_and_report_need_nothing_but_the_package(tmp_path, capsys):
    figure = tmp_path / "show.png"
    question = ["--question", "which digit is red"]
    assert main(["show", *question, "--methods", "condensevlm", "--output", str(figure)]) == 0
    assert figure.stat().st_size > 1e4
    assert main(["report", "--keep", "16", "--rounds", "1", "--new-tokens", "2"]) == 0
    assert "random" in capsys.readouterr().out  # is in every table


# Training


def test_training_learns_stops_and_goes_on(tmp_path, monkeypatch):
    """Two steps at a time are four steps: resuming changes nothing."""
    from condense_kernels.tiny_llava import train

    stages = [train.Stage("tower", 2, 1e-3, decoder=False), train.Stage("both", 2, 1e-3)]
    monkeypatch.setattr(train, "STAGES", tuple(stages))
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "accuracy", lambda model: [0.5] * 6)
    monkeypatch.setattr(train, "EVERY", 1)
    whole, halted = tmp_path / "whole", tmp_path / "halted"

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["train", "--output", str(folder), "--seed", "3"])
        train.main()

    run(whole)
    steps = train.Trainer.one_step
    left = [3]

    def one_step(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return steps(self)

    monkeypatch.setattr(train.Trainer, "one_step", one_step)
    with pytest.raises(KeyboardInterrupt):
        run(halted)
    left[0] = 100
    run(halted)
    assert left[0] == 99  # one step was left
    states = [torch.load(folder / "checkpoint.pt", weights_only=False)["model"] for folder in (whole, halted)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    models = [AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (whole, halted)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))
    history = json.loads((halted / "training.json").read_text())
    assert history["seed"] == 3 and [line["stage"] for line in history["log"]] == ["both", "both"]


def test_heads_and_answers_learn_what_is_there():
    """The loss falls on one batch that is shown again and again: labels belong to their patches and questions."""
    from condense_kernels.tiny_llava import train

    trainer = train.Trainer(0)
    shown = [scenes.Scenes("train", 0).scene() for _ in range(4)]
    trainer.scenes.scene = lambda *_: shown[int(trainer.rng.integers(4))]
    trainer.stage, trainer.step = 2, 400
    trainer.begin_stage()
    losses = [trainer.one_step() for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_halves_are_two_quarters():
    from condense_kernels.tiny_llava.train import patches_of

    at = patches_of((0, 2))
    assert len(at) == PATCHES // 2 and (at % 12 < 6).all() and torch.equal(at, at.sort().values)
