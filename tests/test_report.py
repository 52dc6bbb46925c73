"""python -m condense_kernels report: formulas against the papers, counts against formulas, and what it prints."""

import copy
import csv
from types import SimpleNamespace

import pytest
import torch
import zoo
from PIL import Image
from test_cli import run
from torch.utils.flop_counter import FlopCounterMode

import condense_kernels as ck
from condense_kernels.cli import checkpoint, report_figure, report_table
from condense_kernels.models import efficiency, formulas, timing
from condense_kernels.models.efficiency import Counts, Row, Side, Times
from condense_kernels.models.methods import BASELINES
from condense_kernels.ops.select_and_merge import Condensed
from condense_kernels.tiny_llava import model as tiny_llava
from condense_kernels.tiny_llava import train

FAMILIES = ["llava", "llava_next", "qwen2_vl", "gemma3", "internvl"]


class Processor:
    """Of a family of the zoo: any picture is image 0, any question the zoo's."""

    image_token = "<image>"

    def __init__(self, name: str) -> None:
        self.case = zoo.case(name)
        self.asked: list[str] = []

    def __call__(self, images, text, return_tensors):
        assert len(images) == len(text) == 1 and return_tensors == "pt"
        self.asked += text
        return Moved(self.case.inputs(((0,),)))


class Moved(dict):
    def to(self, device, dtype):
        return self


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA that knows nothing yet."""
    path = tmp_path_factory.mktemp("models") / "untrained"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train.save(tiny_llava.untrained(), path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(path)
    return path


def read(path) -> tuple[dict[str, str], list[dict[str, str]]]:
    lines = path.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return about, list(csv.DictReader(line for line in lines if not line.startswith("#")))


# Formulas


@pytest.mark.parametrize(("kept", "percent"), [(192, 32.7), (128, 21.7), (64, 10.8)])
def test_flops_of_llava(kept, percent):
    known = formulas.KNOWN["llava-1.5-7b"]
    assert round(100 * formulas.flops_left(known.decoder, known.tokens, kept), 1) == percent


def test_flops_and_cache_of_llava_next():
    """Table 7 has 1512.1 and 168.0 MB, 0.14 % more than keys and values of fp16 are: docs/report.md."""
    known = formulas.KNOWN["llava-next-7b"]
    assert round(100 * formulas.flops_left(known.decoder, 2880, 320), 1) == 9.8
    for tokens, ours in ((2880, 1509.9), (320, 167.8)):
        megabytes = formulas.kv_bytes(known.decoder, tokens) / 1e6
        assert round(megabytes, 1) == ours
        assert float(known.printed[tokens].kv_mb) / megabytes == pytest.approx(1.0014, abs=3e-4)


def test_flops_are_the_products_of_a_layer():
    """Multiply-adds of projections, of both products of attention, and of a feed-forward network of two matrices."""
    n, d, m, layers = 7, 16, 40, 3
    x, up = torch.randn(n, d), torch.randn(d, m)
    with FlopCounterMode(display=False) as counter:
        for _ in range(4):
            x @ torch.randn(d, d)
        x @ x.T @ x @ up @ up.T
    decoder = formulas.Decoder(layers, d, m, d)
    assert 2 * formulas.flops(decoder, n) == layers * counter.get_total_flops()


def test_a_decoder_from_a_config():
    assert formulas.Decoder.of(zoo.case("llava").model.config) == formulas.Decoder(2, 64, 64, 2 * 16)
    with pytest.raises(ValueError, match="config: expected num_hidden_layers, .*Remedy"):
        formulas.Decoder.of(SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64)))


# Counts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_is_what_the_formula_says(name):
    case = zoo.case(name)
    inputs = case.inputs(((0,),))
    rows = efficiency.measure(case.model, [inputs], [Side(), Side("condensevlm", 0.5), Side("pooling", 4)], 2, 1)
    decoder = formulas.Decoder.of(case.model.config)
    prompt = inputs["input_ids"].shape[1]
    images = int((inputs["input_ids"] == zoo.IMAGE).sum())
    kept = zoo.CROP // 2 * len(case.inputs(((0,),))["pixel_values"][0]) if name == "llava_next" else images // 2
    assert [row.counts[0].visual for row in rows[:2]] == [images, kept]
    for row in rows:
        (count,) = row.counts
        assert count.prompt == prompt - images + count.visual
        assert count.kv_bytes == formulas.kv_bytes(decoder, count.prompt, itemsize=4)
    assert not hasattr(case.model, "condense_handle")


def test_states_of_linear_attention_are_in_the_cache():
    """Two layers of four have no keys and values, but a window of 4 and a matrix a head, however long the prompt is."""
    case = zoo.case("qwen3_5")
    rows = efficiency.measure(case.model, [case.inputs(((0,),))], [Side(), Side("topk", 4)], 1, 1)
    decoder = formulas.Decoder.of(case.model.config)
    for row in rows:
        (count,) = row.counts
        states = 2 * 4 * (128 * 4 + 4 * 16 * 16)
        assert count.kv_bytes == formulas.kv_bytes(decoder, count.prompt, itemsize=4) // 2 + states


def test_flops_counted_and_by_formula():
    """Llama's feed-forward network has a third matrix, and the counter takes a multiply-add for two."""
    model = tiny_llava.untrained().eval()
    inputs = {"input_ids": torch.tensor([[1, *[model.config.image_token_id] * 144, 7, 8]])}
    inputs |= {"pixel_values": torch.randn(1, 3, 96, 96), "attention_mask": torch.ones(1, 147, dtype=torch.long)}
    sides = [Side(), Side("condensevlm", 16), Side("topk", 16)]
    everything, ours, top = (row.counts[0] for row in efficiency.measure(model, [inputs], sides, 2, 1))
    decoder = formulas.Decoder.of(model.config)
    for count in (everything, ours, top):
        third = decoder.layers * count.prompt * decoder.width * decoder.hidden
        angles = count.decoder_flops - 2 * (formulas.flops(decoder, count.prompt) + third)
        assert angles in (0, 2 * count.prompt * 12)  # of positions, which transformers 5.18 makes by a product
        assert count.flops > count.decoder_flops
    with FlopCounterMode(display=False) as counter:
        ck.condense(torch.randn(1, 144, 96), torch.rand(1, 144), 16, grid=(12, 12))
    assert ours.operator_flops == counter.get_total_flops()
    assert (everything.operator_flops, top.operator_flops) == (0, 0)
    assert ours.flops - ours.operator_flops == top.flops


