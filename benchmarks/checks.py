"""A handful of calls, each held to what it has to give: seconds before anything is timed, and what sanitizers watch.

    python benchmarks/checks.py [--without WORD ...] [--gsan]

Every operator that is declared on an example of its own against the reference; the flagship on inputs that take other
branches, and at its size; that it gives the same bits without s stored, packed, and from a CUDA graph. On a GPU, or
without one on the CPU's kernels. Prints a line a check, goes on after one that fails, and ends with 1 if any did.

Outputs are not filled before, as the tests do it, so a sanitizer sees what was never written. Packed batches load what
no program wrote, behind a segment in its rows of s, and use none of it (docs/design/gpu.md): initcheck goes without.
"""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import bench_calls
import torch
from harness import DEVICE, captured, require_kernels
from shapes import SHAPES

from condense_kernels import Condensed, select_and_merge, select_and_merge_varlen
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.testing import Inputs, assert_matches_reference, assert_same_bits, make_inputs

KINDS = {"random": torch.bfloat16, "masked": torch.float32, "nan": torch.float16, "magnitudes": torch.float32}
LENGTHS, ANCHORS, BACKGROUND = (70, 0, 130, 3), (9, 0, 17, 2), (4, 0, 8, 1)


class Check(NamedTuple):
    name: str
    call: Callable[[], Any]  # launches
    hold: Callable[[Any], None]  # raises if that is not the result


def checks(device: str = DEVICE) -> Iterator[Check]:
    for name, side in bench_calls.sides(SHAPES["overhead"], torch.empty(0, device=device), torch.empty(0)).items():
        if name.endswith("operator"):
            yield Check(name, side.call, side.check)
    flagship = {"batch": 1, "num_tokens": 576, "channels": 1024, "num_anchors": 144, "num_background": 48}
    sizes = {kind: {"num_tokens": 130, "channels": 72} for kind in KINDS} | {"clustered": flagship}
    for kind, size in sizes.items():
        inputs = make_inputs(kind, dtype=KINDS.get(kind, torch.bfloat16), device=device, **size)
        hold = functools.partial(assert_matches_reference, inputs=inputs)
        yield Check(f"{kind}, {size['num_tokens']} tokens", inputs.run, hold)
    inputs = make_inputs("masked", num_tokens=300, channels=200, dtype=torch.bfloat16, device=device)
    yield Check("not stored", functools.partial(not_stored, inputs), lambda results: assert_same_bits(*results))
    yield Check("packed", functools.partial(packed, device), lambda results: assert_same_bits(*results))
    if device == "cuda":
        inputs = make_inputs("clustered", device=device, dtype=torch.bfloat16, **flagship)
        yield Check("from a graph", functools.partial(replayed, inputs), lambda results: assert_same_bits(*results))


def not_stored(inputs: Inputs) -> tuple[Condensed, Condensed]:
    with trying(FusedConfig, store_s=False):
        streamed = inputs.run()
    return streamed, inputs.run()


def packed(device: str) -> tuple[Condensed, Condensed]:
    """A batch, and the same of each image alone: their rows one after the other."""
    features, scores, *_ = make_inputs(batch=1, num_tokens=sum(LENGTHS), channels=72, device=device).args
    at = torch.rand(sum(LENGTHS), 2, generator=torch.Generator().manual_seed(0)).to(device)
    cu = [torch.tensor([0, *counts]).cumsum(0).int().to(device) for counts in (LENGTHS, ANCHORS, BACKGROUND)]
    kept = sum(ANCHORS) + sum(BACKGROUND)
    together = select_and_merge_varlen(features[0], scores[0], *cu, kept, max(LENGTHS), positions=at)
    alone, start = [], 0
    for length, *counts in zip(LENGTHS, ANCHORS, BACKGROUND, strict=True):
        image = slice(start, start + length)
        if length == 0:
            continue
        alone.append(select_and_merge(features[:, image], scores[:, image], *counts, positions=at[image]))
        start += length
    return together, Condensed(*(torch.cat(parts, dim=1)[0] for parts in zip(*alone, strict=True)))


def replayed(inputs: Inputs) -> tuple[Condensed, Condensed]:
    expected = inputs.run()
    replay, result = captured(inputs.run)
    replay()
    torch.cuda.synchronize()
    return result, expected


def gsan_memory() -> contextlib.AbstractContextManager:
    """What Triton's sanitizer of global memory watches: only what was allocated here."""
    from triton.experimental import gsan

    return torch.cuda.use_mem_pool(gsan.create_mem_pool())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without", nargs="+", default=(), metavar="WORD", help="no checks with such names")
    parser.add_argument("--gsan", action="store_true", help="with TRITON_INSTRUMENTATION_MODE=gsan in the environment")
    arguments = parser.parse_args()
    require_kernels()
    failed = 0
    with gsan_memory() if arguments.gsan else contextlib.nullcontext():
        for check in checks():
            if any(word in check.name for word in arguments.without):
                continue
            start, verdict = time.perf_counter(), "right"
            try:
                check.hold(check.call())
            except Exception as error:  # whatever it is, the others are worth a try
                failed, verdict = failed + 1, f"WRONG: {type(error).__name__}: {error}"
            print(f"{check.name:<40} {time.perf_counter() - start:6.2f} s  {verdict}", flush=True)
    if failed:
        sys.exit(f"{failed} checks failed")


if __name__ == "__main__":
    main()
