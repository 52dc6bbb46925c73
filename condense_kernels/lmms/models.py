"""lmms-eval's models on K visual tokens: condense_llava_hf is its llava_hf, and so on for each name in STOCK.

The entry point ``manifests`` says where they are. A class is made when it is asked for, from lmms-eval's own:
``chat_llava_hf`` from the one that lmms-eval prefers, ``simple_llava_hf`` from that of ``--force_simple``.
"""

import inspect
from typing import Any

from . import PREFIX, STOCK

NONE = (None, 0, "none", "None", "")  # num_tokens for all tokens: the baseline, in the same class


def manifests() -> list[Any]:
    """What lmms-eval's entry-point group ``lmms_eval.models`` wants: a ModelManifest for each model."""
    from lmms_eval import models
    from lmms_eval.models.registry_v2 import ModelManifest

    kinds = {"chat": models.AVAILABLE_CHAT_TEMPLATE_MODELS, "simple": models.AVAILABLE_SIMPLE_MODELS}
    return [
        ModelManifest(
            f"{PREFIX}{stock}",
            **{f"{kind}_class_path": f"{__name__}.{kind}_{stock}" for kind, known in kinds.items() if stock in known},
        )
        for stock in STOCK
    ]


def __getattr__(name: str) -> type:
    kind, _, stock = name.partition("_")
    if kind not in ("chat", "simple") or stock not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models import get_model

    made = condensed(get_model(stock, force_simple=kind == "simple"))
    made.__name__ = made.__qualname__ = name  # which lmms-eval writes into its results
    return globals().setdefault(name, made)


def parameters_of(stock: type) -> dict[str, inspect.Parameter]:
    """By name, also those that a class hands on to the class that it is made from."""
    inits = [vars(base)["__init__"] for base in reversed(stock.__mro__[:-1]) if "__init__" in vars(base)]
    return {name: known for init in inits for name, known in inspect.signature(init).parameters.items()}


def split_options(options: dict[str, Any], stock: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_args: those of apply_condense, and those of the stock model."""
    from ..models import apply_condense

    known = inspect.signature(apply_condense).parameters
    ours = {name: options.pop(name) for name in known.keys() & options.keys()}
    ours = {name: None if value in ("none", "None") else value for name, value in ours.items()}
    if unknown := options.keys() - parameters_of(stock).keys():
        raise TypeError(
            f"model_args: expected arguments of {stock.__name__} or of apply_condense ({', '.join(list(known)[1:])}), "
            f"got {', '.join(sorted(unknown))}. Remedy: lmms-eval hands on what is misspelled; mend the name."
        )
    return ours, options


def launched() -> bool:
    """Whether torchrun, or accelerate by it, has started this process among others."""
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def on_one_device(options: dict[str, Any], stock: type) -> dict[str, Any]:
    """device_map is the device where it is not given: "" fails, and "auto" may spread a model, or expect a GPU.
    Where there are several processes, each has its device by lmms-eval."""
    known = parameters_of(stock)
    if "device_map" in known and not launched():
        device = options.get("device") or known["device"].default
        return {"device_map": device, **options}
    return options


class GenerationError(BaseException):
    """lmms-eval's models make an empty answer of any Exception; this passes them."""


def condensed(stock: type[Any]) -> type[Any]:
    """``stock`` with num_tokens and the options of apply_condense as further model_args."""

    class Condensed(stock):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            from ..models import apply_condense

            ours, options = split_options(options, stock)
            num_tokens = ours.pop("num_tokens", None)
            if num_tokens in NONE and ours:
                raise ValueError(
                    f"num_tokens: expected a count or ratio, as {', '.join(sorted(ours))} is given, got none. Remedy: "
                    "num_tokens=64; for the baseline of all tokens leave the other options out."
                )
            super().__init__(**on_one_device(options, stock))
            self.handle = None if num_tokens in NONE else apply_condense(self.model, num_tokens, **ours)

        def generate_until(self, requests: list[Any]) -> list[Any]:
            model, own = self.model, self.model.__dict__.get("generate")
            generate = model.generate

            def watched(*args: Any, **kwargs: Any) -> Any:
                try:
                    return generate(*args, **kwargs)
                except Exception as error:
                    raise GenerationError from error

            model.generate = watched
            try:
                return super().generate_until(requests)
            except GenerationError as failed:
                raise RuntimeError(f"generate failed: {failed.__cause__}") from failed.__cause__
            finally:
                if own is None:
                    del model.generate
                else:
                    model.generate = own

    return Condensed
