"""The checks of tests/ptx: each fires on a small program at the right lines, and not on the right program beside it."""

import re

import numpy as np
import pytest
from ptx import engine
from ptx.handwritten import Device, kernel
from ptx.program import Program

pytestmark = pytest.mark.skipif(engine.compiler() is None, reason="no C++ compiler")

SHARED_OF_THREAD = "shl.b32 %r2, %r1, 2; | mov.b32 %r3, global_smem; | add.s32 %r4, %r3, %r2;"  # %r4: its 4 bytes
GLOBAL_OF_THREAD = "mul.wide.u32 %rd8, %r1, 4; | add.s64 %rd9, %rd1, %rd8;"  # %rd9: its 4 bytes of the first array
ITS_CTA = "mov.u32 %r5, %ctaid.x;"


@pytest.fixture
def device():
    engine.library().regions_clear()
    yield Device()
    engine.library().regions_clear()


def ints(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "found"), [(0, set()), (4, {("out of bounds", 2, None)}), (-4, {("out of bounds", 2, None)})])
@pytest.mark.parametrize("access", ["ld.global.b32 %r9, [%rd9{:+}];", "st.global.b32 [%rd9{:+}], %r1;", "red.global.add.u32 [%rd9{:+}], %r1;"])
def test_the_array_ends(device, access, offset, found):
    assert device.run(f"{GLOBAL_OF_THREAD}\n{access.format(offset)}", ints(32)) == found


def test_what_is_out_of_bounds_is_not_written(device):
    array, neighbour = ints(32), ints(32)
    device.run(f"{GLOBAL_OF_THREAD}\nst.global.b32 [%rd9+2048], 7;\nst.global.b32 [%rd9+64], 7;", array, neighbour)
    assert neighbour.tolist() == list(range(32))
    assert array.tolist() == list(range(16)) + [7] * 16


def test_views_end_before_their_array(device):
    array = ints(32)
    address = device.place(array)
    body = f"{GLOBAL_OF_THREAD}\nld.global.b32 %r9, [%rd9];"
    device.lib.region_bounds(address, address, address + 128)
    assert device.run(body, array) == set()
    device.lib.region_bounds(address, address, address + 124)
    assert device.run(body, array) == {("out of bounds", 2, None)}
    device.lib.region_bounds(address, address + 4, address + 128)
    assert device.run(body, array) == {("out of bounds", 2, None)}


@pytest.mark.parametrize(("shared", "found"), [(128, set()), (127, {("out of bounds", 2, None)})])
def test_shared_memory_ends(device, shared, found):
    assert device.run(f"{SHARED_OF_THREAD}\nst.shared.b32 [%r4], %r1;", shared=shared) == found


def test_nothing_lies_at_address_zero(device):
    assert device.run("mov.b64 %rd5, 0;\nld.global.b32 %r9, [%rd5];") == {("out of bounds", 2, None)}


@pytest.mark.parametrize(("offset", "found"), [(8, set()), (4, {("misaligned", 1, None)})])
def test_addresses_are_multiples_of_the_size(device, offset, found):
    assert device.run(f"ld.global.v2.b32 {{%r8, %r9}}, [%rd1+{offset}];", ints(32)) == found
    assert device.run(f"st.shared.b64 [global_smem+{offset}], 1;") == found


# Races ----------------------------------------------------------------------------------------------------------------

REVERSED = "xor.b32 %r6, %r2, 252; | add.s32 %r7, %r3, %r6;"  # another thread's 4 bytes, of 64, in %r7


@pytest.mark.parametrize("seed", range(5))
def test_a_barrier_between_warps(device, seed):
    out = ints(64)
    write, read = "st.shared.b32 [%r4], %r1;", f"ld.shared.b32 %r9, [%r7];\n{GLOBAL_OF_THREAD} | st.global.b32 [%rd9], %r9;"
    assert device.run(f"{SHARED_OF_THREAD} | {REVERSED}\n{write}\nbar.sync 0;\n{read}", out, warps=2, seed=seed) == set()
    assert out.tolist() == list(range(64))[::-1]
    found = device.run(f"{SHARED_OF_THREAD} | {REVERSED}\n{write}\n{read}", out, warps=2, seed=seed)
    assert ("race between warps", 3, 2) in found or ("race between warps", 2, 3) in found


