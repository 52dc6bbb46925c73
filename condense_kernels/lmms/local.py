"""A task of our own that needs no download: the tiny LLaVA's pictures and questions, as lmms-eval reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
NAME = "tiny_llava"
SEED = 20261125


def examples(scenes: int) -> list[dict[str, Any]]:
    """Each question of each scene: picture (PIL), question, answer, kind. Of what training has not seen."""
    import numpy as np
    from PIL import Image

    from ..tiny_llava.questions import KINDS, ask
    from ..tiny_llava.scenes import Scenes

    rng, drawn = np.random.default_rng(SEED), Scenes("test", SEED)
    found = []
    for _ in range(scenes):
        scene = drawn.scene()
        picture = Image.fromarray(scene.pixels)
        for kind, name in enumerate(KINDS):
            question, answer = ask(scene, kind, rng)
            found.append({"picture": picture, "question": question, "answer": answer, "kind": name})
    return found


def write(folder: Path, scenes: int) -> None:
    """The task's folder in ``folder``, which is lmms-eval's --include_path."""
    task = folder / NAME
    shutil.copytree(TASKS / NAME, task, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    with (task / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for number, example in enumerate(examples(scenes)):
            file = f"{number // 6:04d}.png"
            example.pop("picture").save(task / file)
            lines.write(json.dumps({"picture": file, **example}) + "\n")
