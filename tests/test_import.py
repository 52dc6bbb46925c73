"""Import hygiene: whatever a process imports, in whatever order, it gets right results or one clear error.

docs/installing.md has the table. Nothing of the package is imported here, as most cases run in a process of their own,
forked from one that has imported torch and nothing else.
"""

import gc
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from processes import (
    HAS_LIBRARY,
    LIBRARY,
    PACKAGE,
    VERSION,
    assert_works_like,
    condensed,
    copy_package,
    fresh,
    import_from,
    needs_library,
    python,
    vendored,
)

# Once more, and from two places


def imports_again(folder: Path, without_library: bool):
    os.environ["CONDENSE_DISABLE_CPP"] = str(int(without_library))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = import_from(folder)
        condensed(first)
        for name in [name for name in sys.modules if name.startswith("condense_kernels")]:
            importlib.reload(sys.modules[name])
        assert_works_like(first, first)
        forgotten = [sys.modules.pop(name) for name in list(sys.modules) if name.startswith("condense_kernels")]
        del forgotten
        gc.collect()
        second = importlib.import_module("condense_kernels")
        assert second is not first
        assert_works_like(second, first)
        del first
        gc.collect()
        assert_works_like(second, import_from(folder / "site", "engine._vendor.condense_kernels"))
    assert len(caught) == without_library, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("without_library", [pytest.param(False, marks=needs_library), True])
def test_importing_again(tmp_path, without_library):
    """Reloaded, forgotten and imported anew, collected in between, and under another name: one set of kernels."""
    vendored(tmp_path / "site" / "engine")
    copy_package(tmp_path)
    fresh(imports_again, tmp_path, without_library)


def test_the_exit_is_quiet(tmp_path):
    """Where torch takes back what the package registered, from two copies and after a reload."""
    vendored(tmp_path / "engine")
    code = """
        import importlib, sys, torch
        import condense_kernels as ck, engine._vendor.condense_kernels as theirs
        importlib.reload(ck._dispatch.library)
        ck.similarity(torch.rand(1, 4, 2)), theirs.similarity(torch.rand(1, 4, 2))
        """
    done = python("-W", "ignore", "-c", textwrap.dedent(code), PYTHONPATH=f"{PACKAGE.parent}:{tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")


OURS, THEIRS = "condense_kernels", "engine._vendor.condense_kernels"
NEWER = {"_version.py": (VERSION, "9.8.7")}
OTHER_SCHEMA = {"ops/greedy_select/schema.txt": ("max_min=False", "max_min=True")}
ONE_MORE = {"ops/merge/schema.txt": ("merge(Tensor", "pool(Tensor features) -> Tensor\n\nmerge(Tensor")}


def imports_newer_second(folder: Path, first: str, second: str):
    sys.path.insert(0, str(folder))
    first = importlib.import_module(first)
    assert_works_like(importlib.import_module(second), first)


@pytest.mark.parametrize(
    ("edits", "first", "second", "missing"),
    [
        (NEWER, OURS, THEIRS, None),
        ({**NEWER, **OTHER_SCHEMA}, OURS, THEIRS, "bool max_min=False) -> Tensor order"),
        ({**NEWER, **OTHER_SCHEMA}, THEIRS, OURS, "bool max_min=True) -> Tensor order"),
        ({**NEWER, **ONE_MORE}, OURS, THEIRS, "no such operator"),
    ],
    ids=["same schemas", "another schema", "another schema, the other way round", "one operator more"],
)
def test_two_versions_in_a_process(tmp_path, edits, first, second, missing):
    """The first owns the namespace; the second uses it where the schemas agree, else it names both and the remedy."""
    copy_package(tmp_path)
    vendored(tmp_path / "engine", library=b"", **edits)  # its library would have to be of the same sources
    if missing is None:
        return fresh(imports_newer_second, tmp_path, first, second)
    with pytest.raises(ImportError) as raised:
        fresh(imports_newer_second, tmp_path, first, second)
    message = str(raised.value)
    ours, theirs = (f"{tmp_path}/{name.replace('.', '/')}" for name in (OURS, THEIRS))
    assert f"condense_kernels {VERSION} in {ours}" in message
    assert f"condense_kernels 9.8.7 in {theirs}" in message
    assert f"found    {missing}" in message or f"{missing}\n" in message
    assert "Remedy: one version of condense_kernels for all that this process imports." in message


