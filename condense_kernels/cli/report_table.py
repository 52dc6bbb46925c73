"""The efficiency table: for a terminal, in words, and for a file."""

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import __version__
from ..models import efficiency, formulas
from ..models.efficiency import Row
from . import env

MEASURES = {"total": "total time", "first": "time to first token"}


def provenance(arguments: Any, model: Any, prompts: int, question: str, clock: str) -> dict[str, Any]:
    """What was measured, and where."""
    on_gpu = model.device.type == "cuda"
    return {
        "model": f"{arguments.model} ({type(model).__name__})",
        "device": env.gpus()[0] if on_gpu else ", ".join(env.processor()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": env.version("transformers"),
        "condense_kernels": __version__,
        "prompts": prompts,
        "question": question,
        "new tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "clock": "wall time" if clock == "wall" else "CPU time of all threads",
        "weights, MB": round(efficiency.weight_bytes(model) / 1e6, 3),
        "peak memory": "torch.cuda.max_memory_allocated"
        if on_gpu
        else "weights, and the most that tensors of the call took at a time",
    }


def decoder_of(model: Any) -> formulas.Decoder | None:
    try:
        return formulas.Decoder.of(model.config)
    except ValueError:
        return None


def line(row: Row, everything: Row, model: Any) -> dict[str, Any]:
    """Every number of a row, by the name of its column in the file."""
    numbers: dict[str, Any] = {"method": row.side.method or "all tokens", "keep": row.side.keep}
    if row.reason:
        return {**numbers, "reason": row.reason}
    for name in ("visual", "prompt"):
        numbers[f"{name}_tokens"] = row.mean(name)
    for name in ("total", "first", "token", "wall", "operator"):
        low, high = row.quartiles(name)
        numbers |= {f"{name}_ms": row.median(name), f"{name}_ms_q1": low, f"{name}_ms_q3": high}
    numbers["operator_share"] = row.median("share")
    for name in ("flops", "decoder_flops", "operator_flops"):
        numbers[name] = row.mean(name)
    for name in ("kv", "peak"):
        numbers[f"{name}_mb"] = row.mean(f"{name}_bytes") / 1e6
    decoder = decoder_of(model)
    if decoder is not None:
        numbers |= by_formula(decoder, row, everything, model.dtype.itemsize)
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in numbers.items()}


def by_formula(decoder: formulas.Decoder, row: Row, everything: Row, itemsize: int) -> dict[str, float]:
    """Of the visual tokens alone, as the papers have it, but for kv_prompt."""

    def mean(of: Callable[[int], float], counts: Iterable[int]) -> float:
        return math.fsum(map(of, counts)) / len(row.counts)

    visual, prompt = ([getattr(count, name) for count in row.counts] for name in ("visual", "prompt"))
    eq9 = mean(lambda n: formulas.flops(decoder, n), visual)
    whole = mean(lambda n: formulas.flops(decoder, n), [count.visual for count in everything.counts])
    return {
        "flops_eq9": eq9,
        "flops_eq9_share": eq9 / whole,
        "kv_visual_mb_formula": mean(lambda n: formulas.kv_bytes(decoder, n, itemsize), visual) / 1e6,
        "kv_prompt_mb_formula": mean(lambda n: formulas.kv_bytes(decoder, n, itemsize), prompt) / 1e6,
    }


def number(value: float, significant: int = 3) -> str:
    if math.isnan(value):
        return "-"
    digits = significant - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"


def with_spread(row: Row, name: str) -> str:
    low, high = row.quartiles(name)
    return "-" if math.isnan(low) else f"{number(row.median(name))} ± {number((high - low) / 2, 2)}"


COLUMNS = (
    "visual\ntokens", "total,\nms", "first token,\nms", "each after,\nms", "operator", "peak,\nMB", "FLOPs,\nEq. 9",
    "prefill,\nGFLOP", "KV,\nMB", "KV, MB,\nformula",
)  # fmt: skip


def title(about: dict[str, Any]) -> str:
    return f"{about['model']}, {about['new tokens']} new tokens; {about['device']}, {about['dtype']}"


