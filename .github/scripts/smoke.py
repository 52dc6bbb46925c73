"""Whether an installed package serves: `python smoke.py cpp`, or `reference` where it has no compiled library.

CPU tensors run on what is named, a missing library is told once with its reason, and the results are the reference's.
Needs torch and the package, and nothing else.
"""

import sys
import warnings

import torch


def main(expected: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        import condense_kernels as ck

    told = [str(warning.message) for warning in told if "condense_kernels" in str(warning.message)]
    features = torch.randn(2, 96, 33, generator=torch.Generator().manual_seed(0))
    scores = features.square().mean(-1).softmax(-1)
    run = {"num_anchors": 9, "num_background": 3, "grid": (8, 12)}
    results = {name: ck.select_and_merge(features, scores, **run, backend=name) for name in ("auto", "reference")}
    try:
        ck.select_and_merge(features, scores, **run, backend="cpp")
        served = "cpp"
    except ValueError as error:
        served, reason = "reference", error
    print(f"condense_kernels {ck.__version__} in {ck.__path__[0]}, torch {torch.__version__}, {sys.version}")
    print(f"CPU tensors run on: {served}; told at import: {told or 'nothing'}")
    if served != expected:
        sys.exit(f"expected {expected}, got {served}: {reason if served == 'reference' else 'a compiled library'}")
    if len(told) != (expected == "reference"):
        sys.exit(f"expected {'one warning' if expected == 'reference' else 'no warning'} at import, got {told}")
    for auto, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(auto, reference)
    print("the results are the reference's")


if __name__ == "__main__":
    if sys.argv[1:] not in (["cpp"], ["reference"]):
        sys.exit(f"usage: python {sys.argv[0]} cpp|reference")
    main(sys.argv[1])
