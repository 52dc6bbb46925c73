"""The Triton kernels compiled and run: what the interpreter cannot show. Skipped where there is no GPU."""

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch
from processes import SAFE_PATH, fresh
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from torch._inductor.utils import run_and_get_code

from condense_kernels import Condensed, select_and_merge, similarity
from condense_kernels._triton.tables import FusedConfig, trying
from condense_kernels.testing import KINDS, assert_matches_reference, assert_same_bits, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [30, 130])
def test_every_kind_of_input(tokens, kind, dtype):
    inputs = make_inputs(kind, num_tokens=tokens, channels=72, dtype=dtype, device="cuda")
    assert_matches_reference(inputs.run(), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "kept"), [(1, (1, 0)), (576, (144, 48)), (729, (54, 18)), (2880, (240, 80))])
def test_sizes_of_real_models(tokens, kept, dtype):
    inputs = make_inputs(
        "clustered", batch=1, num_tokens=tokens, channels=1024, num_anchors=kept[0], num_background=kept[1], dtype=dtype
    ).to("cuda")
    assert_matches_reference(inputs.run(), inputs)


@pytest.mark.parametrize("kind", ["parallel", "masked", "positions"])
def test_an_image_alone_is_the_image_in_a_batch(kind):
    inputs = make_inputs(kind, batch=9, num_tokens=158, channels=952, device="cuda")
    together = inputs.run()
    for b in range(9):
        assert_same_bits(inputs.image(b).run(), Condensed(*(t[b : b + 1] for t in together)), f"image {b}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_strides(dtype):
    inputs = make_inputs("clustered", num_tokens=300, channels=1024, dtype=dtype, device="cuda")
    expected = inputs.run()
    permuted = inputs.features.mT.contiguous().mT
    sliced = torch.nn.functional.pad(inputs.features, (0, 1))[..., :-1]  # rows of odd length: narrow loads
    for features in (permuted, sliced):
        assert_same_bits(dataclasses.replace(inputs, features=features).run(), expected, str(features.stride()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    inputs = make_inputs("clustered", batch=4, num_tokens=576, channels=256, dtype=dtype, device="cuda")
    first = inputs.run()
    for _ in range(20):
        assert_same_bits(inputs.run(), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarities_are_symmetric_and_equal_tokens_alike(dtype):
    """To the bit: rests on the matrix units treating swapped operands alike."""
    keys = make_inputs("clustered", batch=2, num_tokens=300, channels=200, dtype=dtype, device="cuda").features
    places = [0, 1, 63, 64, 130, 299]
    keys[:, places] = keys[:, 5:6].clone()
    s = similarity(keys)[0]
    assert torch.equal(s, s.mT)
    for i in places:
        assert torch.equal(s[:, i], s[:, 5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_s_stored_the_bits_are_the_same(kind, dtype):
    """Rests on a product's bits being those of its two keys, wherever they are in a tile."""
    inputs = make_inputs(kind, num_tokens=300, channels=200, dtype=dtype, device="cuda")
    with trying(FusedConfig, store_s=False):
        streamed = inputs.run()
    assert_same_bits(streamed, inputs.run())


@pytest.mark.parametrize("tokens", [2880, 16384])
def test_without_s_stored_at_real_sizes(tokens):
    inputs = make_inputs(
        "clustered", batch=1, num_tokens=tokens, channels=1024, num_anchors=240, num_background=80,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    with trying(FusedConfig, store_s=False):
        streamed = inputs.run()
    assert_same_bits(streamed, inputs.run())


def test_long_inputs_take_memory_in_proportion():
    inputs = make_inputs(
        "clustered", batch=1, num_tokens=65536, channels=256, num_anchors=48, num_background=16,
        dtype=torch.bfloat16,
    ).to("cuda")  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = inputs.run()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 65536 * 320  # 17 GB with s
    assert_same_bits(inputs.run(), first)


def test_memory_of_the_caller():
    from condense_kernels.ops.select_and_merge.kernel import select_and_merge, workspace_bytes

    inputs = make_inputs("masked", num_tokens=200, channels=64, dtype=torch.bfloat16, device="cuda")
    expected = inputs.run()
    out = tuple(torch.empty_like(x) for x in expected)
    needed = workspace_bytes(*inputs.scores.shape, out[1].shape[1], 64, torch.bfloat16)
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    select_and_merge(*inputs.args, **inputs.options, out=out, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_same_bits(Condensed(*out), expected)


def test_nothing_waits_for_the_device():
    inputs = make_inputs("masked", num_tokens=100, device="cuda")
    inputs.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.run()
        inputs.run_stages()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_from_a_graph_on_new_values():
    inputs, other = (make_inputs("random", num_tokens=100, device="cuda", seed=seed) for seed in (0, 1))
    expected = other.run()
    inputs.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = inputs.run()
    inputs.features.copy_(other.features)
    inputs.scores.copy_(other.scores)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(result, expected)


def captured_after_warm_up():
    import triton

    import condense_kernels as ck

    ck.warm_up([(100, 12, 64)], torch.float32, progress=False)
    features, scores = torch.randn(2, 100, 64, device="cuda"), torch.rand(2, 100, device="cuda")
    compiled = []
    triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: compiled.append(fn.name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ck.condense(features, scores, 12, grid=(10, 10))
    graph.replay()
    torch.cuda.synchronize()
    return compiled, torch.equal(result.merged, ck.condense(features, scores, 12, grid=(10, 10)).merged)


def test_the_first_call_after_warm_up_may_be_captured():
    assert fresh(captured_after_warm_up) == ([], True)


@pytest.mark.parametrize("training", [False, True])
def test_reduce_overhead(training):
    """torch.compile records CUDA graphs, one each of forward and backward, and replays them on new values.

    The neighbours of the operator scale by powers of two: however they are fused, no bit depends on it.
    """
    torch._dynamo.reset()
    cudagraph_trees.reset_cudagraph_trees()
    counters.clear()

    def step(features, scores):
        merged, indices, assignment, mass = select_and_merge(features * 2, scores * 0.5, 20, 5, grid=(10, 10))
        return merged * 4, indices, assignment, mass * 0.25

    def run(call, *tensors):
        results = call(*tensors)
        if not training:
            return results
        loss = results[0].square().sum() + results[3].square().sum()
        return *results, *torch.autograd.grad(loss, tensors)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):  # warm-up, recording, replays
        inputs = make_inputs("random", num_tokens=100, device="cuda", seed=seed)
        tensors = inputs.features.requires_grad_(training), inputs.scores.requires_grad_(training)
        expected = run(step, *tensors)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_bits(run(compiled, *tensors), expected)
    assert counters["inductor"]["cudagraph_skips"] == 0
    recorded = cudagraph_trees.get_manager(torch.cuda.current_device()).new_graph_id().id
    assert recorded >= (2 if training else 1)


def scaled(features, scores, height, width):
    """Neighbours for Inductor to fuse whose rounding does not depend on how it does that."""
    out = select_and_merge(features * 2, scores * 0.5, 20, 5, grid=(height, width))
    return out.merged * 4, out.indices + 1, out.assignment, out.mass


def test_inductor_compiles_the_kernels():
    """With sizes that change, and what it generates names them and no operator."""
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True)
    for height, width in [(10, 10), (12, 13), (9, 11), (20, 30)]:
        inputs = make_inputs("clustered", num_tokens=height * width, channels=64, dtype=torch.bfloat16, device="cuda")
        arguments = inputs.features, inputs.scores, height, width
        results, codes = run_and_get_code(compiled, *arguments)
        assert_same_bits(results, scaled(*arguments))
        assert all("select_kernel" in code and "torch.ops.condense" not in code for code in codes)


class OnGrid(torch.nn.Module):
    def forward(self, features, scores):
        return scaled(features, scores, 10, 10)


def test_a_package_runs_without_this_package(tmp_path):
    """AOTInductor's, for any batch, in a process that has none of the operators."""

    def call(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = make_inputs("clustered", batch=batch, num_tokens=100, channels=64, device="cuda", seed=batch)
        return inputs.features, inputs.scores

    axes = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(OnGrid(), call(3), dynamic_shapes=(axes, axes))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    calls = [call(batch) for batch in (3, 2, 7)]
    torch.save([(arguments, OnGrid()(*arguments)) for arguments in calls], tmp_path / "calls.pt")
    code = """
        import sys, torch
        run = torch._inductor.aoti_load_package(sys.argv[1])
        for arguments, expected in torch.load(sys.argv[2]):
            for result, other in zip(run(*arguments), expected, strict=True):
                assert result.dtype == other.dtype and torch.equal(result, other)
        assert not any(name.startswith("condense_kernels") for name in sys.modules)
        print("same")
    """
    command = [sys.executable, *SAFE_PATH, "-c", textwrap.dedent(code), path, tmp_path / "calls.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "same\n", done.stderr


def test_runs_on_the_current_stream():
    inputs = make_inputs("random", num_tokens=100, device="cuda")
    expected = inputs.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = inputs.run()
    stream.synchronize()
    assert_same_bits(result, expected)


@pytest.mark.parametrize("assign_in_select", [False, True])
def test_launches(assign_in_select):
    """Similarity, selection, merge; and the assignment, in the selection's launch or in one of its own."""
    inputs = make_inputs("random", num_tokens=576, channels=64, device="cuda")
    with trying(FusedConfig, assign_in_select=assign_in_select):
        inputs.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            inputs.run()
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == (3 if assign_in_select else 4), kernels


def test_autocast_and_matmul_precision():
    inputs = make_inputs("clustered", num_tokens=200, channels=512, device="cuda")
    expected = inputs.run()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert_same_bits(inputs.run(), expected)
    finally:
        torch.set_float32_matmul_precision(precision)
