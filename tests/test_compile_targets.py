"""What the Triton kernels compile to, for GPUs that need not be here. One subprocess compiles all of them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "inspect_kernels.py"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[str, list[dict]]:
    path = tmp_path_factory.mktemp("compiled") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the package that is tested
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where Triton keeps what it has compiled
        environment.setdefault("TRITON_CACHE_DIR", str(path.parent))
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(path)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(path.read_text())


@pytest.fixture
def rows(compiled) -> list[dict]:
    return compiled[1]


def test_the_table(compiled, capsys):
    with capsys.disabled():
        print("\n" + compiled[0])
    assert "select_kernel" in compiled[0]


def test_registers(rows):
    """Of a thread: 255 on NVIDIA's, 512 on gfx942, fewer where a block has more warps than fit with so many."""
    assert [row for row in rows if not 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255)] == []


def test_every_kernel_compiles_for_every_target(rows):
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "attention_lse_kernel",
        "attention_columns_kernel",
        "similarity_tile_kernel",
        "similarity_means_kernel",
        "unit_sum_kernel",
        "global_similarity_kernel",
        "magnitudes_kernel",
        "distance_tile_kernel",
        "distance_rows_kernel",
        "distance_mean_kernel",
        "nearest_kernel",
        "first_gains_kernel",
        "coverage_select_kernel",
        "greedy_select_kernel",
        "select_kernel",
        "dpp_select_kernel",
        "density_kernel",
        "peak_kernel",
        "rank_kernel",
        "assign_kernel",
        "merge_kernel",
        "merge_backward_kernel",
        "gather_merge_kernel",
        "gather_merge_backward_kernel",
        "gather_merge_weights_kernel",
        "begin_kernel",
        "update_kernel",
        "pick_kernel",
        "keep_kernel",
        "assign_streamed_kernel",
    }
    for kernel in kernels:
        assert {row["target"] for row in rows if row["kernel"] == kernel} == set(SHARED_LIMIT)


# (part of the call, kernel, target): at N = 16384 a register file holds four numbers a token, and what comes before the
# pick loop wants more; fp32 products keep their operands and two accumulators in registers, too.
MAY_SPILL = [
    ("dpp_select N=16384", "dpp_select_kernel", ""),
    ("dpp_select_varlen", "dpp_select_kernel", "sm_80"),  # up to 4 instructions, of 64 registers
    ("N=16384", "select_kernel", ""),
    ("varlen, mean given N=576", "select_kernel", "sm_100"),  # 4, outside of the loop
    ("three launches", "select_kernel", ""),  # why the assignment is a launch of its own
    ("N=65536 fp32", "assign_streamed_kernel", "sm_80"),
    ("N=65536 fp32", "similarity_tile_kernel", "sm_80"),
    ("N=65536 fp32", "similarity_tile_kernel", "sm_90"),
    ("N=65536 fp32", "update_kernel", "sm_90"),
    ("N=65536 fp32", "pick_kernel", "sm_80"),
    ("N=65536 fp32", "pick_kernel", "sm_90"),
    ("attention_scores rows, lse", "attention_columns_kernel", "sm_100"),  # a thread has the row of every column
    ("coverage_select N=2880", "coverage_select_kernel", "sm_100"),  # 4
    ("neg_l2", "distance_tile_kernel", "sm_90"),  # one number, outside of the loop
    ("neg_l2", "distance_tile_kernel", "sm_100"),
    ("merge_varlen lerp", "merge_kernel", "sm_80"),  # one number, outside of the loops, as
    ("merge_backward sum", "merge_backward_kernel", "sm_100"),  # here
]


def test_no_spills(rows):
    found = [row for row in rows if row["spills"]]
    for call, kernel, target in MAY_SPILL:
        found = [
            row
            for row in found
            if not (call in row["call"] and row["kernel"].endswith(kernel) and row["target"].startswith(target))
        ]
    assert found == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_spills_in_a_pick(rows, target):
    """At N = 16384 neither. On sm_100 a few remain there."""
    found = [row for row in rows if row["target"] == target and row["pick_loop"]]
    assert any("N=16384" in row["call"] for row in found) and [row for row in found if row["loop_spills"]] == []


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["target"]]] == []


@pytest.mark.parametrize(
    ("call", "kernel", "limit"),
    [
        ("select_and_merge N=576", "select_kernel", 180),
        ("select_and_merge_varlen N=576", "select_kernel", 196),  # keeps picks and NaN in place; more masks
        ("greedy_select N=576", "greedy_select_kernel", 255),  # clears s, stores the order, chunks move
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_pick_of_576_tokens(rows, target, call, kernel, limit):
    """Few instructions, and no barrier."""
    (row,) = [row for row in rows if (row["call"], row["kernel"], row["target"]) == (call, kernel, target)]
    assert row["barriers"] == 0 and row["pick_loop"] <= limit


def test_scores_are_rounded_twice(rows):
    """A fused multiply-add in the pick loop would round a score once, and pick another token than the contract."""
    found = [row for row in rows if row["pick_loop"]]
    assert {row["kernel"] for row in found} == {"greedy_select_kernel", "select_kernel"}
    assert [row for row in found if row["fused"]] == []


def test_16_bit_products_run_on_matrix_units(rows):
    kernels = ("similarity_tile_kernel", "update_kernel", "pick_kernel", "assign_streamed_kernel")
    kernels += ("attention_lse_kernel", "attention_columns_kernel")
    of_16_bits = lambda call: "fp32" not in call and "nearest" not in call and "similarity_varlen" not in call  # noqa: E731
    found = [row for row in rows if row["kernel"] in kernels and of_16_bits(row["call"])]
    assert {row["kernel"] for row in found} == set(kernels)
    assert [row for row in found if not row["mma"]] == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_fp32_products_do_not(rows, target):
    """Matrix units of NVIDIA take fp32 as tf32."""
    kernels = ("similarity_tile_kernel", "attention_lse_kernel", "attention_columns_kernel")
    found = [r for r in rows if r["target"] == target and r["kernel"] in kernels and " fp32 " in r["call"]]
    assert {row["kernel"] for row in found} == set(kernels)
    assert [row for row in found if row["mma"]] == []


def test_keys_are_loaded_16_bytes_at_a_time(rows):
    """Also where a head has 72 channels, which the compiler alone would not know to be a multiple of 16 bytes."""
    kernels = ("similarity_tile_kernel", "attention_lse_kernel", "attention_columns_kernel")
    found = [row for row in rows if row["kernel"] in kernels]
    assert any("d=72" in row["call"] for row in found)
    assert found and [row for row in found if not row["loads16"]] == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_merge_loads_several_members_at_once(rows, target):
    """Four before the loop, four in it, each with a load of 16 bytes, and the copied token."""
    for call in ("merge bf16", "gather_merge ones"):
        (row,) = [row for row in rows if (row["call"], row["target"]) == (call, target)]
        assert row["loads16"] >= 9
