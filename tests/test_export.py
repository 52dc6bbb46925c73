"""torch.export, and AOTInductor from a C++ program without Python: one node, open sizes, the bits of eager."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
BATCH, HEIGHT, WIDTH, TOKENS = Dim("batch"), Dim("height", min=3), Dim("width", min=3), Dim("tokens", min=6)


class OnGrid(torch.nn.Module):
    """With neighbours for AOTInductor to fuse, whose rounding does not depend on how it does that."""

    def forward(self, planes, scores):  # [B, H, W, D], [B, H, W]
        grid = planes.shape[1:3]
        merged, *rest = ck.select_and_merge(2 * planes.flatten(1, 2), scores.flatten(1), 4, 2, grid=grid)
        return 4 * merged, *rest


class OnPositions(torch.nn.Module):
    def forward(self, features, scores, positions):
        return tuple(ck.condense(features, scores, keep=6, positions=positions))


class Ratio(torch.nn.Module):
    def forward(self, features, scores, positions):
        return tuple(ck.condense(features, scores, keep=0.25, positions=positions))


class Packed(torch.nn.Module):
    def forward(self, features, scores, positions, *budget):
        return tuple(ck.select_and_merge_varlen(features, scores, *budget, positions=positions))


class PackedThreeEach(torch.nn.Module):
    """No ints among the arguments, which a package takes as tensors: they follow from shapes."""

    def forward(self, features, scores, positions, *offsets):
        total_keep, max_seqlen = 3 * (offsets[0].shape[0] - 1), features.shape[0]
        return tuple(
            ck.select_and_merge_varlen(features, scores, *offsets, total_keep, max_seqlen, positions=positions)
        )


def planes(batch: int, height: int, width: int) -> tuple:
    return torch.randn(batch, height, width, 8), torch.rand(batch, height, width)


def tokens(batch: int, count: int) -> tuple:
    return torch.randn(batch, count, 8), torch.rand(batch, count), torch.rand(count, 2)


def packed(*seqlens: int) -> tuple:
    features, scores, positions = tokens(1, sum(seqlens))
    return features[0], scores[0], positions, *ck.varlen_budget(seqlens, keep=3)


def packed_three_each(*seqlens: int) -> tuple:
    return packed(*seqlens)[:-2]


OF_TOKENS = ({0: BATCH, 1: TOKENS}, {0: BATCH, 1: TOKENS}, {0: TOKENS})
OF_PLANES = ({0: BATCH, 1: HEIGHT, 2: WIDTH},) * 2
OFFSETS = ({0: Dim("offsets", min=2)},) * 3
OF_SEGMENTS = ({0: TOKENS}, {0: TOKENS}, {0: TOKENS}, (*OFFSETS, Dim.DYNAMIC, Dim.DYNAMIC))
CASES = {
    "grid": (OnGrid(), OF_PLANES, [planes(3, 5, 6), planes(1, 3, 3), planes(2, 9, 4)]),
    "positions": (OnPositions(), OF_TOKENS, [tokens(3, 30), tokens(1, 6), tokens(2, 31)]),
    "ratio": (Ratio(), OF_TOKENS, [tokens(3, 30), tokens(1, 6), tokens(2, 31)]),
    "packed": (Packed(), OF_SEGMENTS, [packed(10, 8, 13), packed(7, 0, 9), packed(11)]),
    "packed, three each": (
        PackedThreeEach(),
        (*OF_SEGMENTS[:3], OFFSETS),
        [packed_three_each(10, 8, 13), packed_three_each(7, 3, 9, 4), packed_three_each(11)],
    ),
}


def exported(name: str, strict: bool = False) -> torch.export.ExportedProgram:
    model, dynamic_shapes, calls = CASES[name]
    return torch.export.export(model, calls[0], dynamic_shapes=dynamic_shapes, strict=strict)


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "condense" in str(node.target)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strict", [False, True])
def test_one_node_with_open_sizes(name, strict, cpp):
    program = exported(name, strict)
    op = (
        "condense.select_and_merge_varlen.default" if name.startswith("packed") else "condense.select_and_merge.default"
    )
    assert operators(program) == [op]
    assert operators(program.run_decompositions()) == [op]
    model, _, calls = CASES[name]
    for call in calls:
        assert_same_bits(program.module()(*call), model(*call))


def test_a_size_outside_of_the_exported_range(cpp):
    with pytest.raises(AssertionError, match="Guard failed: .*>= 6"):
        exported("positions").module()(*tokens(2, 5))


def test_an_exported_program_has_gradients(cpp):
    model, _, calls = CASES["positions"]
    features = calls[0][0].clone().requires_grad_()
    of_both = [
        torch.autograd.grad(call(features, *calls[0][1:])[0].square().sum(), features)
        for call in (exported("positions").module(), model)
    ]
    assert_same_bits(*of_both)


def test_saved_and_run_by_another_process(tmp_path, cpp):
    for name in CASES:
        torch.export.save(exported(name), tmp_path / f"{name}.pt2")
    results = {name: (calls, [model(*call) for call in calls]) for name, (model, _, calls) in CASES.items()}
    torch.save(results, tmp_path / "calls.pt")
    code = """
        import sys, torch
        from pathlib import Path
        folder = Path(sys.argv[1])
        try:
            torch.export.load(folder / "grid.pt2")
        except RuntimeError:
            print("no operators")
        import condense_kernels
        from condense_kernels.testing import assert_same_bits
        for name, (calls, results) in torch.load(folder / "calls.pt").items():
            run = torch.export.load(folder / f"{name}.pt2").module()
            for call, expected in zip(calls, results, strict=True):
                assert_same_bits(run(*call), expected, name)
        print("same bits")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert done.stdout == "no operators\nsame bits\n", done.stderr
    assert "failed to resolve torch.ops.condense.select_and_merge.default" in done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """tests/aot/condense_aot.cpp, compiled."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "clang++"]
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("aot") / "condense_aot"
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = ROOT / "tests" / "aot" / "condense_aot.cpp"
    flags = ["-std=c++20", "-isystem", TORCH / "include"]
    subprocess.run([*compiler, *flags, source, "-o", path, "-Wl,--no-as-needed", *libraries], check=True)
    return path


@pytest.fixture(scope="module", params=["grid", "packed, three each"])
def package(request, tmp_path_factory) -> tuple[str, str]:
    """What was compiled, and where to."""
    path = tmp_path_factory.mktemp("aot") / "model.pt2"
    return request.param, torch._inductor.aoti_compile_and_package(exported(request.param), package_path=str(path))


def library() -> Path:
    return Path(ck.__file__).with_name("_C.abi3.so")


def run(*command, **environment: str) -> subprocess.CompletedProcess:
    """In an environment that holds nothing else."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_package_in_python(package, cpp):
    model, _, calls = CASES[package[0]]
    compiled = torch._inductor.aoti_load_package(package[1])
    for call in calls:
        assert_same_bits(compiled(*call), model(*call))


