"""The site of the docs: its menu has every page, its reference every public name, its gallery every picture.

The slow half builds it as ``make docs`` does, and opens every page in headless Chromium at the width of a phone.
"""

import functools
import html
import http.server
import importlib
import importlib.util
import inspect
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import urlsplit

import browser
import pytest
import yaml
from processes import ROOT

import condense_kernels as ck
from condense_kernels.methods import METHODS

DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PHONE, DESK = 390, 1440


class Loader(yaml.SafeLoader):
    """mkdocs.yml names Python functions, which nothing here needs."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api = script("api")


def leaves(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]


def test_the_menu_has_every_page_once():
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    written = [page.relative_to(DOCS).as_posix() for page in pages]
    made = [*(f"api/{page}.md" for page in api.PAGES), "changelog.md", "contributing.md", "security.md"]
    assert sorted(leaves(CONFIG["nav"])) == sorted([*written, *made])


def test_the_reference_has_every_public_name_once():
    found = [name for page in api.PAGES for name in api.names_of(page)]
    assert len(found) == len(set(found))
    public = {
        name
        for name, value in vars(ck).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("condense_kernels")
    }
    assert {"merge", "Condense", "warm_up", "debug"} <= public
    assert public <= set(found)
    assert {f"methods.{name}" for name in METHODS} <= set(found)
    hosts = {path.stem for path in (ROOT / "condense_kernels" / "adapters").glob("*.py")} - {"__init__", "common"}
    assert {f"adapters.{host}" for host in hosts} <= set(found)


@pytest.mark.parametrize("page", api.PAGES)
def test_docstrings_are_markdown(page):
    """2**19 twice in a line is bold, and >>> three quotations."""
    for name in api.names_of(page):
        module, _, attribute = api.definition(name).rpartition(".")
        text = inspect.getdoc(getattr(importlib.import_module(module), attribute)) or ""
        text = re.sub(r"``.*?``", "", text)
        assert not re.search(r"\w\*\*\w", text), name
        assert ">>>" not in text or "Examples:" in text, name


@pytest.mark.parametrize("page", api.PAGES)
def test_what_the_reference_names_is_there(page):
    for name in api.names_of(page):
        assert api.definition(name).startswith("condense_kernels.")


def test_the_gallery_has_every_picture():
    shown = re.findall(r"!\[[^\n]+\]\(([^)]+)\)", (DOCS / "gallery.md").read_text())
    assert sorted(shown) == sorted(path.name for path in DOCS.glob("*.png"))


FIRST = re.compile(r"^# .+\n\n(.+(?:\n.+)*)", re.M)  # the block below a page's title


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), *TOP], ids=lambda page: page.stem)
def test_a_page_begins_with_what_it_is_for(page):
    """In words: before code, a table, a picture or another heading. Search engines show them."""
    first = FIRST.search(page.read_text())[1]
    assert not re.match(r"```|\||#|!|[-*] |\d+\. |<", first), first
    assert len(first) >= 40


@pytest.mark.parametrize("page", ["operators", "pieces"])
def test_the_reference_leads_to_equations(page):
    for name in api.names_of(page):
        assert (DOCS / f"{api.explained(name)}.md").is_file(), name


def test_results_are_a_list_in_the_reference(monkeypatch):
    pytest.importorskip("griffe", reason="needs what make docs installs")
    monkeypatch.syspath_prepend(DOCS / "site")
    section = "    A tuple of\n\n    s: [B], of the\n        keys: all.\n    g: [B].\n\n    Both are fp32.\n\n"
    written = script("roles").results(section).split("Returns:</span>\n")[1]
    assert written == "\nA tuple of\n\n- `s`: [B], of the\nkeys: all.\n- `g`: [B].\n\nBoth are fp32.\n\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a page that no menu has, or a link or anchor that leads nowhere, is an error."""
    config = pytest.importorskip("mkdocs.config", reason="needs what make docs installs")
    from mkdocs.commands.build import build
    from mkdocs.exceptions import Abort

    target = tmp_path_factory.mktemp("site") / "condense_kernels"  # as on its host: its 404 page names that folder
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        build(config.load_config("mkdocs.yml", site_dir=str(target)))
    except Abort as error:
        pytest.fail(str(error))
    finally:
        os.chdir(here)
    return target


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def address(site):
    """Of the site, served to this machine alone."""
    handler = functools.partial(Quiet, directory=str(site.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{site.name}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def complaints(tab) -> list:
    return [
        event["params"]
        for event in tab.events
        if event.get("method") == "Runtime.exceptionThrown"
        or (event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] == "error")
    ]


def missing(tab) -> list[str]:
    answers = [event["params"]["response"] for event in tab.events if event.get("method") == "Network.responseReceived"]
    return [answer["url"] for answer in answers if answer["status"] >= 400]


WIDE = """[...document.querySelectorAll('.md-content img, .md-content table, .md-content pre')].filter(element => {
    const box = element.closest('.md-typeset__scrollwrap, pre, .jp-RenderedHTMLCommon, .jp-OutputArea') || element;
    return box.getBoundingClientRect().right > innerWidth + 1;
}).map(element => element.outerHTML.slice(0, 120))"""


# What reads badly: headings that skip a level, pictures without words, and at a desk lines of code to be scrolled.
HEADINGS = """(() => {
    const levels = [...document.querySelectorAll('.md-content :is(h1, h2, h3, h4, h5, h6)')].map(h => +h.tagName[1]);
    return levels.filter((level, i) => i ? level === 1 || level > levels[i - 1] + 1 : level !== 1);
})()"""
WORDLESS = """[...document.images].filter(i => !i.alt.trim() || i.alt.startsWith('No description')).map(i => i.src)"""
SCROLLED = """[...document.querySelectorAll('.md-content pre')].filter(pre => {
    const box = pre.querySelector('code') || pre, most = Math.max(...pre.textContent.split('\\n').map(l => l.length));
    return innerWidth > 1000 && box.scrollWidth > box.clientWidth + 1 && most <= 120;
}).map(pre => pre.textContent.slice(0, 120))"""


def pick(tab, scheme: str) -> None:
    """As a reader does, once for all pages that the browser opens from then on."""
    tab.run(f"document.querySelector('.md-option[data-md-color-scheme={scheme}]').click()")
    assert tab.run("document.body.dataset.mdColorScheme") == scheme


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "default"), (DESK, "default"), (DESK, "slate")])
def test_every_page_fits_and_asks_nobody_else(site, address, tab, width, scheme):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    wrong = {}
    tab.resize(width, 844)
    tab.open(address)
    pick(tab, scheme)
    for page in pages:
        tab.open(address + page.relative_to(site).as_posix())
        found = {
            "wider than the screen": tab.run("document.documentElement.scrollWidth - innerWidth"),
            "cut off": tab.run(WIDE),
            "asked for": [url for url in tab.requests() if not url.startswith((address, "blob:"))],
            "not there": missing(tab),
            "missing pictures": tab.run("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"),
            "errors": complaints(tab),
            "headings": tab.run(HEADINGS),
            "pictures without words": tab.run(WORDLESS),
            "lines of code to be scrolled": tab.run(SCROLLED),
        }
        if bad := {name: what for name, what in found.items() if what and what != 0}:
            wrong[page.relative_to(site).as_posix()] = bad
    assert not wrong, json.dumps(wrong, indent=1)


