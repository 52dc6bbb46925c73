"""On PYTHONPATH of the tests, and so in every process that vLLM starts: torchvision beside a torch without CUDA.

pip's torchvision is built for torch with CUDA. Its compiled part does not load into another one, and its import then
fails on two operators that are not there. vLLM imports it and calls neither, so that their names will do.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing(Path(importlib.util.find_spec(name).origin).parent)
        return None


def declare_missing(folder: Path) -> None:
    import torch

    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision())
