"""What torch.export, AOTAutograd and Inductor make of the operators for a CUDA device that is not there.

Tensors are fake; what would ask a device for its properties is told those of an H100; where Inductor would launch a
kernel to see how fast it is, it is compiled and no more. All else is the real thing: the graphs, the generated Python
and C++, the kernels' code for sm_90. A script, as Triton must not interpret: prints what it finds as JSON.

    python tests/inductor_without_gpu.py graphs|sizes|wrapper|package
"""

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import types
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the doubles below are in this process alone

import torch
import triton
from torch._dynamo import device_interface
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCacheDetails
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import async_compile, config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import cpp_extension
from triton.backends.compiler import GPUTarget

import condense_kernels as ck
from condense_kernels._dispatch import backends

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import inspect_kernels

H100 = types.SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, gcnArchName="",
    shared_memory_per_block_optin=232448, total_memory=80 << 30,
)  # fmt: skip
CUDA = device_interface.CudaInterface


class Driver:
    """Triton's, as far as it is asked for a target."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def without_loading(autotuner: CachingAutotuner) -> None:
    """Launchers of a kernel that is compiled, and stays on this side of the driver."""
    result = autotuner.compile_results[0]
    result.kernel._init_handles = lambda: None
    autotuner.launchers = [result.make_launcher()]


def without_launching(wrapper: PythonWrapperCodegen) -> None:
    """In the place of the block that launches every kernel once, after which AOTInductor has its code."""
    wrapper.kernel_autotune_defs.splice("\nasync_compile.wait(globals())\ndel async_compile\n")
    found: dict = {}
    exec(wrapper.kernel_autotune_defs.getvalue(), found)
    for kernel in [value for value in found.values() if isinstance(value, CachingAutotuner)]:
        kernel.save_gpu_kernel(0, kernel.launchers[0])


@contextlib.contextmanager
def no_gpu():
    """Within, there is an H100, as far as code for one is generated."""
    triton.runtime.driver.set_active(Driver())
    doubles = [
        (CUDA, "is_available", staticmethod(lambda: True)),
        (CUDA, "is_bf16_supported", staticmethod(lambda including_emulation=False: True)),
        (CUDA, "get_device_properties", staticmethod(lambda device=None: H100)),
        (CUDA, "get_compute_capability", staticmethod(lambda device=None: 90)),
        (CUDA.Worker, "get_device_properties", staticmethod(lambda device=None: H100)),
        (torch.cuda, "get_device_properties", lambda device=None: H100),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),  # imported by what is generated
        (joint_graph, "lazy_init", lambda *args, **kwargs: None),  # patterns, traced on the device
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (CachingAutotuner, "_make_launchers", without_loading),
        (PythonWrapperCodegen, "generate_and_run_autotune_block", without_launching),
        (cpp_extension, "CUDA_HOME", str(Path(triton.__file__).parent / "backends/nvidia")),  # it has the headers
    ]
    with contextlib.ExitStack() as stack:
        for place, name, double in doubles:
            stack.enter_context(mock.patch.object(place, name, double, create=not hasattr(place, name)))
        stack.enter_context(config.patch({"use_static_triton_launcher": False, "force_disable_caches": True}))
        yield


class Call(torch.nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        result = self.call(*tensors)
        return tuple(result) if isinstance(result, tuple) else (result,)


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def calls(device: str) -> dict[str, tuple]:
    """Name -> (call, tensors), under fake tensors."""

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return empty(*shape, dtype=dtype, device=device)

    bf16, ints = torch.bfloat16, torch.int64
    features, scores = of(2, 576, 64, dtype=bf16), of(2, 576)
    s, indices, assignment = of(2, 576, 576), of(2, 64, dtype=ints), of(2, 576, dtype=ints)
    merged, mass = of(2, 64, 64, dtype=bf16), of(2, 64)
    offsets = [of(3, dtype=torch.int32) for _ in range(3)]
    heads, lists = of(2, 4, 100, 64, dtype=bf16), of(2, 64, 9, dtype=ints)
    raw = torch.ops.condense
    return {
        "select_and_merge": (
            lambda f, s: ck.select_and_merge(f, s, 48, 16, grid=(24, 24), spatial_weight=0.3), (features, scores)
        ),
        "select_and_merge masked": (
            lambda f, s, k, p, m: ck.select_and_merge(f, s, 48, 16, keys=k, positions=p, mask=m),
            (features, scores, of(2, 576, 80), of(576, 2, dtype=ints), of(2, 576, dtype=torch.bool)),
        ),
        "one token": (lambda f, s: ck.select_and_merge(f, s, 1, 0, grid=(1, 1)), (of(1, 1, 64), of(1, 1))),
        "mean given": (
            lambda f, s, m: ck.select_and_merge(f, s, 48, 16, grid=(24, 24), mean_similarity=m),
            (features, scores, of(2)),
        ),
        "similarity": (ck.similarity, (features, scores)),
        "global_similarity": (ck.global_similarity, (features, scores)),
        "greedy_select": (lambda s, p: ck.greedy_select(s, p, 48), (s, scores)),
        "dpc_knn": (lambda s: ck.dpc_knn(s, 48), (s,)),
        "assign": (lambda s, i: ck.assign(s, i, grid=(24, 24)), (s, indices)),
        "merge": (ck.merge, (features, scores, indices, assignment)),
        "merge_backward": (
            raw.merge_backward, (merged, mass, features, scores, merged, mass, indices, assignment)
        ),
        "assign sources": (
            lambda s, i, m: ck.assign(s, i, sources=m, spatial_weight=0), (s, indices, of(2, 576, dtype=torch.bool))
        ),
        "assign_varlen": (
            lambda s, i, *o: ck.assign_varlen(s, i, *o, 300, spatial_weight=0),
            (of(576, 300), of(64, dtype=ints), *offsets[:2]),
        ),
        "gather_merge": (ck.gather_merge, (features, lists, of(2, 64, 9))),
        "gather_merge ones": (ck.gather_merge, (features, lists)),
        "gather_merge_backward": (
            lambda *t: raw.gather_merge_backward(*t, [576, 64]), (merged, features, lists, of(2, 64, 9))
        ),
        "attention_scores": (lambda q, k: ck.attention_scores(q, k), (heads, heads)),
        "select_and_merge_varlen": (
            lambda f, s, *o: ck.select_and_merge_varlen(f, s, *o, 64, 300, spatial_weight=0),
            (of(576, 64), of(576), *offsets),
        ),
        "long image": (lambda f, s: ck.select_and_merge(f, s, 4, 2, spatial_weight=0), (of(1, 20000, 8), of(1, 20000))),
        "fp64": (lambda f, s: ck.select_and_merge(f.float(), s.float(), 4, 2, spatial_weight=0),
                 (of(1, 40, 8, dtype=torch.float64), of(1, 40, dtype=torch.float64))),
    }  # fmt: skip


def stored_to(kernel, arguments: dict) -> list[str]:
    """The arguments that a kernel stores to, by what Triton compiles of it: as torch looks for them, each step once,
    and not beyond calls, whose results are no pointers."""
    module, names = triton_kernel_wrap.generate_ttir(kernel, arguments, {})
    functions = triton_kernel_wrap.ttir_to_functions(module)

    @functools.cache
    def stored(function: str) -> frozenset[int]:
        steps = functions[function]
        left = []
        for step in (step for same in steps.values() for step in same):
            if step.name == "tt.call":
                left += [step.args[i] for i in stored(step.fn_call_name)]
            elif step.name in ("tt.store", "tt.atomic_rmw", "tt.atomic_cas"):
                left.append(step.args[0])
        seen = set()
        while left:
            value = left.pop()
            if value not in seen:
                seen.add(value)
                before = [] if isinstance(value, triton_kernel_wrap.Param) or value.fake() else steps[value]
                left += [
                    argument for step in before if step.name not in ("tt.load", "tt.call") for argument in step.args
                ]
        return frozenset(value.idx for value in seen if isinstance(value, triton_kernel_wrap.Param))

    return [names[i] for i in sorted(stored(next(iter(functions)))) if isinstance(arguments[names[i]], torch.Tensor)]


def described(graph: torch.fx.Graph) -> dict:
    """The launches of a graph, what each is said to write and what it does write, the tensors of the caller among that,
    and the operators of this package that the graph has."""
    table = triton_kernel_wrap.kernel_side_table
    launches, said, written, of_caller = [], [], [], []
    for node in (node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)):
        kernel = table.get_kernel(node.kwargs["kernel_idx"]).fn.launched
        given = node.kwargs["kwargs"] | table.get_constant_args(node.kwargs["constant_args_idx"])
        fakes = {
            name: value.meta["val"] if isinstance(value, torch.fx.Node) else value for name, value in given.items()
        }
        launches.append(kernel.__name__)
        said.append(sorted(node.kwargs["tensors_to_clone"]))
        written.append(sorted(stored_to(kernel, fakes)))
        of_caller += [name for name in said[-1] if given[name].op == "placeholder"]
    return {
        "launches": launches,
        "said": said,
        "written": written,
        "of the caller": of_caller,
        "operators": [str(node.target) for node in graph.nodes if "condense" in str(node.target)],
    }


def sources(module: torch.fx.GraphModule) -> list[str]:
    """Of kernels, that are part of the key under which torch keeps what it made of a graph."""
    details = AOTAutogradCacheDetails.__new__(AOTAutogradCacheDetails)
    return details.get_triton_source_codes_from_gm(module)


def graphs() -> dict:
    found = {}
    for device in ("cuda", "cpu"):
        with FakeTensorMode():
            for name, (call, tensors) in calls(device).items():
                module, _ = aot_export_module(Call(call), tensors, trace_joint=False)
                found[f"{name} on {device}"] = described(module.graph)
    with FakeTensorMode(shape_env=ShapeEnv()):
        call, tensors = calls("cuda")["select_and_merge"]
        program = torch.export.export(Call(call), tensors)
        for name, exported in (("exported", program), ("decomposed", program.run_decompositions())):
            found[name] = described(exported.graph)
        found["cached by"] = re.findall(r"^def (\w+_kernel)\(", "\n".join(sources(program.graph_module)), re.MULTILINE)
        with torch._functorch.config.patch(decompose_custom_triton_ops=False):
            module, _ = aot_export_module(Call(call), tensors, trace_joint=False)
        found["switched off"] = described(module.graph)
    return found


def sizes() -> dict:
    """How many graphs torch.compile makes of images of many sizes, and how many choices of launches these are."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def compiler(graph, example_inputs):
        compiled.append(graph)
        return boxed_nop(graph, example_inputs)

    def call(features, scores, height, width, num_anchors, num_background):
        return ck.select_and_merge(features, scores, num_anchors, num_background, grid=(height, width))

    found = {}
    images = [(20, 37), (20, 36), (31, 27), (27, 31), (28, 28), (26, 31), (41, 30), (30, 41), (33, 45), (36, 42)]
    for dynamic in (True, None):
        torch._dynamo.reset()
        compiled: list = []
        run = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=compiler))
        with FakeTensorMode(), torch._dynamo.config.patch(recompile_limit=32):
            for i, (height, width) in enumerate(images):
                n, b = height * width, 3 + i % 3
                run(empty(b, n, 64), empty(b, n), height, width, n // 6 + i, n // 9)
        found[str(dynamic)] = len(compiled)
    chosen = {choices(call, image, 48, 16) for image in images}
    return found | {"choices": len(chosen), "images": len(images)}


def launched(call, n: int) -> list[tuple]:
    """The launches of a call that is not traced: kernel, arguments, options."""
    features, scores = empty(2, n, 64, dtype=torch.bfloat16, device="meta"), empty(2, n, device="meta")
    operator = backends.OPERATORS["select_and_merge"]
    with mock.patch.object(backends, "kernel_of", return_value=operator.triton):
        return inspect_kernels.launches(call, (features, scores), {})


def choices(call, image: tuple[int, int], *budget: int) -> str:
    """What is compiled into the kernels of a call."""
    n = image[0] * image[1]
    found = launched(lambda features, scores: call(features, scores, *image, *budget), n)
    return str([[arguments[p.name] for p in kernel.params if p.is_constexpr] for kernel, arguments, _ in found])


def wrapper() -> dict:
    """What Inductor generates for a CUDA device: the text, its kernels compiled for sm_90 beside those of a launch."""
    texts: list[str] = []
    kernels: dict[str, CachingAutotuner] = {}
    triton_of = async_compile.AsyncCompile.triton

    def noted(self, name, source, device_str="cuda"):
        kernels[name] = triton_of(self, name, source, device_str)
        return kernels[name]

    def call(features, scores):
        out = ck.select_and_merge(features, scores, 48, 16, grid=(24, 24), spatial_weight=0.3)
        return out.merged, out.indices, out.assignment, out.mass

    def of_one_token(features, scores):
        return tuple(ck.select_and_merge(features, scores, 1, 0, grid=(1, 1)))

    mode = FakeTensorMode()
    for function, b, n in ((of_one_token, 1, 1), (call, 2, 576)):
        with (
            mode,
            torch._guards.tracing(torch._guards.TracingContext(mode)),
            mock.patch.object(GraphLowering, "save_output_code", texts.append),
            mock.patch.object(async_compile.AsyncCompile, "triton", noted),
        ):
            compile_fx(torch.fx.symbolic_trace(function), [empty(b, n, 64, dtype=torch.bfloat16), empty(b, n)])
    rows = {}
    for kernel, arguments, options in launched(call, 576):
        source = inspect_kernels.source_of(kernel, arguments)
        alone = triton.compile(source, target=Driver().get_current_target(), options=options)
        in_graph = kernels[kernel.__name__].compile_results[0].kernel
        rows[kernel.__name__] = {"alone": figures(alone), "in a graph": figures(in_graph)}
    return {"text": texts[-1], "kernels": rows}


def figures(compiled) -> dict:
    """How often the code has each instruction, but for those that fetch arguments; what a launch needs. In a graph the
    factor of a loop is chosen before it is rounded to fp32, of a launch after it: the same number."""
    text = compiled.asm["ptx"].replace("selp.f64", "selp.f32")
    instructions = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z]\w*\.[\w.:]*)", text, re.MULTILINE)
    return {
        "instructions": Counter(name for name in instructions if not re.match(r"ld\.param|cvt\.rn\.f32\.f64", name)),
        "fused": inspect_kernels.inspect_nvidia(compiled)["fused"],
        "num_warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
    }


