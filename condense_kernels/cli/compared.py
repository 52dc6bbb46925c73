"""What every model that methods are compared on has in common: methods by name, their rows, their times."""

import inspect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import metrics
from ..methods import ALIASES, METHODS, Card
from ..methods.registry import TEXT, check_numbers
from ..ops.select_and_merge import Condensed
from . import CommandError
from .arguments import mismatch

ALWAYS = ("random", "pooling", "uniform")  # the simple baselines
PAIRED = (*ALWAYS, "condensevlm")  # what each method is compared with on the same pictures
EVERYTHING = "all tokens"
BINS = 8  # of the spread over positions
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A method of the registry, with options of its own: ``name`` is how --methods calls it."""

    name: str
    card: Card
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{options}: {self.card.title}" if options else self.card.title

    @property
    def takes(self) -> set[str]:
        return {*inspect.signature(inspect.unwrap(self.card.call)).parameters}

    @property
    def drawn(self) -> bool:
        return "generator" in self.takes

    @property
    def guided(self) -> bool:
        return self.card.scores == TEXT


def entries(names: Sequence[str]) -> list[Entry]:
    """Of --methods; none: all of them. The simple baselines come first."""
    return [entry(name) for name in dict.fromkeys([*ALWAYS, *(names or METHODS)])]


def entry(name: str) -> Entry:
    base, *given = name.split(":")
    card = METHODS.get(ALIASES.get(base, base))
    if card is None:
        raise CommandError(f"--methods: {mismatch(base, METHODS, also=ALIASES)}")
    options = {}
    for one in given:
        option, equals, value = one.partition("=")
        if not equals or option not in card.options:
            expected = ", ".join(f"{base}:{own}=..." for own in card.options) or f"{base}, which has no options"
            raise CommandError(f"--methods: expected {expected}, got {name!r}")
        options[option] = parsed(value)
    try:
        check_numbers(inspect.signature(card.call).parameters, options)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--methods: {base}: {error}") from None
    return Entry(name, card, options)


def parsed(value: str) -> Any:
    for form in (int, float):
        try:
            return form(value)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(value, value)


@dataclass(frozen=True)
class Material:
    """What methods are given, of a batch of pictures; None: not here."""

    features: torch.Tensor  # [B, N, D]
    cls: torch.Tensor  # [B, N], attention of [CLS]
    grid: tuple[int, int]
    guide: torch.Tensor | None = None  # [B, Q, N], attention of each question's last word
    attention: torch.Tensor | None = None  # [B, N, N], of the tower, mean over heads
    keys: torch.Tensor | None = None  # [B, N, Dk], of the tower

    def __getitem__(self, of: slice) -> "Material":
        guide, attention, keys = (None if x is None else x[of] for x in (self.guide, self.attention, self.keys))
        return Material(self.features[of], self.cls[of], self.grid, guide, attention, keys)

    def lacks(self, entry: Entry) -> str:
        """Why a method cannot run here; nothing where it can."""
        if entry.guided and self.guide is None:
            return "reads text-to-image attention, and there is no text here"
        missing = [name for name in entry.card.needs if getattr(self, name, None) is None and name != "generator"]
        return f"needs {' and '.join(missing)}, which is not here" if missing else ""

    def by_question(self) -> "Material":
        """A picture once for each of its questions: text-guided methods keep other tokens for each."""
        guide = self.guide
        if guide is None:
            return self

        def repeated(x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(guide.shape[1], dim=0)

        attention, keys = (None if x is None else repeated(x) for x in (self.attention, self.keys))
        one = guide.flatten(0, 1)[:, None]
        return Material(repeated(self.features), repeated(self.cls), self.grid, one, attention, keys)

    def condensed(self, entry: Entry, keep: int, seed: int = 0) -> Condensed:
        """Of a text-guided method, by the first question: see by_question."""
        scores = self.cls if not entry.guided or self.guide is None else self.guide[:, 0]
        options = dict(entry.options)
        options |= {name: getattr(self, name) for name in entry.card.needs if name not in ("grid", "generator")}
        if entry.drawn:
            options["generator"] = torch.Generator(self.features.device).manual_seed(seed)
        return entry.card.call(self.features, scores, keep, grid=self.grid, **options)


def heads_mean(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, H, 1 + N, d] twice, [CLS] first -> [B, N, N]: each patch's attention to the patches, mean over heads.

    What goes to [CLS] is left out, so that a row sums to less than 1.
    """
    return (queries @ keys.transpose(2, 3) * scale).softmax(dim=3).mean(dim=1)[:, 1:, 1:]