def table(rows: list[Row], model: Any) -> Table:
    table = Table(padding=(0, 0, 0, 1))
    table.add_column("method", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        last = after is not None and after.side.keep != row.side.keep
        ours = row.side.method == "condensevlm"
        table.add_row(*cells(row, rows[0], model), style="bold" if ours else "", end_section=last)
    return table


def cells(row: Row, everything: Row, model: Any) -> list[str]:
    numbers = line(row, everything, model)
    if row.reason:
        return [numbers["method"], *("-" for _ in COLUMNS)]
    eq9 = numbers.get("flops_eq9_share")
    return [
        numbers["method"],
        f"{numbers['visual_tokens']:.0f}",
        *(with_spread(row, name) for name in ("total", "first")),
        number(row.median("token")),
        f"{100 * numbers['operator_share']:.1f} %" if row.side.method else "",
        number(numbers["peak_mb"]),
        "-" if eq9 is None else f"{100 * eq9:.1f} %",
        number(numbers["flops"] / 1e9),
        number(numbers["kv_mb"]),
        number(numbers["kv_visual_mb_formula"]) if eq9 is not None else "-",
    ]


def threads_of(about: dict[str, Any]) -> str:
    return "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"


def notes(about: dict[str, Any]) -> str:
    prompts = "one prompt" if about["prompts"] == 1 else f"{about['prompts']} prompts, of which all numbers are means"
    return f"""\
times     {about["clock"]}, {threads_of(about)}; {prompts}; median of {about["rounds"]} rounds with the sides in turn,
          ± half the distance of the quartiles. Total is generate, first token has the encoder and prefill in it
operator  scores and selection, their share of the time to first token
peak      {about["peak memory"]}
FLOPs     Eq. 9 of CondenseVLM, visual tokens in the language model, share of all tokens'; prefill: counted, two a
          multiply-add, encoder and text included
KV        counted after prefill, text included; formula: of the visual tokens
versions  torch {about["torch"]}, transformers {about["transformers"]}"""


def listed(rows: list[Row], name: str) -> str:
    """By method: its budgets, and the time of each."""
    found: dict[str, list[str]] = {}
    for row in rows:
        shown = f"{row.mean('visual'):.0f} ({number(row.median(name))} ms)"
        found.setdefault(row.side.method or "", []).append(shown)
    return "; ".join(f"{method} at {', '.join(budgets)}" for method, budgets in found.items())


def words(rows: list[Row]) -> str:
    """Which rows are not faster than all tokens, so that nobody has to look for it."""
    everything, *others = rows
    lines = [f"{efficiency.named(row.side)}: not measured. {row.reason}" for row in others if row.reason]
    others = [row for row in others if not row.reason]
    for name, what in MEASURES.items():
        own, (low, _) = everything.median(name), everything.quartiles(name)
        slower = [row for row in others if row.median(name) >= own]
        unclear = [row for row in others if row not in slower and row.quartiles(name)[1] >= low]
        if slower:
            lines.append(f"NOT FASTER than all tokens ({number(own)} ms) in {what}: {listed(slower, name)}.")
        if unclear:
            lines.append(f"Faster than all tokens in {what} by less than the spread: {listed(unclear, name)}.")
        if not slower and not unclear:
            lines.append(f"Every row is faster than all tokens in {what}, by more than the spread.")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[Row], about: dict[str, Any], model: Any) -> None:
    """Lines that begin with # say where the numbers come from."""
    lines = [line(row, rows[0], model) for row in rows]
    write(path, about, lines, [*lines[0], *(["reason"] if any(row.reason for row in rows) else [])])


def write(path: Path, about: dict[str, Any], lines: list[dict[str, Any]], names: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        for name, value in about.items():
            file.write(f"# {name}: {' '.join(str(value).split())}\n")
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def formula_line(known: formulas.Known, tokens: int, kept: int) -> dict[str, Any]:
    printed = known.printed.get(kept, formulas.Printed()) if tokens == known.tokens else formulas.Printed()
    return {
        "visual_tokens": kept,
        "flops_eq9": formulas.flops(known.decoder, kept),
        "flops_eq9_share": round(formulas.flops_left(known.decoder, tokens, kept), 6),
        "kv_mb": formulas.kv_bytes(known.decoder, kept, known.itemsize) / 1e6,
        "papers_flops": printed.flops,
        "papers_kv_mb": printed.kv_mb,
    }


def sizes_of(known: formulas.Known) -> str:
    decoder = known.decoder
    return (
        f"T = {decoder.layers}, d = {decoder.width}, m = {decoder.hidden}, keys and values of {decoder.kv_width}, "
        f"{known.itemsize} bytes an element"
    )


def formula_table(known: formulas.Known, counts: list[int]) -> Table:
    table = Table(padding=(0, 0, 0, 1))
    for name in ("visual tokens", "GFLOP, Eq. 9", "of all tokens'", "KV cache, MB"):
        table.add_column(name, justify="right")
    printed = bool(known.printed)
    for name in ("in the papers: FLOPs", "KV, MB") if printed else ():
        table.add_column(name, justify="right", no_wrap=True)
    for kept in counts:
        of = formula_line(known, counts[0], kept)
        kv = f"{of['kv_mb']:.1f}" if of["kv_mb"] >= 10 else number(of["kv_mb"])
        cells = [str(kept), number(of["flops_eq9"] / 1e9), f"{100 * of['flops_eq9_share']:.1f} %", kv]
        table.add_row(*cells, *((of["papers_flops"], of["papers_kv_mb"]) if printed else ()))
    return table


def write_formula_csv(path: Path, known: formulas.Known, counts: list[int]) -> None:
    about = {"model": known.title, "language model": sizes_of(known), "measured": "nothing"}
    lines = [formula_line(known, counts[0], kept) for kept in counts]
    write(path, about, lines, list(lines[0]))