def test_what_a_method_allocates_is_in_the_peak(monkeypatch):
    case, extra = zoo.case("llava"), 50_000_000

    def wasteful(features, scores, keep, grid):
        torch.empty(extra, dtype=torch.uint8).fill_(1)
        return topk(features, scores, keep, grid)

    topk = BASELINES["topk"]
    monkeypatch.setitem(BASELINES, "maxmin", wasteful)
    sides = [Side("topk", 4), Side("maxmin", 4)]
    frugal, other = (row.counts[0] for row in efficiency.measure(case.model, [case.inputs(((0,),))], sides, 2, 1))
    weights = sum(p.numel() * 4 for p in case.model.parameters())
    assert weights < frugal.peak_bytes < weights + 5_000_000
    assert weights + extra < other.peak_bytes < weights + extra + 5_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_peak_is_the_allocators():
    model = copy.deepcopy(zoo.case("llava").model).cuda()
    inputs = {name: tensor.cuda() for name, tensor in zoo.case("llava").inputs(((0,),)).items()}
    rows = efficiency.measure(model, [inputs], [Side(), Side("condensevlm", 4)], 3, 2)
    for row in rows:
        assert row.counts[0].peak_bytes > efficiency.weight_bytes(model)
        assert 0 < row.median("first") < row.median("total")


def test_the_profiler_is_silent_and_errors_come_back(capfd):
    with pytest.raises(KeyError), efficiency.errors_to_nowhere():
        raise KeyError
    case = zoo.case("llava")
    efficiency.peak(case.model, lambda: case.model(**case.inputs(((0,),))))
    assert capfd.readouterr().err == ""


# Times


class Clock:
    """Goes on by a millisecond whenever somebody looks, so that the machine has no say in what is told."""

    seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-3
        return self.seconds


def test_a_slow_method_is_said_to_be_slow(monkeypatch):
    case, seconds, wall = zoo.case("llava"), 0.05, Clock()
    monkeypatch.setattr(efficiency, "CLOCKS", {"wall": wall, "cpu": Clock()})
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=wall))

    def slow(features, scores, keep, grid):
        wall.seconds += seconds
        return topk(features, scores, keep, grid)

    topk = BASELINES["topk"]
    monkeypatch.setitem(BASELINES, "maxmin", slow)
    rows = efficiency.measure(case.model, [case.inputs(((0,),))], [Side(), Side("maxmin", 4)], 3, 3, clock="wall")
    everything, other = rows
    for name in ("total", "first", "operator"):
        assert other.median(name) - everything.median(name) > 1e3 * seconds / 2
    for at in range(3):
        total, first, token = (other.times(name)[at] for name in ("total", "first", "token"))
        assert token > 0 and 0.8 * total < first + 2 * token <= total
    assert 0.3 < other.median("share") < 1
    assert everything.median("operator") == 0
    told = report_table.words(rows)
    assert "NOT FASTER than all tokens" in told and "in total time: maxmin at 4 (" in told
    rows = efficiency.measure(case.model, [case.inputs(((0,),))], [Side(), Side("maxmin", 4)], 1, 1, clock="cpu")
    assert rows[1].median("total") < 1e3 * seconds < rows[1].median("wall")  # asleep it takes no CPU time