def meets_an_operator_of_something_else():
    other = torch.library.Library("condense", "FRAGMENT")
    other.define("merge(Tensor x) -> Tensor")
    import condense_kernels  # noqa: F401


def test_an_operator_of_something_else_is_an_error_at_import():
    """Loading the library, which would register it a second time, would end the process."""
    with pytest.raises(ImportError, match="other operators than something else") as raised:
        fresh(meets_an_operator_of_something_else)
    assert "found    condense::merge(Tensor x) -> Tensor" in str(raised.value)


def loads_the_library_by_hand():
    torch.ops.load_library(str(LIBRARY))
    import condense_kernels as ck

    assert ck._dispatch.library.cpp_unavailable() is None
    assert_works_like(ck, ck)


@needs_library
def test_a_library_that_was_loaded_by_hand_serves():
    fresh(loads_the_library_by_hand)


def imports_in_threads(folder: Path, names: tuple[str, ...]):
    sys.path.insert(0, str(folder))
    start, failures = threading.Barrier(len(names)), []

    def work(name):
        start.wait()
        try:
            importlib.import_module(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert_works_like(sys.modules[names[0]], sys.modules[names[-1]])


@pytest.mark.parametrize("names", [(OURS, OURS, OURS), (OURS, THEIRS)], ids=["one copy", "two copies"])
def test_threads_that_import_at_the_same_time(tmp_path, names):
    copy_package(tmp_path)
    vendored(tmp_path / "engine")
    fresh(imports_in_threads, tmp_path, names)


# A library that does not fit


def patched(old: bytes, new: bytes) -> bytes:
    """The built library with a text replaced: as if built from other sources."""
    built = LIBRARY.read_bytes()
    assert old in built
    assert len(old) == len(new)
    return built.replace(old, new)


def of_machine(number: int) -> bytes:
    built = LIBRARY.read_bytes()
    return built[:18] + number.to_bytes(2, "little") + built[20:]


BROKEN = {
    "empty": (lambda: b"", "file too short"),
    "garbage": (lambda: b"no library" * 100, "invalid ELF header"),
    "cut off": (lambda: LIBRARY.read_bytes()[:300_000], "the file is cut off"),
    "of another architecture": (lambda: of_machine(8), "cannot open shared object"),  # MIPS
    "for a newer torch": (lambda: patched(b"\0torch_parallel_for\0", b"\0torch_parallel_new\0"), "torch_parallel_new"),
}


def reason_for(library: Path) -> str | None:
    from condense_kernels._dispatch import library as _library

    return _library._load_file(library)


@needs_library
@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_library_that_does_not_load_says_why(tmp_path, content, reason):
    """Without the check of its length, one that is cut off ends the process with SIGBUS."""
    (tmp_path / LIBRARY.name).write_bytes(content())
    why = fresh(reason_for, tmp_path / LIBRARY.name)
    assert reason in why
    assert "rebuild it on this machine against the installed torch" in why


def falls_back(folder: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sys.path.insert(0, str(folder))
        import condense_kernels as ck
    assert len(caught) == 1
    assert caught[0].filename == __file__  # points at the import
    assert "_C.abi3.so: invalid ELF header); rebuild it" in str(caught[0].message)
    from condense_kernels.testing import assert_matches_reference, make_inputs

    inputs = make_inputs("random", num_tokens=12)
    assert_matches_reference(inputs.run(), inputs)
    with pytest.raises(ValueError, match="invalid ELF header"):
        ck.similarity(inputs.features, backend="cpp")


@needs_library
def test_a_library_that_does_not_load_leaves_the_reference_with_one_warning(tmp_path):
    copy_package(tmp_path, library=b"no library" * 100)
    fresh(falls_back, tmp_path)


def fails_twice(folder: Path) -> list[str]:
    messages = []
    for _ in range(2):
        with pytest.raises(ImportError) as raised:
            import_from(folder)
        messages.append(str(raised.value))
    return messages


@needs_library
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"\0merge_backward(Tensor", b"\0merge_backwarm(Tensor", "no such operator"),
        (b"max_min=False) -> Tensor order", b"min_max=False) -> Tensor order", "min_max=False) -> Tensor order"),
    ],
    ids=["lacks an operator", "another schema"],
)
def test_a_library_of_older_sources_is_an_error(tmp_path, old, new, found):
    """Never a mixture: neither the reference beside it for what it lacks, nor another meaning under the same name."""
    copy = copy_package(tmp_path, library=patched(old, new))
    for message in fresh(fails_twice, tmp_path):
        assert f"the compiled library of condense_kernels {VERSION} in {copy}" in message
        assert f"found    {found}" in message or f"{found}\n" in message
        assert "Remedy: rebuild the library" in message