@pytest.mark.slow
def test_package_in_cpp(program, package, tmp_path, cpp):
    model, _, calls = CASES[package[0]]
    torch.save([list(call) for call in calls], tmp_path / "inputs.pt")
    done = run(program, library(), package[1], tmp_path / "inputs.pt", tmp_path / "results.pt")
    assert (done.returncode, done.stderr) == (0, "")
    for call, result in zip(calls, torch.load(tmp_path / "results.pt"), strict=True):
        assert_same_bits(result, model(*call))


@pytest.mark.slow
def test_no_python_in_that_process(program, cpp):
    """Neither the program nor the library of operators links it, or asks for one of its symbols."""
    for binary in (program, library()):
        listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
        assert "libc10.so" in listed and "libpython" not in listed and "libtorch_python" not in listed
    listed = subprocess.run(["nm", "-D", "--undefined-only", library()], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_library") for symbol in symbols)
    assert not any(symbol.startswith(("Py", "_Py")) for symbol in symbols)


@pytest.mark.slow
def test_what_a_user_sees_in_cpp(program, package, tmp_path, cpp):
    """Without the library, and with sizes that the operator refuses: a message, no crash."""
    name, path = package
    call = CASES[name][2][0]
    torch.save([list(call)], tmp_path / "inputs.pt")
    results = tmp_path / "results.pt"
    other = TORCH / "lib" / "libc10.so"
    for where, says in [
        (other, "Could not find schema for condense::select_and_merge"),
        ("none.so", "none.so: cannot"),
    ]:
        done = run(program, where, path, tmp_path / "inputs.pt", results)
        assert done.returncode == 1 and done.stderr.startswith(f"condense_aot: {says}"), done.stderr
    wrong, message = {
        "grid": (planes(1, 1, 5), "expected 1 <= K <= N = 5 tokens"),
        "packed, three each": ((*call[:-1], call[-1][1:]), "cu_background: expected shape [S+1] = [4]"),
    }[name]
    torch.save([list(wrong)], tmp_path / "inputs.pt")
    done = run(program, library(), path, tmp_path / "inputs.pt", results)
    assert done.returncode == 1 and message in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", ["grid"], indirect=True)
def test_environment_variables_in_cpp(program, package, tmp_path, cpp):
    """The library reads its own, without Python: a wrong value is an error, an empty one is not set."""
    torch.save([list(CASES[package[0]][2][0])], tmp_path / "inputs.pt")
    command = program, library(), package[1], tmp_path / "inputs.pt", tmp_path / "results.pt"
    done = run(*command, CONDENSE_STORED_TOKENS="many")
    said = "condense_aot: CONDENSE_STORED_TOKENS: expected a number of 1 to 18 digits, got 'many'. Remedy: unset"
    assert done.returncode == 1 and said in done.stderr, done.stderr
    done = run(*command, CONDENSE_STORED_TOKENS="", CONDENSE_CPU_CAPABILITY="")
    assert (done.returncode, done.stderr) == (0, "")