CONTRAST = """(() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const over = ([r, g, b, a = 1], [s, h, c]) => [r * a + s * (1 - a), g * a + h * (1 - a), b * a + c * (1 - a)];
    const behind = e => e ? over(parts(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
    const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const found = {}, texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.data.trim(), e = texts.currentNode.parentElement, style = getComputedStyle(e);
        const seen = opacity(e), hidden = !e.checkVisibility({visibilityProperty: true}) || seen < 0.05;
        if (!text || hidden || e.closest('svg, script, style, noscript, .headerlink')) continue;
        const back = behind(e), [r, g, b, a = 1] = parts(style.color);
        const [low, high] = [light(over([r, g, b, a * seen], back)), light(back)].sort((p, q) => p - q);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found[`${e.tagName}.${e.className}`] = [ratio, text];
    }
    return found;
})()"""
STILL = "document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>')"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["", "greedy_select/", "api/operators/", "notebooks/quickstart/"])
def test_text_has_contrast(address, tab, page, dark):
    """That of WCAG 2, level AA: 4.5 to 1, of large letters 3 to 1."""
    tab.resize(DESK, 844)
    tab.open(address + page)
    pick(tab, "slate" if dark else "default")
    tab.run(STILL)
    assert tab.run(f"new Promise(later => setTimeout(() => later({CONTRAST}), 300))") == {}


DESCRIPTION = re.compile(r"""<meta name=["']?description["']? content="([^"]*)">""")


@pytest.mark.slow
def test_search_engines_get_a_title_and_words_for_each_page(site):
    titles, words = {}, {}
    for page in site.rglob("index.html"):
        text = page.read_text()
        titles[re.search(r"<title>(.*?)</title>", text)[1]] = words[DESCRIPTION.search(text)[1]] = page
        assert 40 <= len(html.unescape(DESCRIPTION.search(text)[1])) <= 160, page
    assert len(titles) == len(words) == len([*site.rglob("index.html")])


SHOWN = re.compile(r"<(pre|code)\b.*?</\1>", re.S)  # what readers see, and browsers do not run


@pytest.mark.slow
def test_search_finds_without_a_network(address, tab):
    tab.resize(DESK, 844)
    tab.open(address)
    tab.run("""new Promise((found, fail) => {
        const field = document.querySelector('.md-search__input');
        field.focus();
        field.value = 'mean_similarity';
        field.dispatchEvent(new Event('input', {bubbles: true}));
        const late = setTimeout(() => fail(new Error('nothing found')), 30000);
        const look = setInterval(() => {
            if (document.querySelector('.md-search-result__link')) {
                clearInterval(look), clearTimeout(late), found(true);
            }
        }, 100);
    })""")
    assert "similarity" in tab.run("document.querySelector('.md-search-result__list').innerText")


FETCHED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=[\"']?(\S+?)[\"'\s>]|<link\b[^>]*>", re.I)


@pytest.mark.slow
def test_nothing_is_loaded_from_other_hosts(site):
    """By the text, which also has what a script would load later on."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"\b(?:import|from)\s*\(?\s*[\"'](?:https?:)?//", html.unescape(SHOWN.sub("", text))), page
        for found in FETCHED.finditer(text):
            target = found[1]
            if target is None:
                if re.search(r"rel=[\"']?(canonical|next|prev|alternate)", found[0]):
                    continue
                target = re.search(r"href=[\"']?([^\"'\s>]+)", found[0])[1]
            assert not urlsplit(target).netloc, f"{page.relative_to(site)}: {found[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name
