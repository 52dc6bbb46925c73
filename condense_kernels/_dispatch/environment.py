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
}
OF_A_RUN = tuple(VARIABLES)[:4]  # the others are read by a build and by the benchmarks

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


def read(name: str) -> bool | int | str | None:
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
