"""The model of ``--model``: the tiny LLaVA that comes with the package, or a folder of transformers'."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import CommandError, need, waiting
from .arguments import meant

TINY = "tiny"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws some of its own, in a pipe, too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    kind = "" if isinstance(error, ImportError | OSError | ValueError) else f"{type(error).__name__}: "
    return kind + str(error).strip().partition("\n")[0]


def load(name: str) -> tuple[Any, Any]:
    """(model, processor) in fp32 on CPU, fp16 on a GPU, of "tiny" or a directory; nothing is downloaded."""
    need("transformers", "PIL", remedy="pip install 'condense-kernels[cli,models]'")
    with waiting("loading the model"):
        return loaded(name, folder_of(name))


def folder_of(name: str) -> Path:
    from ..tiny_llava import PATH

    folder = PATH if name == TINY else Path(name)
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"--model {name}: expected {TINY!r} or a directory with config.json, as save_pretrained writes it, got "
            f"{'a directory without it' if folder.is_dir() else 'no directory'}{meant(name, [TINY])}"
        )
    return folder


def loaded(name: str, folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    try:
        with without_bars():
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a broken folder raises is transformers', safetensors' or tokenizers'
        raise CommandError(
            f"--model {name}: expected a model with images and its processor: {first_line(error)}"
        ) from error
    return model.eval().to("cuda" if on_gpu else "cpu"), processor
