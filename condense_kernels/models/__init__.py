"""Stock transformers models on K visual tokens an image: apply_condense. Needs the extra ``models``."""

OLDEST, BELOW = "5.18.0", "6"  # mm_encoder_outputs came with the first


def check_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "condense_kernels.models needs transformers, which is not installed. Remedy: pip install "
            "'condense-kernels[models]'."
        ) from error
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    oldest = tuple(int(part) for part in OLDEST.split(".")[:2])
    if not oldest <= release < (int(BELOW),):
        raise ImportError(
            f"condense_kernels.models needs transformers >= {OLDEST}, < {BELOW}, got {transformers.__version__}. "
            "Remedy: pip install 'condense-kernels[models]'."
        )


check_transformers()

from .apply import CondenseHandle as CondenseHandle  # noqa: E402  after the check, whose error is the clearer one
from .apply import apply_condense as apply_condense  # noqa: E402
from .families import FAMILIES as FAMILIES  # noqa: E402
from .report import Report as Report  # noqa: E402