@pytest.mark.parametrize(("barrier", "found"), [("bar.sync 0;", set()), ("nop;", {("race between warps", 4, 2)})])
def test_a_barrier_before_writing_again(device, barrier, found):
    body = f"{SHARED_OF_THREAD} | {REVERSED} | st.shared.b32 [%r4], 0; | bar.sync 0;\nld.shared.b32 %r9, [%r7];\n{barrier}\nst.shared.b32 [%r4], %r1;"
    runs = [device.run(body, warps=2, seed=seed) for seed in range(5)]
    assert set.union(*runs) - {("race between warps", 2, 4)} == found


@pytest.mark.parametrize(("barrier", "found"), [("bar.sync 0;", set()), ("nop;", {("race between warps", 4, 2), ("race between warps", 2, 4)})])
def test_a_barrier_between_warps_in_global_memory(device, barrier, found):
    body = f"{GLOBAL_OF_THREAD} | xor.b32 %r6, %r1, 63; | mul.wide.u32 %rd5, %r6, 4; | add.s64 %rd6, %rd1, %rd5;\nst.global.b32 [%rd9], %r1;\n{barrier}\nld.global.b32 %r9, [%rd6];"
    runs = [device.run(body, ints(64), warps=2, seed=seed) for seed in range(5)]
    assert set.union(*runs) <= found and any(runs) == bool(found)


def test_races_are_not_looked_for_without_their_flag(device):
    body = f"{ITS_CTA}\nst.global.b32 [%rd1], %r5;"
    assert device.run(body, ints(1), grid=2, flags=0) == set()


def test_warps_that_store_the_same(device):
    assert device.run("st.shared.b32 [global_smem], 7;", warps=2) == {("race between warps, same value", 1, 1)}


CTAS = {
    "own places": ("mul.wide.u32 %rd5, %r5, 4; | add.s64 %rd6, %rd1, %rd5;\nst.global.b32 [%rd6], %r5;", None),
    "one place": ("nop;\nst.global.b32 [%rd1], %r5;", "race between CTAs"),
    "one value": ("nop;\nst.global.b32 [%rd1], 99;", "race between CTAs, same value"),
    "atomics": ("setp.ne.b32 %p1, %r1, 0;\n@%p1 red.global.add.u32 [%rd1], %r5;", None),
    "reads": ("nop;\nld.global.b32 %r9, [%rd1];", None),
}


@pytest.mark.parametrize("case", CTAS)
def test_ctas_of_a_launch(device, case):
    body, kind = CTAS[case]
    # Thread 0 alone, but in the case of atomics, where all the others are not it.
    one = "setp.eq.b32 %p2, %r1, 0; | @!%p2 bra $over;" if case != "atomics" else "nop;"
    found = device.run(f"{ITS_CTA} | {one} | {body}\n$over:", ints(8), grid=4)
    assert found == ({(kind, 2, 2)} if kind else set())


def test_ctas_that_read_what_another_writes(device):
    body = f"{ITS_CTA} | setp.eq.b32 %p1, %r5, 0;\n@%p1 st.global.b32 [%rd1], %r5;\n@!%p1 ld.global.b32 %r9, [%rd1];"
    runs = [device.run(f"setp.ne.b32 %p2, %r1, 0; | @%p2 bra $over; | {body}\n$over:", ints(1), grid=3, seed=seed) for seed in range(8)]
    assert set.union(*runs) == {("race between CTAs", 2, 3), ("race between CTAs", 3, 2)}
    assert all(runs)


def test_launches_do_not_race(device):
    array = ints(1)
    for value in (1, 2):
        assert device.run(f"setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd1], {value};", array) == set()


@pytest.mark.parametrize(("barrier", "found"), [("bar.warp.sync -1;", set()), ("nop;", {("hazard within a warp", 4, 2)})])
def test_lanes_hand_over(device, barrier, found):
    body = f"{SHARED_OF_THREAD} | xor.b32 %r6, %r4, 4;\nst.shared.b32 [%r4], %r1;\n{barrier}\nld.shared.b32 %r9, [%r6];"
    assert device.run(body) == found


