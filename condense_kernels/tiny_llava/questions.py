"""Six kinds of questions about a scene, each with an answer of one word."""

from collections.abc import Sequence

import numpy as np

from . import KINDS as KINDS
from .scenes import BACKGROUNDS, COLOURS, QUARTERS, Digit, Scene

COUNTS = ("one", "two", "three", "four")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ASKED = "which what digit color is the how many digits there a background yes no"
WORDS = (*SPECIAL, *ASKED.split(), *COUNTS, *map(str, range(10)), *COLOURS, *BACKGROUNDS, *QUARTERS)
ID = {word: number for number, word in enumerate(WORDS)}
LONGEST = 5  # words of a question

Question = tuple[str, str]  # what is asked, the last word of which is what it is about; the answer


def ask(scene: Scene, kind: int, rng: np.random.Generator, seen: Sequence[Digit] | None = None) -> Question:
    """One question of that kind. ``seen``: the digits that it may be about; None: all of the scene's."""
    digit = (scene.digits if seen is None else seen)[rng.integers(len(scene.digits if seen is None else seen))]
    label, colour = str(digit.label), tuple(COLOURS)[digit.colour]
    if kind == 0:
        return f"which digit is {colour}", label
    if kind == 1:
        return f"what color is the {label}", colour
    if kind == 2:
        return f"which digit is {QUARTERS[digit.quarter]}", label
    if kind == 3:
        return "how many digits", COUNTS[len(scene.digits if seen is None else seen) - 1]
    if kind == 4:
        there = {d.label for d in scene.digits}  # a digit that is there, but not seen, is not asked for
        if rng.random() < 0.5:
            return f"is there a {rng.choice([d for d in range(10) if d not in there])}", "no"
        return f"is there a {label}", "yes"
    return "what is the background", BACKGROUNDS[scene.background]
