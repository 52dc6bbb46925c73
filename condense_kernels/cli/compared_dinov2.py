"""Methods compared on DINOv2's tokens: what the rest of the model makes of K of them, beside what it makes of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import metrics
from .compared import BINS, Entry, Material, Row, Tick, heads_mean, numbers, over_seeds, timed
from .dinov2 import BEFORE, BLOCKS, Tokens, encode, finish, follow
from .patches import PATCH, open_picture

ON, SIDE = "dinov2", 24
TOKENS = SIDE * SIDE


def seen(model: Any, path: Path) -> tuple[Tokens, Material]:
    """A picture half-way, and what methods are given of it: all from the last block before condensing."""
    entered: list[torch.Tensor] = []
    block = model.encoder.layer[BEFORE - 1]
    hook = block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        tokens = encode(model, open_picture(path, SIDE * PATCH))
    finally:
        hook.remove()
    own, x = block.attention, block.norm1(entered[0])
    q, k = (y.unflatten(2, (own.num_attention_heads, -1)).transpose(1, 2) for y in (own.q_proj(x), own.k_proj(x)))
    attention = heads_mean(q, k, own.scaling)
    keys = k[:, :, 1:].transpose(1, 2).flatten(2)
    return tokens, Material(tokens.patches, tokens.scores, (SIDE, SIDE), attention=attention, keys=keys)


def together(parts: Sequence[Material]) -> Material:
    of = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("features", "cls", "attention", "keys")}
    return Material(grid=parts[0].grid, **of)


def fidelity(model: Any, pictures: Sequence[Tokens], condensed: Any) -> dict[str, torch.Tensor]:
    """Cosines to the output on all tokens, as in docs/fidelity.md, [P] each. A dropped token counts as part of the row
    that is nearest to it."""
    found: dict[str, list[float]] = {"cls": [], "tokens": [], "cls_prop": [], "tokens_prop": []}
    features = torch.cat([tokens.patches for tokens in pictures])
    rows = metrics.nearest_rows(features, condensed.merged, condensed.assignment)
    for at, tokens in enumerate(pictures):
        for proportional, suffix in ((False, ""), (True, "_prop")):
            _, near = follow(model, tokens, condensed.merged[at], rows[at], proportional)
            found[f"cls{suffix}"].append(near.cls)
            found[f"tokens{suffix}"].append(near.tokens)
    return {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in found.items()}


@torch.no_grad()
def compared(
    model: Any, paths: Sequence[Path], methods: Sequence[Entry], budgets: Sequence[int], seeds: int, rounds: int,
    tick: Tick,
) -> tuple[list[Row], dict[str, str]]:  # fmt: skip
    """Rows, and why methods are left out, by title."""
    tick("DINOv2: reading the pictures")
    pictures, parts = zip(*(seen(model, path) for path in paths), strict=True)
    material, left_out, rows = together(parts), {}, []
    for keep in budgets:
        for entry in methods:
            tick(f"DINOv2: {entry.name}, K = {keep}")
            reason = material.lacks(entry)
            try:
                rows += [] if reason else [row_of(model, pictures, material, entry, keep, seeds)]
            except (TypeError, ValueError) as error:
                reason = f"K = {keep}: {str(error).partition('. Remedy')[0]}"
            if reason:
                left_out[entry.title] = reason
    everything = dict.fromkeys(
        ("cls", "tokens", "cls_prop", "tokens_prop"), torch.ones(len(paths), dtype=torch.float64, device="cpu")
    )
    rows.append(Row(ON, None, TOKENS, TOKENS, 1, everything))
    measure_times(model, pictures[0], material[:1], rows, rounds, tick)
    return rows, left_out


def row_of(
    model: Any, pictures: Sequence[Tokens], material: Material, entry: Entry, keep: int, seeds: int
) -> Row:  # fmt: skip
    runs, spread = [], []
    for seed in range(seeds if entry.drawn else 1):
        condensed = material.condensed(entry, keep, seed)
        runs.append({**fidelity(model, pictures, condensed), **numbers(material.features, condensed)})
        spread.append(metrics.position_spread(condensed.indices, TOKENS, BINS).mean(dim=0))
    return Row(ON, entry, keep, TOKENS, len(runs), over_seeds(runs), torch.stack(spread).mean(dim=0).tolist())


def measure_times(
    model: Any, tokens: Tokens, first: Material, rows: Sequence[Row], rounds: int, tick: Tick
) -> None:  # fmt: skip
    """Of one picture; the rest of the model is its last blocks, on [CLS] and K tokens."""
    sides: dict[Any, Any] = {}
    for row in rows:
        hidden = torch.cat([tokens.cls, tokens.patches[:, : row.keep]], dim=1)
        sides[row.keep] = lambda hidden=hidden: finish(model, hidden)
        if row.entry is not None:
            sides[row.keep, row.name] = lambda row=row: first.condensed(row.entry, row.keep)
    times = timed(sides, rounds, lambda what: tick("DINOv2: times"))
    config = model.config
    width = config.hidden_size
    blocks = metrics.Decoder(BLOCKS - BEFORE, width, int(config.mlp_ratio * width), width)
    for row in rows:
        row.ms = times.get((row.keep, row.name), [])
        row.rest_ms = sorted(times[row.keep])[len(times[row.keep]) // 2]
        row.flops_left = metrics.flops_left(blocks, TOKENS, row.keep)
