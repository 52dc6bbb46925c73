"""The releases of vLLM whose models are extended, by methods that are not its public interface."""

import re

KNOWN = "0.32"  # and none before or after: docs/vllm.md


def is_known() -> bool:
    import vllm

    return re.match(rf"{re.escape(KNOWN)}\b", vllm.__version__) is not None


def check_release() -> None:
    if not is_known():
        import vllm

        raise ImportError(
            f"condense_kernels.vllm needs vLLM {KNOWN}, got {vllm.__version__}. Remedy: pip install 'vllm=={KNOWN}.*'; "
            "or neither CONDENSE_NUM_TOKENS nor condensed() in hf_overrides."
        )