@dataclass
class Row:
    """A method at a budget, on one model. Qualities are by picture, [P] each, means over seeds."""

    on: str
    entry: Entry | None  # None: all tokens
    keep: int
    of: int
    seeds: int
    quality: dict[str, torch.Tensor]
    spread: list[float] = field(default_factory=list)  # over positions, mean
    ms: list[float] = field(default_factory=list)
    rest_ms: float = math.nan  # the model after it, on K tokens
    before_ms: float = 0.0  # the first pass, of text-guided methods
    flops_left: float = 1.0

    @property
    def name(self) -> str:
        return EVERYTHING if self.entry is None else self.entry.name


def numbers(features: torch.Tensor, condensed: Condensed) -> dict[str, torch.Tensor]:
    """[B] each, of the rows that the model gets; NaN of redundancy where there is one row."""
    merged, indices, assignment, _ = condensed
    return {
        "redundancy": metrics.redundancy(merged),
        "coverage": metrics.coverage(features, indices),
        "reconstruction": metrics.reconstruction_error(features, merged, assignment),
        "bias": metrics.position_bias(indices, features.shape[1]),
    }


def over_seeds(runs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """float64 on CPU: a mean over pictures is of numbers that hardly differ."""
    return {name: torch.stack([run[name].double().cpu() for run in runs]).mean(dim=0) for name in runs[0]}


def share(values: torch.Tensor) -> tuple[float, float]:
    """The mean over pictures, and its standard error; NaN of one picture."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def timed(sides: dict[Any, Callable[[], Any]], rounds: int, tick: Tick = lambda what: None) -> dict[Any, list[float]]:
    """Milliseconds of one thread's CPU time, which what else runs on the machine hardly touches; sides in turn."""
    import time

    from ..models.efficiency import in_turn

    def once(run: Callable[[], Any]) -> Callable[[], float]:
        def milliseconds() -> float:
            start = time.process_time()
            run()
            return 1e3 * (time.process_time() - start)

        return milliseconds

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in sides.values():
            run()  # the first call of each is not counted
        return in_turn({name: once(run) for name, run in sides.items()}, rounds, tick)
    finally:
        torch.set_num_threads(before)


HEADLINES = {"dinov2": ("tokens", "cls"), "tiny": ("accuracy", "without_count")}
MEASURED = ("redundancy", "coverage", "reconstruction", "bias")


def lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every number, flat, for a file and for the tables; differences are paired by picture."""
    found = {(row.on, row.keep, row.name): row for row in rows}
    whole = {row.on: row.rest_ms for row in rows if row.entry is None}
    return [line(row, found, whole.get(row.on, math.nan)) for row in rows]


def line(row: Row, found: dict[tuple[str, int, str], Row], whole_ms: float) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "on": row.on, "method": row.name, "title": row.entry.title if row.entry else EVERYTHING,
        "scores": row.entry.card.scores if row.entry else "", "keep": row.keep, "of": row.of, "seeds": row.seeds,
        "pictures": len(next(iter(row.quality.values()))),
    }  # fmt: skip
    for name, values in row.quality.items():
        flat[name], flat[f"{name} error"] = share(values)
    for name in HEADLINES[row.on]:
        for simple in PAIRED:
            other = found.get((row.on, row.keep, simple))
            if other is not None and other is not row:
                gap = share(row.quality[name] - other.quality[name])
                flat[f"{name} minus {simple}"], flat[f"{name} minus {simple} error"] = gap
    flat |= {f"places {at + 1} of {BINS}": value for at, value in enumerate(row.spread)}
    if row.ms:
        flat["ms"] = statistics.median(row.ms)
        flat["ms low"], _, flat["ms high"] = statistics.quantiles(row.ms, n=4) if len(row.ms) > 1 else row.ms * 3
    flat |= {"before_ms": row.before_ms, "rest_ms": row.rest_ms, "flops_left": row.flops_left}
    flat["time_left"] = (flat.get("ms", 0.0) + row.before_ms + row.rest_ms) / whole_ms
    return flat
