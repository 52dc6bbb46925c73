"""vLLM's LLaVA and LLaVA-NeXT on K visual tokens an image: a plugin of vLLM, which changes none of its code.

Every process of vLLM imports this module, wherever the package is installed, and calls ``register``: no model is
imported here, and none changed where nothing is asked for.
"""

from .options import ARCHITECTURES, from_environment
from .options import Options as Options
from .options import condensed as condensed
from .plan import Checked, Unasked
from .release import check_release, is_known


def register() -> None:
    """What vLLM calls, by the entry point vllm.general_plugins: condensed models, beside its own, by names of theirs.

    Where CONDENSE_NUM_TOKENS is set, they also go by the names of its own. With another release than 0.32 it is idle.

    Raises:
        ValueError: one of the variables has a value that it cannot have.
        ImportError: CONDENSE_NUM_TOKENS is set, and this is another release of vLLM.
    """
    configured = from_environment() is not None
    if configured:
        check_release()
    if is_known():
        add_models(configured)


def add_models(by_names_of_vllm: bool) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in ARCHITECTURES.values():
        model = f"Condensed{name}"
        MODELS_CONFIG_MAP[name] = Unasked
        for known_as in (model, name) if by_names_of_vllm else (model,):
            ModelRegistry.register_model(known_as, f"{__name__}.models:{model}")
            MODELS_CONFIG_MAP[known_as] = Checked
