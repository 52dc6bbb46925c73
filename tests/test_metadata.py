"""What the package index, citations, agents and contributors are told agrees with what is here."""

import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from test_docs import LINK, PAGES

from condense_kernels.cli import start

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = runpy.run_path(str(ROOT / "condense_kernels" / "_version.py"))["__version__"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
SUPPORT = (ROOT / "docs" / "support.md").read_text()
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # Keep a Changelog 1.1.0


def url(name: str) -> str:
    return re.search(rf'^{name} = "(https://.*)"$', PYPROJECT, re.M)[1]


def releases() -> list[tuple[str, str]]:
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", CHANGELOG, re.M)


def test_the_index_page_has_absolute_links_to_the_files_of_this_version(description):
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert len(links) > 50 and all(link.startswith(("https://", "#")) for link in links)
    prefixes = tuple(f"{url('Repository')}/{view}/v{VERSION}/" for view in ("blob", "raw"))
    ours = [link for link in links if link.startswith(prefixes)]
    assert len(ours) > 50
    for link in ours:
        view, path = re.fullmatch(rf"{re.escape(url('Repository'))}/(\w+)/v[^/]+/([^#]+).*", link).groups()
        assert (ROOT / path).exists() and (view == "raw") == (Path(path).suffix == ".png"), link


def test_the_index_page_is_the_readme_but_for_links(description):
    plain = re.compile(r"\]\([^)\s]+\)")
    assert plain.sub("]", description) == plain.sub("]", (ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def description() -> str:
    """What setup.py hands to setuptools, which is asked for nothing else."""
    handed: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("setuptools.setup", lambda **arguments: handed.update(arguments))
        runpy.run_path("setup.py")
    assert handed["long_description_content_type"] == "text/markdown"
    return handed["long_description"]


def test_the_repository_has_one_address():
    """Elsewhere it may stand as a part of longer ones, but not as another."""
    owner, name = url("Repository").rsplit("/", 2)[1:]
    files = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob("*.yml")]
    files += [path for suffix in ("md", "py", "yml") for path in (ROOT / ".github").rglob(f"*.{suffix}")]
    for file in files:
        for found in re.findall(r"github\.com/([\w-]+/condense[\w-]*)", file.read_text()):
            assert found == f"{owner}/{name}", f"{file.relative_to(ROOT)}: github.com/{found}"
    assert url("Documentation") == f"https://{owner}.github.io/{name}/" == start.DOCS
    assert f"site_url: {url('Documentation')}\n" in (ROOT / "mkdocs.yml").read_text()


def test_the_changelog_keeps_a_changelog():
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.M)
    dated = [f"[{version}] - {date}" for version, date in releases()]
    assert headings in (dated, ["[Unreleased]", *dated]), "## [Unreleased], then ## [X.Y.Z] - YYYY-MM-DD, newest first"
    versions = [tuple(map(int, version.split("."))) for version, _ in releases()]
    assert versions == sorted(set(versions), reverse=True) and versions
    dates = [date for _, date in releases()]
    assert dates == sorted(dates, reverse=True)
    for block in re.split(r"^## .*$", CHANGELOG, flags=re.M)[1:]:
        kinds = re.findall(r"^### (.*)$", block, re.M)
        assert kinds == [kind for kind in SECTIONS if kind in kinds], f"sections {kinds}: of {SECTIONS}, in that order"


def test_every_release_of_the_changelog_links_to_its_changes():
    references = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", CHANGELOG, re.M))
    numbers = [version for version, _ in releases()]
    expected = {version: f"{url('Repository')}/compare/v{before}...v{version}" for version, before in pairwise(numbers)}
    expected[numbers[-1]] = f"{url('Repository')}/releases/tag/v{numbers[-1]}"
    if "## [Unreleased]" in CHANGELOG:
        expected["Unreleased"] = f"{url('Repository')}/compare/v{numbers[0]}...HEAD"
    assert references == expected


def test_the_citation_is_of_the_newest_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version, date = releases()[0]
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert version == VERSION
    assert citation["repository-code"] == url("Repository") and citation["url"] == url("Documentation")
    assert f'license = "{citation["license"]}"' in PYPROJECT


def requirement(name: str) -> str:
    (found,) = {text for text in re.findall(rf'"({name}[<>=][^;"]*)[;"]', PYPROJECT)}
    return ", ".join(sorted(map(str, Requirement(found).specifier), key=lambda text: "<" in text))


@pytest.mark.parametrize("package", ["torch", "triton", "transformers"])
def test_the_support_page_has_the_versions_of_the_package(package):
    said = re.search(rf"^\| {package} \| ([^|]*) \|", SUPPORT, re.M)[1]
    assert said.replace(">= ", ">=").replace("< ", "<") == requirement(package)


def test_the_support_page_has_the_classifiers_pythons():
    minors = [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT)]
    first, last = re.search(r"^\| Python \| 3\.(\d+) to 3\.(\d+) \|", SUPPORT, re.M).groups()
    assert minors == list(range(int(first), int(last) + 1))
    assert f'requires-python = ">=3.{first}"' in PYPROJECT


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_asks_each_thing_once(form):
    parsed = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert parsed["contact_links"]
        return
    ids = [part["id"] for part in parsed["body"]]
    assert len(ids) == len(set(ids)) and {"name", "description"} <= set(parsed)


@pytest.mark.parametrize("page", ["AGENTS.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_pages_beside_the_code_name_what_is_there(page):
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
    assert named and named <= targets, f"{page}: {sorted(named - targets)} are no targets of make"
    paths = re.findall(r"(?<![\w/])(?:tests|docs|benchmarks|condense_kernels|csrc)/[\w./]*\w", text)
    named = [link for link in LINK.findall(text) if "://" not in link] + [path for path in paths if "NAME" not in path]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page} names what is not there: {missing}"
