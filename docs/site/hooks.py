"""What mkdocs needs besides docs/: the reference, the pages at the top of the repository, links that leave docs/."""

import html
import json
import posixpath
import re
import sys
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import api

ROOT = Path(__file__).parents[2]
SHOWN = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```\w+) .*$", re.M)
FOREIGN = re.compile(r"<script (src=\"\"|type=\"(text/x-mathjax-config|module)\")>.*?</script>", re.S)
FOREIGN_IMAGE = re.compile(r"""<img alt="([^"]*)" src="https?://[^"]*" */?>""")
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.S)
WORDLESS = re.compile(r'alt="No description[^"]*"')
SECTION = re.compile(r"^<!-- README: (.+) -->$", re.M)


def on_files(files, config):
    for source, target in SHOWN.items():
        text = moved((ROOT / source).read_text(encoding="utf-8"), ".", "docs")
        files.append(File.generated(config, target, content=text))
    for page in api.PAGES:
        files.append(File.generated(config, f"api/{page}.md", content=api.markdown(page)))
    return files


def on_page_markdown(markdown, page, config, files):
    text = SECTION.sub(lambda found: moved(section(found[1]), ".", "docs"), markdown)
    folder = posixpath.dirname(page.file.src_uri)

    def target(found: re.Match) -> str:
        """What is not on the site is at the repository."""
        path = posixpath.normpath(posixpath.join("docs", folder, found[2]))
        if "://" in found[2] or found[2].startswith("mailto:"):
            return found[0]
        if path in SHOWN:
            return f"{found[1]}{posixpath.relpath(SHOWN[path], folder or '.')}{found[3]}"
        if path.startswith("docs/") and files.get_file_from_path(path.removeprefix("docs/")):
            return found[0]
        return f"{found[1]}{config.repo_url}/blob/main/{path}{found[3]}"

    return as_python_markdown(LINK.sub(target, text))


def on_page_content(content, page, **_):
    """What a search engine shows of a page is its first paragraph, which says what the page is for."""
    texts = (html.unescape(re.sub(r"<[^>]+>", "", found)).split() for found in PARAGRAPH.findall(content))
    if first := next(filter(None, texts), None):  # that of a badge has no words
        page.meta["description"] = textwrap.shorten(" ".join(first), 160, placeholder="…").replace('"', "'")


def as_python_markdown(text: str) -> str:
    """What a code host reads and Python-Markdown does not: words behind a block's language, Markdown in <details>."""
    return FENCE.sub(r"\1", text).replace("<details><summary>", '<details markdown="1"><summary>')


def on_post_page(output, page, config):
    """Nothing comes from other hosts: no counts of stars, no badges, no scripts for diagrams, which notebooks bring."""
    output = on_post_template(output)
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    words = iter(words_of_pictures(Path(page.file.abs_src_path)))
    output = WORDLESS.sub(lambda _: f'alt="{html.escape(next(words))}"', output)
    return FOREIGN_IMAGE.sub(r"\1", FOREIGN.sub("", output))


def words_of_pictures(notebook: Path) -> list[str]:
    """From the metadata of cells, in which Jupyter's template for pages does not look."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        cell["metadata"]["alt"]
        for cell in cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]


def on_post_template(output, template_name="", config=None, **_):
    """Also of the 404 page, which is none of docs/."""
    if template_name == "404.html":
        start = f'<a href="{urlsplit(config.site_url).path}">the first page</a>'
        lost = f"<p>There is no page of this name. Start from {start}, or search above.</p>"
        output = output.replace("404 - Not found</h1>", f"404 - Not found</h1>{lost}")
    return output.replace(' data-md-component="source"', "")


def section(title: str) -> str:
    """Of the README, without its heading."""
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    if found is None:
        raise KeyError(f"README.md has no section {title!r}")
    return found[1].strip()


def moved(text: str, old: str, new: str) -> str:
    """The text with its relative links seen from another folder."""

    def relative(found: re.Match) -> str:
        if "://" in found[2] or found[2].startswith("mailto:"):
            return found[0]
        return found[1] + posixpath.relpath(posixpath.join(old, found[2]), new) + found[3]

    return LINK.sub(relative, text)
