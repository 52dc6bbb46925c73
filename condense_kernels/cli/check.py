"""hold every backend that this machine has to the reference

Each case runs on each backend and dtype. A backend may round cosines differently from the fp64 reference, and so pick
another token where two are closer than that rounding: the column "selected" says how many kept tokens differ from
those of the reference in fp64 (which is right only in a tie, up to rounding), and the verdict comes from comparing
every step given what was chosen before it, with derived bounds (condense_kernels/testing/). A mismatch makes the
exit status 1.

On a machine without a GPU, TRITON_INTERPRET=1 adds the Triton kernels in Triton's interpreter (small cases, slow).
"""

import argparse
import warnings
from typing import NamedTuple

import torch

from .._dispatch import backends
from ..ops.greedy_select import reference as greedy_reference
from ..ops.similarity.reference import TAKEN
from ..testing import KINDS, Finding, Inputs, compare, compare_alone, exact_similarity, make_inputs
from . import make_console, make_progress, need, print_table

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUICK_KINDS = ("random", "clustered", "duplicates", "nan", "masked")
INTERPRETER_TOKENS = 64  # the interpreter takes seconds above


class Case(NamedTuple):
    name: str
    options: dict  # of make_inputs
    dtypes: tuple[torch.dtype, ...]


class Backend(NamedTuple):
    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    @property
    def label(self) -> str:
        return "triton (interpreter)" if self.interpreted else self.name


class Verdict(NamedTuple):
    case: str
    backend: str
    dtype: str
    selected: str
    worst: str
    ok: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few seconds: small shapes, fp32 and bf16")


def make_cases(quick: bool) -> list[Case]:
    few = (torch.float32, torch.bfloat16)
    if quick:
        return [Case(kind, {"kind": kind}, few) for kind in QUICK_KINDS]
    edges = (
        ("1 token", {"num_tokens": 1, "num_anchors": 1, "num_background": 0}),
        ("2 tokens, background only", {"num_tokens": 2, "num_anchors": 0, "num_background": 1}),
        ("prime N, anchors only", {"num_tokens": 61, "num_anchors": 7, "num_background": 0}),
        ("K = N", {"num_tokens": 30, "num_anchors": 20, "num_background": 10}),
        ("K = 1", {"num_tokens": 48, "num_anchors": 1, "num_background": 0}),
    )
    shapes = (
        ("clustered", 158, 952, 24, 8),
        ("clustered", 576, 1024, 48, 16),
        ("random", 576, 1024, 144, 48),
        ("clustered", 729, 1152, 96, 32),
    )
    return (
        [Case(name, {"kind": "random", **options}, DTYPES) for name, options in edges]
        + [Case(kind, {"kind": kind}, DTYPES) for kind in KINDS]
        + [
            Case(
                f"{kind}, N={n} D={d} K={a + b}",
                {"kind": kind, "num_tokens": n, "channels": d, "num_anchors": a, "num_background": b},
                few,
            )
            for kind, n, d, a, b in shapes
        ]
    )


def find_backends() -> tuple[list[Backend], list[str]]:
    """The fast backends that run here, and why the others do not."""
    gpu = torch.cuda.is_available()
    found, reasons = [], []
    for name, device in (("cpp", "cpu"), ("triton", "cuda" if gpu else "cpu")):
        reason = backends.unavailable(name, torch.device(device))
        if reason is None:
            found.append(Backend(name, device))
        else:
            reasons.append(f"{name} is not checked: {reason}.")
    return found, reasons


def runs_on(case: Case, dtype: torch.dtype, backend: Backend) -> bool:
    if backend.interpreted and case.options.get("num_tokens", 0) > INTERPRETER_TOKENS:
        return False
    return backend.name != "triton" or dtype != torch.float64  # fp64 is for the CPU


