"""How often the tiny LLaVA answers right on K of a picture's 144 tokens, by method and kind of question."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..methods.results import selected
from ..models.methods import Condenser
from ..models.scoring import Recorder, attention_of, recording
from ..models.timing import Stopwatch
from ..ops.select_and_merge import Condensed
from ..tokens import sizes
from .model import PATCHES, answer, encode, ids_of, to_input, tokens_of
from .questions import KINDS, ask
from .scenes import GRID, Scene, Scenes

BUDGETS = (48, 32, 16)  # tokens kept, as 192, 128 and 64 of LLaVA-1.5's 576 are: 66.7, 77.8 and 88.9 % pruned
SEEDS = 5
PICTURES, SEED = 1000, 4242
CHUNK = 250  # pictures that are answered at a time
COUNT = KINDS.index("count")

Method = Callable[[torch.Tensor, torch.Tensor, int], Condensed]  # features [B, N, D], scores [B, N], K
Tick = Callable[[str], None]


def condensing(merging: bool = True, **options: Any) -> Method:
    """The paper's method, with options of Condenser."""

    def method(features: torch.Tensor, scores: torch.Tensor, keep: int) -> Condensed:
        condensed = Condenser("condensevlm", **options).batch(features, scores, keep, (GRID, GRID))
        return condensed if merging else selected(features, scores, condensed.indices)

    return method


def baseline(name: str) -> Method:
    return lambda features, scores, keep: Condenser(name).batch(features, scores, keep, (GRID, GRID))


OURS = "CondenseVLM"
METHODS: dict[str, Method] = {
    OURS: condensing(),
    "top-k [CLS]": baseline("topk"),
    "max-min": baseline("maxmin"),
    "uniform grid": baseline("uniform"),
    "pooling": baseline("pooling"),
    "random": baseline("random"),
    "random + merge": baseline("random_merge"),
    "top-k + merge": baseline("topk_merge"),
}
# The first three are rows of the paper's Table 7: selection by attention and suppression, then merging by similarity.
ABLATIONS: dict[str, Method] = {
    "A + S": condensing(merging=False, background_ratio=0.0),
    "A + S + Sm": condensing(background_ratio=0.0, spatial_weight=0.0),
    "A + S + Sm + Dm": condensing(background_ratio=0.0),
    "no merging": condensing(merging=False),
    "no spatial term": condensing(spatial_weight=0.0),
    "no suppression": condensing(suppression=0.0),
    "anchors suppressed alone": condensing(background_suppression=0.0),
    "half the background's": condensing(background_suppression=0.5),
}


def is_random(name: str) -> bool:
    return name.startswith("random")


@dataclass(frozen=True)
class Exam:
    """Pictures that the model has encoded, and a question of each kind about each."""

    features: torch.Tensor  # [P, N, D] before the projector
    scores: torch.Tensor  # [P, N], the attention of [CLS], Eq. 1
    questions: torch.Tensor  # [P, kinds, words] int64
    last: torch.Tensor  # [P, kinds] int64
    answers: torch.Tensor  # [P, kinds] int64

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, pictures: int = PICTURES, seed: int = SEED) -> "Exam":
        drawn, rng = Scenes("test", seed, step=1), np.random.default_rng(seed)  # digits at any pixel
        scenes = [drawn.scene() for _ in range(pictures)]
        asked = [[ask(scene, kind, rng) for kind in range(len(KINDS))] for scene in scenes]
        questions, last = tokens_of([[question for question, _ in row] for row in asked])
        answers = ids_of([[word for _, word in row] for row in asked])
        parts = [encoded(model, scenes[at : at + CHUNK]) for at in range(0, pictures, CHUNK)]
        features, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(features, scores, questions, last, answers)


def encoded(model: Any, scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N, D] and [B, N], the scores by what apply_condense listens with."""
    tower = model.model.vision_tower
    recorder = Recorder(True, None, Stopwatch(model.device))
    pixels = to_input(torch.from_numpy(np.stack([scene.pixels for scene in scenes])))
    with recording(attention_of(tower, model.config.vision_feature_layer)[1], recorder):
        features, _ = encode(model, pixels)
    return features, recorder.flat().view(len(scenes), PATCHES)


def right(model: Any, exam: Exam, condensed: Condensed | None, *options: bool) -> torch.Tensor:
    """[P, kinds] bool; the arguments are those of :func:`said`."""
    return said(model, exam, condensed, *options).argmax(dim=-1) == exam.answers


@torch.no_grad()
def said(
    model: Any, exam: Exam, condensed: Condensed | None, original: bool = False, proportional: bool = False
) -> torch.Tensor:
    """[P, kinds, words] logits. None: with all tokens; ``original``, ``proportional``: as of apply_condense."""
    features = exam.features if condensed is None else condensed.merged
    found = []
    for at in range(0, len(features), CHUNK):
        of = slice(at, at + CHUNK)
        positions = log_sizes = None
        if original and condensed is not None:
            places = 1 + condensed.indices[of]
            positions = torch.nn.functional.pad(places, (0, 1), value=1 + PATCHES)
        if proportional and condensed is not None:
            log_sizes = sizes(condensed.assignment[of], condensed.indices[of]).to(features.dtype).log()
        found.append(answer(model, features[of], exam.questions[of], exam.last[of], positions, log_sizes))
    return torch.cat(found)


Results = dict[tuple[str, int], torch.Tensor]  # by method and budget: [seeds, P, kinds] bool


def compare(
    model: Any,
    exam: Exam,
    methods: dict[str, Method],
    budgets: Sequence[int] = BUDGETS,
    seeds: int = SEEDS,
    original: bool = False,
    proportional: bool = False,
    tick: Tick = lambda what: None,
) -> Results:
    """Of every method and budget, which questions were answered right; of random choices, for each seed."""
    found: Results = {}
    for keep in budgets:
        for name, method in methods.items():
            tick(f"{name}, K = {keep}")
            runs = []
            for seed in range(seeds if is_random(name) else 1):
                torch.manual_seed(seed)
                condensed = method(exam.features, exam.scores, keep)
                runs.append(right(model, exam, condensed, original, proportional))
            found[name, keep] = torch.stack(runs)
    return found


@dataclass(frozen=True)
class Share:
    """Percent, with its standard error over pictures: questions about one picture are not independent."""

    value: float
    error: float

    @classmethod
    def of(cls, by_picture: torch.Tensor) -> "Share":  # [P], each in [-1, 1]
        deviation = float(by_picture.std()) if len(by_picture) > 1 else math.nan
        return cls(100 * float(by_picture.mean()), 100 * deviation / math.sqrt(len(by_picture)))


def mean_of_kinds(runs: torch.Tensor, without: Sequence[int] = ()) -> torch.Tensor:
    """[seeds, P, kinds] bool -> [P]: the share of a picture's questions that were answered right, over seeds, too."""
    kinds = [kind for kind in range(runs.shape[2]) if kind not in without]
    return runs[..., kinds].double().mean(dim=(0, 2))


def difference(ours: torch.Tensor, other: torch.Tensor, without: Sequence[int] = ()) -> Share:
    """Ours minus the other's, paired: on the same pictures, whose own difficulty drops out."""
    return Share.of(mean_of_kinds(ours, without) - mean_of_kinds(other, without))
