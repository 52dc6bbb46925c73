"""The environment variables of condense_kernels: in Python, each is read here and nowhere else.

It needs nothing but Python: setup.py loads this file by its path. csrc/environment.cpp says the same of the variables
that the compiled library reads by itself, where there may be no Python. What they do: docs/environment.md.
"""

import os
import re
import warnings
from collections.abc import Callable

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16", "amx")


def switch(name: str, text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise wrong(name, f"one of {', '.join(TRUE + FALSE)}", text)
    return text.lower() in TRUE


def capability(name: str, text: str) -> str:
    if text.lower() not in CAPABILITIES:
        raise wrong(name, f"one of {', '.join(CAPABILITIES)}", text)
    return text.lower()


def number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise wrong(name, "a number of 1 to 18 digits", text)
    return int(text)


def decimal(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", text) else None


def count_or_ratio(name: str, text: str) -> int | float:
    value = decimal(text)
    if value is None or (value < 1 if "." not in text else not 0 < value <= 1):
        raise wrong(name, "a count of tokens, as 64, or a ratio up to 1.0, as 0.25", text)
    return value if "." in text else int(text)


def share(name: str, text: str) -> float:
    value = decimal(text)
    if value is None or value > 1:
        raise wrong(name, "a decimal from 0 to 1", text)
    return value


def weight(name: str, text: str) -> float:
    value = decimal(text)
    if value is None:
        raise wrong(name, "a decimal of digits, as 0.5", text)
    return value


def words(name: str, text: str) -> str:
    return text


def wrong(name: str, expected: str, text: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got '{text}'. Remedy: unset {name}, or see docs/environment.md.")


VARIABLES: dict[str, Callable] = {
    "CONDENSE_DISABLE_CPP": switch,
    "CONDENSE_DEBUG": switch,
    "CONDENSE_CPU_CAPABILITY": capability,
    "CONDENSE_STORED_TOKENS": number,
    "CONDENSE_BUILD_EXT": switch,
    "CONDENSE_COMMIT": words,
    "CONDENSE_NUM_TOKENS": count_or_ratio,
    "CONDENSE_BACKGROUND_RATIO": share,
    "CONDENSE_SUPPRESSION": weight,
    "CONDENSE_SPATIAL_WEIGHT": weight,
    "CONDENSE_BACKGROUND_SUPPRESSION": weight,
    "CONDENSE_SCALE_PRIOR": switch,
}
OF_A_RUN = tuple(VARIABLES)[:4]  # the others are read by a build, by the benchmarks, and by vLLM's plugin

# What else is read around us, by others. Only named here, for `python -m condense_kernels env`.
OF_OTHERS = (
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "AOTI_RUNTIME_CHECK_INPUTS",
)


def read(name: str) -> bool | int | float | str | None:
    """The variable's value; None where it is not set, or empty, which is the same.

    Raises:
        ValueError: it has another value than those that docs/environment.md lists.
    """
    text = os.environ.get(name, "")
    return VARIABLES[name](name, text) if text else None


def check() -> None:
    """At import: every wrong value is an error now, and not on the first call; a misspelt name is a warning."""
    for name in OF_A_RUN:
        read(name)
    unknown = [name for name in os.environ if name.upper().startswith("CONDENSE_") and name not in VARIABLES]
    for name in unknown:
        if (meant := nearest(name)) is not None:
            warnings.warn(
                f"the environment variable {name} is none of condense_kernels, and has no effect. {meant} is one.",
                RuntimeWarning,
                stacklevel=4,  # this module, the one that calls, the package, who imports it
            )


def nearest(name: str) -> str | None:
    """The variable that was probably meant; None where it may well be a variable of somebody else."""
    import difflib  # rarely needed

    known = {variable.removeprefix("CONDENSE_"): variable for variable in VARIABLES}
    close = difflib.get_close_matches(name.upper().removeprefix("CONDENSE_"), known, n=1, cutoff=0.75)
    return known[close[0]] if close else None


def present() -> dict[str, str]:
    """The variables that are set, as they are."""
    return {name: os.environ[name] for name in (*VARIABLES, *OF_OTHERS) if name in os.environ}
