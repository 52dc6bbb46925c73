"""python -m condense_kernels show: the figure, the page, and what the page says of each patch."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import zoo
from PIL import Image
from test_cli import run
from transformers import LlamaConfig, LlamaForCausalLM

from condense_kernels import condense, split_budget
from condense_kernels.cli import checkpoint, photographs, reasons, selection, show, show_page, show_picture, sources
from condense_kernels.cli.prompts import inputs_of
from condense_kernels.models import apply_condense
from condense_kernels.models.methods import METHODS
from condense_kernels.testing import make_inputs
from condense_kernels.tiny_llava import model, train

TOKENS, GRID = 144, (12, 12)
QUESTION = "which digit is red"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA, not trained."""
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        train.save(model.untrained(width=32, vision_layers=3, text_layers=1), path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a <picture>.png"
    levels = (torch.arange(3 * 70 * 90) * 37 % 251).view(70, 90, 3)
    Image.fromarray(levels.to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture
def figures(monkeypatch):
    """Those that are saved, saved all the same."""
    found, save = [], show_picture.save
    monkeypatch.setattr(show_picture, "save", lambda figure, path: (found.append(figure), save(figure, path)))
    return found


def some(grid=GRID, dtype=torch.float32) -> selection.Seen:
    n = grid[0] * grid[1]
    side = torch.rand(1, n // 6 + 1, 16).repeat_interleave(6, dim=1)[:, :n]  # neighbours are alike
    features = (side + 0.3 * torch.randn(1, n, 16)).to(dtype)
    return selection.Seen("some", torch.rand(8 * grid[0], 8 * grid[1], 3), features, torch.rand(1, n).to(dtype), grid)


def data_of(page) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])


def texts(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# The figure


def test_the_figure_has_a_row_a_method_and_two_panels_a_budget(capsys, tmp_path, folder, picture, figures):
    output = tmp_path / "out.png"
    given = [
        "--model",
        folder,
        "--image",
        picture,
        "--question",
        QUESTION,
        "--methods",
        "condensevlm",
        "topk",
        "pooling",
    ]
    status, out, err = run(capsys, "show", *given, "--output", output)
    assert status == 0, err
    assert out == f"wrote {output}\n"
    with Image.open(output) as image:
        assert image.format == "PNG" and image.width > 1000 and image.height > 500
    beside, right = figures[0].subfigs
    assert len([axes for axes in beside.axes if axes.axison]) == 2  # the picture, and its scores
    panels = right.axes[:18]
    assert [axes.get_ylabel() for axes in panels[::6]] == ["CondenseVLM", "top-k", "pooling"]
    titles = [panels[i].get_title(loc="left") for i in (0, 2, 4)]
    assert titles == ["48 tokens, 66.7 % pruned", "32 tokens, 77.8 % pruned", "16 tokens, 88.9 % pruned"]
    assert all(axes.get_xlabel().startswith("“") for axes in panels[::2])  # the answers
    assert "a <picture>.png" in texts(figures[0]) and QUESTION in texts(figures[0]).replace("\n", " ")


def test_outlines_are_around_the_kept_tokens(tmp_path, figures):
    seen = some((6, 9))
    methods = ("condensevlm", "topk", "random")
    found = {m: {k: selection.Cell(selection.keep_tokens(m, seen, k)) for k in (18, 6)} for m in methods}
    show_picture.draw(tmp_path / "out.png", seen, found, show.Answers(None, None, 0))
    panels = figures[0].subfigs[1].axes
    for row, cells in enumerate(found.values()):
        for column, cell in enumerate(cells.values()):
            outlined = {}
            for patch in panels[4 * row + 2 * column].patches:
                at = int(patch.get_y()) * 9 + int(patch.get_x())
                outlined.setdefault(patch.get_edgecolor(), []).append(at)
            ours = [cell.kept.anchors, cell.kept.background]
            expected = ours if row == 0 else [cell.kept.indices]
            assert list(outlined.values()) == expected
            shown = panels[4 * row + 2 * column].images[0].get_array()  # kept patches as they are
            for at in cell.kept.indices:
                y, x = at // 9 * 8 + 3, at % 9 * 8 + 3
                torch.testing.assert_close(torch.from_numpy(shown.data[y, x]), seen.picture[y, x])


def test_matrices_hold_the_cosines_on_one_scale(tmp_path, figures):
    seen = some((6, 9))
    found = {m: {9: selection.Cell(selection.keep_tokens(m, seen, 9))} for m in ("topk", "pooling")}
    show_picture.draw(tmp_path / "out.png", seen, found, show.Answers(None, None, 0))
    images = [axes.images[0] for axes in figures[0].subfigs[1].axes[1:4:2]]
    assert images[0].get_clim() == images[1].get_clim()
    for image, rows in zip(images, (seen.features[0, found["topk"][9].kept.indices], found["pooling"][9].kept.condensed
                                    .merged[0]), strict=True):  # fmt: skip
        z = torch.nn.functional.normalize(rows.double(), dim=1)
        drawn = torch.from_numpy(image.get_array().data)
        torch.testing.assert_close(drawn.flatten().sort().values, (z @ z.T).flatten().sort().values)
        torch.testing.assert_close(drawn.diagonal(), torch.ones(9, dtype=torch.float64))
        assert image.get_clim()[0] <= drawn.min()


def test_each_token_is_beside_the_most_similar_one_that_is_left():
    s = torch.tensor([[1.0, 0.1, 0.9, -0.3], [0.1, 1.0, -0.2, -0.8], [0.9, -0.2, 1.0, -0.1], [-0.3, -0.8, -0.1, 1.0]])
    assert selection.beside_alike(s, torch.tensor([0.5, 0.1, 0.2, 0.3])).tolist() == [0, 2, 3, 1]


# What is kept, and why


def test_ours_is_what_condense_returns():
    seen = some()
    kept = selection.keep_tokens("condensevlm", seen, 32)
    for found, expected in zip(kept.condensed, condense(seen.features, seen.scores, 32, grid=GRID), strict=True):
        assert torch.equal(found, expected)
    assert (len(kept.anchors), len(kept.background)) == split_budget(TOKENS, 32)


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_choice_does_not_change_between_calls(method):
    seen = some()
    first, again = (selection.keep_tokens(method, seen, 24, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.condensed, again.condensed, strict=True))


def test_pooling_takes_the_next_smaller_product():
    seen = some((5, 7))
    assert selection.fitting("pooling", 13, (5, 7)) == 12
    assert selection.keep_tokens("pooling", seen, 13).size == 12
    assert selection.keep_tokens("topk", seen, 13).size == 13


@pytest.mark.parametrize("kind", ["random", "clustered", "ties", "duplicates", "negative"])
@pytest.mark.parametrize("suppression", [1.0, 0.25, 0.0])
def test_the_highest_score_of_each_step_is_the_pick(kind, suppression):
    inputs = make_inputs(kind, num_tokens=40, suppression=suppression)
    stages = inputs.run_stages()
    tiers = reasons.reasons(stages, inputs)
    for name, order in (("anchors", stages.anchors[0]), ("background", stages.background[0])):
        tier = tiers[name]
        assert torch.equal(tier.order, order)
        best = tier.scores.masked_fill(~tier.open, -torch.inf).argmax(dim=1)  # of equal ones the first, as the contract
        assert torch.equal(best, order)


def test_a_reason_names_the_most_similar_pick_before():
    inputs = make_inputs("clustered", num_tokens=40)
    stages = inputs.run_stages()
    s = stages.s[0]
    for tier in reasons.reasons(stages, inputs).values():
        told, order = tier.told(), tier.order.tolist()
        for token in range(40):
            before = order[: order.index(token)] if token in order else order[:-1]
            if not before:
                assert told["suppressor"][token] == -1 and told["score"][token] == tier.utility[token]
                continue
            most = max(s[token, pick] for pick in before)
            assert told["suppressor"][token] in before
            assert told["likeness"][token] == most == s[token, told["suppressor"][token]]
            assert told["score"][token] == tier.utility[token] - most
            if token not in order:
                assert told["score"][token] <= told["score"][order[-1]] or not tier.open[-1, token]


# The page


def test_the_page_says_what_the_operators_return(capsys, tmp_path, folder, picture):
    page, seed = tmp_path / "out.html", 4
    given = ["--model", folder, "--image", picture, "--output", tmp_path / "out.png", "--html", page, "--seed", seed]
    methods = ["condensevlm", "topk", "random_merge", "pooling"]
    status, out, err = run(capsys, "show", *given, "--methods", *methods)
    assert status == 0, err
    assert str(page) in out
    data = data_of(page)
    seen, _ = show.source(show_arguments(folder, picture))
    assert [data["name"], data["grid"], len(data["scores"])] == ["a <picture>.png", [12, 12], TOKENS]
    assert [cell["size"] for cell in data["methods"][0]["cells"]] == [4, 8, 12, 16, 24, 32, 40, 48, 72, 96, 120, 144]
    assert [method["name"] for method in data["methods"]] == methods
    for method in data["methods"]:
        for cell in method["cells"]:
            kept = selection.keep_tokens(method["name"], seen, cell["size"], seed)
            assert cell["kept"] == kept.indices
            if method["merges"]:
                assert cell["near"] == kept.condensed.indices[0][kept.condensed.assignment[0]].tolist()
    for cell in data["methods"][0]["cells"]:
        stages = selection.keep_tokens("condensevlm", seen, cell["size"]).stages
        assert cell["anchors"] == stages.anchors[0].tolist() and cell["background"] == stages.background[0].tolist()
        assert set(cell["tiers"]) == {"anchors", "background"}
        for name, tier in cell["tiers"].items():
            exact = reasons.reasons(stages, selection.keep_tokens("condensevlm", seen, cell["size"]).inputs)[
                name
            ].told()
            assert tier["suppressor"] == exact["suppressor"].tolist()
            assert tier["score"] == pytest.approx(exact["score"].tolist(), abs=1e-4)
    cosine = seen.cosines()
    near = data["methods"][1]["cells"][3]
    for i in range(TOKENS):
        assert near["like"][i] == pytest.approx(float(cosine[i, near["near"][i]]), abs=1e-4)


def show_arguments(folder, picture):
    from condense_kernels.__main__ import build_parser

    return build_parser().parse_args(["show", "--model", str(folder), "--image", str(picture)])


def test_the_page_refers_to_nothing_outside(tmp_path):
    page = write_page(tmp_path)
    content = page.read_text("utf-8")
    content, pictures = re.subn(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", content)
    assert pictures == 1
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(", content)
    assert page.stat().st_size < 2_000_000
    assert data_of(page)["name"] == "</script><b>"  # a name is data, and ends nothing


def write_page(tmp_path, methods=("condensevlm", "topk", "pooling")):
    seen = some()._replace(name="</script><b>")
    budgets = selection.budgets_of(TOKENS)
    found = {m: {k: selection.Cell(selection.keep_tokens(m, seen, k)) for k in budgets} for m in methods}
    show_page.write_page(tmp_path / "page.html", seen, found, show.Answers(None, None, 0))
    return tmp_path / "page.html"


# Models and pictures


def asked_about(folder, scene) -> sources.Answering:
    loaded, processor = checkpoint.load(str(folder))
    return sources.Answering(loaded, processor, scene, inputs_of("tiny", loaded, processor, scene, QUESTION))


def test_an_answer_is_apply_condenses(folder):
    asked = asked_about(folder, sources.scene(1))
    seen, on_all = asked.seen("scene"), asked.answer()
    assert seen.grid == GRID
    kept = selection.keep_tokens("condensevlm", seen, 16)
    with apply_condense(asked.model, 16):
        expected = asked.answer()
    assert asked.answer_on(kept, 0) == expected
    assert asked.answer_on(selection.keep_tokens("topk", seen, TOKENS), 0) == on_all != ""


def test_a_random_answer_is_on_the_tokens_that_are_drawn(folder):
    asked, results = asked_about(folder, sources.scene(1)), []
    kept = selection.keep_tokens("random_merge", asked.seen("scene"), 16, seed=9)
    asked.answer = lambda: asked.model(**asked.inputs)
    projector = asked.model.model.multi_modal_projector
    hook = projector.register_forward_hook(lambda module, args, output: results.append(output))
    with torch.no_grad(), hook:
        asked.answer_on(kept, 9)
        expected = projector(kept.condensed.merged)
    assert torch.equal(results[0], expected)


def test_the_picture_is_what_the_encoder_sees(folder):
    scene = sources.scene(1)
    seen = asked_about(folder, scene).seen("scene")
    torch.testing.assert_close(seen.picture, sources.as_pixels(scene), atol=0.004, rtol=0)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "mistral3", "gemma4", "idefics3", "internvl"])
def test_any_family_is_seen(name):
    """Of several crops or tiles the first; packed pixels are not unpacked."""
    case, picture = zoo.case(name), Image.new("RGB", (30, 20))
    inputs = case.inputs(((0,),))
    processor = SimpleNamespace(image_processor=None)
    found = []

    def all_tokens(features, scores, keep, grid):
        found.append((features, scores, grid))
        return condense(features, scores, keep, grid=grid)

    with apply_condense(case.model, 1.0, method=all_tokens):
        case.model(**inputs)
    seen = sources.Answering(case.model, processor, picture, inputs).seen("it")
    features, scores, grid = found[0]
    assert torch.equal(seen.features, features[:1]) and torch.equal(seen.scores, scores[:1])
    assert seen.grid == tuple(grid)[-2:] and seen.grid[0] * seen.grid[1] == seen.tokens
    assert seen.picture.shape[2] == 3
    assert selection.keep_tokens("condensevlm", seen, 2).size == 2


@pytest.mark.slow
def test_dinov2_is_shown(capsys, tmp_path):
    status, _, err = run(capsys, "show", "--model", "dinov2", "--methods", "topk", "--output", tmp_path / "out.png")
    assert status == 0, err
    seen = sources.seen_by_dinov2(photographs.PHOTOGRAPHS[1].path)
    assert (seen.grid, seen.tokens, seen.name) == ((24, 24), 576, "astronaut.png")
    assert 0 < float(seen.scores.sum()) < 1  # of [CLS]' attention, what is not its own


def text_only(tmp_path):
    width = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    LlamaForCausalLM(LlamaConfig(**width)).save_pretrained(tmp_path / "text")
    return tmp_path / "text"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "no-such-picture.png"], "no such file: no-such-picture.png"),
        (["--image", __file__], "not a picture that Pillow can read"),
        (["--methods", "topk", "maxmn"], "--methods: expected some of condensevlm, topk, .*did you mean 'maxmin'"),
        (["--output", "show.jpg"], "--output: expected a name that ends in .png"),
        (["--output", "no/such/folder/show.png"], "--output: no such folder"),
        (["--html", "show.png"], "--html: expected a name that ends in .html"),
        (["--html", "no/such/folder/show.html"], "--html: no such folder"),
        (["--model", "no-such-folder", "--image", "PICTURE"], "expected 'tiny' or a directory with config.json"),
        (["--model", "TEXT", "--image", "PICTURE"], "expected a model with images and its processor"),
        (["--model", "MODEL"], "--image: needed with --model"),
        (["--model", "dinov2", "--question", "why"], "--question: DINOv2 answers none. Remedy"),
        (["--model", "MODEL", "--image", "PICTURE", "--output", "FOLDER"], "--output: expected a file, got a folder"),
        (["--model", "MODEL", "--image", "PICTURE", "--output", "OUT", "--html", "PAGES"], "--html: expected a file"),
    ],
)
def test_show_tells_a_mistake_in_one_line(capsys, tmp_path, folder, picture, arguments, words):
    named = {"PICTURE": picture, "MODEL": folder, "FOLDER": tmp_path / "dir.png", "PAGES": tmp_path / "dir.html",
             "OUT": tmp_path / "out.png"}  # fmt: skip
    named["FOLDER"].mkdir()
    named["PAGES"].mkdir()
    if "TEXT" in arguments:
        named["TEXT"] = text_only(tmp_path)
    methods = [] if "--methods" in arguments else ["--methods", "topk"]
    status, _, err = run(capsys, "show", *(named.get(word, word) for word in arguments), *methods)
    assert status == 2
    last = err.splitlines()[-1]
    assert last.startswith("python -m condense_kernels show: error: ") and re.search(words, last), err


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, "show")
    assert status == 2
    assert err.startswith("python -m condense_kernels show needs transformers: pip install")
