"""The model of ``--model``: the tiny LLaVA that comes with the package, or a folder of transformers'."""

from pathlib import Path
from typing import Any

from . import CommandError, need

TINY = "tiny"


def load(name: str) -> tuple[Any, Any]:
    """(model, processor) in fp32 on CPU, fp16 on a GPU, of "tiny" or a directory; nothing is downloaded."""
    need("transformers", "PIL", remedy="pip install 'condense-kernels[cli,models]'")
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..tiny_llava import PATH

    folder = PATH if name == TINY else Path(name)
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"--model {name}: expected {TINY!r} or a directory with config.json, as save_pretrained writes it, got "
            f"{'a directory without it' if folder.is_dir() else 'no directory'}"
        )
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"--model {name}: expected a model with images and its processor: {reason}") from error
    return model.eval().to("cuda" if on_gpu else "cpu"), processor
