"""python -m condense_kernels reproduce: what it reads and refuses, on small results as lmms-eval writes them."""

import argparse
import json

import pytest

from condense_kernels.cli import CommandError, reproduce
from condense_kernels.lmms import tables


def written(folder, answer="a", asked=1):
    (folder / "m").mkdir()
    (folder / "m" / "1_results.json").write_text(
        json.dumps(
            {
                "results": {"gqa": {"exact_match,none": 0.6, "alias": "gqa"}},
                "n-samples": {"gqa": {"original": 100, "effective": asked}},
            }
        )
    )
    (folder / "m" / "1_samples_gqa.jsonl").write_text(json.dumps({"filtered_resps": [answer]}) + "\n")


def test_results_are_read(tmp_path):
    written(tmp_path)
    assert reproduce.read(tmp_path, "gqa") == {"exact_match": 0.6}


def test_empty_answers_are_refused(tmp_path):
    written(tmp_path, " ")
    with pytest.raises(CommandError, match="1 empty of 1"):
        reproduce.read(tmp_path, "gqa")


def test_the_error_is_told_and_not_the_progress_bar():
    assert reproduce.telling("ValueError: no template\nResponding: 0/2\n") == "ValueError: no template"
    assert reproduce.telling("a\nb\n") == "b"
    assert reproduce.telling("") == "nothing printed"


def test_missing_answers_are_refused(tmp_path):
    written(tmp_path, asked=2)
    with pytest.raises(CommandError, match="each of 2 questions, got 1"):
        reproduce.read(tmp_path, "gqa")


def test_missing_results_are_refused(tmp_path):
    with pytest.raises(CommandError, match="no results of gqa"):
        reproduce.read(tmp_path, "gqa")


@pytest.mark.parametrize(("ours", "held"), [(0.619, True), (0.60, False), (float("nan"), False)])
def test_upper_bound(ours, held):
    table, found = tables.TABLES["2"], {"gqa": {"exact_match": ours}}
    arguments = argparse.Namespace(tolerance=1.0)
    if held:
        reproduce.check_bound(table, table.rows()[0], found, arguments)
    else:
        with pytest.raises(CommandError, match="GQA: expected all tokens within 1 % of 61.9"):
            reproduce.check_bound(table, table.rows()[0], found, arguments)


def test_what_was_not_run_is_printed_so(capsys):
    table = tables.TABLES["2"]
    found = {"all tokens": {"gqa": {"exact_match": 0.5}}, "condensevlm, 64": {"gqa": {"exact_match": 0.4}}}
    reproduce.show(table, table.rows(), found, argparse.Namespace(limit=None))
    printed = capsys.readouterr().out
    assert "GQA: 40.0 (paper 56.5), 80.0 % of all tokens" in printed and "MME: not run (paper 1862)" in printed
