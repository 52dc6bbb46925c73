"""What the operators owe the processes that they run in: symbolic sizes, threads, instruction sets."""

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
    thread = threading.Thread(target=ck.select_and_merge, args=(features, scores, 300, 100), kwargs={"grid": (50, 60)})
    thread.start()
    ticks = 0
    while thread.is_alive():
        ticks += 1
        time.sleep(0.0005)
    assert ticks >= 5


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
