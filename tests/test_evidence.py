"""What is committed of the tiny LLaVA's answers says one thing in all places."""

import csv

import evidence
import pytest
from rows import ROOT

from condense_kernels.tiny_llava import answers, table

FILE = ROOT / "benchmarks" / "results" / "evidence.csv"


def committed() -> dict[tuple[str, str, int], dict[str, str]]:
    with FILE.open(newline="") as file:
        return {(line["model"], line["method"], int(line["keep"])): line for line in csv.DictReader(file)}


def test_the_record_has_every_method_of_every_model():
    expected = {(model, "all tokens", 144) for model in evidence.MODELS}
    names = (*answers.METHODS, *answers.ABLATIONS)
    expected |= {(model, name, keep) for model in evidence.MODELS for name in names for keep in answers.BUDGETS}
    assert set(committed()) == expected


def test_the_models_are_as_good_as_was_asked_for():
    for model in evidence.MODELS:
        assert float(committed()[model, "all tokens", 144]["mean"]) >= 92


def test_the_readme_has_the_records_numbers():
    text = (ROOT / "README.md").read_text()
    section = text.split("## What it does to answers")[1].split("\n## ")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line][2:]
    assert {row[0] for row in rows} == {"all tokens", *answers.METHODS} - {"top-k + merge"}
    for name, *cells in rows:
        for keep, cell in zip([144] if name == "all tokens" else answers.BUDGETS, cells, strict=False):
            line = committed()["seed 1", name, keep]
            numbers = [float(line["mean"]), float(line["without count"])]
            assert [float(x) for x in cell.split(" / ")] == pytest.approx(numbers, abs=0.051)


def test_the_page_has_the_records_numbers():
    text = (ROOT / "docs" / "evidence.md").read_text()
    for model in evidence.MODELS:
        section = text.split(f"## {model.capitalize()}")[1].split("\n## ")[0]
        for name in (*answers.METHODS, *answers.ABLATIONS):
            row = next(line for line in section.splitlines() if line.strip("| *").startswith(f"{name}"))
            found = [float(cell.split("(")[0].strip(" *")) for cell in row.split("|")[2:-1]]
            expected = [float(committed()[model, name, keep]["mean"]) for keep in answers.BUDGETS]
            assert found == pytest.approx(expected, abs=0.051)


def test_the_script_measures_every_cell():
    found = evidence.measure("tiny", pictures=4, seeds=2)
    text = evidence.report({"seed 1": found}, 4, 2)
    for name in (*answers.METHODS, *answers.ABLATIONS):
        assert f"{name}" in text
    assert found.results["random", 16].shape == (2, 4, 6) and found.results["pooling", 16].shape == (1, 4, 6)
    assert len(table.rows(found.everything, found.results)) == 1 + 16 * 3