def count_other_picks(result, inputs: Inputs, exact: tuple) -> int:
    """How many kept tokens are not those of the reference carried through in fp64."""
    s, sbar, g, tier = exact
    sbar = sbar if inputs.scale_prior else None
    of_anchors, of_background = inputs.suppressions
    anchors = greedy_reference.greedy_select(
        s, inputs.scores.cpu(), inputs.num_anchors, sbar=sbar, tier=tier, suppression=of_anchors
    )
    rest = tier.scatter(1, anchors, TAKEN)
    background = greedy_reference.greedy_select(
        s, g, inputs.num_background, sbar=sbar, tier=rest, suppression=of_background
    )
    expected = torch.cat([anchors, background], dim=1)
    indices = result.indices.cpu()
    return int((indices[:, :, None] != expected[:, None, :]).all(dim=2).sum())


def describe(findings: list[Finding]) -> tuple[str, bool]:
    """The finding nearest to its bound, or the first one above it."""
    wrong = [finding for finding in findings if not finding.ok]
    worst = wrong[0] if wrong else max(findings, key=lambda finding: finding.share)
    if worst.error == 0:
        return "no difference", True
    if worst.bound == 0:
        return f"{worst.what}: {worst.error:.0f} differ, first at {worst.where}", False
    place = f", at {worst.where}" if wrong else ""
    return f"{worst.what}: {worst.error:.1e} of {worst.bound:.1e}{place}", not wrong


def check_one(case: Case, dtype: torch.dtype, backend: Backend, inputs: Inputs, exact: tuple) -> Verdict:
    labels = (case.name, backend.label, str(dtype).removeprefix("torch."))
    inputs = inputs.to(backend.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's numpy, where the inputs hold NaN
            result = inputs.run(backend.name)
            findings = compare(result, inputs, backend=backend.name, exact=exact)
            findings.append(compare_alone(result, inputs, backend=backend.name))
    except Exception as error:  # a kernel that fails is a finding too, and the other cases go on
        first = str(error).strip().split("\n", 1)[0]
        return Verdict(*labels, "-", f"{type(error).__name__}: {first}", False)
    others = count_other_picks(result, inputs, exact)
    worst, ok = describe(findings)
    selected = "equal" if others == 0 else f"{others} of {result.indices.numel()} {'tied' if ok else 'differ'}"
    return Verdict(*labels, selected, worst, ok)


def run_cases(cases: list[Case], backends: list[Backend]) -> list[Verdict]:
    verdicts = []
    with make_progress() as progress:
        task = progress.add_task("", total=sum(len(case.dtypes) for case in cases))
        for case in cases:
            for dtype in case.dtypes:
                progress.update(task, advance=1, description=f"{case.name}, {str(dtype).removeprefix('torch.')}")
                here = [backend for backend in backends if runs_on(case, dtype, backend)]
                if here:
                    inputs = make_inputs(**case.options, dtype=dtype)
                    exact = exact_similarity(inputs)
                    verdicts += [check_one(case, dtype, backend, inputs, exact) for backend in here]
    return verdicts


def show(verdicts: list[Verdict], console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="backends against the fp64 reference", title_justify="left", title_style="bold")
    for name in ("case", "backend", "dtype", "selected", "largest error of its bound", "ok"):
        table.add_column(name)
    for v in verdicts:
        ok = "[green]ok[/green]" if v.ok else "[bold red]NO[/bold red]"
        table.add_row(escape(v.case), v.backend, v.dtype, v.selected, escape(v.worst), ok)
    print_table(console, table)


def run(arguments: argparse.Namespace) -> int:
    need("rich")
    console = make_console()
    backends, reasons = find_backends()
    if not backends:
        reasons.append(
            "No fast backend is here: checked is the reference rounded to the dtype, which serves CPU tensors."
        )
        backends = [Backend("reference", "cpu")]
    verdicts = run_cases(make_cases(arguments.quick), backends)
    show(verdicts, console)
    for reason in reasons:
        console.print(reason, markup=False)
    wrong = sum(not verdict.ok for verdict in verdicts)
    console.print(f"{len(verdicts)} checks, {wrong} wrong", style="bold red" if wrong else "bold green")
    return 1 if wrong else 0