@pytest.mark.parametrize(("barrier", "found"), [("bar.warp.sync -1;", set()), ("nop;", {("hazard within a warp", 4, 2)})])
def test_lanes_write_what_others_have_read(device, barrier, found):
    body = f"{SHARED_OF_THREAD} | xor.b32 %r6, %r4, 4; | st.shared.b32 [%r4], 99; | bar.warp.sync -1;\nld.shared.b32 %r9, [%r6];\n{barrier}\nst.shared.b32 [%r4], %r1;"
    assert device.run(body) == found


@pytest.mark.parametrize(("value", "found"), [("7", set()), ("%r1", {("lanes store different values", 1, 1)})])
def test_lanes_that_store_to_one_place(device, value, found):
    assert device.run(f"st.shared.b32 [global_smem], {value};") == found


# Uninitialised --------------------------------------------------------------------------------------------------------

UNINITIALISED = "ld.shared.b32 %r9, [global_smem];"  # nobody has written it
USES = {
    "branch": ("setp.eq.b32 %p1, %r9, 0; | @%p1 bra $over;", "branch or predicate on uninitialised"),
    "predicate": ("setp.eq.b32 %p1, %r9, 0; | @%p1 mov.b32 %r8, 0;", "branch or predicate on uninitialised"),
    "address of a load": ("add.s32 %r8, %r3, %r9; | ld.shared.b32 %r7, [%r8];", "address uninitialised"),
    "address of a store": ("add.s32 %r8, %r3, %r9; | st.shared.b32 [%r8], 0;", "address uninitialised"),
    "shuffle": ("shfl.sync.bfly.b32 %r7, %r1, %r9, 31, -1;", "shuffle by uninitialised"),
}


@pytest.mark.parametrize("use", USES)
def test_uninitialised_values_that_decide(device, use):
    text, kind = USES[use]
    found = device.run(f"mov.b32 %r3, global_smem;\n{UNINITIALISED}\n{text}\n$over:")
    assert (kind, 3, None) in found and found <= {(kind, 3, None), ("out of bounds", 3, None), ("misaligned", 3, None)}
    written = f"st.shared.b32 [global_smem], 0; | bar.sync 0;\n{UNINITIALISED}"
    assert device.run(f"mov.b32 %r3, global_smem; | {written}\n{text}\n$over:") == set()


@pytest.mark.parametrize(
    ("combine", "tainted"),
    [
        ("mov.b32 %r8, %r9;", True),
        ("add.s32 %r8, %r9, 1;", True),
        ("and.b32 %r8, %r9, 0;", False),
        ("and.b32 %r8, %r9, 1;", True),
        ("or.b32 %r8, %r9, -1;", False),
        ("mul.rn.f32 %r8, %r9, 0f7FFFFFFF;", False),
        ("fma.rn.f32 %r8, %r9, 0f3F800000, 0f7FFFFFFF;", False),
        ("selp.b32 %r8, %r9, 3, %p1;", True),
        ("selp.b32 %r8, 3, %r9, %p1;", False),
        ("shfl.sync.bfly.b32 %r8, %r9, 1, 31, -1;", True),
        ("redux.sync.add.s32 %r8, %r9, -1;", True),
    ],
)
def test_uninitialised_values_are_followed_to_the_result(device, combine, tainted):
    out = ints(32)
    body = f"{GLOBAL_OF_THREAD} | setp.eq.b32 %p1, 0, 0;\n{UNINITIALISED}\n{combine}\nst.global.b32 [%rd9], %r8;"
    assert device.run(body, out) == set()
    assert device.tainted(out) == 128 * tainted


def test_bytes_are_uninitialised_one_by_one(device):
    out = np.zeros(8, np.uint8)
    device.place(out, uninitialised=True)
    assert device.run("setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b8 [%rd1+1], 7;\n@%p1 st.global.b16 [%rd1+4], 7;", out) == set()
    assert device.tainted(out) == 5


