"""The notebooks of docs/notebooks: what is stored in them, and that they run and give it again."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SILENT = ("import ", "def ", "%pip", "assert ")  # a cell of which one is a line may have nothing to show
LARGEST = 400_000  # bytes
REPOSITORY = re.search(r'^Repository = "https://github.com/(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["quickstart", "tiny_llava"]


@EVERY
def test_it_is_stored_as_it_ran(path):
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        outputs = cell["outputs"]
        assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs), source
        assert outputs or any(line.lstrip().startswith(SILENT) for line in source.splitlines()), f"no output: {source}"
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom: make notebooks"


@EVERY
def test_it_holds_pictures_numbers_and_nothing_of_a_machine(path):
    text = path.read_text()
    assert len(text) < LARGEST
    assert text.count("image/png") >= 2
    assert not re.search(r"/(home|root|work|tmp|opt|usr)/|site-packages|pypi|simple/", text)
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"


@EVERY
def test_its_pictures_have_words(path):
    for cell in cells(path, "code"):
        if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
            assert len(cell["metadata"].get("alt", "")) > 20, "".join(cell["source"])


@EVERY
def test_its_badge_opens_it_in_colab(path):
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/docs/notebooks/{path.name}"
    assert f"]({link})" in "".join(cells(path, "markdown")[0]["source"])


@EVERY
def test_it_installs_what_it_imports_where_that_is_missing(path):
    (cell,) = ["".join(cell["source"]) for cell in cells(path, "code") if "%pip" in "".join(cell["source"])]
    assert 'find_spec("condense_kernels") is None' in cell and f"github.com/{REPOSITORY}" in cell


@EVERY
def test_its_links_lead_to_files(path):
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    found = re.findall(rf"https://github\.com/{REPOSITORY}/blob/main/([^)#\s]+)", text)
    assert found and all((ROOT / name).is_file() for name in found), found


@pytest.mark.slow
@EVERY
def test_it_gives_the_same_again(path, tmp_path):
    """Its assertions hold, and what it prints is what is stored, but where a cell is tagged "varies"."""
    import nbformat
    from notebooks import differs, execute, text_of

    again, stored = execute(path, tmp_path), nbformat.read(path, as_version=4)
    for new, old in zip(again.cells, stored.cells, strict=True):
        if new.cell_type == "code" and "varies" not in old.metadata.get("tags", ()):
            assert not differs(text_of(new), text_of(old)), f"{new.source}\n{text_of(new)}\ninstead of\n{text_of(old)}"
