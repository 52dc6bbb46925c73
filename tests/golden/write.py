"""Golden vectors of the methods, written from their restatements in numpy: python tests/golden/write.py [METHOD ...]

A file for each method: {"method", "cases": [{"keep", "grid", "options", "features" [N][D], "scores" [N], and what else
the method takes; "merged" [K][D], "indices" [K], "assignment" [N], "mass" [K]}]}. Numbers are decimals of three places
going in, of twelve coming out; a cosine of two of its tokens is the same in any language to 1e-15. So hosts in C++ can
read the same files.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

GRID, D = (4, 6), 5
KEEPS = (1, 6, 12, 24)


def modules() -> list:
    names = (path.stem for path in sorted((HERE.parent / "restated").glob("*.py")))
    return [importlib.import_module(f"restated.{name}") for name in names if name not in ("__init__", "common")]


# What a method takes beyond features, scores, keep and grid: by name how it is made of a generator and N, D, K. Those
# of one method alone are ARRAYS of its restatement's module.
ARRAYS = {
    "keys": lambda rng, n, d, k: rng.normal(size=(n, d + 2)),
    "noise": lambda rng, n, d, k: rng.random(n),
}
for found in modules():
    ARRAYS |= getattr(found, "ARRAYS", {})


def restatements() -> dict:
    """Of every method, by name."""
    return {
        name: function
        for module in modules()
        for name, function in vars(module).items()
        if callable(function) and getattr(function, "__module__", "") == module.__name__
    }


def taken() -> dict[str, tuple[tuple[str, ...], list[dict]]]:
    """By method, as CASES of its restatement's module has it: which ARRAYS it takes, and the options of each case in
    turn. A method that is not there takes none."""
    return {name: cases for module in modules() for name, cases in getattr(module, "CASES", {}).items()}


def clustered(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Tokens around a few centres, as a picture's are."""
    return rng.normal(size=(5, d))[rng.integers(5, size=n)] + 0.5 * rng.normal(size=(n, d))


def cases_of(name: str, function) -> list[dict]:
    rng = np.random.default_rng(sum(name.encode()))
    arrays, options = taken().get(name, ((), [{}]))
    n, cases = GRID[0] * GRID[1], []
    for turn, keep in enumerate((*KEEPS, 6)):
        given = {"features": clustered(rng, n, D), "scores": rng.random(n)}
        given |= {array: ARRAYS[array](rng, n, D, keep) for array in arrays}
        given = {key: value.round(3) if value.dtype.kind == "f" else value for key, value in given.items()}
        chosen = options[turn % len(options)]
        result = function(keep=keep, grid=GRID, **given, **chosen)
        found = dict(zip(("merged", "indices", "assignment", "mass"), map(np.asarray, result), strict=True))
        found = {key: value.round(12) if value.dtype.kind == "f" else value for key, value in found.items()}
        told = {key: value.tolist() for key, value in {**given, **found}.items()}
        cases.append({"keep": keep, "grid": list(GRID), "options": chosen, **told})
    return cases


def text_of(name: str, function) -> str:
    """A row of numbers a line, so that a difference can be read."""
    cases = []
    for case in cases_of(name, function):
        lines = ",\n".join(f'   "{key}": {json.dumps(value)}' for key, value in case.items())
        cases.append("  {\n" + lines + "\n  }")
    return f'{{"method": "{name}", "cases": [\n' + ",\n".join(cases) + "\n]}\n"


def main(names: list[str]) -> None:
    from condense_kernels.methods import METHODS

    known = restatements()
    for name in names or METHODS:
        (HERE / f"{name}.json").write_text(text_of(name, known[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
