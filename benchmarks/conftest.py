"""`pytest benchmarks`: every case is a benchmark whose call is a round of all its sides; the tables come at the end."""

from pathlib import Path

import harness
import pytest
import rows
import targets
from shapes import SWEPT

CASES, SIDES = pytest.StashKey[list](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of condense_kernels")
    group.addoption("--rounds", type=int, default=harness.ROUNDS, help="calls of a side that is not slow")
    group.addoption("--long", action="store_true", help="the longest inputs too, minutes each")
    group.addoption("--sweeps", action="store_true", help="what the plots of speed against N, K and B are made of too")
    group.addoption("--csv", type=Path, help="put the rows into this file; rows of the same names are replaced")
    group.addoption("--compare", metavar="REF", help="show the change against the results file of a commit")
    group.addoption(
        "--record", action="store_true", help="replace this device's results file, and plots and table in docs/, too"
    )


def pytest_configure(config):
    config.stash[CASES], config.stash[SIDES] = [], {}
    if config.option.compare:
        try:
            config.option.before = rows.read_commit(config.option.compare, rows.results_file(harness.DEVICE))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc):
    if "shape_name" in metafunc.fixturenames:
        module, option = metafunc.module, metafunc.config.option
        swept = SWEPT if option.sweeps and module.__name__ == "bench_select_and_merge" else ()
        long = module.LONG if option.long and hasattr(module, "LONG") else ()
        metafunc.parametrize("shape_name", module.SHAPES + long + swept)


@pytest.fixture(scope="session")
def progress(pytestconfig):
    """On the terminal, whatever pytest captures."""
    with (
        pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled(),
        harness.progress() as bar,
    ):
        yield bar


@pytest.fixture
def interleaved(benchmark, request, progress):
    """Check all sides of a case, then time them beside each other; pytest-benchmark's own time is that of a round."""
    harness.require_kernels()

    def run(op: str, shape: str, sides: harness.Sides) -> None:
        task = progress.add_task(f"{op} {shape}: checking", total=request.config.option.rounds)
        case = harness.Case(op, shape, sides, rounds=request.config.option.rounds)
        progress.update(task, description=f"{op} {shape}")

        def one_round() -> None:
            case.round()
            progress.advance(task)

        benchmark.group = op
        benchmark.pedantic(one_round, rounds=case.rounds, iterations=1, warmup_rounds=0)
        progress.update(task, description=f"{op} {shape}: memory")
        found = case.rows()
        progress.remove_task(task)
        benchmark.extra_info.update({f"{row.side} ({row.mode}) median ms": row.median_ms for row in found})
        request.config.stash[CASES].append((found, case.leaves_out))
        request.config.stash[SIDES][op] = sides

    return run


def pytest_terminal_summary(config):
    cases = config.stash[CASES]
    if not cases:
        return
    console = harness.console()
    cases = [(harness.with_launches(found, config.stash[SIDES]), leaves_out) for found, leaves_out in cases]
    found = [row for rows_, _ in cases for row in rows_]
    console.print()
    harness.print_origin(harness.DEVICE)
    for case_rows, leaves_out in cases:
        console.print(rows.case_table(case_rows, leaves_out))
        console.print()
    console.print(targets.verdict_table(found))
    if config.option.compare:
        console.print(rows.comparison_table(found, config.option.before, config.option.compare))
    if config.option.csv:
        rows.write(config.option.csv, found)
    if config.option.record:
        record(found)


def record(found: list[rows.Row]) -> None:
    import plot  # needs matplotlib, which a bare GPU machine may lack
    import report

    path, page = rows.results_file(harness.DEVICE), rows.ROOT / "docs" / "benchmarks.md"
    path.unlink(missing_ok=True)
    rows.write(path, found)
    plot.draw(found, page.parent)
    page.write_text(report.replaced(page.read_text(), found))
