"""python -m condense_kernels: demo, check, env."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import SAFE_PATH
from rich.console import Console
from rich.table import Table

from condense_kernels import __main__, __version__, testing
from condense_kernels._dispatch import backends, environment
from condense_kernels.cli import check, demo, env, methods, patches, photographs, print_table, start, tables
from condense_kernels.testing import inputs

CPP_OR_REFERENCE = "reference" if backends.unavailable("cpp", torch.device("cpu")) else "cpp"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = __main__.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def quick_demo(monkeypatch):
    """Few random draws, and no timing of the slow reference."""
    monkeypatch.setattr(methods, "RANDOM_SEEDS", 3)
    monkeypatch.setattr(demo, "BACKENDS", (CPP_OR_REFERENCE, "triton"))


@pytest.fixture
def picture(tmp_path):
    """Portrait, 16 levels of grey, with a transparent corner."""
    path = tmp_path / "a picture [1].png"
    levels = torch.arange(90 * 60).reshape(90, 60) % 16 * 17
    image = Image.fromarray(levels.to(torch.uint8).numpy()).convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 20, 30, 40))
    image.save(path)
    return path


# demo


def test_demo_writes_a_png_and_prints_the_numbers(capsys, tmp_path, picture, quick_demo):
    output = tmp_path / "out.png"
    status, out, err = run(capsys, "demo", picture, "--grid", 6, "--keep", 9, "--output", output)
    assert status == 0, err
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert image.height > 700
    assert "a picture [1].png" in out
    for words in ("anchors", "background", "redundancy", "PSNR", "pooling, 3 x 3", "top-k by score", "random (mean of"):
        assert words in out
    assert "distance from the mean patch" in out  # which saliency it is
    assert "beat" in out  # who beats whom is said
    assert "median ms" in out
    assert "interpreter, not timed" in out or "not here: " in out  # there is no GPU time without a GPU


def test_demo_numbers_several_pictures(capsys, tmp_path, picture, quick_demo):
    status, *_ = run(capsys, "demo", picture, picture, "--grid", 4, "--keep", "0.25", "--output", tmp_path / "two.png")
    assert status == 0
    assert (tmp_path / "two-1.png").is_file()
    assert (tmp_path / "two-2.png").is_file()
    assert not (tmp_path / "two.png").exists()


def test_demo_tells_a_broken_picture_before_it_draws_another(capsys, tmp_path, picture):
    output = tmp_path / "two.png"
    status, out, _ = run(capsys, "demo", picture, __file__, "--grid", 4, "--keep", 4, "--output", output)
    assert (status, out) == (2, "")
    assert not (tmp_path / "two-1.png").exists()


def test_demo_brings_its_picture():
    assert patches.open_picture(photographs.HOPPER.path, 28).shape == (28, 28, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0"], "ratio in (0, 1]"),
        (["--keep", "577"], "keep: expected 1 <= keep <= 576"),
        (["--keep", "1.5"], "ratio in (0, 1]"),
        (["--keep", "many"], "a count or a ratio"),
        (["--background-ratio", "2"], "--background-ratio: expected a number from 0 to 1, got '2'"),
        (["--grid", "0"], "--grid"),
        (["--output", "demo.jpg"], "ends in .png"),
        (["--output", "no/such/folder/demo.png"], "no such folder"),
        (["--device", "toaster"], "expected cpu or cuda"),
        (["no-such-picture.png"], "no such file: no-such-picture.png"),
        ([__file__], "not a picture that Pillow can read"),
    ],
)
def test_demo_tells_a_mistake_in_one_line(capsys, arguments, words):
    status, out, err = run(capsys, "demo", *arguments)
    assert status == 2
    assert out == ""
    assert words in err
    assert err.startswith("python -m condense_kernels demo: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "package", "name"),
    [("demo", "matplotlib", "matplotlib"), ("demo", "PIL", "pillow"), ("check", "rich", "rich")],
)
def test_a_missing_package_is_named(capsys, monkeypatch, command, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = run(capsys, command)
    assert status == 2
    assert err == f"python -m condense_kernels {command} needs {name}: pip install {name}\n"


@pytest.mark.parametrize(
    ("mode", "size"),
    [("L", (50, 9)), ("1", (20, 20)), ("P", (3, 5)), ("RGBA", (30, 70)), ("I;16", (40, 40)), ("CMYK", (8, 8))],
)
def test_every_kind_of_picture_is_read(tmp_path, mode, size):
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.new(mode, size, 1 if mode in ("1", "P") else None).save(path)
    picture = patches.open_picture(path, 56)
    assert picture.shape == (56, 56, 3)
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() <= picture.max() <= 1


def test_sixteen_bits_keep_their_levels(tmp_path):
    path = tmp_path / "ramp.png"
    ramp = torch.linspace(0, 65535, 56).expand(56, 56).to(torch.int32).numpy().astype("uint16")
    Image.fromarray(ramp).save(path)
    picture = patches.open_picture(path, 56)
    assert picture[0, :, 0].diff().min() > 0
    assert picture.max() > 0.98


def test_patches_go_together_again():
    picture = torch.rand(42, 42, 3)
    assert torch.equal(patches.put_together(patches.cut(picture), 3), picture)


def test_a_picture_of_one_colour_has_no_score_and_no_direction():
    inputs = patches.make_inputs(torch.full((42, 42, 3), 0.3), 2, 1)
    assert torch.count_nonzero(inputs.keys) == 0
    assert inputs.scores.max() < 1e-6


@pytest.mark.parametrize(
    ("keep", "side", "blocks"),
    [(64, 24, (8, 8)), (192, 24, (12, 16)), (1, 24, (1, 1)), (61, 24, (6, 10)), (576, 24, (24, 24))],
)
def test_pooling_comes_near_to_the_budget(keep, side, blocks):
    assert methods.pooling_blocks(keep, side) == blocks


def test_methods_share_budget_and_stages():
    inputs = patches.make_inputs(torch.rand(84, 84, 3, generator=torch.Generator().manual_seed(0)), 6, 3)
    steps = []
    rows = methods.compare_methods(inputs, "auto", steps.append)
    assert len(steps) == methods.METHOD_STEPS
    ours, top, pooled, random = rows
    assert [row.result.size for row in rows] == [9, 9, 9, 9]
    whole = inputs.run()
    assert sorted(ours.result.anchors + ours.result.background) == whole.indices[0].tolist()
    assert torch.equal(ours.result.merged, whole.merged[0])
    assert top.result.kept == sorted(inputs.scores[0].topk(9).indices.tolist())
    assert torch.equal(pooled.result.assignment.bincount(), torch.full((9,), 4))
    block = [0, 1, 6, 7]
    torch.testing.assert_close(pooled.result.merged[0], inputs.features[0, block].mean(dim=0))
    torch.testing.assert_close(pooled.result.keys[0], inputs.keys[0, block].mean(dim=0))
    assert len(random.spread) == methods.RANDOM_SEEDS


def test_quality_by_hand():
    inputs = patches.make_inputs(torch.rand(28, 28, 3, generator=torch.Generator().manual_seed(0)), 1, 0)
    x = inputs.features[0]
    merged = torch.stack([x[0], x[1] + 0.1])
    keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # cosines 0.8, 0, 0.6
    result = methods.Result(merged[:2], torch.tensor([0, 1, 1, 0]), [], [], [], keys)
    quality = methods.measure(result, inputs)
    error = torch.stack([x[0] - x[0], merged[1] - x[1], merged[1] - x[2], x[0] - x[3]])
    assert quality.redundancy == pytest.approx(1 / 3)
    assert quality.rmse == pytest.approx(float(error.square().mean().sqrt()))
    assert quality.psnr == pytest.approx(-20 * torch.tensor(quality.rmse).log10().item(), abs=1e-4)


def test_the_verdict_names_who_is_better():
    def row(title, psnr):
        return methods.Row(title, None, methods.Quality(0.1, 0.1, psnr, psnr))

    rows = [row("select_and_merge", 10.0), row("top-k by score", 9.0), row("pooling, 8 x 8", 11.0)]
    assert "pooling beats it on PSNR" in tables.verdict(rows)
    assert "none beats it on redundancy" in tables.verdict(rows)
    rows.append(row("random (median of 20)", 12.0))
    assert "pooling and random beat it on PSNR" in tables.verdict(rows)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_no_table_loses_a_number_on_a_narrow_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    table = Table("method", "PSNR dB", "detail dB", title="a title of several words that may be broken")
    table.add_row("random (mean of 20)", "123.456789", "987.654321")
    print_table(console, table)
    assert {"123.456789", "987.654321"} <= set(console.file.getvalue().split())
    assert console.width == width


# check


@pytest.fixture
def small_check(monkeypatch):
    """Two cases, on one backend, so that it is quick on any machine."""
    cases = [check.Case(kind, {"kind": kind, "num_tokens": 12}, (torch.float32,)) for kind in ("clustered", "masked")]
    monkeypatch.setattr(check, "make_cases", lambda quick: cases)
    monkeypatch.setattr(check, "find_backends", lambda: ([check.Backend(CPP_OR_REFERENCE, "cpu")], []))


def test_check_is_green(capsys, small_check):
    status, out, _ = run(capsys, "check")
    assert status == 0
    assert "clustered" in out
    assert "2 checks, 0 wrong" in out


def test_check_without_a_fast_backend_says_so(capsys, monkeypatch, small_check):
    monkeypatch.setattr(check, "find_backends", lambda: ([], ["cpp is not checked: no compiler."]))
    status, out, _ = run(capsys, "check", "--quick")
    assert status == 0
    assert "No fast backend is here" in out
    assert "no compiler" in out


def wrong_merge(features, scores, indices, assignment, **options):
    merged, mass = REAL["merge"](features, scores, indices, assignment, **options)
    return merged * 1.001, mass


def wrong_assign(s, indices, **options):
    return REAL["assign"](s, indices, **{**options, "spatial_weight": 0.0})


def wrong_select(s, prior, k, **options):
    return REAL["greedy_select"](s, prior, k, **{**options, "suppression": 0.0})


def wrong_similarity(keys, *rest, **options):
    return REAL["similarity"](keys.bfloat16(), *rest, **options)


REAL = {name: getattr(inputs, name) for name in ("similarity", "greedy_select", "assign", "merge")}
WRONG = {"similarity": wrong_similarity, "greedy_select": wrong_select, "assign": wrong_assign, "merge": wrong_merge}


@pytest.mark.parametrize("stage", WRONG)
def test_check_finds_a_wrong_backend(capsys, monkeypatch, small_check, stage):
    """Flagship and stages are wrong alike, so that it is the comparison with the reference which has to notice."""
    monkeypatch.setattr(inputs, stage, WRONG[stage])
    monkeypatch.setattr(testing.Inputs, "run", lambda inputs, backend="auto": inputs.run_stages(backend).condensed)
    status, out, _ = run(capsys, "check")
    assert status == 1
    assert "NO" in out


def test_check_finds_a_flagship_that_is_not_its_stages(capsys, monkeypatch, small_check):
    run_real = testing.Inputs.run
    monkeypatch.setattr(testing.Inputs, "run", lambda inputs, backend: run_real(inputs, backend)._replace(
        mass=run_real(inputs, backend).mass.nextafter(torch.tensor(9.0))))  # fmt: skip
    status, out, _ = run(capsys, "check")
    assert status == 1
    assert "mass: the stages in a row" in out


def test_check_reports_a_kernel_that_fails_and_goes_on(capsys, monkeypatch, small_check):
    def broken(inputs, backend):
        raise RuntimeError("kernel image\nsecond line")

    monkeypatch.setattr(testing.Inputs, "run", broken)
    status, out, _ = run(capsys, "check")
    assert status == 1
    assert "RuntimeError: kernel image" in out
    assert "2 checks, 2 wrong" in out


def test_check_covers_what_it_says():
    names = {case.name for case in check.make_cases(quick=False)}
    assert set(testing.KINDS) <= names
    assert any("N=729" in name for name in names)
    assert len(check.make_cases(quick=True)) < len(names) / 2
    small = check.Case("large", {"num_tokens": 576}, ())
    assert not check.runs_on(small, torch.float32, check.Backend("triton", "cpu"))
    assert check.runs_on(small, torch.float32, check.Backend("triton", "cuda"))
    assert not check.runs_on(small, torch.float64, check.Backend("triton", "cuda"))


# env


def test_env_describes_the_machine(capsys):
    status, out, _ = run(capsys, "env")
    assert status == 0
    for words in (__version__, torch.__version__, "compiled library", "simd", "gpu driver"):
        assert words in out
    rows = dict(env.facts())
    for backend in backends.BACKENDS[1:]:
        reason = backends.unavailable(backend, torch.device("cpu"))
        assert rows[f"{backend} on cpu"] == ("available" if reason is None else f"no: {reason}")


def test_env_lists_the_variables_that_are_set(monkeypatch):
    for name in (*environment.VARIABLES, *environment.OF_OTHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONDENSE_STORED_TOKENS", "77")
    monkeypatch.setenv("CXX", "clang++")
    assert env.facts()[-2:] == [("CONDENSE_STORED_TOKENS", "77"), ("CXX", "clang++")]


def test_env_says_why_there_is_no_library(monkeypatch):
    monkeypatch.setattr(env.library, "cpp_unavailable", lambda: "it was not built")
    rows = dict(env.facts())
    assert rows["compiled library"] == "none: it was not built"
    assert "it was not built" in rows["cpp on cpu"]


def test_env_for_programs(capsys):
    status, out, _ = run(capsys, "env", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["torch"] == torch.__version__
    assert isinstance(found["cpu"]["threads"], int)
    assert found["library"]["loaded"] is (found["library"]["reason"] is None)
    reason = backends.unavailable("cpp", torch.device("cpu"))
    assert found["backends"]["cpu"]["cpp"] == {"available": reason is None, "reason": reason}
    assert isinstance(found["gpus"], list)


KEYS = {
    **dict.fromkeys(("condense_kernels", "torch", "triton", "numpy", "transformers", "python", "system")),
    **dict.fromkeys(("cuda", "rocm", "driver", "triton_interpreter", "variables")),
    "cpu": dict.fromkeys(("model", "simd", "cores", "usable", "threads")),
    "gpus": dict.fromkeys(("name", "capability", "memory")),
    "library": dict.fromkeys(("loaded", "reason", "capability")),
    "backends": dict.fromkeys(("available", "reason")),
}


def test_the_keys_of_env_for_programs_stay(capsys, monkeypatch):
    """A key that is gone, or has another name, breaks somebody's program; a new one is added here and on the page."""
    gpu = SimpleNamespace(name="some", major=9, minor=0, total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = env.record()
    assert set(found) == set(KEYS)
    assert set(found["cpu"]) == set(KEYS["cpu"])
    assert set(env.gpu_record(0)) == set(KEYS["gpus"])
    assert set(found["library"]) == set(KEYS["library"])
    for of_device in found["backends"].values():
        assert set(of_device) == set(backends.BACKENDS[1:])
        assert all(set(of_backend) == set(KEYS["backends"]) for of_backend in of_device.values())
    page = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()
    table = [line.split("|") for line in page.partition("## env --json")[2].splitlines() if line.startswith("| `")]
    assert {name for row in table for name in re.findall("`(\\w+)`", row[1])} == set(KEYS)
    told = {name: set(re.findall("`(\\w+)`", row[2])) for row in table for name in re.findall("`(\\w+)`", row[1])}
    assert all(told[name] == set(inner) for name, inner in KEYS.items() if inner)


# the program


def test_every_command_has_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in __main__.COMMANDS:
        assert command in out
        status, text, _ = run(capsys, command, "--help")
        assert status == 0
        assert len(text) > 100
        assert f"example:\n  python -m condense_kernels {command} " in text


def test_without_a_command_it_shows_what_there_is(capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert __version__ in out
    assert "https://" in out
    assert {name for group in start.GROUPS.values() for name in group} == set(__main__.COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("example", [e for group in start.GROUPS.values() for _, e in group.values()])
def test_the_examples_of_the_screen_are_understood(example):
    assert __main__.build_parser().parse_args(example.split()).command == example.split()[0]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["show --html show.html", "compare-answers --keep 32", "check --quick"])
def test_an_example_runs_as_it_stands(example, tmp_path):
    """Those that take no picture of the user's, no other extra and at most a minute."""
    command = [sys.executable, *SAFE_PATH, "-m", "condense_kernels", *example.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and "\x1b" not in done.stdout + done.stderr  # no colours in a pipe, and no bars


def test_a_terminal_without_signs_of_its_own():
    command = [sys.executable, *SAFE_PATH, "-m", "condense_kernels", "compare", "--help"]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "An error (?)" in done.stdout


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"condense_kernels {__version__}\n", "")


def test_env_runs_as_a_program_without_the_extra():
    """Nothing of the extra "cli" is imported before a command asks for it."""
    blocked = "import sys\nfor name in ('rich', 'matplotlib', 'PIL', 'einops'):\n    sys.modules[name] = None\n"
    code = blocked + "from condense_kernels.__main__ import main\nsys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
