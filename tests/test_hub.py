"""hub/assemble.py: both layouts, by kernels itself; what it writes on top for Python 3.9; and kernels that are loaded
beside the installed package, with its bits.
"""

import ast
import builtins
import importlib.util
import re
import runpy
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import vermin
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_forward_from_hub
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata
from kernels.layer import use_kernel_mapping
from kernels.layer.layer import _validate_layer
from kernels.variants import get_variants_local
from processes import HAS_LIBRARY, fresh, python

ROOT = Path(__file__).parent.parent
HUB = runpy.run_path(str(ROOT / "hub" / "assemble.py"))
COMPILED = HUB["CPU_VARIANT"]
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """What needs no compiler."""
    folder = tmp_path_factory.mktemp("hub") / "output"
    HUB["assemble"](folder, compiled=False)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "compiled"
    HUB["assemble"](folder)
    return folder / "repository"


# The projects of kernel-builder


def test_kernel_builder_reads_both_projects(output):
    cpu, triton = (Build.open(output / "source" / name) for name in ("cpu", "triton"))
    assert cpu.general.backends == [Backend.CPU]
    assert triton.general.backends == [Backend.CPU, Backend.CUDA]
    for name in ("cpu", "triton"):
        assert {"build.toml", "flake.nix", "CARD.md"} <= {path.name for path in (output / "source" / name).iterdir()}
        package = output / "source" / name / "torch-ext" / "condense_kernels"
        assert (package / "ops" / "merge" / "schema.txt").is_file()
        assert not (package / "_ops.py").exists()  # kernel-builder writes it


def test_the_project_names_every_source_with_the_flags_of_setup_py(output):
    project = output / "source" / "cpu"
    config = (project / "build.toml").read_text()
    sources = re.findall(r'^    "(csrc/.*)",$', config, re.MULTILINE)
    assert sorted(sources) == sorted(path.relative_to(project).as_posix() for path in (project / "csrc").iterdir())
    assert {path.name for path in (ROOT / "csrc").iterdir()} | {"schemas.h"} == {Path(s).name for s in sources}
    flags = re.findall(r'^    "(-.*|rounding.h)",$', config, re.MULTILINE)
    found = of_setup_py("VALUES_AS_WRITTEN", "COMPILE_FLAGS")
    by_kernel_builder = ("-std=c++17", "-fPIC", "-Wall")  # and it defines the version by stable-abi
    expected = [flag for flag in found["COMPILE_FLAGS"] if flag not in by_kernel_builder]
    target = expected.pop()
    assert flags == ["-Dcondense=TORCH_EXTENSION_NAME", *(flag.removeprefix("csrc/") for flag in expected)]
    major, minor = re.search('stable-abi = "(.*)[.](.*)"', config).groups()
    assert target == f"-DTORCH_TARGET_VERSION=0x{int(major):02x}{int(minor):02x}000000000000"


