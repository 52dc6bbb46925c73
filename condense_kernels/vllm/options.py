"""What a condensed model of vLLM is told, by hf_overrides or by the environment."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from .._dispatch import environment
from .._dispatch.checks import MAX_TOKENS, check_background_suppression, check_flag, check_weight
from ..budget import DEFAULT_BACKGROUND_RATIO, as_number, count_of, split_budget
from .release import check_release

KEY = "condense"  # of hf_overrides, and then of the model's config
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}


@dataclass(frozen=True)
class Options:
    """Of :func:`condense_kernels.condense`. vLLM calls them with a model's config, which is a condensed one's then."""

    num_tokens: int | float
    background_ratio: float = DEFAULT_BACKGROUND_RATIO
    suppression: float = 1.0
    spatial_weight: float = 1.0
    background_suppression: float | None = None
    scale_prior: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", as_number("num_tokens", self.num_tokens))
        count_of("num_tokens", self.num_tokens, MAX_TOKENS)
        split_budget(1, 1, self.background_ratio)
        check_weight("suppression", self.suppression)
        check_weight("spatial_weight", self.spatial_weight)
        check_background_suppression(self.background_suppression)
        check_flag("scale_prior", self.scale_prior)

    @classmethod
    def of(cls, config: Any) -> "Options":
        """Of a model's config; where it says nothing, of the environment."""
        given = getattr(config, KEY, None)
        if given is None:
            found = from_environment()
            if found is None:
                raise ValueError(
                    f"{KEY}: expected options of a condensed model, as {{'num_tokens': 64}} in hf_overrides, got none. "
                    "Remedy: hf_overrides=condense_kernels.vllm.condensed(num_tokens=64), or CONDENSE_NUM_TOKENS=64."
                )
            return found
        if not isinstance(given, dict) or "num_tokens" not in given or not given.keys() <= set(NAMES):
            raise ValueError(
                f"{KEY}: expected a dict with num_tokens, and with none but {', '.join(NAMES)}, got {given!r}. Remedy: "
                "{'num_tokens': 64}."
            )
        return cls(**given)

    def of_operator(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "num_tokens"}

    def __call__(self, config: Any) -> Any:
        """As hf_overrides. A config without images, as that of a draft model, stays as it is."""
        check_release()
        if hasattr(config, "vision_config"):
            if config.model_type not in ARCHITECTURES:
                raise ValueError(
                    f"model: expected one of the types {', '.join(ARCHITECTURES)}, got {config.model_type!r}. Remedy: "
                    "leave hf_overrides out; condense_kernels.models has more types, for transformers."
                )
            architecture = f"Condensed{ARCHITECTURES[config.model_type]}"
            config.update({"architectures": [architecture], KEY: asdict(self)})
        return config

    def __str__(self) -> str:
        return "-".join(["condensed", *map(str, asdict(self).values())])


NAMES = tuple(field.name for field in fields(Options))


def from_environment() -> Options | None:
    """None where CONDENSE_NUM_TOKENS is not set."""
    found: dict[str, Any] = {name: environment.read(f"CONDENSE_{name.upper()}") for name in NAMES}
    given = {name: value for name, value in found.items() if value is not None}
    if given and "num_tokens" not in given:
        name = f"CONDENSE_{next(iter(given)).upper()}"
        raise ValueError(
            f"{name}: expected CONDENSE_NUM_TOKENS beside it, got none. Remedy: set that, or unset {name}."
        )
    return Options(**given) if given else None


def condensed(
    num_tokens: int | float = 64,
    *,
    background_ratio: float = DEFAULT_BACKGROUND_RATIO,
    suppression: float = 1.0,
    spatial_weight: float = 1.0,
    background_suppression: float | None = None,
    scale_prior: bool = True,
) -> Options:
    """``vllm.LLM(model, hf_overrides=condensed(num_tokens=64))``: a model on ``num_tokens`` visual tokens an image.

    Args:
        num_tokens: a count (int) or a ratio in (0, 1] (float) of each image's tokens; of each crop's, in LLaVA-NeXT.
        background_ratio, suppression, spatial_weight, background_suppression, scale_prior: as in
            :func:`condense_kernels.condense`.

    Raises:
        TypeError, ValueError: an option has a value that it cannot have. From vLLM, which calls the result: a model of
            another type than LLaVA and LLaVA-NeXT, or with fewer tokens.
        ImportError: from there, another release of vLLM than 0.32.
    """
    return Options(num_tokens, background_ratio, suppression, spatial_weight, background_suppression, scale_prior)
