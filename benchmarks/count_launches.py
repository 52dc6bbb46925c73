"""How many kernels a call launches, on a machine without a GPU: the launchers are called with meta tensors.

python benchmarks/count_launches.py [--json]
"""

import argparse
import collections
import json
import os

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
from inspect_kernels import empty, launches
from rich.console import Console
from rich.table import Table

from condense_kernels.ops.select_and_merge.kernel import select_and_merge
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen

IMAGES = {"576, K = 64": (576, 64), "20000, K = 640": (20_000, 640), "65536, K = 1024": (65_536, 1024)}
BATCHES = {  # segments, tokens, longest, rows
    "64 x 2880, K = 320": (64, 64 * 2880, 2880, 64 * 320),
    "65 x 2880, K = 320": (65, 65 * 2880, 2880, 65 * 320),
    "4096 segments, the longest 10000": (4096, 4096 * 100, 10_000, 4096 * 10),
    "40 x 16384, K = 640": (40, 40 * 16_384, 16_384, 40 * 640),
    "5 x 20000, K = 640": (5, 5 * 20_000, 20_000, 5 * 640),
}


def kernels_of(launcher, *args, **kwargs) -> collections.Counter[str]:
    return collections.Counter(kernel.__name__ for kernel, *_ in launches(launcher, args, kwargs))


def counts() -> dict[str, collections.Counter[str]]:
    found = {}
    for name, (n, k) in IMAGES.items():
        image = empty(1, n, 64, dtype=torch.bfloat16), empty(1, n)
        found[f"1 x {name}"] = kernels_of(select_and_merge, *image, k - k // 4, k // 4, spatial_weight=0.0)
        options = {"spatial_weight": 0.0, "mean_similarity": empty(1)}
        found[f"1 x {name}, mean given"] = kernels_of(select_and_merge, *image, k - k // 4, k // 4, **options)
    for name, (segments, tokens, longest, rows) in BATCHES.items():
        offsets = [empty(segments + 1, dtype=torch.int32)] * 3
        batch = empty(tokens, 64, dtype=torch.bfloat16), empty(tokens), *offsets, rows, longest
        found[f"packed, {name}"] = kernels_of(select_and_merge_varlen, *batch, spatial_weight=0.0)
    return found


def table(found: dict[str, collections.Counter[str]]) -> Table:
    result = Table("call", "launches", "of these")
    for call, kernels in found.items():
        names = (f"{count} {name.removesuffix('_kernel')}" for name, count in kernels.items())
        result.add_row(call, str(kernels.total()), ", ".join(names))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="instead of a table")
    found = counts()
    if parser.parse_args().json:
        print(json.dumps(found))
    else:
        Console(width=150).print(table(found))
