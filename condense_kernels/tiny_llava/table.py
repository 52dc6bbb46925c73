"""The tables of answers: for a terminal, as rows for a file, and what they say in words."""

from typing import Any

import torch
from rich.table import Table

from .answers import COUNT, OURS, Results, Share, difference, is_random, mean_of_kinds
from .model import PATCHES
from .questions import KINDS

CLEAR = 2.0  # standard errors from which a difference is called one


def kinds_of(runs: torch.Tensor) -> list[float]:
    """Percent right, of each kind."""
    return (100 * runs.double().mean(dim=(0, 1))).tolist()


def of_budget(everything: torch.Tensor, found: Results, keep: int) -> Table:
    """``everything``: [1, P, kinds] with all tokens."""
    pictures, pruned = everything.shape[1], 100 * (1 - keep / PATCHES)
    title = f"{keep} of {PATCHES} tokens ({pruned:.1f} % pruned): % of answers right, {pictures} pictures"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("method", no_wrap=True)
    for name in (*(kind.replace(" ", "\n", 1) for kind in KINDS), "mean", "without\ncount", "ours\nminus it"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, runs in {
        "all tokens": everything,
        **{name: runs for (name, k), runs in found.items() if k == keep},
    }.items():
        mean, rest = Share.of(mean_of_kinds(runs)), Share.of(mean_of_kinds(runs, (COUNT,)))
        ahead = "" if name in ("all tokens", OURS) else written(difference(found[OURS, keep], runs), "+.1f")
        cells = [f"{value:.1f}" for value in kinds_of(runs)]
        style = "bold" if name == OURS else ""
        table.add_row(named(name, runs), *cells, written(mean), written(rest), ahead, style=style)
    return table


def named(name: str, runs: torch.Tensor) -> str:
    return f"{name} (of {len(runs)})" if is_random(name) and len(runs) > 1 else name


def written(share: Share, form: str = ".1f") -> str:
    return f"{share.value:{form}} ± {share.error:.1f}"


def in_words(found: Results, keep: int) -> str:
    """Which methods do better than ours, and whether that is beyond chance."""
    lines = []
    for what, without in (("of all six kinds", ()), ("without the count question", (COUNT,))):
        better = {}
        for (name, k), runs in found.items():
            if k == keep and name != OURS:
                ahead = difference(found[OURS, keep], runs, without)
                if ahead.value < 0:
                    clear = "" if -ahead.value > CLEAR * ahead.error else ", within chance"
                    better[name] = f"{name} by {-ahead.value:.1f} ± {ahead.error:.1f}{clear}"
        lines.append(f"Better than {OURS} {what}: {'; '.join(better.values()) or 'none'}.")
    return "\n".join(lines)


def rows(everything: torch.Tensor, found: Results) -> list[dict[str, Any]]:
    """Every cell, for a file: percent, standard errors over pictures; "ahead": ours minus it, paired."""
    lines = []
    for (name, keep), runs in {("all tokens", PATCHES): everything, **found}.items():
        mean, rest = Share.of(mean_of_kinds(runs)), Share.of(mean_of_kinds(runs, (COUNT,)))
        line: dict[str, Any] = {"method": name, "keep": keep, "seeds": len(runs), "pictures": runs.shape[1]}
        line |= {kind: round(value, 2) for kind, value in zip(KINDS, kinds_of(runs), strict=True)}
        line |= {"mean": round(mean.value, 2), "mean error": round(mean.error, 2)}
        line |= {"without count": round(rest.value, 2), "without count error": round(rest.error, 2)}
        if keep != PATCHES:
            for what, without in (("", ()), (" without count", (COUNT,))):
                ahead = difference(found[OURS, keep], runs, without)
                line |= {f"ahead{what}": round(ahead.value, 2), f"ahead{what} error": round(ahead.error, 2)}
        lines.append(line)
    return lines
