"""Times this tree against another one on the same machine, and says what changed beyond the noise.

    python benchmarks/against.py measure OTHER changes.json [--rounds 4] [-k EXPRESSION]
    python benchmarks/against.py table changes.json          # in Markdown

Both trees have to be built in place; `make bench-against BASE=OTHER` does that, too. They run in turn, in processes of
their own, and which is first changes from round to round, so that a drifting machine harms both alike. The baselines
are torch's or published code in both trees, so what their times change by is noise: what changes less says nothing.

Nothing here is imported from the package or from torch: a hosted job turns into a comment what a job without rights has
measured, so `table` takes the file for untrusted, and passes on names, numbers and no other text.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = (
    "-m pytest benchmarks --benchmark-only --benchmark-quiet -q --show-capture=no "
    "-p no:cacheprovider -p no:randomly -p no:warnings"
)
# One call of each operator in what it costs at least, and the sizes of LLaVA-1.5 and of all crops of LLaVA-NeXT.
SELECTED = "overhead or (llava15-64 and not batch8) or (llava-next-global and not varlen)"
KEY = ("op", "shape", "side", "mode")
ORIGIN = ("device", "instruction_set", "threads", "torch", "commit")
SMALLEST = 0.05  # a change that is worth a word, however quiet the machine


def run(tree: Path, rows: Path, arguments: list[str]) -> list[dict[str, str]]:
    """The rows of one run of a tree's benchmarks."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.pop("PYTHONSAFEPATH", None)  # benchmarks start others of their folder, which import what is beside them
    command = [sys.executable, *PYTEST.split(), "--csv", str(rows), *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode or not rows.exists():
        raise SystemExit(
            f"{tree}: {' '.join(command)} failed with status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    with rows.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(base: Path, head: Path, rounds: int, arguments: list[str]) -> dict:
    trees, times, origin = {"base": base.resolve(), "head": head}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name in ("base", "head") if turn % 2 == 0 else ("head", "base"):
                print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                for row in run(trees[name], Path(folder, f"{name}-{turn}.csv"), arguments):
                    times.setdefault(tuple(row[column] for column in KEY), {"base": [], "head": []})[name].append(
                        float(row["median_ms"])
                    )
                    origin[name] = {column: re.sub(r"[^\w .,()+/-]", " ", row[column]) for column in ORIGIN}
    both = {key: found for key, found in times.items() if len(found["base"]) == len(found["head"]) == rounds}
    return {"origin": origin, "rows": [{**dict(zip(KEY, key, strict=True)), **found} for key, found in both.items()]}


# What follows takes the file for untrusted


def name_of(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w .,()+/-]{0,200}", value, re.ASCII):
        raise ValueError(f"expected a name of letters, digits, spaces and .,()+/-, got {value!r:.100}")
    return value


def times_of(value: object) -> list[float]:
    numbers = isinstance(value, list) and all(type(number) in (int, float) for number in value)
    if not numbers or not value or not all(0 < number < math.inf for number in value):
        raise ValueError(f"expected times above 0, got {value!r:.100}")
    return value


def checked(text: str) -> dict:
    """What `measure` wrote, or ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or set(found) != {"origin", "rows"} or not isinstance(found["rows"], list):
        raise ValueError("expected origin and rows")
    origin = {tree: {column: name_of(found["origin"][tree][column]) for column in ORIGIN} for tree in ("base", "head")}
    rows = []
    for row in found["rows"]:
        names = {column: name_of(row[column]) for column in KEY}
        base, head = times_of(row["base"]), times_of(row["head"])
        if len(base) != len(head):
            raise ValueError(f"expected as many times of both trees, got {len(base)} and {len(head)}")
        rows.append({**names, "base": base, "head": head})
    if not 0 < len(rows) <= 400:  # more than a comment holds
        raise ValueError(f"expected 1 to 400 rows that both trees have, got {len(rows)}")
    return {"origin": origin, "rows": rows}


def is_ours(row: dict) -> bool:
    return row["side"].startswith("ours") or row["op"] == "calls"


def changes(row: dict) -> list[float]:
    """Of the time, round by round, so that only what changes within a round is in it."""
    return [head / base - 1 for base, head in zip(row["base"], row["head"], strict=True)]


def noise_of(rows: list[dict]) -> float:
    """What baselines change by at most in nine of ten rounds, for no reason of ours."""
    found = sorted(abs(change) for row in rows if not is_ours(row) for change in changes(row))
    return max(SMALLEST, found[math.ceil(0.9 * len(found)) - 1] if found else 0.0)


def verdict(row: dict, noise: float) -> str:
    """Every round has to show it: medians beyond the noise are common among so many rows, of equal trees, too."""
    found = changes(row)
    return "slower" if min(found) > noise else "faster" if max(found) < -noise else ""


def line(row: dict, noise: float) -> str:
    name = row["side"] if row["mode"] == "call" else f"{row['side']} ({row['mode']})"
    base, head, found = statistics.median(row["base"]), statistics.median(row["head"]), changes(row)
    spread = f"{min(found):+.0%} to {max(found):+.0%}"
    said = verdict(row, noise)
    cells = [row["op"], row["shape"], name, f"{base:.3g}", f"{head:.3g}", f"{statistics.median(found):+.1%}", spread]
    return f"| {' | '.join([*cells, f'**{said}**' if said else ''])} |"


def table(found: dict) -> str:
    rows, (base, head) = found["rows"], (found["origin"][tree] for tree in ("base", "head"))
    noise, ours = noise_of(rows), [row for row in rows if is_ours(row)]
    told = [row for row in ours if verdict(row, noise)]
    top = ["| operator | shape | side | base ms | head ms | change | rounds | |", "|---|---|---|--:|--:|--:|--:|---|"]
    slower = sum(verdict(row, noise) == "slower" for row in told)
    summary = f"{slower} slower, {len(told) - slower} faster, {len(ours) - len(told)} within the noise of {noise:.0%}"
    rounds = len(rows[0]["base"])
    return "\n".join(
        [
            f"### Times: {summary}",
            "",
            f"{base['commit']} against {head['commit']}, in turn, {rounds} rounds on one machine ({head['device']}; "
            f"{head['threads']} threads, torch {head['torch']}). Medians of the rounds; a change is told if each round "
            f"shows it, beyond what baselines, the same code in both, change by in nine of ten rounds ({noise:.0%}).",
            "",
            *([*top, *(line(row, noise) for row in told)] if told else ["Nothing changed."]),
            "",
            f"<details><summary>all {len(rows)} rows, baselines too</summary>",
            "",
            *top,
            *(line(row, noise) if is_ours(row) else line(row, math.inf) for row in rows),
            "",
            "</details>",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="time both trees into a file")
    measuring.add_argument("base", type=Path, help="the other tree, built in place")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--rounds", type=int, default=4, help="runs of each tree (%(default)s)")
    measuring.add_argument("-k", default=SELECTED, metavar="EXPRESSION", help="which benchmarks: %(default)s")
    showing = commands.add_parser("table", help="print what a file says, in Markdown")
    showing.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        try:
            print(table(checked(arguments.file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{arguments.file}: not what `measure` writes: {error}")
        return
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected at least 2, so that rounds can disagree, got {arguments.rounds}")
    if not (arguments.base / "benchmarks" / "conftest.py").is_file():
        parser.error(f"base: expected a tree of this project, got {arguments.base}")
    found = measure(arguments.base, ROOT, arguments.rounds, ["-k", arguments.k])
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    arguments.file.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