def of_setup_py(*names: str) -> dict:
    """Assignments and functions, without running it: that would build."""
    body = ast.parse((ROOT / "setup.py").read_text()).body
    wanted = [node for node in body if isinstance(node, ast.Assign) and node.targets[0].id in names]
    wanted += [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    found: dict = {"runpy": runpy, "Path": Path}
    exec(compile(ast.Module(wanted, []), "setup.py", "exec"), found)
    return found


def test_the_schemas_are_as_setup_py_writes_them(output, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    of_setup_py("write_schemas")["write_schemas"](tmp_path / "schemas.h")
    assert (output / "source" / "cpu" / "csrc" / "schemas.h").read_text() == (tmp_path / "schemas.h").read_text()


@needs_gxx
def test_a_source_compiles_in_the_project_and_registers_in_its_namespace(output, tmp_path):
    """As CMake would call the compiler: from another folder, with the include folder and the flags of build.toml."""
    project = output / "source" / "cpu"
    flags = re.findall(r'^    "(-.*|rounding.h)",$', (project / "build.toml").read_text(), re.MULTILINE)
    include = Path(torch.__file__).parent / "include"
    of_kernel_builder = [
        "-DTORCH_EXTENSION_NAME=_condense_kernels_cpu_1a2b",
        "-DTORCH_TARGET_VERSION=0x20a000000000000",
    ]
    command = ["g++", "-std=c++17", "-fPIC", *of_kernel_builder, f"-I{project / 'csrc'}", "-isystem", include, *flags]
    subprocess.run([*command, "-c", project / "csrc" / "library.cpp", "-o", "library.o"], cwd=tmp_path, check=True)
    code = (tmp_path / "library.o").read_bytes()
    assert b"\0_condense_kernels_cpu_1a2b\0" in code
    assert b"\0condense\0" not in code


# The variants


def test_the_metadata_is_what_kernels_reads(output):
    build = output / "repository" / "build"
    assert {variant.variant_str for variant in get_variants_local(build)} == {"torch-cpu", "torch-cuda"}
    for variant in build.iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        backend = variant.name.partition("-")[2]
        assert re.fullmatch(rf"_condense_kernels_{backend}_[0-9a-f]{{10}}_py", metadata.id)
        assert (str(metadata.name), metadata.license, metadata.python_depends) == ("condense-kernels", "Apache-2.0", [])
        assert metadata.version == int((ROOT / "condense_kernels/_version.py").read_text().split('"')[1].split(".")[0])
        assert metadata.backend.backend_type == Backend.from_str(backend)
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert metadata.id in (variant / "_ops.py").read_text()
        project = re.search(r'^\[project.urls\][^[]*?"(https://github.com/[^/"]+/[^/"]+)/?"', PYPROJECT, re.M | re.S)
        assert project is None or metadata.upstream == project[1]


PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_another_byte_is_another_namespace():
    sources = HUB["projects"]()
    before, again = HUB["identifiers"](sources), HUB["identifiers"](HUB["projects"]())
    assert before == again
    assert len(set(before.values())) == 3
    sources["cpu"]["csrc/merge_cpu.cpp"] += " "
    after = HUB["identifiers"](sources)
    assert not set(after.values()) & set(before.values())


def test_what_is_shipped(output):
    package = output / "repository" / "build" / "torch-cuda"
    names = {path.name for path in package.iterdir()}
    assert not names & {
        "cli",
        "models",
        "adapters",
        "vllm",
        "lmms",
        "tiny_llava",
        "testing",
        "warming.py",
        "__main__.py",
    }
    assert {"ops", "methods", "_triton", "layers.py", "budget.py", "_ops.py", "_not_built.txt"} <= names
    assert not [path for path in package.rglob("*") if path.suffix not in ("", ".py", ".txt", ".json")]


def test_what_is_no_earlier_output_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    for output in (tmp_path, tmp_path / "mine"):
        with pytest.raises(SystemExit, match="--output: expected a new folder.*another thing"):
            HUB["assemble"](output, compiled=False)
    assert (tmp_path / "mine").is_file()


def test_assembling_again_leaves_nothing_of_before(tmp_path):
    HUB["assemble"](tmp_path / "output", compiled=False)
    stale = tmp_path / "output" / "repository" / "build" / "torch-cpu" / "stale.py"
    stale.touch()
    HUB["assemble"](tmp_path / "output", compiled=False)
    assert not stale.exists()


# Python 3.9, and imports


def python_files(output: Path) -> list[Path]:
    """One variant, and what the others have otherwise than that."""
    files = [path for path in output.rglob("*.py") if "__pycache__" not in path.parts]
    different = {path.read_bytes(): path for path in files}
    assert len(different) > 130
    return list(different.values())


def evaluated(tree: ast.AST):
    """What runs when the module does, or a function is called: no annotation, and not what is for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.arg):
            continue
        if isinstance(node, ast.AnnAssign):
            yield from (node.value,) if node.value is not None else ()
            yield from evaluated(node.value) if node.value is not None else ()
            continue
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        yield node
        yield from evaluated(node)


def is_type(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None
    name = ast.unparse(node)
    return isinstance(getattr(builtins, name, None), type) or name.startswith("ast.") or name.endswith("Tensor")


class OfTypeCheckers(ast.NodeTransformer):
    """Takes away what no interpreter runs."""

    def visit_If(self, node):
        return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def of_later_libraries(tree: ast.Module) -> list[str]:
    """Names, arguments and syntax that vermin knows to be of a later Python; zip(strict=) is _python39.py's."""
    known = vermin.Config()
    known.add_exclusion("zip(strict)")
    known.add_exclusion("long")  # of a tensor, not of Python 2
    known.set_verbose(2)  # with lines
    seen = vermin.visit(ast.unparse(OfTypeCheckers().visit(tree)), known)
    _, oldest = seen if isinstance(seen, list) else seen.minimum_versions()  # a list: it is no syntax of this Python
    return [] if oldest is None or oldest <= (3, 9) else [seen.output_text()]


def of_later_python(text: str) -> list[str]:
    tree = ast.parse(text, feature_version=(3, 9))
    unions = any(isinstance(node, ast.BitOr) for found in HUB["annotations"](tree) for node in ast.walk(found))
    found = ["X | Y in an annotation"] if unions and "\nfrom __future__ import annotations\n" not in text else []
    for node in evaluated(tree):
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.BitOr)
            and (is_type(node.left) or is_type(node.right))
        ):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in ("bit_count", "add_note"):  # of values, not of modules
            found.append(node.attr)
        if isinstance(node, ast.Call) and any(keyword.arg == "strict" for keyword in node.keywords):
            found += [] if "_python39 import zip\n" in text else ["zip(strict=)"]
    return found + of_later_libraries(tree)