def package() -> dict:
    """AOTInductor's package for a CUDA device, as C++ sources and the code of kernels: an open batch, an open size."""

    def call(features, scores):
        return tuple(ck.select_and_merge(2 * features, scores, 48, 16, spatial_weight=0))

    def packed(axes: dict, folder: str) -> Path:
        with FakeTensorMode(shape_env=ShapeEnv()):
            tensors = empty(3, 576, 64), empty(3, 576)
            program = torch.export.export(Call(call), tensors, dynamic_shapes=((axes, axes),))
        path = str(Path(folder) / "model.pt2")
        return Path(torch._inductor.aoti_compile_and_package(program, package_path=path))

    options = {
        "aot_inductor.package_cpp_only": True,  # its compiler would link the CUDA runtime
        "aot_inductor.precompile_headers": False,
        "triton.unique_kernel_names": True,
    }
    batch = torch.export.Dim("batch", max=1024)
    tokens = torch.export.Dim("tokens", min=64, max=2880)
    with config.patch(options), tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(packed({0: batch}, folder)) as archive:
            names = {name.rpartition("/")[2]: name for name in archive.namelist()}
            (wrapper,) = (archive.read(name).decode() for file, name in names.items() if file.endswith("wrapper.cpp"))
            kernels = {file: archive.read(name)[:4].hex() for file, name in names.items() if file.endswith(".cubin")}
        refused = None
        try:
            packed({0: batch, 1: tokens}, folder)
        except RuntimeError as error:
            refused = str(error)
    return {"wrapper": re.sub(r"/\*.*?\*/", "", wrapper, flags=re.DOTALL), "kernels": kernels, "refused": refused}


if __name__ == "__main__":
    with no_gpu():
        print(json.dumps(globals()[sys.argv[1]]()))