def test_an_atomic_sum_with_something_uninitialised_is_uninitialised(device):
    total = np.zeros(1, np.int32)
    assert device.run("red.global.add.u32 [%rd1], %r1;", total) == set()
    assert (total[0], device.tainted(total)) == (31 * 16, 0)
    device.lib.set_taint(device.place(total), 4, True)
    assert device.run("red.global.add.u32 [%rd1], 1;", total) == set()
    assert device.tainted(total) == 4


def test_every_load_of_something_uninitialised_on_demand(device):
    assert device.run(UNINITIALISED, flags=1 | 8) == {("load of uninitialised", 1, None)}
    assert device.run(f"st.shared.b32 [global_smem], 7; | bar.sync 0;\n{UNINITIALISED}", flags=1 | 8) == set()


def test_registers_that_nothing_defines_are_any_value(device):
    assert device.run("setp.eq.b32 %p1, %r77, 0;\n@%p1 mov.b32 %r8, 0;") == set()
    body = "setp.eq.b32 %p2, %r1, 99;\n@%p2 mov.b32 %r77, 0;\nsetp.eq.b32 %p1, %r77, 0;\n@%p1 mov.b32 %r8, 0;"
    assert device.run(body) == {("branch or predicate on uninitialised", 4, None)}


# Barriers and whole warps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "found"), [(32, set()), (16, {("not converged", 3, None)})])
@pytest.mark.parametrize(
    "instruction",
    ["bar.sync 0;", "bar.warp.sync -1;", "shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;", "redux.sync.add.s32 %r7, %r1, -1;"],
)
def test_lanes_that_took_another_way(device, instruction, threads, found):
    assert device.run(f"setp.ge.u32 %p1, %r1, {threads};\n@%p1 bra $over;\n{instruction}\n$over:") == found


def test_members_are_the_whole_warp(device):
    assert device.run("redux.sync.add.s32 %r7, %r1, 65535;") == {("not converged", 1, None)}


def test_lanes_that_ended(device):
    found = device.run("setp.ge.u32 %p1, %r1, 16;\n@%p1 ret;\nshfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;")
    assert found == {("not converged", 3, None)}


def test_lanes_meet_again(device):
    out = ints(32)
    loop = "$loop:\nadd.s32 %r7, %r7, 1;\nsetp.lt.s32 %p1, %r7, %r1;\n@%p1 bra $loop;"
    body = f"{GLOBAL_OF_THREAD} | mov.b32 %r7, 0;\n{loop}\nredux.sync.add.s32 %r8, %r7, -1; | st.global.b32 [%rd9], %r8;"
    assert device.run(body, out) == set()
    assert out.tolist() == [1 + sum(range(32))] * 32


def test_warps_at_different_barriers(device):
    body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $other;\nbar.sync 0;\nbra $over;\n$other:\nbar.sync 0;\n$over:"
    assert device.run(body, warps=2) == {("barriers differ", 3, 6)} or device.run(body, warps=2) == {("barriers differ", 6, 3)}


def test_warps_that_end_before_a_barrier(device):
    assert device.run("setp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;", warps=2) == {("barriers differ", 3, None)}


def test_a_kernel_that_does_not_end(device):
    body = "mov.b32 %r2, 0;\n$loop:\nadd.s32 %r2, %r2, 1;\nsetp.lt.s32 %p1, %r2, {};\n@%p1 bra $loop;"
    assert device.run(body.format(1000), limit=10_000) == set()
    found = device.run(body.format(100_000), limit=10_000)
    assert {kind for kind, _, _ in found} == {"does not end"} and all(3 <= at <= 5 for _, at, _ in found)
    assert device.run("$self:\nbra $self;", limit=10_000) == {("does not end", 2, None)}


# What runs meanwhile --------------------------------------------------------------------------------------------------

COPY = "cp.async.ca.shared.global [%r4+0], [%rd9+0], 4, %r5;"
COPIED = f"{GLOBAL_OF_THREAD} | {SHARED_OF_THREAD} | mov.b32 %r5, 4;\n{COPY}\ncp.async.commit_group;"
TO_SECOND = "add.s64 %rd10, %rd2, %rd8; | st.global.b32 [%rd10], %r9;"


