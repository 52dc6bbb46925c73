"""The operators as PyTorch sees them: schemas, fake kernels, threads, instruction sets."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import condense_kernels as ck
from condense_kernels.testing import assert_same_bits, make_inputs

OPS = torch.ops.condense
INPUTS = make_inputs("masked", num_tokens=12, channels=5, num_anchors=3, num_background=2)
S, SBAR, G, TIER = ck.similarity(INPUTS.features, INPUTS.scores, INPUTS.mask)
ORDER = ck.greedy_select(S, INPUTS.scores, 5, sbar=SBAR, tier=TIER)
KEPT = ORDER.sort(dim=1).values
ROWS = ck.assign(S, KEPT, tier=TIER, grid=(3, 4))
OUT = {name: torch.empty_like(t) for name, t in INPUTS.run()._asdict().items()}
WORKSPACE = torch.empty(ck.workspace_bytes(*INPUTS.args, **INPUTS.options), dtype=torch.uint8)

# Dense but permuted tensors catch a fake kernel that copies its input's strides.
PERMUTED = INPUTS.features.transpose(1, 2).contiguous().transpose(1, 2)
CALLS = [
    ("similarity", (INPUTS.features, INPUTS.scores, INPUTS.mask), {}),
    ("similarity", (PERMUTED.bfloat16(),), {}),
    ("similarity", (INPUTS.features, INPUTS.scores.double()), {}),
    ("greedy_select", (S, INPUTS.scores, 5), {"sbar": SBAR, "tier": TIER, "suppression": 0.5}),
    ("greedy_select", (S.transpose(1, 2), INPUTS.scores, 0), {}),
    ("assign", (S, KEPT), {"tier": TIER, "grid": [3, 4]}),
    ("assign", (S, KEPT), {"positions": torch.rand(12, 2), "spatial_weight": 0.3}),
    ("merge", (INPUTS.features, INPUTS.scores, KEPT, ROWS), {}),
    ("merge", (PERMUTED.half(), INPUTS.scores, KEPT, ROWS), {}),
    ("select_and_merge", INPUTS.args, INPUTS.options),
    ("select_and_merge", (PERMUTED, INPUTS.scores.double(), 3, 2), {"grid": [3, 4], "keys": PERMUTED[:, :, :2]}),
    ("select_and_merge", (PERMUTED.bfloat16(), INPUTS.scores, 0, 12), {"spatial_weight": 0.0}),
    ("select_and_merge_out", INPUTS.args, {**INPUTS.options, **OUT, "workspace": WORKSPACE}),
]
CU = [torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 24], [0, 2, 2, 5], [0, 1, 1, 2])]
PACKED = (INPUTS.features.flatten(0, 1), INPUTS.scores.flatten(), *CU, 7, 19)
GRADS = torch.rand_like(OUT["merged"]), torch.rand_like(OUT["mass"])
CALLS += [
    ("merge_backward", (*GRADS, *INPUTS.args[:2], OUT["merged"], OUT["mass"], KEPT, ROWS), {}),
    ("merge_backward", (GRADS[0].bfloat16().expand(2, -1, -1), GRADS[1], PERMUTED.bfloat16(), INPUTS.scores.half(),
                        OUT["merged"].bfloat16(), OUT["mass"], KEPT, ROWS), {}),
    ("select_and_merge_varlen", PACKED, {"positions": torch.rand(24, 2), "suppression": 0.5}),
    ("select_and_merge_varlen", (PERMUTED.flatten(0, 1).bfloat16(), *PACKED[1:]), {"spatial_weight": 0.0}),
]  # fmt: skip
# With gradients: what opcheck traces then is forward and backward.
CALLS += [
    (op, tuple(a.clone().requires_grad_() if i < 2 else a for i, a in enumerate(args)), options)
    for op, args, options in (
        ("merge", (*INPUTS.args[:2], KEPT, ROWS), {}),
        ("select_and_merge", INPUTS.args, INPUTS.options),
        ("select_and_merge_varlen", PACKED, {"spatial_weight": 0.0}),
    )
]
CALL_IDS = [f"{i}-{call[0]}" for i, call in enumerate(CALLS)]


@pytest.mark.parametrize(("op", "args", "options"), CALLS, ids=CALL_IDS)
def test_opcheck(op, args, options):
    torch.library.opcheck(getattr(OPS, op).default, args, options)


@pytest.mark.parametrize(("op", "args", "options"), CALLS, ids=CALL_IDS)
def test_fake_agrees_in_shape_dtype_and_strides(op, args, options):
    real = getattr(OPS, op)(*args, **options)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        convert = lambda value: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value  # noqa: E731
        fake = getattr(OPS, op)(*map(convert, args), **{name: convert(value) for name, value in options.items()})
    tuples = [x if isinstance(x, tuple) else () if x is None else (x,) for x in (real, fake)]
    for r, f in zip(*tuples, strict=True):
        assert (f.shape, f.dtype, f.stride(), f.device) == (r.shape, r.dtype, r.stride(), r.device)


def test_one_graph_serves_all_sizes():
    """Symbolic sizes: traced once at N = 24, the graph is right at N = 30 and another batch."""

    def call(features, scores):
        return torch.ops.condense.select_and_merge(features, scores, features.shape[1] // 4, 2, spatial_weight=0.0)

    inputs, other = make_inputs("random", num_tokens=24), make_inputs("random", batch=3, num_tokens=30)
    graph = make_fx(call, tracing_mode="symbolic")(inputs.features, inputs.scores)
    assert_same_bits(graph(other.features, other.scores), call(other.features, other.scores))


def test_the_gil_is_released(cpp):
    """Another Python thread counts on while one large image is condensed."""
    features, scores = torch.rand(1, 3000, 1024), torch.rand(1, 3000)
    done, ticks = threading.Event(), []

    def condense():
        ck.select_and_merge(features, scores, 300, 100, grid=(50, 60))
        done.set()

    thread = threading.Thread(target=condense)
    thread.start()
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    thread.join()
    assert len(ticks) >= 5


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16", "amx"])
def test_each_instruction_set_that_the_machine_has(capability, cpp):
    """Named in the environment; one that the machine lacks falls back to the next. Stored and streamed s alike."""
    done = python(
        """
        import os, torch
        from condense_kernels.testing import KINDS, assert_matches_reference, assert_same_bits, make_inputs
        capabilities = ("default", "avx2", "avx512", "avx512_bf16", "amx")
        used, asked = (capabilities.index(name) for name in
                       (torch.ops.condense.cpu_capability(), os.environ["CONDENSE_CPU_CAPABILITY"]))
        assert used <= asked
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for kind in KINDS:
                inputs = make_inputs(kind, num_tokens=61, channels=37, dtype=dtype)
                result = inputs.run("cpp")
                assert_matches_reference(result, inputs, backend="cpp")
                assert_same_bits(result, inputs.run_stages("cpp")[-1], f"{kind} {dtype}")
        """,
        CONDENSE_CPU_CAPABILITY=capability,
        CONDENSE_STORED_TOKENS="60",
    )
    assert done.returncode == 0, done.stderr
