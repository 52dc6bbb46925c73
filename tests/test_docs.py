"""The examples of README.md and docs/ run as they stand, and their relative links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)\s]*\)")

FILE = re.compile(r"(?<![\w/.~-])(?:condense_kernels|tests|benchmarks|csrc|docs|hub|\.github)/[\w./*-]+[\w*]")
INVENTED = ("NAME", "weigh")  # files that a reader is to write


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if EXAMPLE.search(page.read_text())], ids=name)
def test_examples_run(page):
    text = page.read_text()
    namespace: dict = {}
    for example in EXAMPLE.finditer(text):  # a page's examples build on each other
        line = text.count("\n", 0, example.start(1))
        exec(compile("\n" * line + example[1], page, "exec"), namespace)  # a traceback names the page's own line


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(page):
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{name(page)} links to what is not there: {missing}"


OTHERS = [ROOT / file for file in ("CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_files_that_are_named_are_there(page):
    text = page.read_text().replace("\\", "")
    named = {file for file in FILE.findall(text) if not any(part in file for part in INVENTED)}
    missing = [file for file in named if not any(ROOT.glob(file))]
    assert not missing, f"{name(page)} names what is not there: {missing}"


def test_the_readme_counts_the_model_types():
    from condense_kernels.models import FAMILIES

    assert int(re.search(r"(\d+) model types have a row", PAGES[0].read_text())[1]) == len(FAMILIES)