@pytest.mark.parametrize(("wait", "tainted"), [("cp.async.wait_group 0;", 0), ("cp.async.wait_group 1;", 128)])
def test_a_copy_is_waited_for(device, wait, tainted):
    source, out = ints(32), ints(32)[::-1].copy()
    body = f"{COPIED}\n{wait}\nld.shared.b32 %r9, [%r4];\n{TO_SECOND}\ncp.async.wait_group 0;"
    assert device.run(body, source, out) == set()
    assert device.tainted(out) == tainted and (out == source).all() == (not tainted)


def test_copies_of_a_group_arrive_in_order(device):
    source, out = ints(32), np.zeros(32, np.int32)
    body = f"{COPIED}\ncp.async.ca.shared.global [%r4+128], [%rd9+0], 4, %r5; | cp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.b32 %r9, [%r4{{}}];\n{TO_SECOND}\ncp.async.wait_group 0;"
    assert device.run(body.format("+0"), source, out) == set()
    assert device.tainted(out) == 0 and (out == source).all()
    assert device.run(body.format("+128"), source, out) == set()
    assert device.tainted(out) == 128


def test_a_copy_of_fewer_bytes_ends_in_zeros(device):
    source, out = np.full(32, -1, np.int32), np.ones(32, np.int32)
    body = f"{COPIED}\ncp.async.wait_group 0;\nld.shared.b32 %r9, [%r4];\n{TO_SECOND}"
    assert device.run(body.replace("mov.b32 %r5, 4;", "mov.b32 %r5, 2;"), source, out) == set()
    assert out.tolist() == [0xFFFF] * 32
    # Nothing is read where nothing is copied.
    assert device.run(body.replace("mov.b32 %r5, 4;", "mov.b32 %r5, 0; | add.s64 %rd9, %rd9, 9999;"), source, out) == set()
    assert out.tolist() == [0] * 32


@pytest.mark.parametrize("copied", [COPIED, COPIED.replace("cp.async.commit_group;", "nop;")], ids=["committed", "open"])
def test_a_copy_that_nobody_waited_for(device, copied):
    assert device.run(copied, ints(32)) == {("not waited for", 2, None)}


def test_a_copy_lands_after_the_barrier_that_was_to_order_it(device):
    body = f"{COPIED}\nbar.sync 0;\nxor.b32 %r6, %r4, 128; | ld.shared.b32 %r9, [%r6];\ncp.async.wait_group 0;"
    found = set.union(*(device.run(body, ints(64), warps=2, seed=seed) for seed in range(5)))
    assert found == {("race between warps", 2, 5), ("race between warps", 5, 2)}


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    ["tanh.approx.f32 %r2, %r1;", "bar.sync 1;", "ld.local.b32 %r2, [%r1];", "add.cc.u32 %r2, %r1, 1;", "shfl.sync.bfly.b32 %r2|%p1, %r1, 1, 31, -1;"],
)
def test_an_unknown_instruction_is_named(statement):
    with pytest.raises(NotImplementedError, match=re.escape(f"PTX instruction '{statement[:-1]}' of example")):
        Program(kernel(statement))


def test_a_mutated_program(device):
    def without_barriers(statements, labels):
        return [("nop" if text.startswith("bar.sync") else text, place) for text, place in statements], labels

    text = kernel(f"{SHARED_OF_THREAD} | {REVERSED}\nst.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r9, [%r7];", warps=2)
    assert Program(text).run(b"", (1,), 256) == []
    assert {one["kind"] for one in Program(text, without_barriers).run(b"", (1,), 256)} == {"race between warps"}


def test_seeds_decide_the_order(device):
    def last(seed):
        array = ints(1)
        device.run(f"{ITS_CTA} | setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd1], %r5;", array, grid=16, seed=seed)
        return array[0]

    orders = [last(seed) for seed in range(8)]
    assert orders == [last(seed) for seed in range(8)] and len(set(orders)) > 3


def test_instructions_are_counted(device):
    device.lib.take_executed()
    device.run("nop;\nnop;", warps=3, grid=5)
    assert device.lib.take_executed() == 3 * 5 * 4  # with the index of the thread, and the end


def test_without_a_compiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert engine.compiler() is None
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler.*Remedy"):
        engine.build(tmp_path)