def imports_with_warnings_as_errors():
    os.environ["CONDENSE_DISABLE_CPP"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeWarning, match="runs CPU tensors on its slow reference"):
                import condense_kernels
    with pytest.warns(RuntimeWarning):
        import condense_kernels
    condensed(condense_kernels)


def test_the_warning_as_an_error_leaves_nothing_behind():
    """python -W error: the import fails with the warning's text, each time, and works once it is a warning again."""
    fresh(imports_with_warnings_as_errors)


# What may be missing


def test_without_anything_optional():
    """No library, no Triton, no numpy, no home: right results, one warning, and nothing at the exit."""
    code = """
        import sys, warnings
        sys.modules["numpy"] = sys.modules["triton"] = None  # an import of them fails
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import condense_kernels as ck
        ours = [str(w.message) for w in caught if "condense_kernels" in str(w.message)]
        if len(ours) != 1 or "CONDENSE_DISABLE_CPP=1 is set" not in ours[0]:
            raise SystemExit(f"expected one warning, got {ours}")
        import torch
        from condense_kernels.testing import KINDS, assert_matches_reference, make_inputs
        for kind in KINDS:
            inputs = make_inputs(kind, num_tokens=12, dtype=torch.bfloat16)
            assert_matches_reference(inputs.run(), inputs)
        inputs = make_inputs("random")
        torch.library.opcheck(torch.ops.condense.select_and_merge.default, inputs.args, inputs.options)
        for backend, reason in {"cpp": "CONDENSE_DISABLE_CPP", "triton": "triton is not installed"}.items():
            try:
                ck.similarity(inputs.features, backend=backend)
            except ValueError as error:
                if reason not in str(error):
                    raise
            else:
                raise SystemExit(f"backend={backend!r} ran")
        """
    done = python("-c", textwrap.dedent(code), CONDENSE_DISABLE_CPP="1", HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "condense" not in done.stderr


def meets_triton(folder: Path, text: str) -> tuple[str, str]:
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(text)
    sys.path.insert(0, str(folder))
    import condense_kernels as ck
    from condense_kernels._dispatch import backends

    features, scores = torch.rand(1, 4, 2), torch.rand(1, 4)
    rows = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="triton") as of_the_function:
        ck.merge(features, scores, rows[:, :1], rows, backend="triton")
    with pytest.raises(RuntimeError, match="triton") as of_the_operator:  # as on a GPU
        backends.raw(backends.on_triton["merge"])(features, scores, rows[:, :1], rows)
    return str(of_the_function.value), str(of_the_operator.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ModuleNotFoundError('gone', name='triton')", "triton is not installed"),
        ("raise ImportError('libcuda.so.1: no such file')", "its import fails (ImportError: libcuda.so.1: no such"),
        ("__version__ = '3.1.0'", "triton 3.1.0 is installed, expected 3.6 or newer"),
    ],
    ids=["absent", "broken", "too old"],
)
def test_triton_that_cannot_be_used_is_named(tmp_path, text, reason):
    for message in fresh(meets_triton, tmp_path, text):
        assert reason in message
        assert "Remedy: pip install" in message


