"""run a table of the paper with lmms-eval, row by row, and print it beside the paper's numbers

The row of all tokens comes first: where it misses the paper's by more than --tolerance, no other row is run, as nothing
could be learned from it. What was not run is printed so. A row's results are kept in --output and used again.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..lmms import VERSION, local, tables
from . import CommandError, checkpoint, make_console, need, waiting
from .arguments import check_name, decimal, whole

REMEDY = f"pip install --no-deps lmms-eval=={VERSION}, and what it imports"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", choices=tuple(tables.TABLES), required=True, help="2 of the paper, or the tiny LLaVA's"
    )
    parser.add_argument("--model", metavar="PATH", help="folder or name of the checkpoint (default: the table's)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lmms-eval (default: the table's)")
    parser.add_argument("--keep", type=whole(1), nargs="+", metavar="K", help="rows of these budgets (default: all)")
    parser.add_argument(
        "--limit", type=whole(1), metavar="N", help="samples of a task: a trial, not the paper's number"
    )
    parser.add_argument("--tolerance", type=decimal(0, 100), default=1.0, metavar="PERCENT",
                        help="of the paper's upper bound (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("reproduced"), metavar="DIR", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    need("yaml", "rich", remedy="pip install 'condense-kernels[cli,models]'")
    need("lmms_eval", remedy=REMEDY)
    table = tables.TABLES[arguments.table]
    known = list(dict.fromkeys(benchmark.task for benchmark in table.benchmarks))
    for task in arguments.tasks or ():
        check_name("--tasks", task, known)
    tasks = [task for task in known if task in (arguments.tasks or known)]
    rows = table.rows()
    if unknown := {str(k) for k in arguments.keep or ()} - {row.num_tokens for row in rows}:
        raise CommandError(f"--keep: expected budgets of table {arguments.table}, got {', '.join(sorted(unknown))}")
    found: dict[str, dict[str, Any]] = {}
    try:
        for row in rows:
            if row.num_tokens is None or arguments.keep is None or int(row.num_tokens) in arguments.keep:
                of_row = found.setdefault(row.label, {})
                for task in tasks:
                    of_row[task] = measured(row, task, arguments)
                    if row.num_tokens is None:
                        check_bound(table, row, {task: of_row[task]}, arguments)
    finally:
        show(table, rows, found, arguments)
    return 0


def measured(row: tables.Row, task: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The metrics of one row on one task: those of an earlier run with the same settings, or of lmms-eval now."""
    given = tables.arguments_of(row.config)
    given["pretrained"] = str(arguments.model or given["pretrained"])
    if given["pretrained"] == checkpoint.TINY:
        from ..tiny_llava import PATH

        given["pretrained"] = str(PATH)
    if not torch.cuda.is_available():  # lmms-eval's own default is cuda
        given.setdefault("device", "cpu")
    config = {**row.config, "tasks": task, "model_args": ",".join(f"{name}={value}" for name, value in given.items())}
    settings = {"model_args": config["model_args"], "task": task, "limit": arguments.limit, "lmms-eval": VERSION}
    kept = arguments.output / f"{row.label.replace(', ', '-').replace(' ', '_')}-{task}.json"
    if kept.exists():
        record = json.loads(kept.read_text(encoding="utf-8"))
        if record["settings"] == settings:
            return record["metrics"]
    with tempfile.TemporaryDirectory() as folder, waiting(f"{row.label}: {task}"):
        metrics = evaluate(config, task, arguments.limit, Path(folder))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"settings": settings, "metrics": metrics}, indent=1), encoding="utf-8")
    return metrics


def evaluate(config: dict[str, Any], task: str, limit: int | None, folder: Path) -> dict[str, float]:
    tasks = local.TASKS
    if task == local.NAME:
        tasks = folder / "tasks"
        local.write(tasks, 50)
    config = {**config, "output_path": str(folder / "out"), "include_path": str(tasks)}
    if limit is not None:
        config["limit"] = limit
    (folder / "config.json").write_text(json.dumps([config]), encoding="utf-8")  # which is YAML, too
    command = [sys.executable, "-m", "lmms_eval", "--config", str(folder / "config.json")]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    last = telling(done.stdout)
    if done.returncode:
        raise CommandError(f"lmms-eval failed on {task} (a dataset missing?), {config['model_args']}: {last}")
    return read(folder / "out", task, last)


def telling(output: str) -> str:
    """Of what lmms-eval printed, the last line that names an error; progress bars may follow it."""
    lines = output.strip().splitlines() or ["nothing printed"]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1]).strip()


def read(folder: Path, task: str, last: str = "") -> dict[str, float]:
    """The metrics that lmms-eval wrote; it swallows errors, so that no file or an empty answer is one."""
    results, samples = sorted(folder.rglob("*_results.json")), sorted(folder.rglob(f"*_samples_{task}.jsonl"))
    if not results or not samples:
        raise CommandError(f"lmms-eval wrote no results of {task} (a dataset missing?): {last}")
    lines = samples[-1].read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["filtered_resps"] for line in lines]
    empty = sum(not str(a[0] if isinstance(a, list) and a else a or "").strip() for a in answers)
    if empty or not answers:
        raise CommandError(f"{task}: expected an answer to every question, got {empty} empty of {len(answers)}")
    record = json.loads(results[-1].read_text(encoding="utf-8"))
    asked = record["n-samples"][task]["effective"]
    if len(answers) != asked:
        raise CommandError(f"{task}: expected an answer to each of {asked} questions, got {len(answers)}")
    values = record["results"][task]
    return {k.partition(",")[0]: v for k, v in values.items() if isinstance(v, int | float) and "_stderr" not in k}


def value_of(benchmark: tables.Benchmark, found: dict[str, dict[str, float]]) -> float:
    metrics = found.get(benchmark.task, {})
    return benchmark.scale * sum(metrics.get(name, math.nan) for name in benchmark.metrics)


def check_bound(table: tables.Table, row: tables.Row, found: dict[str, Any], arguments: argparse.Namespace) -> None:
    for benchmark in table.benchmarks:
        paper, ours = table.printed(row, benchmark), value_of(benchmark, found)
        if benchmark.task not in found or math.isnan(paper):
            continue
        if not abs(ours - paper) <= arguments.tolerance / 100 * paper:
            raise CommandError(f"{benchmark.name}: expected all tokens within {arguments.tolerance:g} % of {paper:g}, "
                               f"the paper's, got {ours:.1f}; no other row is run")  # fmt: skip


def show(table: tables.Table, rows: list[tables.Row], found: dict[str, Any], arguments: argparse.Namespace) -> None:
    console, bound = make_console(), found.get("all tokens", {})
    console.print(table.title + (f"; {arguments.limit} samples a task: a trial" if arguments.limit else ""))
    for row in rows:
        console.print(row.label)
        for benchmark in table.benchmarks:
            ours, paper, whole = (value_of(benchmark, found.get(row.label, {})), table.printed(row, benchmark),
                                  value_of(benchmark, bound))  # fmt: skip
            cell = "not run" if math.isnan(ours) else f"{ours:.1f}"
            share = f", {100 * ours / whole:.1f} % of all tokens" if whole and not math.isnan(ours / whole) else ""
            printed = "" if math.isnan(paper) else f" (paper {paper:g})"
            console.print(f"  {benchmark.name}: {cell}{printed}{share}")
