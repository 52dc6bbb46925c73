"""Trains the tiny LLaVA from nothing, in stages, in 34 minutes of one core:

    make tiny-llava

What is in OUTPUT goes on where it was interrupted. At the end OUTPUT is a Hugging Face folder in fp16, with
training.json: the accuracy on held-out pictures along the way. The package has the model of seed 1.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .model import PATCHES, answer, encode, ids_of, processor, to_input, tokens_of, untrained
from .questions import KINDS, ask
from .scenes import BACKGROUNDS, COLOURS, GRID, PATCH, Scene, Scenes

ASKED = (0, 0, 1, 1, 2, 2, 3, 4, 4, 5)  # kinds of questions about each picture
HALVES = ((0, 1), (2, 3), (0, 2), (1, 3))  # quarters
LABELS = 10 + len(COLOURS)
EVERY = 200  # steps between lines, and between checkpoints


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    rate: float
    tower: bool = True  # is trained
    decoder: bool = True


STAGES = (
    Stage("tower", 2600, 1.5e-3, decoder=False),
    Stage("decoder", 800, 1.5e-3, tower=False),
    Stage("both", 3600, 1.2e-3),
)
BATCH = 32
ANYWHERE = (
    0.5  # of the batches have digits at any pixel; the others, and at first all, on the patch grid, which is easier
)
ON_GRID = 1300  # steps of the first stage
WARM_UP = 200  # steps, in each stage
FLOOR = 0.1  # of the rate, at the end of the first stage
TOWER_RATE = 0.5  # of the rate, beside the decoder


class Heads(torch.nn.Module):
    """What the tower is asked in training, not kept: [CLS] says which digits and colours are there, a patch says whose
    ink it has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.picture, self.patch = torch.nn.Linear(width, LABELS), torch.nn.Linear(width, LABELS + 2)

    def loss(self, features: torch.Tensor, pooled: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
        there = torch.zeros(len(scenes), LABELS, dtype=torch.float32, device="cpu")
        label = torch.full((len(scenes), PATCHES), -1, dtype=torch.int64, device="cpu")
        colour = label.clone()
        for row, scene in enumerate(scenes):
            owner = torch.from_numpy(scene.owner)
            for number, digit in enumerate(scene.digits):
                there[row, [digit.label, 10 + digit.colour]] = 1
                label[row, owner == number], colour[row, owner == number] = digit.label, digit.colour
        said, inked = self.patch(features), label >= 0
        of_patch = (
            F.cross_entropy(said[inked][:, :10], label[inked])
            + F.cross_entropy(said[inked][:, 10:LABELS], colour[inked])
            + F.cross_entropy(said[..., LABELS:].flatten(0, 1), inked.long().flatten())
        )
        return 2.0 * F.binary_cross_entropy_with_logits(self.picture(pooled), there) + 0.5 * of_patch


def patches_of(quarters: Sequence[int]) -> torch.Tensor:
    """Those of two quarters, ascending."""
    at = torch.arange(PATCHES, dtype=torch.int64, device="cpu")
    quarter = at // GRID // (GRID // 2) * 2 + at % GRID // (GRID // 2)
    return at[torch.isin(quarter, torch.tensor(quarters, dtype=torch.int64, device="cpu"))]


class Trainer:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = untrained()
        self.heads = Heads(self.model.config.vision_config.hidden_size)
        self.rng = np.random.default_rng(seed)
        self.scenes = Scenes("train", seed)
        of_tower = {*map(id, self.model.model.vision_tower.parameters())}
        self.tower = [*self.model.model.vision_tower.parameters(), *self.heads.parameters()]
        self.decoder = [p for p in self.model.parameters() if id(p) not in of_tower]
        self.log: list[dict[str, Any]] = []
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.begin_stage()

    def begin_stage(self) -> None:
        groups = [{"params": self.tower, "scale": TOWER_RATE if STAGES[self.stage].decoder else 1.0}]
        groups += [{"params": self.decoder, "scale": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(self) -> float:
        stage = STAGES[self.stage]
        floor = 0.0 if self.stage == len(STAGES) - 1 else FLOOR
        wave = 0.5 + 0.5 * math.cos(math.pi * self.step / stage.steps)
        return stage.rate * min(1.0, (self.step + 1) / WARM_UP) * (floor + (1 - floor) * wave)

    def one_step(self) -> float:
        stage = STAGES[self.stage]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group["scale"]
        loss = self.loss(stage)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.tower, *self.decoder], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def loss(self, stage: Stage) -> torch.Tensor:
        # Four of ten batches show the decoder one half of the picture: it shall know two lengths.
        half = HALVES[self.rng.integers(4)] if stage.decoder and self.rng.random() < 0.4 else None
        anywhere = self.rng.random() < ANYWHERE and (self.stage > 0 or self.step > ON_GRID)
        self.scenes.step = 1 if anywhere else PATCH
        crowded = not stage.decoder and self.rng.random() < 0.75
        scenes = [self.scenes.scene(crowded, half) for _ in range(BATCH)]
        pixels = to_input(torch.from_numpy(np.stack([scene.pixels for scene in scenes])))
        with torch.set_grad_enabled(stage.tower):
            features, pooled = encode(self.model, pixels)
        losses = [self.heads.loss(features, pooled, scenes)] if stage.tower else []
        losses += [self.answers(features, scenes, half)] if stage.decoder else []
        return torch.stack(losses).sum()

    def answers(self, features: torch.Tensor, scenes: Sequence[Scene], half: Sequence[int] | None) -> torch.Tensor:
        shown = features if half is None else features[:, patches_of(half)]
        seen = [[d for d in scene.digits if half is None or d.quarter in half] for scene in scenes]
        asked = [[ask(s, kind, self.rng, of) for kind in ASKED] for s, of in zip(scenes, seen, strict=True)]
        questions, last = tokens_of([[question for question, _ in row] for row in asked])
        right = ids_of([[word for _, word in row] for row in asked])
        # A language model has read texts of every length; this one would know visual tokens at 1 to 144 only. Half of
        # the batches squeeze positions, so that a shorter sequence is not by itself a surprise.
        squeeze = 1.0 if self.rng.random() < 0.5 else self.rng.uniform(0.1, 1.0)
        steps = torch.arange(shown.shape[1] + 1, dtype=torch.float32, device="cpu")
        positions = 1 + (squeeze * steps).long()
        logits = answer(self.model, shown, questions, last, positions.expand(len(scenes), -1))
        return F.cross_entropy(logits.flatten(0, 1), right.flatten())

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": (self.rng.bit_generator.state, self.scenes.rng.bit_generator.state),
            "at": (self.stage, self.step, self.seconds, self.log),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.stage, self.step, self.seconds, self.log = state["at"]
        self.begin_stage()
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state, self.scenes.rng.bit_generator.state = state["random"]


@torch.no_grad()
def accuracy(model: Any, pictures: int = 300) -> list[float]:
    """Of each kind of question, on held-out pictures with digits on the patch grid."""
    scenes, rng = Scenes("test", 1000), np.random.default_rng(1000)
    right = torch.zeros(len(KINDS), dtype=torch.float32, device="cpu")
    for _ in range(pictures // 50):
        batch = [scenes.scene() for _ in range(50)]
        asked = [[ask(scene, kind, rng) for kind in range(len(KINDS))] for scene in batch]
        questions, last = tokens_of([[question for question, _ in row] for row in asked])
        features, _ = encode(model, to_input(torch.from_numpy(np.stack([scene.pixels for scene in batch]))))
        said = answer(model, features, questions, last).argmax(dim=-1)
        right += (said == ids_of([[word for _, word in row] for row in asked])).float().sum(dim=0)
    return (right / (pictures // 50 * 50)).tolist()


def save(model: Any, folder: Path) -> None:
    model.half()
    model.generation_config.max_new_tokens = 1  # an answer is a word; what would come after it was never trained
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the tiny LLaVA from nothing.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint, console = args.output / "checkpoint.pt", Console()
    trainer = Trainer(args.seed)
    if checkpoint.exists():
        trainer.resume(torch.load(checkpoint, weights_only=False))
        console.print(f"going on from step {trainer.step} of stage {STAGES[trainer.stage].name}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        total = sum(stage.steps for stage in STAGES)
        bar = progress.add_task("training", total=total)
        while trainer.stage < len(STAGES):
            stage, began = STAGES[trainer.stage], time.process_time()
            losses: list[float] = []
            done = sum(s.steps for s in STAGES[: trainer.stage])
            while trainer.step < stage.steps and len(losses) < EVERY:
                losses.append(trainer.one_step())
                progress.update(bar, completed=done + trainer.step, description=stage.name)
            trainer.seconds += time.process_time() - began
            line = f"{stage.name} {trainer.step}: loss {np.mean(losses):.3f}, {trainer.seconds:.0f} s of a core"
            if stage.decoder:
                found = accuracy(trainer.model)
                trainer.log.append({"stage": stage.name, "step": trainer.step, "accuracy": found})
                line += f", held out {np.mean(found):.3f}: " + " ".join(f"{x:.2f}" for x in found)
            console.print(line, soft_wrap=True)
            if trainer.step == stage.steps:
                trainer.stage, trainer.step = trainer.stage + 1, 0
                if trainer.stage < len(STAGES):
                    trainer.begin_stage()
            if trainer.stage < len(STAGES):
                torch.save(trainer.state(), checkpoint)
    save(trainer.model, args.output)
    history = {"seed": args.seed, "core_seconds": round(trainer.seconds), "kinds": KINDS, "log": trainer.log}
    (args.output / "training.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {args.output}; {len(BACKGROUNDS)} backgrounds, {trainer.seconds / 60:.0f} minutes of a core")


if __name__ == "__main__":
    main()
