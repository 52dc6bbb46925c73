"""torch.compile, torch.export and AOTInductor for a CUDA device that is not there: inductor_without_gpu.py says what is
real. Each of its parts runs once, in a process of its own, as Triton must not interpret."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("inductor_without_gpu.py")
DENSE = ["similarity_tile_kernel", "select_kernel", "assign_kernel", "merge_kernel"]
LAUNCHES = {  # of a call on a GPU; none: the graph has the operator
    "select_and_merge": DENSE,
    "select_and_merge masked": DENSE,
    "one token": DENSE,
    "mean given": ["unit_sum_kernel", "global_similarity_kernel", *DENSE],
    "similarity": ["similarity_tile_kernel", "similarity_means_kernel"],
    "global_similarity": ["unit_sum_kernel", "global_similarity_kernel"],
    "greedy_select": ["greedy_select_kernel"],
    "dpc_knn": ["density_kernel", "peak_kernel", "rank_kernel"],
    "assign": ["assign_kernel"],
    "merge": ["merge_kernel"],
    "merge_backward": ["merge_backward_kernel"] * 2,
    "assign sources": ["assign_kernel"],
    "assign_varlen": [],
    "gather_merge": ["gather_merge_kernel"],
    "gather_merge ones": ["gather_merge_kernel"],
    "gather_merge_backward": ["gather_merge_backward_kernel", "gather_merge_weights_kernel"],
    "attention_scores": ["attention_lse_kernel", "attention_columns_kernel"],
    "select_and_merge_varlen": [],
    "long image": [],
}


@pytest.fixture(scope="module")
def found():
    """What the script finds, by the name of the part."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the package that is tested

    @functools.cache
    def part(name: str) -> dict:
        run = subprocess.run([sys.executable, SCRIPT, name], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    return part


def operator_of(name: str) -> str:
    if name in ("select_and_merge masked", "mean given", "one token", "long image"):
        return "select_and_merge"
    return name.removesuffix(" sources").removesuffix(" ones")


def has_the_operator(graph: dict, name: str) -> bool:
    return graph["launches"] == [] and graph["operators"] == [f"condense.{operator_of(name)}.default"]


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_graph_has_the_launches(name, found):
    graph = found("graphs")[f"{name} on cuda"]
    if LAUNCHES[name]:
        assert graph["launches"] == LAUNCHES[name] and graph["operators"] == []
    else:
        assert has_the_operator(graph, name)


@pytest.mark.parametrize("name", [name for name, launches in LAUNCHES.items() if launches])
def test_what_a_launch_writes_is_known(name, found):
    """Else torch would keep what was there before; and a tensor of the caller never changes."""
    graph = found("graphs")[f"{name} on cuda"]
    for kernel, said, written in zip(graph["launches"], graph["said"], graph["written"], strict=True):
        assert written and set(written) <= set(said), kernel
    assert graph["of the caller"] == []


@pytest.mark.parametrize("name", LAUNCHES)
def test_on_cpu_the_graph_has_the_operator(name, found):
    assert has_the_operator(found("graphs")[f"{name} on cpu"], name)


@pytest.mark.parametrize("what", ["exported", "decomposed", "switched off"])
def test_what_is_exported_has_the_operator(what, found):
    """It can be read by another version of Triton; torch has a switch for other graphs, too."""
    assert has_the_operator(found("graphs")[what], "select_and_merge")


def test_what_torch_keeps_is_kept_by_the_kernels(found):
    """A graph in torch's cache on disk is not taken for that of another version of the package."""
    assert set(DENSE) <= set(found("graphs")["cached by"])


def test_a_graph_for_each_choice_of_launches(found):
    """And by default one more, which has the sizes of the first call."""
    counts = found("sizes")
    assert 1 < counts["choices"] < counts["images"]
    assert (counts["True"], counts["None"]) == (counts["choices"], counts["choices"] + 1)


@pytest.mark.slow
def test_kernels_in_a_graph_are_those_of_a_launch(found):
    """The code for sm_90: each instruction as often, no fused one in the pick loop; as many warps."""
    kernels = found("wrapper")["kernels"]
    assert set(kernels) == set(DENSE)
    assert kernels["select_kernel"]["in a graph"]["fused"] == 0
    for name, figures in kernels.items():
        assert figures["alone"] == figures["in a graph"], name
        assert sum(figures["alone"]["instructions"].values()) > 100, name


@pytest.mark.slow
def test_the_generated_wrapper(found):
    """Its call allocates and launches, and does nothing else; no operator is looked up. Sizes that would be constants,
    as they are 1, are none in the kernels."""
    text = found("wrapper")["text"]
    assert text.count("    N = tl.to_tensor(N)\n") == len(DENSE)
    call = re.search(r"def call\(self, args\):\n(.*?)\n\n", text, re.DOTALL)[1]
    assert re.findall(r"(\w+)\.run\(", call) == [f"{name}_{i}" for i, name in enumerate(DENSE)]
    assert "condense" not in call and "copy_(" not in call
    floats = re.search(r"select_kernel_1\.run\(.*?, (1\.0, 1\.0, 0\.3), ", call)
    assert floats is not None


@pytest.mark.slow
def test_a_package_holds_the_kernels(found):
    """And neither looks for an operator nor has Python to do it: what is left is launches, for any batch."""
    package = found("package")
    kernels = [file.removesuffix(".cubin") for file in package["kernels"]]
    assert [name for name in kernels if not name.startswith("triton_")] == list(DENSE)
    assert set(package["kernels"].values()) == {b"\x7fELF".hex()}
    wrapper = package["wrapper"]
    assert "condense" not in wrapper and "aoti_torch_proxy_executor_call_function" not in wrapper
    for i, name in enumerate(DENSE):
        assert re.search(rf"call_{name}_{i}\(buf\d+.*\bs\d+, 1L, 1L, ", wrapper) or name == "merge_kernel", name


@pytest.mark.slow
def test_a_package_of_sizes_that_want_several_launches_is_refused(found):
    """It has no place to choose: other sizes would be computed by launches that are not theirs."""
    said = found("package")["refused"]
    assert said.startswith("select_and_merge: expected sizes that one choice of launches serves") and "Remedy" in said
