"""What do the checks notice? Changes PTX of the kernels, an instruction at a time, and runs them.

    PYTHONPATH=tests:benchmarks python -m ptx.mutants --sample 200
    PYTHONPATH=tests:benchmarks python -m ptx.mutants --kinds barrier,wait --target sm_90 --json survivors.json

A mutant is caught where a check finds something, a result has other bits, or an element of a result is not written.
It is not reached where its statement, for these inputs, does nothing. docs/checking.md says why others survive.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import torch

from condense_kernels._dispatch import backends
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.ops.attention_scores.kernel import attention_scores
from condense_kernels.ops.merge.kernel import merge_backward
from condense_kernels.ops.select_and_merge.kernel import select_and_merge
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen
from condense_kernels.testing import Inputs, make_inputs, same_bits

from .compiling import TARGETS
from .device import Device, program_of

backends.triton_interprets = lambda: True  # backend="triton" takes CPU tensors
LIMIT = 3_000_000  # warp instructions of a launch: ten times what the longest takes
SEEDS = 3  # orders of warps and programs in which a survivor has run
SURVIVES, NOT_REACHED = "survives", "not reached"


# Kinds of changes: from a statement to another, or None. Each has a probe, a change that cannot go unnoticed where the
# statement does anything for these inputs: a survivor whose probe survives as well was not reached.


def barrier(text: str) -> str | None:
    """Left out."""
    return "nop" if text.startswith("bar.sync") else None


def wait(text: str) -> str | None:
    """For copies or products under way: left out."""
    return "nop" if re.match(r"(cp\.async|wgmma)\.wait_group", text) else None


def leave(text: str) -> str:
    return "ret"


def index(text: str) -> str | None:
    """The next element instead."""
    access = re.match(r"(?:@!?%p\d+ )?(?:ld|st)\.(?:global|shared)(?:::cta)?(?:\.v(\d))?\.[bsu](\d+)", text)
    copy = re.match(r"(?:@!?%p\d+ )?cp\.async\.c[ag]\S* .*\], (0x\w+)", text)
    if access is None and copy is None:
        return None
    return moved(text, int(copy[1], 16) if copy else int(access[1] or 1) * int(access[2]) // 8)


def moved(text: str, step: int = 2**28) -> str:
    address = r"\[([^\]+]+?)\s*(?:\+\s*(-?\d+))?\s*\]"
    return re.sub(address, lambda place: f"[{place[1]}+{int(place[2] or 0) + step}]", text, count=1)


def predicate(text: str) -> str | None:
    """A guarded access that is not guarded."""
    guarded = re.match(r"@!?%p\d+ ((?:ld|st)\.global.*)", text)
    return guarded and guarded[1]


def guarded_against(text: str) -> str:
    """Far away, where the guard would have spared it."""
    return moved(text[:1] + text[1:].removeprefix("!") if text[1] == "!" else "@!" + text[1:])


def compare(text: str) -> str | None:
    """An edge that is moved by one."""
    compared = re.match(r"setp\.(lt|gt)\.s32(.*)", text)
    return compared and f"setp.{'le' if compared[1] == 'lt' else 'ge'}.s32{compared[2]}"


def inverted(text: str) -> str:
    return text.replace(".lt.", ".ge.").replace(".gt.", ".le.")


Change = Callable[[str], str | None]
KINDS: dict[str, tuple[Change, Change]] = {
    change.__name__: (change, probe)
    for change, probe in (
        (barrier, leave),
        (wait, leave),
        (index, moved),
        (predicate, guarded_against),
        (compare, inverted),
    )
}


# What is run ---------------------------------------------------------------------------------------------------------


def inputs_of(dtype: torch.dtype) -> Inputs:
    """Some tokens masked, the last block not full, several tiles of channels, and keys that the first image scales."""
    sizes = {"batch": 2, "num_tokens": 70, "num_anchors": 5, "num_background": 4}
    inputs = make_inputs("magnitudes", channels=208, dtype=dtype, **sizes)
    keys = torch.stack([inputs.keys[0], inputs.features[1]]).to(dtype)
    return dataclasses.replace(inputs, features=inputs.features[..., :24], keys=keys, mask=torch.rand(2, 70) < 0.8)


def dense(dtype: torch.dtype, **path) -> tuple:
    inputs = inputs_of(dtype)
    with trying(FusedConfig, **path):
        return select_and_merge(*inputs.args, **inputs.options)


def stages() -> tuple:
    """One by one, so that s itself is a result: a change of it seldom moves a pick."""
    *parts, condensed = inputs_of(torch.bfloat16).run_stages("triton")
    return (*parts, *condensed)


def packed() -> tuple:
    inputs = inputs_of(torch.bfloat16)
    offsets = [torch.tensor(counts, dtype=torch.int32) for counts in ([0, 60, 60, 70], [0, 5, 5, 6], [0, 3, 3, 3])]
    options = {"keys": inputs.keys[0], "positions": torch.rand(70, 2)}
    return select_and_merge_varlen(inputs.features[0], inputs.scores[0], *offsets, 9, 60, **options)


def backward() -> tuple:
    rows, tokens = torch.randn(2, 9, 24), torch.randn(2, 70, 24)
    mass, scores = torch.rand(2, 9) + 1, torch.rand(2, 70)
    indices = torch.stack([torch.randperm(70)[:9].sort().values for _ in range(2)])
    return merge_backward(rows, mass, tokens, scores, rows, mass, indices, torch.randint(0, 9, (2, 70)))


def attention() -> tuple:
    queries, keys = torch.randn(1, 2, 70, 40).bfloat16(), torch.randn(1, 1, 90, 40).bfloat16()
    return (attention_scores(queries, keys, mask=torch.rand(1, 90) < 0.8),)


WORKLOADS: dict[str, Callable[[], tuple]] = {
    "dense": lambda: dense(torch.float32),
    "stages": stages,
    "streamed": lambda: dense(torch.bfloat16, store_s=False),
    "packed": packed,
    "backward": backward,
    "attention": attention,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    target: str
    workload: str
    kind: str
    ptx: str  # of the kernel, as compiled
    pc: int
    is_probe: bool = False

    def of(self, ptx: str):
        return self.change if ptx == self.ptx else None

    def change(self, statements: list, labels: dict) -> tuple[list, dict]:
        text, place = statements[self.pc]
        return [
            *statements[: self.pc],
            (KINDS[self.kind][self.is_probe](text), place),
            *statements[self.pc + 1 :],
        ], labels

    def describe(self) -> dict:
        program = program_of(self.ptx, None)
        where = {"kernel": program.name, "at": program.where[self.pc], "ptx": program.text[self.pc], "pc": self.pc}
        return {"kind": self.kind, "target": self.target, "workload": self.workload, **where}


def run(workload: str, target: str, mutant: Mutant | None = None, seed: int = 0) -> tuple[tuple, Device]:
    torch.manual_seed(0)
    with Device(target, seed, mutate=mutant and mutant.of, limit=LIMIT) as device:
        return WORKLOADS[workload](), device


def mutants_of(workload: str, target: str, kinds: list[str]) -> tuple[tuple, list[Mutant]]:
    """The right results, and every mutant of a workload."""
    results, device = run(workload, target)
    if found := device.take():
        raise RuntimeError(f"{workload} on {target} is not right to begin with: {found}")
    found = []
    for ptx in dict.fromkeys(launch.ptx for launch in device.launches):
        text = program_of(ptx, None).text
        found += [Mutant(target, workload, k, ptx, pc) for k in kinds for pc, t in enumerate(text) if KINDS[k][0](t)]
    return results, found


def outcome(mutant: Mutant, expected: tuple) -> str:
    """How it was caught, or how it was not."""
    for seed in range(SEEDS):
        if caught := noticed(mutant, expected, seed):
            return caught
    return SURVIVES if noticed(dataclasses.replace(mutant, is_probe=True), expected) else NOT_REACHED


def noticed(mutant: Mutant, expected: tuple, seed: int = 0) -> str:
    results, device = run(mutant.workload, mutant.target, mutant, seed)
    if found := device.take():
        return found[0]["kind"]
    if not all(same_bits(a, b).all() for a, b in zip(results, expected, strict=True)):
        return "other bits"
    return "not written" if any(map(device.memory.count_unwritten, results)) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="these alone")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of changes (default: %(default)s)")
    parser.add_argument("--sample", type=int, help="so many mutants of each kind, drawn at random, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--json", type=pathlib.Path, help="write the outcome of each to this file")
    options = parser.parse_args()

    expected, mutants = {}, []
    for workload in WORKLOADS:
        for target in options.target or TARGETS:
            expected[workload, target], found = mutants_of(workload, target, options.kinds.split(","))
            mutants += found
    of_kind = {kind: [mutant for mutant in mutants if mutant.kind == kind] for kind in options.kinds.split(",")}
    draw = random.Random(options.seed)
    drawn = [draw.sample(found, min(len(found), options.sample or len(found))) for found in of_kind.values()]
    rows = []
    for mutant in itertools.chain(*drawn):
        rows.append({**mutant.describe(), "outcome": outcome(mutant, expected[mutant.workload, mutant.target])})
        if rows[-1]["outcome"] == SURVIVES:
            print("survives: {kind}, {workload}, {target}, {kernel} at {at}: {ptx}".format(**rows[-1]), flush=True)
    for kind, found in of_kind.items():
        ends = collections.Counter(row["outcome"] for row in rows if row["kind"] == kind)
        print(f"{kind}: {ends.total()} of {len(found)}: {dict(ends.most_common())}")
    print(f"seed {options.seed}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
