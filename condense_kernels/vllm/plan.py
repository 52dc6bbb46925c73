"""What becomes of the tokens of an image, as far as a model's config says it."""

from dataclasses import asdict, dataclass
from typing import Any

from ..budget import count_of
from .options import KEY, Options

TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # which tokens are patches: all but [CLS], all


@dataclass(frozen=True)
class Plan:
    """Of an image, or of each crop where an image is several."""

    options: Options
    side: int  # of the square grid that its tokens lie on
    keep: int

    @classmethod
    def of(cls, config: Any) -> "Plan":
        vision, strategy = config.vision_config, config.vision_feature_select_strategy
        if TOWERS.get(vision.model_type) != strategy:
            expected = " or ".join(f"{tower} with {patches!r}" for tower, patches in TOWERS.items())
            raise ValueError(
                f"model: expected a vision_config, with its vision_feature_select_strategy, of {expected}, got "
                f"{vision.model_type} with {strategy!r}. Remedy: the model without condensation."
            )
        options, side = Options.of(config), vision.image_size // vision.patch_size
        return cls(options, side, count_of("num_tokens", options.num_tokens, side**2))

    @property
    def keeps_all(self) -> bool:
        return self.keep == self.side**2


class Checked:
    """What vLLM calls with the configs of a condensed model before there is an engine: errors are raised here, and what
    the environment says is written down, for all processes of the engine."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        config = model_config.hf_config
        config.update({KEY: asdict(Plan.of(config).options)})

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        pass


class Unasked(Checked):
    """Of vLLM's own models: options beside them would be lost."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        if hasattr(model_config.hf_config, KEY):
            name = f"Condensed{model_config.architecture}"
            raise ValueError(
                f"{KEY}: expected a condensed model beside it, got {model_config.architecture}. Remedy: "
                f"'architectures': ['{name}'] in hf_overrides, too."
            )