def row(method: str | None, keep: int, *totals: float) -> Row:
    counts = Counts(visual=keep, prompt=keep + 5, flops=1, decoder_flops=1, operator_flops=0, kv_bytes=1, peak_bytes=1)
    runs = [[Times(total, total / 2, total / 10, total, 0.1, 0.1)] for total in totals]
    return Row(Side(method, keep), [counts], runs)


def test_words_tell_faster_from_slower_and_from_chance():
    everything = row(None, 36, 10.0, 10.1, 10.2)
    faster, slower, unclear = row("topk", 9, 5.0, 5.0, 5.1), row("random", 9, 12, 12, 12), row("random", 4, 9, 10, 11)
    told = report_table.words([everything, faster, slower, unclear])
    assert "NOT FASTER than all tokens (10.1 ms) in total time: random at 9 (12.0 ms)." in told
    assert "in total time by less than the spread: random at 4 (10.0 ms)." in told
    assert "topk" not in told
    only = report_table.words([everything, faster])
    assert only.count("Every row is faster than all tokens in") == 2


def test_medians_are_over_rounds_of_means_over_prompts():
    two = Row(Side(), runs=[[Times(*[value] * 6) for value in run] for run in ([1.0, 3.0], [5.0, 5.0], [9.0, 11.0])])
    assert two.times("total") == [2.0, 5.0, 10.0]
    assert two.median("total") == 5.0 and two.quartiles("total") == (3.5, 7.5)


def test_sides_take_turns_and_turns_at_being_first():
    order = []
    sides = {name: lambda name=name: order.append(name) or name for name in "abc"}
    found = efficiency.in_turn(sides, 4)
    assert "".join(order) == "abcbcacababc"
    assert found == {name: [name] * 4 for name in "abc"}


# The command


def test_a_folder(capsys, tmp_path, folder, picture):
    """Two pictures, every number in the file, a figure; random and pooling without being asked for."""
    arguments = ["--model", folder, "--image", picture, picture, "--keep", 16, 0.25, "--methods", "condensevlm"]
    outputs = ["--csv", tmp_path / "a.csv", "--figure", tmp_path / "a.png"]
    status, out, err = run(capsys, "report", *arguments, *outputs, "--rounds", 2, "--new-tokens", 3)
    assert status == 0, err
    for words in ("all tokens", "2 prompts", "in total time", "in time to first token", "CPU time of all threads, 1"):
        assert words in out
    about, rows = read(tmp_path / "a.csv")
    assert {"device", "dtype", "threads", "torch", "transformers"} <= set(about)
    assert about["torch"] == torch.__version__ and about["dtype"] == "float32" and about["threads"] == "1"
    assert [(line["method"], float(line["visual_tokens"])) for line in rows] == [
        ("all tokens", 144), *((name, keep) for keep in (16, 36) for name in ("condensevlm", "random", "pooling"))
    ]  # fmt: skip
    decoder = formulas.Decoder(2, 96, 192, 96)
    for line in rows:
        assert line["kv_mb"] == line["kv_prompt_mb_formula"]
        assert float(line["total_ms_q1"]) <= float(line["total_ms"]) <= float(line["total_ms_q3"])
        assert 0 < float(line["first_ms"]) < float(line["total_ms"])
        share = formulas.flops_left(decoder, 144, int(float(line["visual_tokens"])))
        assert float(line["flops_eq9_share"]) == pytest.approx(share, abs=1e-6)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family(capsys, monkeypatch, picture, name):
    processor = Processor(name)
    monkeypatch.setattr(checkpoint, "load", lambda name: (zoo.case(name).model, processor))
    arguments = ["--model", name, "--image", picture, "--keep", 4, "--rounds", 1, "--new-tokens", 1]
    status, out, err = run(capsys, "report", *arguments)
    assert status == 0, err
    assert processor.asked == ["<image> Describe the image."]
    assert all(method in out for method in ("condensevlm", "topk", "random", "pooling"))


def test_a_chat_template_is_used():
    from condense_kernels.cli.prompts import prompt_of

    class Chatty(Processor):
        chat_template = "..."

        def apply_chat_template(self, messages, add_generation_prompt):
            assert add_generation_prompt
            return f"{messages[0]['role']} {[part['type'] for part in messages[0]['content']]}"

    assert prompt_of("folder", Chatty("llava"), "what?") == "user ['image', 'text']"
    assert prompt_of("tiny", Chatty("llava"), "what is it") == "<s> <image> what is it"
    plain = Processor("llava")
    plain.boi_token = "<start>"  # Gemma 3's, in the place of which it puts all of an image's
    assert prompt_of("folder", plain, "what?") == "<start> what?"


