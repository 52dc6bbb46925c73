"""The rows that a run leaves: one schema for all operators, where they come from, and how they change."""

import csv
import dataclasses
import datetime
import io
import re
import subprocess
import typing
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.table import Table

from condense_kernels._dispatch import environment, library
from condense_kernels.cli.env import driver, processor, read_lines, version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WRITTEN = (
    ":!benchmarks/results",
    ":!docs/benchmarks.md",
    ":!docs/comparison.md",
    ":!docs/fidelity.md",
    ":!docs/*.png",
)  # by the benchmarks themselves
SIMD = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")  # the widest comes first


@dataclasses.dataclass(frozen=True)
class Row:
    op: str
    shape: str
    side: str
    mode: str  # cpu: "call"; cuda: "plain" launches or "graph" replay
    B: int
    N: int
    D: int
    K: int
    median_ms: float  # of one call
    p20_ms: float
    p80_ms: float
    calls: int
    x_base: float  # median over that of the case's first side
    gflop: float | None  # what the task needs: docs/benchmarks.md
    mbyte: float | None
    gflops: float | None  # a second
    gbs: float | None
    ceiling_gflops: float  # a large matrix product and a large copy, in the same run
    ceiling_gbs: float
    peak_gflops: float | None  # multiply-adds that wait for nothing, by the instruction set below; none on a GPU
    peak_extra_mb: float | None  # above what was there before the call, results included
    launches: int | None
    device: str
    instruction_set: str  # that the library runs with
    driver: str
    threads: int
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.side, self.mode


def commit() -> str:
    """The commit that is measured; "+dirty" where the tree differs from it in more than what a benchmark writes.

    CONDENSE_COMMIT says it for a copy of the files that has no history.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy of the files alone
        return environment.read("CONDENSE_COMMIT") or "unknown"


def model() -> str:
    """The processor's name and family: of a rented one the name alone may be that of several generations."""
    family = next(
        (line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("cpu family")), ""
    )
    return f"{processor()[0]} family {family}" if family else processor()[0]


def provenance(device: str) -> dict[str, str | int]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else ", ".join([model(), processor()[1]]),
        "instruction_set": "" if device == "cuda" or library.cpp_unavailable() else torch.ops.condense.cpu_capability(),
        "driver": driver() if device == "cuda" else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def slug(device: str) -> str:
    """The name of this device's file of results."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        widest = next((name for name in SIMD if name in processor()[1].split()), "")
        name = f"{model()} {widest} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_file(device: str) -> Path:
    return RESULTS / f"{slug(device)}.csv"


def _value(field: dataclasses.Field, text: str):
    if type(None) in typing.get_args(field.type):
        if text == "":
            return None
        return typing.get_args(field.type)[0](text)
    return field.type(text)


def read(file: Iterable[str]) -> list[Row]:
    """A file may be older than a column."""
    fields = dataclasses.fields(Row)
    return [
        Row(**{field.name: _value(field, line.get(field.name, "")) for field in fields})
        for line in csv.DictReader(file)
    ]


def read_path(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return read(file)


def read_commit(reference: str, path: Path) -> list[Row]:
    """The rows of ``path`` as they were at a commit."""
    name = path.resolve().relative_to(ROOT).as_posix()
    shown = subprocess.run(["git", "show", f"{reference}:{name}"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        raise ValueError(
            f"--compare: expected a commit that has {name}, got {reference!r} ({shown.stderr.strip()}). "
            f"Remedy: git log -- {name}"
        )
    return read(io.StringIO(shown.stdout))


def write(path: Path, rows: list[Row]) -> None:
    """Rows of the same operator, shape, side and mode are replaced, others stay: each says its commit and date."""
    kept = {row.key: row for row in (read_path(path) if path.exists() else [])}
    kept |= {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, [dataclasses.asdict(row) for row in kept.values()])


def replace(path: Path, rows: list[dict]) -> None:
    """The file as a whole, at once: a run that is killed leaves the last one that was complete."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            )
    new.replace(path)


def number(value: float | None, form: str = ".3g") -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else format(value, form)


def case_table(rows: list[Row], leaves_out: dict[str, str]) -> Table:
    """The sides of one case, as they ran beside each other."""
    first = rows[0]
    ceilings = f"ceilings {first.ceiling_gflops:.0f} GFLOP/s, {first.ceiling_gbs:.0f} GB/s"
    if first.peak_gflops:
        ceilings += f", peak {first.peak_gflops:.0f} GFLOP/s"
    title = f"{first.op}, {first.shape}: {first.B} x {first.N} x {first.D}, K = {first.K} ({ceilings})"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("side", no_wrap=True)
    columns = ["median ms", "p20", "p80", "x first", "GFLOP/s", "GB/s", "peak MB"]
    counted = any(row.launches is not None for row in rows)
    for name in columns + ["launches"] * counted:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("leaves out")
    for row in rows:
        table.add_row(
            row.side if row.mode == "call" else f"{row.side} ({row.mode})",
            number(row.median_ms),
            number(row.p20_ms),
            number(row.p80_ms),
            number(row.x_base),
            number(row.gflops),
            number(row.gbs),
            number(row.peak_extra_mb),
            *(["" if row.launches is None else str(row.launches)] * counted),
            leaves_out.get(row.side, ""),
            style="bold" if row.side.startswith("ours") else "",
        )
    return table


def comparison_table(rows: list[Row], before: list[Row], reference: str) -> Table:
    """Time, and time relative to the case's first side, which a slower or faster day of the machine leaves alone."""
    old = {row.key: row for row in before}
    commits = ", ".join(sorted({row.commit for row in before}))
    title = f"change since {reference} (rows of {commits})"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("operator", "shape", "side"):
        table.add_column(name, no_wrap=True)
    for name in ("before ms", "now ms", "change", "before x first", "now x first", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.key in old:
            was = old[row.key]
            table.add_row(
                row.op,
                row.shape,
                row.side if row.mode == "call" else f"{row.side} ({row.mode})",
                number(was.median_ms),
                number(row.median_ms),
                f"{row.median_ms / was.median_ms - 1:+.0%}",
                number(was.x_base),
                number(row.x_base),
                f"{row.x_base / was.x_base - 1:+.0%}",
            )
    if not table.row_count:
        table.caption = f"{reference} has none of these rows"
    return table
