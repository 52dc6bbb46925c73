"""benchmarks/what_works.py: every value of a sweep has its row, on the page and of a small exam."""

import what_works
from rows import ROOT

from condense_kernels.cli import checkpoint
from condense_kernels.tiny_llava.answers import BUDGETS, Exam


def cells(lines: list[str], name: str) -> list[str]:
    """First cells below the first header that begins with the name."""
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {name}"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(line.split("|")[1].strip())
    return found


def test_the_page_has_every_value_of_every_sweep():
    lines = (ROOT / "docs" / "what_works.md").read_text().splitlines()
    for name, sweep in what_works.SWEEPS.items():
        expected = [what_works.named(name, options) for options in sweep]
        assert sum(value.startswith("**") for value in expected) == 1  # the paper's
        assert cells(lines, f"{name} | K = 48") == expected
        for keep in (192, 128, 64):
            assert cells(lines, f"{name}, K = {keep} |") == expected
    assert (
        sum(", K = " in line and line.startswith(tuple(f"| {p}," for p in what_works.PLACES)) for line in lines) == 15
    )


def test_a_small_exam_gives_every_row():
    model = checkpoint.load("tiny")[0].float()
    exam = Exam.of(model, pictures=6)
    for name, sweep in what_works.SWEEPS.items():
        lines = what_works.answers_of(model, exam, name)
        assert [line[0] for line in lines] == [what_works.named(name, options) for options in sweep]
        assert all(len(line) == 1 + 2 * len(BUDGETS) for line in lines)
        assert all(
            ("(" in line[1]) != line[0].startswith("**") for line in lines
        )  # the paper's is what others are held to
    places = what_works.places_of(model, exam, seeds=1)
    assert len(places) == len(what_works.PLACES) * len(BUDGETS) and all(len(line) == 9 for line in places)
