import functools
import os
import pathlib
import subprocess
import sys
import zlib

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: who waits leaves the core to others

import pytest
import torch

if not torch.cuda.is_available():  # else tests/test_gpu.py runs the kernels for real
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels run on CPU tensors

import quick_interpreter
import triton  # the test extra brings it: without it half of the tests would be skipped
from triton.runtime import interpreter

from condense_kernels._dispatch import backends

try:
    import hypothesis
except ModuleNotFoundError:  # on a GPU machine that has what benchmarks/gpu.sh needs, and no more
    pass
else:  # a busy machine is slow, and not wrong
    too_slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=too_slow)
    hypothesis.settings.load_profile("any machine")

# `make vllm` and `make lmms-eval` run the first two, in their environments, `make ptx-check` the third, by its plugin.
collect_ignore = ["with_vllm", "with_lmms_eval", *(["ptx"] if "ptx.plugin" not in sys.modules else [])]
CPU = torch.device("cpu")
FAST = ("cpp", "triton")


if os.environ.get("TRITON_INTERPRET") == "1" and triton.__version__.startswith(quick_interpreter.VERSIONS):
    quick_interpreter.quicken()


def _or_skip(backend: str):
    """Skips only for what a machine may lack (a compiler); the test extra brings the rest."""
    reason = backends.unavailable(backend, CPU)
    return pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}"))


@pytest.fixture(params=[_or_skip(backend) for backend in FAST])
def fast(request) -> str:
    """Each backend that is held to the reference."""
    return request.param


@pytest.fixture(params=[_or_skip(backend) for backend in (*FAST, "reference")])
def backend(request) -> str:
    """Each backend, the reference included: for what all of them owe."""
    return request.param


@pytest.fixture
def cpp() -> str:
    reason = backends.unavailable("cpp", CPU)
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    return "cpp"


@pytest.fixture
def ptx_engine():
    """Runs small PTX programs, see tests/ptx/handwritten.py."""
    from ptx import engine, handwritten

    if engine.compiler() is None:
        pytest.skip("no C++ compiler")
    return handwritten.Device()


@pytest.fixture
def bounded(monkeypatch):
    """The interpreter, held to what the tensors of a launch span."""
    spans: list[tuple[int, int]] = []
    launch, access = interpreter.GridExecutor.__call__, interpreter._interpreter

    def note(value):
        if isinstance(value, tuple):
            for field in value:
                note(field)
        elif isinstance(value, torch.Tensor) and value.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            spans.append((value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()))

    def noted(self, *args, **kwargs):
        spans.clear()
        note((*args, *kwargs.values()))
        return launch(self, *args, **kwargs)

    def check(pointers, mask):
        at = torch.from_numpy(pointers[mask].astype("int64"))
        inside = torch.zeros(at.shape, dtype=torch.bool)
        for start, stop in spans:
            inside |= (at >= start) & (at < stop)
        assert inside.all(), f"{int((~inside).sum())} accesses outside of the tensors"

    class Checked:
        def __getattr__(self, name):
            return getattr(access, name)

        def load(self, pointers, mask, *rest):
            check(pointers, mask)
            return access.load(pointers, mask, *rest)

        def store(self, pointers, values, mask):
            check(pointers, mask)
            return access.store(pointers, values, mask)

        def atomic_rmw(self, operation, pointers, values, mask, semantics):
            check(pointers, mask)
            return access.atomic_rmw(operation, pointers, values, mask, semantics)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    monkeypatch.setattr(interpreter, "_interpreter", Checked())


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> str:
    """An interpreter without packages, as isolated builds run."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin" / "python")


@functools.cache
def has_fixtures_of_the_module(file: pathlib.Path) -> bool:
    return 'scope="module"' in file.read_text()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What takes minutes begins first, so that no core waits for it at the end: `slow(minutes=5)`, then files with
    fixtures of their module. The others stay as they were shuffled."""

    def minutes(item) -> float:
        slow = item.get_closest_marker("slow")
        return slow.kwargs.get("minutes", 0) if slow else 0

    items.sort(key=lambda item: (-minutes(item), not has_fixtures_of_the_module(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker gets test by test, in their order, but all of a file that has fixtures of its module together."""
    from xdist.scheduler import LoadScopeScheduling

    class TestByTest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if has_fixtures_of_the_module(config.rootpath / file) else nodeid

    config.option.loadscopereorder = False  # by the number of tests
    return TestByTest(config, log)


def pytest_collectstart():
    torch.manual_seed(0)  # for what a module draws when it is imported


@pytest.fixture(autouse=True)
def inputs_of_its_own(request):
    """What a test draws follows from its name: alone, in any order and beside any other, it is the same."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty hands out NaN (largest integers): an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