@pytest.mark.parametrize(
    "interpreter", [sys.executable, "python3.10", "python3.11", "python3.12", "python3.13"], ids=lambda p: Path(p).name
)
def test_without_torch_the_error_says_what_to_install(interpreter):
    if shutil.which(interpreter) is None or python("-c", "", interpreter=interpreter).returncode != 0:
        pytest.skip(f"{interpreter} is not installed")
    code = "import sys; sys.modules['torch'] = None; import condense_kernels"
    done = python("-B", "-S", "-c", code, interpreter=interpreter)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: condense_kernels {VERSION} needs torch >= 2.10, and no torch is installed. "
        "Remedy: pip install torch, or the build for your machine that https://pytorch.org/get-started names."
    )


def meets_an_older_torch():
    torch.__version__ = "2.9.1+cu128"
    import condense_kernels  # noqa: F401


def test_an_older_torch_is_an_error_that_names_both_versions():
    with pytest.raises(ImportError, match=r"needs torch >= 2.10, found torch 2.9.1\+cu128 in .*pip install 'torch>="):
        fresh(meets_an_older_torch)


def imports_from_a_zip(archive: Path):
    ck = import_from(archive)
    assert ck.__file__.startswith(str(archive))
    assert (ck._dispatch.library.cpp_unavailable() is None) == HAS_LIBRARY
    assert_works_like(ck, ck)


def test_import_from_a_zip(tmp_path):
    """The library is loaded from a temporary copy: nothing of the package has to lie in a folder, writable or not."""
    copy = copy_package(tmp_path)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in copy.rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    fresh(imports_from_a_zip, tmp_path / "all.zip")


# What an import brings


def cpu_kernels_of_python() -> list[str]:
    from condense_kernels._dispatch.declaration import OPERATORS

    found = (re.fullmatch(r"condense/(\w+)/CPU", name) for name in torch.library._impls)
    operators = [OPERATORS[match[1]] for match in found if match]
    return [operator.name for operator in operators if operator.reference is not operator.triton]  # else plain torch


@needs_library
def test_with_the_library_no_operator_is_the_reference():
    """An operator whose C++ kernel is forgotten would be right, and slow."""
    assert not fresh(cpu_kernels_of_python)


def modules_of_the_import() -> set[str]:
    before = set(sys.modules)
    import condense_kernels  # noqa: F401

    return {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}


def test_import_brings_no_other_package_and_no_heavy_part_of_torch():
    """Each of these would take longer than the package itself. numpy comes with torch, so a test above hides it."""
    brought = fresh(modules_of_the_import)
    assert {name.partition(".")[0] for name in brought} <= {"condense_kernels", "torch"}
    heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.testing"}
    assert not brought & {*heavy, "condense_kernels.cli", "condense_kernels.testing"}


# Other processes


def forks():
    import condense_kernels as ck

    keys = torch.rand(1, 500, 64)
    expected = ck.similarity(keys)[0]
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for threads of its parent waits for ever
        torch.set_num_threads(1)
        os._exit(not torch.equal(ck.similarity(keys)[0], expected))
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_worker():
    """As of a data loader: its parent has used several threads, and it uses one."""
    fresh(forks)


@pytest.mark.slow
def test_a_spawned_worker_takes_and_returns_what_the_operators_do():
    import condense_kernels as ck

    features, scores = torch.rand(1, 12, 8), torch.rand(1, 12)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(ck.condense, (features, scores), {"keep": 4, "grid": (3, 4)})
    assert isinstance(result, ck.Condensed)
    assert torch.equal(result.merged, ck.condense(features, scores, keep=4, grid=(3, 4)).merged)
