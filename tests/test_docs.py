"""The examples of README.md and docs/ run as they stand, and their relative links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)\s]*\)")


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
