"""How many kernels are compiled for images of mixed sizes, and how long that takes: on a machine without a GPU.

The launch path is Triton's own, against a stub of the CUDA driver (stub_driver.py), so specialisations are those of a
GPU. --fast counts them and compiles nothing; else each is compiled, down to ptxas, in a cache of its own. The table is
that of docs/benchmarks.md.

    python benchmarks/count_compilations.py [--fast] [--images 1000] [--seed 0] [--capability 90]
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
    if "--fast" not in sys.argv:
        fresh_cache = tempfile.TemporaryDirectory()  # gone with the process
        os.environ["TRITON_CACHE_DIR"] = fresh_cache.name

import stub_driver
import torch
import triton
from report import markdown

import condense_kernels as ck

IMAGES, CHANNELS, DTYPE = 1000, 1024, torch.bfloat16
MIN_TOKENS, MAX_TOKENS, MAX_PACKED = 64, 5800, 16  # of an image, and images of a packed batch
Grid = tuple[int, int]


def grids(count: int, seed: int) -> list[Grid]:
    """Heights and widths of 4 to 96 patches, the product in range."""
    source, found = random.Random(seed), []
    while len(found) < count:
        height, width = source.randint(4, 96), source.randint(4, 96)
        if MIN_TOKENS <= height * width <= MAX_TOKENS:
            found.append((height, width))
    return found


def batches(images: list[Grid], seed: int) -> Iterator[list[Grid]]:
    source, first = random.Random(seed), 0
    while first < len(images):
        count = source.randint(1, MAX_PACKED)
        yield images[first : first + count]
        first += count


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def run_dense(images: list[Grid], seed: int = 0) -> None:
    for height, width in images:
        n = height * width
        ck.condense(empty(1, n, CHANNELS), empty(1, n), n // 3, grid=(height, width))


def run_packed(images: list[Grid], seed: int = 0) -> None:
    for batch in batches(images, seed):
        seqlens = [height * width for height, width in batch]
        budget, tokens = ck.varlen_budget(seqlens, [n // 3 for n in seqlens]), sum(seqlens)
        features, scores, positions = empty(tokens, CHANNELS), empty(tokens), empty(tokens, 2, dtype=torch.float32)
        ck.select_and_merge_varlen(features, scores, *budget, positions=positions)


@triton.jit
def nothing_kernel(x):
    pass


def warm() -> None:
    """What a process, and no kernel, takes its time for."""
    nothing_kernel[(1,)](1, enable_fp_fusion=False)


def count(images: list[Grid], *, seed: int = 0, capability: int = 90, compiling: bool = False) -> dict[str, list]:
    """The compilations of dense calls, of packed calls, and of both in one process."""
    found = {}
    for name, calls in {"dense": [run_dense], "packed": [run_packed], "both": [run_dense, run_packed]}.items():
        with stub_driver.device(capability, compiling=compiling) as counts:
            warm()
            counts.reset()
            for call in calls:
                call(images, seed)
            found[name] = counts.compilations
    return found


def rows(found: dict[str, list[stub_driver.Compilation]], timed: bool) -> tuple[list[str], list[list[str]]]:
    """The header; a row for each kernel, and one for all."""
    made = [compilation for part in found.values() for compilation in part if not compilation.cached]
    header, lines = ["kernel", *found, *(("longest, s of CPU", "all, s of CPU") if timed else ())], []
    for kernel in (*dict.fromkeys(compilation.kernel for compilation in found["both"]), "all"):
        counts = [sum(kernel in ("all", compilation.kernel) for compilation in part) for part in found.values()]
        seconds = [compilation.seconds for compilation in made if kernel in ("all", compilation.kernel)]
        times = [f"{max(seconds):.1f}", f"{sum(seconds):.1f}"] if timed else []
        lines.append([kernel, *map(str, counts), *times])
    return header, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="count, and compile nothing")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--capability", type=int, default=90, choices=stub_driver.FIGURES)
    options = parser.parse_args()
    images = grids(options.images, options.seed)
    found = count(images, seed=options.seed, capability=options.capability, compiling=not options.fast)
    sizes = f"{options.images} images of {MIN_TOKENS} to {MAX_TOKENS} tokens, K = N / 3, {CHANNELS} channels, bf16"
    print(f"{sizes}, sm_{options.capability}, Triton {triton.__version__}\n")
    print(markdown(*rows(found, timed=not options.fast)))


if __name__ == "__main__":
    main()
