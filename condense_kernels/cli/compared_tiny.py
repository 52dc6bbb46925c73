"""Methods compared by the tiny LLaVA's answers. Text-guided ones get the attention of a first pass on all tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import metrics
from ..models.scoring import Recorder, attention_of, recording
from ..models.timing import Stopwatch
from ..ops.select_and_merge import Condensed
from ..tiny_llava import KINDS
from ..tiny_llava.answers import CHUNK, COUNT, SEED, Exam, right
from ..tiny_llava.model import PATCHES, answer, to_input
from ..tiny_llava.questions import LONGEST
from ..tiny_llava.scenes import GRID, Scenes
from .compared import BINS, Entry, Material, Row, Tick, heads_mean, numbers, over_seeds, timed

ON, TOKENS = "tiny", PATCHES
LAYER = 1  # FastV's K - 1, the second layer; here it is the last one, too


def towers_map(model: Any, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[P, N, N] and [P, N, Dk], of the layer whose [CLS] the exam's scores are of; on the exam's pictures."""
    drawn = Scenes("test", SEED, step=1)
    scenes = [torch.from_numpy(drawn.scene().pixels) for _ in range(pictures)]
    found = []
    for at in range(0, pictures, CHUNK):
        recorder = Recorder(False, None, Stopwatch(model.device))
        with recording(attention_of(model.model.vision_tower, model.config.vision_feature_layer)[1], recorder):
            model.model.vision_tower(to_input(torch.stack(scenes[at : at + CHUNK])))
        queries, keys, scale, _ = recorder.calls[0]()
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        found.append((heads_mean(queries, keys, scale), keys[:, :, 1:].transpose(1, 2).flatten(2)))
    maps, keys_of = zip(*found, strict=True)
    return torch.cat(maps), torch.cat(keys_of)


def text_attention(model: Any, exam: Exam, layer: int = LAYER) -> torch.Tensor:
    """[P, kinds, N]: how the last word of each question attends to the picture's tokens, mean over heads.

    From a first pass of the language model on all tokens, in which each question sees the picture and itself alone.
    """
    decoder = model.model.language_model
    own = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")  # the one that shows its map
    try:
        return torch.cat([
            rows_of_map(model, exam.features[at : at + CHUNK], exam.questions[at : at + CHUNK],
                        exam.last[at : at + CHUNK], layer)
            for at in range(0, len(exam.features), CHUNK)
        ])  # fmt: skip
    finally:
        decoder.set_attn_implementation(own)


def rows_of_map(
    model: Any, features: torch.Tensor, questions: torch.Tensor, last: torch.Tensor, layer: int
) -> torch.Tensor:  # fmt: skip
    maps: list[torch.Tensor] = []
    attention = model.model.language_model.layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    try:
        answer(model, features, questions, last)
    finally:
        hook.remove()
    v, q = features.shape[1], questions.shape[1]
    at = 1 + v + LONGEST * torch.arange(q, dtype=torch.int64, device=last.device) + last  # [B, Q]
    mean = maps[0].mean(dim=1)[:, :, 1 : 1 + v]  # [B, L, N]
    return mean.gather(1, at[..., None].expand(-1, -1, v))


def marks(answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """[P, kinds] bool -> percent of a picture's questions that were answered right."""
    rest = [kind for kind in range(len(KINDS)) if kind != COUNT]
    values = 100 * answers.double()
    by_kind = {kind: values[:, at] for at, kind in enumerate(KINDS)}
    return {"accuracy": values.mean(dim=1), "without_count": values[:, rest].mean(dim=1), **by_kind}


def by_questions(exam: Exam) -> Exam:
    """A picture once for each question about it."""
    q = len(KINDS)
    features, scores = (x.repeat_interleave(q, dim=0) for x in (exam.features, exam.scores))
    return Exam(features, scores, *(x.flatten(0, 1)[:, None] for x in (exam.questions, exam.last, exam.answers)))


def run(model: Any, exam: Exam, material: Material, entry: Entry, keep: int, seed: int) -> tuple[Any, Condensed]:
    """[P, kinds] bool, and what was condensed: of P pictures, or of P * kinds where the question counts."""
    condensed = material.condensed(entry, keep, seed)
    return right(model, exam, condensed).view(-1, len(KINDS)), condensed


@torch.no_grad()
def compared(
    model: Any, pictures: int, methods: Sequence[Entry], budgets: Sequence[int], seeds: int, rounds: int, tick: Tick
) -> tuple[list[Row], dict[str, str]]:
    """Rows, and why methods are left out, by title."""
    tick("tiny LLaVA: encoding pictures")
    exam = Exam.of(model, pictures)
    attention, keys = towers_map(model, pictures)
    material = Material(
        exam.features, exam.scores, (GRID, GRID), text_attention(model, exam), attention=attention, keys=keys
    )
    spread_out = by_questions(exam), material.by_question()
    left_out, rows = {}, []
    for keep in budgets:
        for entry in methods:
            tick(f"tiny LLaVA: {entry.name}, K = {keep}")
            reason = material.lacks(entry)
            try:
                of = spread_out if entry.guided else (exam, material)
                rows += [] if reason else [row_of(model, *of, entry, keep, seeds)]
            except (TypeError, ValueError) as error:
                reason = f"K = {keep}: {str(error).partition('. Remedy')[0]}"
            if reason:
                left_out[entry.title] = reason
    rows.append(Row(ON, None, TOKENS, TOKENS, 1, over_seeds([marks(right(model, exam, None))])))
    measure_times(model, exam, material[:1], rows, rounds, tick)
    return rows, left_out


def row_of(model: Any, exam: Exam, material: Material, entry: Entry, keep: int, seeds: int) -> Row:
    runs, spread = [], []
    for seed in range(seeds if entry.drawn else 1):
        answers, condensed = run(model, exam, material, entry, keep, seed)
        by_row = numbers(material.features, condensed)
        by_picture = {name: values.view(len(answers), -1).mean(dim=1) for name, values in by_row.items()}
        runs.append({**marks(answers), **by_picture})
        spread.append(metrics.position_spread(condensed.indices, TOKENS, BINS).mean(dim=0))
    return Row(ON, entry, keep, TOKENS, len(runs), over_seeds(runs), torch.stack(spread).mean(dim=0).tolist())


def measure_times(
    model: Any, exam: Exam, first: Material, rows: Sequence[Row], rounds: int, tick: Tick
) -> None:  # fmt: skip
    """Of one picture and one question; the rest of the model is the projector and the language model on K tokens."""
    questions, last = exam.questions[:1, :1], exam.last[:1, :1]
    asked = replace(exam, features=exam.features[:1], questions=questions, last=last)
    sides: dict[Any, Any] = {"first pass": lambda: text_attention(model, asked)}
    for row in rows:
        kept = exam.features[:1, : row.keep]
        sides[row.keep] = lambda kept=kept: answer(model, kept, questions, last)
        if row.entry is not None:
            sides[row.keep, row.name] = lambda row=row: first.condensed(row.entry, row.keep)
    times = timed(sides, rounds, lambda what: tick("tiny LLaVA: times"))
    middle = {name: sorted(of)[len(of) // 2] for name, of in times.items()}
    decoder = metrics.Decoder.of(model.config)
    for row in rows:
        row.ms, row.rest_ms = times.get((row.keep, row.name), []), middle[row.keep]
        row.before_ms = middle["first pass"] if row.entry is not None and row.entry.guided else 0.0
        row.flops_left = metrics.flops_left(decoder, TOKENS, row.keep)
