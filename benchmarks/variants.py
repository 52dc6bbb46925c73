"""Launch choices worth measuring, one against another: run it on a GPU, and condense_kernels/_triton/tables.py can cite
times.

Each variant is the flagship with some fields of a launch config changed. Its results must be those of the default, bit
for bit. On a GPU every variant is timed by replaying a CUDA graph ten times, with its inputs in the L2 cache, all of
them in turn, so that a drifting clock harms all alike; one that does not compile or launch says why in its row, and the
others are timed. Without a GPU there are no times: the bits are compared in Triton's interpreter, which knows no warps
and no pipelines, and the kernels that a variant changes are compiled for sm_90 and counted. The file is written anew
after every round and every kernel.

    python benchmarks/variants.py [--csv FILE]

Not here: other sizes of the similarity tile and of its steps along the channels, which may change bits; and loading the
next row ahead of its pick, which cannot start before the pick is known.
"""

import argparse
import contextlib
import datetime
import functools
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable

if __name__ == "__main__" and "--bits" not in sys.argv:  # read when triton is imported
    os.environ.pop("TRITON_INTERPRET", None)

import harness
import inspect_kernels
import rows
import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from condense_kernels._triton.tables import (
    AssignConfig,
    FusedConfig,
    MergeConfig,
    SelectConfig,
    SimilarityConfig,
    StreamConfig,
    next_power_of_2,
    trying,
)
from condense_kernels.ops.select_and_merge.kernel import select_and_merge, workspace_bytes

SHAPES = {"N=576 K=192": (576, 144, 48), "N=2880 K=320": (2880, 240, 80)}  # N, num_anchors, num_background
CHANNELS = 1024
ROUNDS, REPLAYS = 30, 10

Changes = list[tuple[type, dict]]


def variants(n: int) -> dict[str, Changes]:
    """Label -> what to change, for one image of n tokens. The first one is the default."""
    padded = next_power_of_2(n)
    found = {
        "default": [],
        "similarity: 8 warps": [(SimilarityConfig, {"num_warps": 8})],
        "similarity: 2 stages": [(SimilarityConfig, {"num_stages": 2})],
        "similarity: 4 stages": [(SimilarityConfig, {"num_stages": 4})],
        "select: N padded, no chunks": [(SelectConfig, {"block": padded}), (FusedConfig, {"width": padded})],
        "select: the likely next row ahead": [(SelectConfig, {"ahead": True})],
        "assign: by the selection": [(FusedConfig, {"assign_in_select": True})],
        "assign: 16 tokens": [(AssignConfig, {"block_n": 16})],
        "assign: 64 tokens": [(AssignConfig, {"block_n": 64})],
        "assign: 8 rows at a time": [(AssignConfig, {"block_k": 8})],
        "merge: 512 channels, 2 warps": [(MergeConfig, {"block_d": 512, "num_warps": 2})],
        "merge: 8 warps": [(MergeConfig, {"num_warps": 8})],
        "merge: 256 tokens at a time": [(MergeConfig, {"block_n": 256})],
        "s not stored": [(FusedConfig, {"store_s": False})],
        "s not stored, no turns to spare": [(FusedConfig, {"store_s": False}), (StreamConfig, {"spare_turns": 0})],
    }
    for block, warps in ((64, 2), (128, 1), (128, 2), (128, 4)) if n <= 1024 else ((512, 8), (1024, 4), (1024, 8)):
        found[f"select: chunks of {block}, {warps} warps"] = [(SelectConfig, {"block": block, "num_warps": warps})]
    return found


@contextlib.contextmanager
def changed(changes: Changes):
    with contextlib.ExitStack() as stack:
        for config, fields in changes:
            stack.enter_context(trying(config, **fields))
        yield


def inputs(n: int, channels: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(1, n, channels, generator=generator) + torch.randn(1, 1, channels, generator=generator)
    return features.to(device, torch.bfloat16), torch.rand(1, n, generator=generator).to(device)


def same_bits(results, expected) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(results, expected, strict=True)
    )


class Captured:
    """A variant as a CUDA graph that owns its memory."""

    def __init__(self, features, scores, num_anchors, num_background, changes):
        b, n, d = features.shape
        k = num_anchors + num_background
        with changed(changes):
            self.out = (
                features.new_empty((b, k, d)),
                torch.empty((b, k), dtype=torch.int64, device=features.device),
                torch.empty((b, n), dtype=torch.int64, device=features.device),
                torch.empty((b, k), device=features.device),
            )
            self.workspace = torch.empty(
                workspace_bytes(b, n, k, d, features.dtype), dtype=torch.uint8, device=features.device
            )

            def run():
                select_and_merge(
                    features, scores, num_anchors, num_background,
                    grid=(1, n), out=self.out, workspace=self.workspace,
                )  # fmt: skip

            run()  # compiles
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                run()

    def microseconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()  # while it runs, the host gets ahead: no launch is waited for between the events
        start.record()
        for _ in range(REPLAYS):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / REPLAYS


