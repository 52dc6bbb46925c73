"""What the compilers make of the Triton kernels, on a machine without a GPU.

Calls the launchers with meta tensors, compiles what they launch for every target, and prints what is found in the
generated code:

    instructions  of the whole kernel
    registers     of a thread
    spills        instructions that spill to or fill from the stack (CUDA), spilled vector registers (HIP)
    stack         bytes of a thread, also what the compiler puts there on its own account
    shared        bytes of a block
    pick_loop     instructions in the body of the greedy loop
    barriers, fused, loop_spills  how many of those are barriers, fused multiply-adds, spills
    mma           matrix instructions
    loads16       loads of 16 bytes a thread

    python benchmarks/inspect_kernels.py [--json FILE]
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.ops.assign.kernel import assign, assign_varlen
from condense_kernels.ops.attention_scores.kernel import attention_scores
from condense_kernels.ops.attention_scores_varlen.kernel import attention_scores_varlen
from condense_kernels.ops.coverage_select.kernel import coverage_select, coverage_select_varlen
from condense_kernels.ops.dpc_knn.kernel import dpc_knn, dpc_knn_varlen
from condense_kernels.ops.dpp_select.kernel import dpp_select, dpp_select_varlen
from condense_kernels.ops.gather_merge.kernel import gather_merge, gather_merge_backward
from condense_kernels.ops.greedy_select.kernel import greedy_select, greedy_select_varlen
from condense_kernels.ops.merge.kernel import merge, merge_backward, merge_varlen
from condense_kernels.ops.select_and_merge.kernel import select_and_merge
from condense_kernels.ops.select_and_merge_varlen.kernel import select_and_merge_varlen
from condense_kernels.ops.similarity.kernel import (
    global_similarity_of,
    similarity,
    similarity_and_nearest,
    similarity_varlen,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OF_THE_PICK_LOOP = ("pick_loop", "barriers", "fused", "loop_spills")
SELECTING = ("greedy_select_kernel", "select_kernel")  # those with a pick loop
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def select_and_merge_in_three(*args, **kwargs):
    with trying(FusedConfig, assign_in_select=True):
        return select_and_merge(*args, **kwargs)


def attention_calls() -> dict[str, tuple]:
    """Heads as encoders have them: [B, N, H, d], transposed."""

    def heads(n: int, count: int, d: int, dtype: torch.dtype) -> torch.Tensor:
        return empty(2, n, count, d, dtype=dtype).transpose(1, 2)

    bf16 = torch.bfloat16
    cases = {}
    for dtype, d in ((bf16, 64), (bf16, 72), (torch.float16, 64), (torch.float32, 64), (torch.float32, 80)):
        cases[f"attention_scores {TYPES[dtype]} d={d}"] = (attention_scores, (heads(577, 16, d, dtype),) * 2, {})
    text = {"rows": empty(2, 33, dtype=torch.int64), "causal": True}
    for d in (64, 128):  # chosen rows of a language model
        grouped = heads(700, 28, d, bf16), heads(700, 4, d, bf16)
        mask, lse = empty(2, 700, dtype=torch.bool), empty(2, 28, 700)
        cases[f"attention_scores rows d={d}"] = attention_scores, grouped, text | {"mask": mask}
        cases[f"attention_scores rows, lse d={d}"] = attention_scores, grouped, text | {"lse": lse}
    packed = (empty(20000, 16, 80, dtype=bf16),) * 2
    cases["attention_scores_varlen"] = attention_scores_varlen, (*packed, empty(10, dtype=torch.int32), 2880), {}
    return cases


def dpp_calls() -> dict[str, tuple]:
    cases = {}
    for n in (576, 2880, 16384):
        options = {"tier": empty(2, n, dtype=torch.int8), "eps": 1e-5, "damping": 0.0}
        cases[f"dpp_select N={n}"] = (dpp_select, (empty(2, n, n), empty(2, n), 64), options)
    packed = empty(20000, 2880), empty(20000), *[empty(10, dtype=torch.int32)] * 2, 500, 2880
    cases["dpp_select_varlen"] = (dpp_select_varlen, packed, {"eps": 1e-5, "damping": 0.0})
    return cases


def mean_calls() -> dict[str, tuple]:
    """The mean similarity given."""
    bf16, mean = torch.bfloat16, {"mean_similarity": empty(2)}
    cases = {}
    for dtype, dk in ((bf16, 1024), (bf16, 80), (torch.float16, 1024), (torch.float32, 1024)):
        image = empty(2, 576, dk, dtype=dtype), empty(2, 576)
        cases[f"global_similarity {TYPES[dtype]} Dk={dk}"] = global_similarity_of, image, {}
    for n, kept in ((576, 48), (2880, 48), (16384, 48), (65536, 2)):
        arguments = (empty(2, n, 1024, dtype=bf16), empty(2, n, dtype=bf16), kept, 2)
        options = {"spatial_weight": 0.0, **mean}
        cases[f"select_and_merge, mean given N={n}"] = select_and_merge, arguments, options
    for n in (576, 65536):
        tokens = max(n, 20000)
        packed = empty(tokens, 1024, dtype=bf16), empty(tokens, dtype=bf16), *[empty(10, dtype=torch.int32)] * 3, 2, n
        options = {"spatial_weight": 0.0, "mean_similarity": empty(9)}
        cases[f"select_and_merge_varlen, mean given N={n}"] = select_and_merge_varlen, packed, options
    return cases


def calls() -> dict[str, tuple]:
    """Label -> (launcher, positional arguments, keyword arguments)."""
    bf16, int64 = torch.bfloat16, torch.int64
    cases = {
        f"similarity {TYPES[dtype]} Dk={dk}": (similarity, (empty(2, 576, dk, dtype=dtype), empty(2, 576)), {})
        for dtype, dk in ((bf16, 1024), (bf16, 80), (torch.float16, 1024), (torch.float32, 1024))
    }
    image, packed = (empty(2, 576, 1024), empty(2, 576)), (empty(20000, 1024), empty(10, dtype=torch.int32), 2880)
    for metric in ("cosine", "neg_l2"):
        options = {"metric": metric}
        cases[f"similarity and nearest {metric}"] = (similarity_and_nearest, image, options)
        cases[f"similarity_varlen {metric}"] = (similarity_varlen, packed, options)
    for n in (576, 729, 2880, 16384):
        options = {"sbar": empty(2), "tier": empty(2, n, dtype=torch.int8)}
        cases[f"greedy_select N={n}"] = (greedy_select, (empty(2, n, n), empty(2, n), 64), options)
    options = {"candidates": empty(2, 576, dtype=torch.bool), "combine": "mul", "max_min": True}
    cases["greedy_select, products N=576"] = (greedy_select, (empty(2, 576, 576), empty(2, 576), 64), options)
    cases |= dpp_calls()
    for n in (576, 2880, 16384):
        cases[f"dpc_knn N={n}"] = (dpc_knn, (empty(2, n, n), 64), {"tier": empty(2, n, dtype=torch.int8)})
    offsets = [empty(10, dtype=torch.int32)] * 2
    cases["dpc_knn_varlen N=2880"] = (dpc_knn_varlen, (empty(20000, 2880), *offsets, 500, 2880), {})
    for n in (576, 2880, 16384):
        options = {"weight": empty(2, n), "candidates": empty(2, n, dtype=torch.bool)}
        cases[f"coverage_select N={n}"] = (coverage_select, (empty(2, n, n), 64), options)
    picked = empty(20000, 2880), *[empty(10, dtype=torch.int32)] * 2, 500, 2880
    cases["coverage_select_varlen"] = (coverage_select_varlen, picked, {"weight": empty(20000)})
    places = {
        "grid": {"grid": (24, 24)},
        "positions": {"positions": empty(576, 2)},
        "int64 positions": {"positions": empty(576, 2, dtype=int64)},
    }
    for label, where in places.items():
        options = {"tier": empty(2, 576, dtype=torch.int8), **where}
        cases[f"assign {label}"] = (assign, (empty(2, 576, 576), empty(2, 64, dtype=int64)), options)
    options = {"sources": empty(2, 576, dtype=torch.bool), "spatial_weight": 0.0}
    cases["assign sources"] = (assign, (empty(2, 576, 576), empty(2, 64, dtype=int64)), options)
    offsets = [empty(10, dtype=torch.int32)] * 2
    options = {"tier": empty(20000, dtype=torch.int8), "positions": empty(20000, 2)}
    cases["assign_varlen"] = (assign_varlen, (empty(20000, 2880), empty(500, dtype=int64), *offsets, 2880), options)
    for dtype in (bf16, torch.float32):
        tensors = (empty(2, 576), empty(2, 64, dtype=int64), empty(2, 576, dtype=int64))
        cases[f"merge {TYPES[dtype]}"] = (merge, (empty(2, 576, 1024, dtype=dtype), *tensors), {})
        merged, mass = empty(2, 64, 1024, dtype=dtype), empty(2, 64)
        arguments = (merged, mass, empty(2, 576, 1024, dtype=dtype), tensors[0], merged, mass, *tensors[1:])
        cases[f"merge_backward {TYPES[dtype]}"] = (merge_backward, arguments, {})
        of_features = (merged, mass, None, tensors[0], None, mass, *tensors[1:])
        cases[f"merge_backward of features {TYPES[dtype]}"] = (merge_backward, of_features, {})
        for mode in ("sum", "lerp"):
            cases[f"merge {mode} {TYPES[dtype]}"] = merge, (arguments[2], *tensors), {"mode": mode}
            cases[f"merge_backward {mode} {TYPES[dtype]}"] = merge_backward, arguments, {"mode": mode}
    image, kept = empty(2, 576, 1024, dtype=bf16), tensors[1:]
    for label, sizes in (
        ("no scores", None),
        ("sizes", empty(2, 576, dtype=int64)),
        ("bools", empty(2, 576, dtype=torch.bool)),
    ):
        cases[f"merge {label}"] = merge, (image, sizes, *kept), {"mode": "sum"}
    arguments = merged, mass, None, None, None, mass, *kept
    cases["merge_backward no scores"] = merge_backward, arguments, {"mode": "lerp"}
    packed = empty(20000, 1024, dtype=bf16), None, empty(500, dtype=int64), empty(20000, dtype=int64)
    offsets = *[empty(10, dtype=torch.int32)] * 2, 2880
    for mode in ("mean", "lerp"):
        cases[f"merge_varlen {mode}"] = merge_varlen, (*packed, *offsets), {"mode": mode}
    for dtype in (bf16, torch.float32):
        x, grad = empty(2, 576, 1024, dtype=dtype), empty(2, 144, 1024, dtype=dtype)
        lists = empty(2, 144, 32, dtype=int64), empty(2, 144, 32)
        cases[f"gather_merge {TYPES[dtype]}"] = (gather_merge, (x, *lists), {})
        cases[f"gather_merge_backward {TYPES[dtype]}"] = (gather_merge_backward, (grad, x, *lists, [576, 1024]), {})
    cases["gather_merge ones"] = (gather_merge, (empty(2, 576, 1024, dtype=bf16), lists[0]), {})
    for n, grid in ((576, (24, 24)), (729, (27, 27)), (2880, (5, 24, 24)), (16384, (128, 128))):
        features, scores = empty(2, n, 1024, dtype=bf16), empty(2, n, dtype=bf16)
        cases[f"select_and_merge N={n}"] = (select_and_merge, (features, scores, 48, 16), {"grid": grid})
    for dtype in (bf16, torch.float32):  # two picks a loop: each of its kernels once
        arguments = (empty(2, 65536, 1024, dtype=dtype), empty(2, 65536, dtype=bf16), 2, 2)
        cases[f"select_and_merge N=65536 {TYPES[dtype]}"] = (select_and_merge, arguments, {"grid": (256, 256)})
    image = empty(2, 576, 1024, dtype=bf16), empty(2, 576, dtype=bf16), 48, 16
    cases["three launches N=576"] = (select_and_merge_in_three, image, {"grid": (24, 24)})
    options = {"mask": empty(2, 576, dtype=torch.bool), "positions": empty(2, 576, 2)}
    cases["select_and_merge masked"] = (select_and_merge, image, options)
    for n, kept in ((576, 500), (2880, 500), (65536, 2)):  # of the longest of 9 segments, and of all
        tokens = max(n, 20000)
        packed = empty(tokens, 1024, dtype=bf16), empty(tokens, dtype=bf16), *[empty(10, dtype=torch.int32)] * 3
        if n < 65536:
            packed_s = empty(tokens, n), empty(tokens), *[empty(10, dtype=torch.int32)] * 2, kept, n
            options = {"tier": empty(tokens, dtype=torch.int8), "first": empty(9, dtype=int64)}
            cases[f"greedy_select_varlen N={n}"] = (greedy_select_varlen, packed_s, options)
        options = {"positions": empty(tokens, 2)}
        cases[f"select_and_merge_varlen N={n}"] = (select_and_merge_varlen, (*packed, kept, n), options)
    return cases | mean_calls() | attention_calls()


def launches(launcher, args, kwargs) -> list[tuple]:
    """(kernel, its arguments by name, options) of everything a launcher launches; nothing runs."""
    recorded = []

    def record(kernel, *args, grid, warmup, **kwargs):
        names = [p.name for p in kernel.params]
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        recorded.append((kernel, {**dict(zip(names, args, strict=False)), **kwargs}, options))

    original, triton.JITFunction.run = triton.JITFunction.run, record
    try:
        launcher(*args, **kwargs)
    finally:
        triton.JITFunction.run = original
    return recorded


def source_of(kernel, arguments: dict, is_aligned=lambda tensor: True) -> ASTSource:
    """Specialised as at a launch: 1 is a constant, multiples of 16 and allocations are known as such, unless a kernel
    wants none of that."""
    signature, constants, attributes = {}, {}, {}

    def type_of(value, place: tuple[int, ...], constant: bool = False, special: bool = True):
        if isinstance(value, tuple):
            return type(value)(*(type_of(field, (*place, i)) for i, field in enumerate(value)))
        special = special and isinstance(value, int)
        if constant or value is None or (special and value == 1):
            constants[place] = value
            return "constexpr"
        if is_aligned(value) if isinstance(value, torch.Tensor) else special and value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if abs(value) < 2**31 else "i64"

    for i, parameter in enumerate(kernel.params):
        special = not parameter.do_not_specialize
        signature[parameter.name] = type_of(arguments[parameter.name], (i,), parameter.is_constexpr, special)
    return ASTSource(kernel, signature, constants, attributes)


def nvidia_tool(name: str, *arguments: str) -> str:
    path = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loops(code: list[str], label: re.Pattern, branch: re.Pattern) -> list[list[str]]:
    """The instructions between each backward branch and its label, innermost loops only."""
    labels, spans = {}, []
    for i, line in enumerate(code):
        if found := label.match(line):
            labels[found[1]] = i
        elif (found := branch.search(line)) and labels.get(found[1], i) < i:
            spans.append((labels[found[1]], i))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[line for line in code[start : end + 1] if not label.match(line)] for start, end in inner]


def inspect_nvidia(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = nvidia_tool("nvdisasm", "--no-dataflow", "--print-code", cubin.name)  # the same text in 3/4 of the time
    code = [line.strip() for line in sass.splitlines()]
    code = [line for line in code if line.startswith(".L_") or re.match(r"/\*[0-9a-f]+\*/", line)]
    picks = [
        loop
        for loop in loops(code, re.compile(r"(\.L_\w+):"), re.compile(r"\bBRA\b.*`\((\.L_\w+)\)"))
        if sum("REDUX.MIN" in line for line in loop) >= 2
    ]

    def spills(line):
        return bool(re.search(r"\b(STL|LDL)\b", line))

    return {
        "instructions": sum(not line.startswith(".L_") for line in code),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": sum(map(spills, code)),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "pick_loop": min((len(loop) for loop in picks), default=None),
        "barriers": max((sum("BAR." in line for line in loop) for loop in picks), default=None),
        "fused": max((sum("FFMA" in line for line in loop) for loop in picks), default=None),
        "loop_spills": max((sum(map(spills, loop)) for loop in picks), default=None),
        "mma": sum(bool(re.search(r"\b[HU]GMMA|HMMA|UTC\w*MMA", line)) for line in code),
        "loads16": sum(bool(re.search(r"\bLDG\S*\.128|LDGSTS\S*\.128", line)) for line in code),
    }


def inspect_amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    code = [line.strip() for line in text.splitlines()]

    def metadata(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    found = loops(code, re.compile(r"(\.LBB\w+):"), re.compile(r"\bs_c?branch\S*\s+(\.LBB\w+)"))
    picks = [
        loop
        for loop in found
        if sum(bool(re.search(r"v_min3?_i32", line)) for line in loop) >= 4
        and not any(re.search(r"v_(sqrt|rsq|rcp)_f32", line) for line in loop)  # as the assignment has
    ]
    return {
        "instructions": sum(bool(re.match(r"[a-z]\w+(\s|$)", line)) for line in code),
        "registers": metadata("vgpr_count"),
        "spills": metadata("vgpr_spill_count"),
        "stack": metadata("private_segment_fixed_size"),
        "shared": metadata("group_segment_fixed_size"),
        "pick_loop": None if not picks else min(map(len, picks)),
        "barriers": max((sum("s_barrier" in line for line in loop) for loop in picks), default=None),
        "fused": max((sum(bool(re.search(r"v_(pk_)?fma", line)) for line in loop) for loop in picks), default=None),
        "loop_spills": max((sum("scratch_" in line for line in loop) for loop in picks), default=None),
        "mma": sum("mfma" in line for line in code),
        "loads16": sum(bool(re.search(r"(global|buffer)_load_dwordx4", line)) for line in code),
    }


@functools.cache
def jobs() -> list[tuple]:
    """(label, kernel, source, options, target) of everything there is to compile, each once."""
    found, seen = [], set()
    for label, (launcher, args, kwargs) in calls().items():
        for kernel, arguments, options in launches(launcher, args, kwargs):
            source = source_of(kernel, arguments)
            specialised = str((kernel.__name__, source.signature, source.constants, source.attrs, options))
            if specialised not in seen:
                seen.add(specialised)
                found += [(label, kernel, source, options, target) for target in TARGETS]
    return found


def inspect_compiled(kernel, source: ASTSource, options: dict, target: str) -> dict:
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    found = inspect_nvidia(compiled) if TARGETS[target].backend == "cuda" else inspect_amd(compiled)
    if kernel.__name__ not in SELECTING:
        found |= dict.fromkeys(OF_THE_PICK_LOOP)
    return found


def row_of(i: int) -> dict:
    label, kernel, source, options, target = jobs()[i]
    return {
        "call": label,
        "kernel": kernel.__name__,
        "target": target,
        **inspect_compiled(kernel, source, options, target),
    }


def inspect() -> list[dict]:
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(row_of, range(len(jobs())), chunksize=1)


def table(rows: list[dict]) -> Table:
    result = Table(*rows[0], title="Generated code, not measured speed")
    for row in rows:
        result.add_row(*("" if value is None else str(value) for value in row.values()))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    options = parser.parse_args()
    found = inspect()
    Console(width=None if sys.stdout.isatty() else 190).print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