def test_python_3_9_reads_what_is_shipped(output):
    wrong = {path: found for path in python_files(output) if (found := of_later_python(path.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    "text",
    ["def f(x: int | None): ...", "A = int | None", "isinstance(x, int | str)", "zip(a, b, strict=True)",
     "from typing import ParamSpec", "import itertools\nitertools.pairwise(a)", "count.bit_count()",
     "from dataclasses import dataclass\n@dataclass(slots=True)\nclass A: ...", "class A:\n    x: str | None = None",
     "import bisect\nbisect.bisect(a, b, key=f)", "from pathlib import Path\nPath(a).hardlink_to(b)", "anext(a)"],
)  # fmt: skip
def test_what_python_3_9_lacks_is_found(text):
    assert of_later_python(text)


def test_python_3_9_itself_compiles_it(output):
    """And reads no file otherwise than this Python: torch >= 2.10, without which nothing can run, does not have it."""
    interpreter = next((found for found in installed_3_9() if found.is_file()), None)
    if interpreter is None:
        pytest.skip("python3.9 is not installed")
    code = "import pathlib, sys; [compile(p.read_bytes(), p, 'exec') for p in pathlib.Path(sys.argv[1]).rglob('*.py')]"
    done = subprocess.run([interpreter, "-c", code, str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def installed_3_9() -> list[Path]:
    on_path = shutil.which("python3.9")
    beside = Path(sys.base_prefix).parent.glob("3.9*/bin/python3.9")  # as pyenv has them
    return [*beside, *([Path(on_path)] if on_path else [])]


def test_zip_of_python_3_9_is_that_of_later_ones(monkeypatch):
    path = str(ROOT / "hub" / "package" / "_python39.py")
    assert runpy.run_path(path)["zip"] is zip
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    own = runpy.run_path(path)["zip"]
    assert own is not zip
    for columns in ((), ([1, 2],), ([1, 2], "ab"), ([1, 2, 3], "ab"), ([], "a")):
        assert list(own(*columns)) == list(zip(*columns, strict=False))
    assert list(own(iter([1, 2]), "ab", strict=True)) == [(1, "a"), (2, "b")]
    with pytest.raises(ValueError, match="of one length"):
        own([1, 2, 3], "ab", strict=True)


def test_imports_are_relative_or_of_the_standard_library_torch_and_triton(output):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in python_files(output):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed, path
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"condense(_kernels)?(::|\.\w+$)", node.value), (path, node.value)
            elif isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.ops.condense", "ops.condense"), path


# Loaded


def load(repository: Path):
    """By kernels, without network, and not from sys.path."""

    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    socket.socket.connect = refuse
    assert str(repository) not in sys.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = get_local_kernel(repository, backend="cpu")
    return module, [str(warning.message) for warning in caught]


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    features, scores = (torch.rand(shape, generator=generator) for shape in ((2, 60, 24), (2, 60)))
    return features.to(dtype), scores


def assert_same_bits(ours, theirs, **options):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        features, scores = tensors(dtype)
        for found, expected in (
            (ours.condense(features, scores, keep=16, grid=(6, 10), **options),
             theirs.condense(features, scores, keep=16, grid=(6, 10), **options)),
            (ours.select_and_merge(features, scores, 7, 5, grid=(6, 10), keys=features[..., :8], **options),
             theirs.select_and_merge(features, scores, 7, 5, grid=(6, 10), keys=features[..., :8], **options)),
        ):  # fmt: skip
            assert all(map(torch.equal, found, expected))


@use_kernel_forward_from_hub("AttentionScores")
class Attention(torch.nn.Module):
    causal = True

    def forward(self, queries, keys):
        raise AssertionError("the layer's own forward")


@use_kernel_forward_from_hub("Condense")
class Keep(torch.nn.Module):
    def __init__(self, num_anchors, num_background, grid):
        super().__init__()
        self.num_anchors, self.num_background, self.grid = num_anchors, num_background, grid
        self.suppression = 0.5

    def forward(self, features, scores):
        raise AssertionError("the layer's own forward")


@use_kernel_forward_from_hub("Merge")
class Merge(torch.nn.Module):
    mode = "sum"

    def forward(self, features, scores, indices, assignment):
        raise AssertionError("the layer's own forward")


LAYERS = {"AttentionScores": Attention, "Condense": Keep, "Merge": Merge}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.keep, self.merge = Attention(), Keep(7, 5, (6, 10)), Merge()

    def forward(self, features):
        heads = features[:, None, :, :8]
        scores = self.attention(heads, heads)
        merged, indices, assignment, mass = self.keep(features, scores)
        return merged, mass, self.merge(features, None, indices, assignment)[0]


def kernelized(repository: Path, mode: Mode) -> Model:
    layers = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}
    with use_kernel_mapping(layers, inherit_mapping=False):
        return kernelize(Model(), mode=mode, device="cpu", use_fallback=False)


def expected_of(package, features):
    heads = features[:, None, :, :8]
    scores = package.attention_scores(heads, heads, causal=True)
    out = package.select_and_merge(features, scores, 7, 5, grid=(6, 10), suppression=0.5)
    return out.merged, out.mass, package.merge(features, None, out.indices, out.assignment, mode="sum")[0]


def in_python_and_triton(output: Path):
    import condense_kernels.methods

    ck = condense_kernels
    kernel, (warning,) = load(output / "repository")
    assert kernel.__file__ == str(output / "repository" / "build" / "torch-cpu" / "__init__.py")
    assert "this variant is Python and Triton, without C++" in warning
    assert kernel._dispatch.library.NAMESPACE == kernel.__name__ != ck._dispatch.library.NAMESPACE == "condense"
    assert_same_bits(kernel, ck, backend="reference")
    features, scores = tensors()
    triton = kernel.select_and_merge(features, scores, 7, 5, grid=(6, 10), backend="triton")
    of_ours = ck.select_and_merge(features, scores, 7, 5, grid=(6, 10), backend="triton")
    assert all(map(torch.equal, triton, of_ours))
    assert kernel.methods.divprune(features, scores, 9).indices.equal(ck.methods.divprune(features, scores, 9).indices)
    assert (ck._dispatch.library.cpp_unavailable() is None) == HAS_LIBRARY  # as before
    for name, host in LAYERS.items():
        layer = getattr(kernel.layers, name)
        assert layer()  # no arguments
        assert "__annotations__" not in vars(layer)  # of which Python 3.14 makes members
        _validate_layer(check_cls=host, cls=layer, repo=name)
    model = kernelized(output / "repository", Mode.TRAINING)
    features.requires_grad_()
    merged, mass, sums = model(features)
    assert all(map(torch.equal, (merged, mass, sums), expected_of(kernel, features)))
    merged.square().sum().backward()
    assert features.grad.abs().sum() > 0
    spec = importlib.util.spec_from_file_location("old", Path(kernel.__file__).parent / "condense_kernels/__init__.py")
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert old.select_and_merge is kernel.select_and_merge


def test_the_variant_of_python_and_triton_runs_beside_the_installed_package(output):
    fresh(in_python_and_triton, output)


PARAMETERS = """
import importlib, pkgutil, sys, warnings
from pathlib import Path
from kernels import get_local_kernel
from triton.runtime.jit import JITFunction
import condense_kernels as ck
warnings.simplefilter("ignore")
found = []
for package in (ck, get_local_kernel(Path(sys.argv[1]), backend="cpu")):
    names = (m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    modules = [importlib.import_module(n) for n in names if ".ops" in n or "._triton" in n]
    kernels = [k for m in modules for k in vars(m).values() if isinstance(k, JITFunction)]
    found.append([(k.__name__, p.name, p.is_constexpr, p.annotation_type) for k in kernels for p in k.params])
assert len(found[0]) > 400 and found[0] == found[1]
"""


@pytest.mark.slow
def test_triton_sees_the_same_constants_in_annotations_that_are_text(output):
    done = python("-c", PARAMETERS, str(output / "repository"), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def in_cpp(repository: Path, installed_first: bool):
    if installed_first:
        import condense_kernels as ck
    kernel, caught = load(repository)
    assert not caught
    assert Path(kernel.__file__).parent.name == COMPILED
    assert kernel._dispatch.library.cpp_unavailable() is None
    assert f"{kernel.__name__}.abi3.so" in {path.name for path in Path(kernel.__file__).parent.iterdir()}
    import condense_kernels as ck

    assert_same_bits(kernel, ck)
    other, _ = load(repository / "build" / "torch-cpu")  # a second build, in the same process
    assert other.__name__ == f"{kernel.__name__}_py"
    assert_same_bits(other, kernel, backend="reference")
    features, scores = tensors()
    packed = features.flatten(0, 1), scores.flatten()
    offsets = [torch.tensor(values, dtype=torch.int32) for values in ([0, 50, 120], [0, 7, 13], [0, 5, 8])]
    ours, theirs = (
        package.select_and_merge_varlen(*packed, *offsets, 21, 70, spatial_weight=0) for package in (kernel, ck)
    )
    assert all(map(torch.equal, ours, theirs))
    for mode in (Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE):
        model = kernelized(repository, mode)
        assert all(map(torch.equal, model(features), expected_of(ck, features)))
    compiled = torch.compile(model.keep, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(features, scores), model.keep(features, scores)))


@pytest.mark.slow
@needs_gxx
@pytest.mark.skipif(not HAS_LIBRARY, reason="the compiled library was not built, or is switched off")
@pytest.mark.parametrize("installed_first", [True, False])
def test_the_compiled_variant_has_the_bits_of_the_installed_package(compiled, installed_first):
    fresh(in_cpp, compiled, installed_first)


@pytest.mark.slow
@needs_gxx
def test_the_compiled_variant_is_what_its_metadata_says(compiled):
    variant = compiled / "build" / COMPILED
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert re.fullmatch(r"_condense_kernels_cpu_[0-9a-f]{10}", metadata.id)
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    assert not (variant / "_not_built.txt").exists()
    assert b"\0condense\0" not in (variant / f"{metadata.id}.abi3.so").read_bytes()