Keep = Callable[[list[dict]], None]  # what a shape has so far


def timed(name: str, keep: Keep) -> None:
    n, *kept = SHAPES[name]
    features, scores = inputs(n, CHANNELS, "cuda")
    captured, errors = {}, {}
    for label, changes in track(variants(n).items(), f"{name}, capturing"):
        try:
            captured[label] = Captured(features, scores, *kept, changes)
        except Exception as error:  # of one variant: more shared memory than there is, say
            errors[label] = f"{type(error).__name__}: {error}"
    times = {label: [] for label in captured}
    harness.busy()
    for turn in track(range(ROUNDS + 1), f"{name}, {len(captured)} variants"):
        for label, graph in captured.items():
            value = graph.microseconds()
            if turn > 0:  # the first warms up
                times[label].append(value)
        keep([row_of(name, label, times, captured, errors) for label in variants(n)])


def row_of(name: str, label: str, times: dict, captured: dict[str, Captured], errors: dict[str, str]) -> dict:
    row = {"shape": name, "variant": label, "error": errors.get(label, "")}
    if label not in captured or "default" not in captured:
        return row | dict.fromkeys(("same_bits", "rounds", "p20_us", "median_us", "p80_us"))
    same, values = same_bits(captured[label].out, captured["default"].out), torch.tensor(times[label] or [torch.nan])
    low, median, high = (round(x, 2) for x in values.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist())
    measured = {"rounds": len(times[label]), "p20_us": low, "median_us": median, "p80_us": high}
    return row | {"same_bits": same, **measured}


def counted(name: str, keep: Keep, same: dict[str, bool]) -> None:
    """The kernels of each variant that differ from the default's, as compiled for sm_90."""
    n, *kept = SHAPES[name]
    tensors = [inspect_kernels.empty(1, n, CHANNELS, dtype=torch.bfloat16), inspect_kernels.empty(1, n)]
    jobs, default = [], set()
    for label, changes in variants(n).items():
        with changed(changes):
            launches = inspect_kernels.launches(select_and_merge, (*tensors, *kept), {"grid": (1, n)})
        seen = set()
        for kernel, arguments, options in launches:
            source = inspect_kernels.source_of(kernel, arguments)
            specialised = str((kernel.__name__, source.signature, source.constants, source.attrs, options))
            if specialised not in default | seen:
                seen.add(specialised)
                jobs.append((label, kernel, source, options))
        if label == "default":
            default = seen
    columns = ("instructions", "registers", "spills", "shared", "pick_loop", "barriers")
    so_far = []
    for label, kernel, source, options in track(jobs, f"{name}, compiling for sm_90"):
        found = inspect_kernels.inspect_compiled(kernel, source, options, "sm_90")
        row = {"shape": name, "variant": label, "kernel": kernel.__name__}
        so_far.append(row | {column: found[column] for column in columns} | {"same_bits": same.get(label)})
        keep(so_far)


def interpreted() -> dict[str, bool]:
    """Label -> the bits of the default? At a small size, in a process where triton interprets."""
    command = [sys.executable, "-W", "ignore", __file__, "--bits"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"comparing bits in the interpreter failed:\n{run.stderr}")
    return {label: same == "True" for same, label in (line.split(" ", 1) for line in run.stdout.splitlines())}


def print_bits() -> None:
    n = 130
    features, scores = inputs(n, 16, "cpu")
    expected = None
    for label, changes in variants(n).items():
        with changed(changes):
            results = select_and_merge(features, scores, 6, 3, grid=(10, 13))
        expected = results if expected is None else expected
        print(same_bits(results, expected), label)


def provenance() -> dict:
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"none, compiled on {platform.machine()}",
        "cuda": torch.version.cuda if gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": rows.commit(),
        "date": datetime.date.today().isoformat(),
    }


def show(found: list[dict], title: str) -> None:
    table = Table(*found[0], title=title)
    for row in found:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=pathlib.Path, help="also write the rows to this file")
    parser.add_argument("--bits", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bits:
        return print_bits()
    origin, found = provenance(), {}

    def keep(name: str, so_far: list[dict]) -> None:
        found[name] = so_far
        if options.csv:
            rows.replace(options.csv, [row | origin for part in found.values() for row in part])

    if torch.cuda.is_available():
        title = "select_and_merge, CUDA-graph replay, microseconds"
        for name in SHAPES:
            timed(name, functools.partial(keep, name))
    else:
        title, same = "What a variant changes, counted in sm_90 code: no times", interpreted()
        show([{"variant": label, "same bits in the interpreter": bits} for label, bits in same.items()], "")
        for name in SHAPES:
            counted(name, functools.partial(keep, name), same)
    show(all_rows := [row for part in found.values() for row in part], title)
    wrong = sorted({row["variant"] for row in all_rows if row["same_bits"] is False or row.get("error")})
    if wrong:
        sys.exit(f"other bits than the default, or an error: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
