"""The page of ``show`` in headless Chromium, which ``make test-html`` asks for: moved, pointed at, and read."""

import json

import browser
import pytest
import torch

from condense_kernels.cli import selection, show, show_page

pytestmark = pytest.mark.slow
ROWS, COLUMNS = 6, 9
TOKENS = ROWS * COLUMNS


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


class Stub(show.Answers):
    """A model whose answer is how many tokens it got."""

    def __init__(self):
        self.question, self.on_all = "how many?", str(TOKENS)


@pytest.fixture
def opened(tab, tmp_path):
    """The page at the width of a desk, and what is in it."""
    torch.manual_seed(0)
    features = torch.rand(1, TOKENS // 3, 8).repeat_interleave(3, dim=1) + 0.2 * torch.randn(1, TOKENS, 8)
    seen = selection.Seen("a <b>picture</b>", torch.rand(48, 72, 3), features, torch.rand(1, TOKENS), (ROWS, COLUMNS))
    budgets = selection.budgets_of(TOKENS)
    found = {method: {} for method in ("condensevlm", "topk", "pooling")}
    for method, cells in found.items():
        for budget in budgets:
            kept = selection.keep_tokens(method, seen, budget)
            cells[budget] = selection.Cell(kept, f"{kept.size} of {method}")
    show_page.write_page(tmp_path / "page.html", seen, found, Stub())
    tab.resize(1200, 800)
    tab.open(tmp_path / "page.html")
    return tab, json.loads(tab.text_content("#data"))


def at(patch: int) -> str:
    return f"[data-patch='{patch}']"


def place(patch: int) -> str:
    return f"row {patch // COLUMNS + 1}, column {patch % COLUMNS + 1}"


def kinds(tab) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    classes = tab.run("[...document.querySelectorAll('[data-patch]')].map(patch => patch.className.baseVal)")
    for patch, names in enumerate(classes):
        for name in names.split():
            found.setdefault(name, []).append(patch)
    return found


def slide(tab, to: int) -> None:
    """By the keyboard, as a person does."""
    tab.run("document.getElementById('budget').focus()")
    tab.press("Home")
    for _ in range(to):
        tab.press("ArrowRight")


def choose(tab, method: str) -> None:
    tab.run(f"""(() => {{
        const select = document.getElementById("method");
        select.value = {method!r};
        select.dispatchEvent(new Event("input", {{bubbles: true}}));
    }})()""")


def test_the_slider_moves_the_number_of_tokens(opened):
    tab, data = opened
    for step, cell in enumerate(data["methods"][0]["cells"]):
        slide(tab, step)
        assert tab.text("#count") == f"{cell['size']} of {TOKENS}"
        found = kinds(tab)
        assert found.get("anchor", []) == sorted(cell["anchors"])
        assert found.get("background", []) == sorted(cell["background"])
        assert len(found.get("dropped", [])) == TOKENS - cell["size"]
        assert f"On these {cell['size']}: “{cell['size']} of condensevlm”" in tab.text("#answers")
    assert f"On all {TOKENS} tokens: “{TOKENS}”" in tab.text("#answers")


def test_a_choice_changes_the_method(opened):
    tab, data = opened
    slide(tab, 4)
    choose(tab, "topk")
    cell = data["methods"][1]["cells"][4]
    assert kinds(tab)["kept"] == cell["kept"] and "member" not in kinds(tab)  # nothing merges
    tab.point(at(next(i for i in range(TOKENS) if i not in cell["kept"])))
    assert "merged into nothing; the most similar kept token is" in tab.text("#details")
    choose(tab, "pooling")
    near = data["methods"][2]["cells"][4]["near"]
    tab.point(at(5))
    assert f"Averaged over a block of {near.count(near[5])} patches" in tab.text("#details")
    assert kinds(tab)["member"] == [i for i in range(TOKENS) if near[i] == near[5]]
    assert set(kinds(tab)) == {"pooled", "member"}


@pytest.mark.parametrize("touch", [False, True])
def test_a_patch_says_why(opened, touch):
    tab, data = opened
    slide(tab, 6)
    cell = data["methods"][0]["cells"][6]
    for name, order, kind in (("anchors", cell["anchors"], "an anchor"), ("background", cell["background"],
                                                                           "a background token")):  # fmt: skip
        for rank, patch in enumerate(order):
            tab.point(at(patch), touch)
            said, tier = tab.text("#details"), cell["tiers"][name]
            assert said.startswith(f"Patch in {place(patch)}\n")
            assert f"Kept as {kind}: pick {rank + 1} of {len(order)}." in said
            score = f"{tier['score'][patch]:.3f}".replace("-", "\u2212")
            assert score in said
            if rank:
                assert f"The suppressor is {place(tier['suppressor'][patch])}" in said
            else:
                assert "nothing was picked before it" in said
    dropped = next(i for i in range(TOKENS) if i not in cell["kept"])
    tab.point(at(dropped), touch)
    said, near = tab.text("#details"), cell["near"]
    assert f"Dropped: merged into {place(near[dropped])}, cosine {cell['like'][dropped]:.3f}" in said
    for name in ("anchors", "background"):
        assert f"The suppressor is {place(cell['tiers'][name]['suppressor'][dropped])}" in said
    assert kinds(tab)["member"] == [i for i in range(TOKENS) if near[i] == near[dropped]]


def test_the_arrow_keys_move_over_the_patches(opened):
    tab, data = opened
    tab.run("document.getElementById('picture').focus()")
    here = data["first"]
    for key, by in (("Home", -(here % COLUMNS)), ("ArrowRight", 1), ("ArrowLeft", -1), ("ArrowLeft", 0), ("End", 8)):
        tab.press(key)
        here += by
        assert f"Patch in {place(here)}\n" in tab.text("#details")
    for key, by in (("ArrowUp", -COLUMNS), ("ArrowDown", COLUMNS)):
        for _ in range(ROWS):
            tab.press(key)
            here += by if 0 <= here + by < TOKENS else 0
            assert f"Patch in {place(here)}\n" in tab.text("#details")


def test_tab_reaches_the_controls_which_have_names(opened):
    tab, _ = opened
    reached = []
    for _ in range(3):
        tab.press("Tab")
        reached.append(tab.run("document.activeElement.id"))
    assert reached == ["method", "budget", "picture"]
    assert tab.run("document.getElementById('method').labels[0].textContent") == "Method"
    assert tab.run("document.getElementById('budget').labels[0].textContent").startswith("Tokens kept")
    assert tab.run("document.getElementById('details').getAttribute('aria-live')") == "polite"


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1600, True)])
def test_the_page_fits_and_text_stands_out(opened, width, dark):
    tab, _ = opened
    tab.resize(width, 800, dark)
    assert tab.run("document.documentElement.scrollWidth") <= width
    picture = tab.run("document.getElementById('picture').getBoundingClientRect().width")
    assert 300 < picture < width
    ground, *inks = [
        luminance(tab.run(f"getComputedStyle(document.querySelector('{of}')).{what}"))
        for of, what in (("body", "backgroundColor"), ("body", "color"), (".soft", "color"))
    ]
    assert (ground < 0.5) == dark
    for ink in inks:
        light, deep = max(ground, ink), min(ground, ink)
        assert (light + 0.05) / (deep + 0.05) > 7  # WCAG 2, level AAA


def luminance(colour: str) -> float:
    levels = [int(level) / 255 for level in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_nothing_is_asked_for_and_a_name_stays_text(opened):
    tab, _ = opened
    tab.point(at(3))
    assert tab.requests() == []
    assert tab.text("h1").startswith("a <b>picture</b>: which of 54 tokens")
