"""pytest -p ptx.plugin: tests of Triton kernels run them compiled, on the PTX engine, and what that finds fails them.

A test that names Triton runs once for each target; others are left out. `make ptx-check` is the way here.
"""

import inspect
import os
import pathlib
import re
import zlib
from collections import Counter, defaultdict

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import pytest

from condense_kernels._dispatch import backends

from . import engine
from .compiling import TARGETS
from .device import Checks, Device, text_of

backends.triton_interprets = lambda: True  # backend="triton" takes CPU tensors

HERE = pathlib.Path(__file__).parent
NOT_HERE = {  # tests that name Triton, and what they are about instead
    "test_blas.py::test_no_product_is_numpys": "the interpreter's products",
    "test_cli.py::test_check_covers_what_it_says": "what `check` lists",
    "test_errors.py::test_unavailable_backend_says_why_and_what_to_do": "a machine without Triton",
    "test_import.py::test_without_anything_optional": "a machine without Triton",
    "test_triton_attention.py::test_bounds_are_looked_at": "what the interpreter's tests find",
    "test_triton_attention.py::test_memory_grows_with_the_tokens": "a launcher, on tensors without values",
    "test_triton_attention.py::test_the_host_reads_nothing_and_a_given_lse_spares_a_launch": "likewise",
    "test_triton_varlen.py::test_bounds_are_looked_at": "what the interpreter's tests find",
    "test_triton_varlen.py::test_the_host_reads_nothing": "a launcher, on tensors without values",
    "test_vision.py::test_the_light_demo_says_that_this_exists": "a machine without the vision extra",
}
# Offsets that lead nowhere: programs may race where the caller's segments overlap, and read what nobody wrote. What is
# asked of them is that nothing outside of the tensors is touched, and that they end.
WRONG_ON_PURPOSE = {
    "test_attention_scores_varlen.py::test_decreasing_offsets_do_no_harm": "segments overlap",
    "test_select_and_merge_varlen.py::test_offsets_that_decrease": "segments overlap",
    "test_triton_attention.py::test_wrong_offsets_lead_nowhere": "segments overlap, or leave tokens out",
    "test_triton_gradients.py::test_gradients_that_are_not": "rows that do not exist, or have several tokens",
    "test_triton_mean.py::test_wrong_offsets_stay_inside": "segments overlap, or leave tokens out",
    "test_triton_varlen.py::test_what_no_program_computed_leads_nowhere": "contents of the workspace are made up",
    "test_triton_varlen.py::test_wrong_offsets_lead_nowhere": "segments overlap, or leave tokens out",
    "test_coverage_select.py::test_wrong_offsets_are_harmless": "segments overlap, or leave tokens out",
    "test_greedy_select_varlen.py::test_wrong_offsets_lead_nowhere": "segments overlap",
}
STILL_ASKED = {"out of bounds", "misaligned", "does not end", "not converged", "barriers differ", "not waited for"}
MOST_SHOWN = 5


def pytest_addoption(parser):
    group = parser.getgroup("ptx", "compiled kernels on the PTX engine")
    group.addoption("--ptx-target", choices=TARGETS, help="one target alone")
    group.addoption("--ptx-cases", type=int, help="so many cases of each test function, instead of all")
    group.addoption("--ptx-seed", type=int, default=0, help="another order of warps and programs, and other cases")
    group.addoption("--ptx-guard-bits", type=int, help="tensor cores truncate, with so many bits more than a float has")
    group.addoption("--ptx-inexact", action="store_true", help="approximate instructions are off by up to 2 ulp")
    group.addoption("--ptx-loads", action="store_true", help="every load of memory that nobody wrote is a finding")


def pytest_configure(config):
    try:
        engine.library()  # compiled once, before there are workers
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(Totals(), "ptx totals")


def pytest_generate_tests(metafunc):
    target = metafunc.config.getoption("ptx_target")
    metafunc.parametrize("ptx_device", [target] if target else list(TARGETS), indirect=True)


def pytest_ignore_collect(collection_path):
    """Files without a word of Triton nor a fixture of backends: importing them all takes longer than many a test."""
    if collection_path.suffix == ".py" and collection_path.parent != HERE:
        return None if re.search(r"triton|\b(fast|backend)[,)]", collection_path.read_text()) else True
    return None


def name_of(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.originalname}"


def names_triton(item: pytest.Item) -> bool:
    """By its file, by a backend that it is given, or by one that it writes down."""
    given = {value for name, value in item.callspec.params.items() if name != "ptx_device" and isinstance(value, str)}
    if item.path.name.startswith("test_triton") or item.path.parent == HERE or "triton" in given:
        return True
    return not {"fast", "backend"} & set(item.fixturenames) and '"triton"' in inspect.getsource(item.function)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if names_triton(item) and name_of(item) not in NOT_HERE]
    if (most := config.getoption("ptx_cases")) is not None:
        cases = defaultdict(list)
        for item in chosen:
            cases[name_of(item)].append(item)
        seed = config.getoption("ptx_seed")
        by_lot = (sorted(group, key=lambda item: lot(item, seed))[:most] for group in cases.values())
        kept = {item.nodeid for group in by_lot for item in group}
        chosen = [item for item in chosen if item.nodeid in kept]
    left_out = set(items).difference(chosen)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = chosen


def lot(item: pytest.Item, seed: int) -> int:
    return zlib.crc32(f"{seed} {item.nodeid}".encode())


@pytest.fixture(autouse=True)
def ptx_device(request):
    """The device of a test. Findings fail it when it ends."""
    option = request.config.getoption
    checks = Checks(guard_bits=option("ptx_guard_bits"), inexact=option("ptx_inexact"), loads=option("ptx_loads"))
    with Device(request.param, lot(request.node, option("ptx_seed")), checks) as device:
        yield device
    for launch in device.launches:
        request.node.user_properties.append(("ptx", (launch.kernel, launch.instructions, launch.seconds)))
    found = device.take()
    if name_of(request.node) in WRONG_ON_PURPOSE:
        found = [finding for finding in found if finding["kind"] in STILL_ASKED]
    if found:
        shown = "\n".join(map(text_of, found[:MOST_SHOWN]))
        more = "" if len(found) <= MOST_SHOWN else f"\nand {len(found) - MOST_SHOWN} more"
        pytest.fail(f"{shown}{more}\nRepeat with --ptx-seed {option('ptx_seed')}.", pytrace=False)


class Totals:
    """What was run, of all workers."""

    def __init__(self):
        self.tests = self.instructions = 0
        self.seconds = 0.0
        self.launches: Counter = Counter()

    def pytest_runtest_logreport(self, report):
        launches = [value for name, value in report.user_properties if name == "ptx"]
        if report.when == "teardown" and launches:
            self.tests += 1
            for kernel, instructions, seconds in launches:
                self.launches[kernel] += 1
                self.instructions += instructions
                self.seconds += seconds

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("compiled kernels")
        for kernel, count in self.launches.most_common():
            terminalreporter.write_line(f"{count:6} launches of {kernel}")
        terminalreporter.write_line(
            f"{self.tests} tests made {self.launches.total()} launches: {self.instructions / 1e6:.1f} million "
            f"instructions of warps in {self.seconds:.1f} s"
        )