def test_a_budget_that_pooling_cannot_have_is_told(capsys, folder, picture):
    status, out, err = run(capsys, "report", "--model", folder, "--image", picture, "--keep", 13, "--rounds", 1)
    assert status == 0, err
    assert "pooling, 13: not measured. keep: expected for pooling" in out


def test_a_method_that_fails_everywhere_is_an_error(capsys, monkeypatch, folder, picture):
    def broken(features, scores, keep, grid):
        return Condensed(features, scores, scores, scores)

    for method in ("random", "pooling"):
        monkeypatch.setitem(BASELINES, method, broken)
    arguments = ["--model", folder, "--image", picture, "--methods", "random", "--keep", 4, "--rounds", 1]
    status, _, err = run(capsys, "report", *arguments)
    assert status == 2 and "method: expected merged [1, 4, 96]" in err


def test_formulas_alone(capsys, tmp_path, folder):
    status, out, _ = run(capsys, "report", "--config-only", "--model", "llava-1.5-7b")
    assert status == 0 and all(share in out for share in ("32.7 %", "21.7 %", "10.8 %"))
    arguments = ["--config-only", "--model", "llava-next-7b", "--csv", tmp_path / "a.csv"]
    status, out, _ = run(capsys, "report", *arguments)
    assert all(number in out for number in ("9.8 %", "1509.9", "1512.1", "167.8", "168.0", "FastV 12.8 %"))
    rows = {line["visual_tokens"]: line for line in read(tmp_path / "a.csv")[1]}
    assert rows["320"]["papers_kv_mb"] == "168.0" and float(rows["320"]["kv_mb"]) == 167.77216
    for name in (folder, folder / "config.json"):
        status, out, _ = run(capsys, "report", "--config-only", "--model", name, "--keep", 48)
        assert status == 0 and "T = 2, d = 96, m = 192" in out and "27.3 %" in out
    status, out, _ = run(capsys, "report", "--config-only", "--model", folder, "--tokens", 288, "--keep", 144)
    assert status == 0 and " 288" in out and "39.3 %" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "no-such-picture.png"], "--image: no such file: no-such-picture.png"),
        (["--image", __file__], "--image: not a picture that Pillow can read"),
        (["--methods", "best"], "--methods: expected some of condensevlm, topk,"),
        (["--keep", "145"], "keep: expected 1 <= keep <= 144 tokens, got 145"),
        (["--keep", "1.5"], "ratio in (0, 1]"),
        (["--keep", "many"], "a count or a ratio"),
        (["--new-tokens", "0"], "--new-tokens: expected a whole number from 1"),
        (["--threads", "0"], "--threads: expected a whole number from 1 to 1024, got '0'"),
        (["--rounds", "0"], "--rounds: expected a whole number from 1"),
        (["--csv", "no/such/folder/a.csv"], "--csv: no such folder"),
        (["--figure", "a.jpg"], "--figure: expected a name that ends in .png"),
        (["--tokens", "3"], "--tokens: expected --config-only beside it"),
        (["--config-only", "--image", "a.png"], "--config-only: expected neither --image nor --figure"),
        (["--config-only", "--model", "gpt"], "--model gpt: expected llava-1.5-7b, llava-next-7b, tiny,"),
        (["--config-only", "--model", "llava-1.5-7b", "--keep", "577"], "keep: expected 1 <= keep <= 576"),
        (["--model", "no-such-folder"], "--model no-such-folder: expected 'tiny' or a directory"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys, folder, picture, arguments, words):
    given = ("--model", folder), ("--image", picture)
    wanted = [] if "--config-only" in arguments else [pair for pair in given if pair[0] not in arguments]
    rest = [part for pair in wanted for part in pair]
    status, out, err = run(capsys, "report", *rest, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.splitlines()[-1].startswith("python -m condense_kernels report: error: ")


def test_a_picture_is_needed_and_a_model_that_takes_it(capsys, monkeypatch, folder, picture):
    status, _, err = run(capsys, "report", "--model", folder)
    assert status == 2 and "--image: expected a picture or several, got none" in err
    text = zoo.case("llava").model.model.language_model
    monkeypatch.setattr(checkpoint, "load", lambda name: (text, Processor("llava")))
    status, _, err = run(capsys, "report", "--model", folder, "--image", picture)
    assert status == 2 and "model: expected one that takes images" in err


def test_tiny_has_a_picture_of_its_own():
    from condense_kernels.cli.report import default_picture

    assert default_picture("tiny").size == (96, 96)


def test_ticks_that_would_run_into_each_other_are_left_out():
    assert report_figure.apart({13, 14, 32, 48}, 4) == [48, 32, 14]
