"""The checks of tests/ptx: each fires on a small program at the right lines, and not on the right program beside it.

Here bounds, what is uninitialised, and programs as such; test_ptx_order.py has races and barriers.
"""

import re

import numpy as np
import pytest
from ptx import engine
from ptx.encoding import UnknownInstruction
from ptx.handwritten import OF_THREAD, kernel
from ptx.program import Program


def ints(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4, -4])
@pytest.mark.parametrize(
    "access",
    ["ld.global.b32 %r9, [%rd11+{}];", "st.global.b32 [%rd11+{}], %r1;", "red.global.add.u32 [%rd11+{}], %r1;"],
)
def test_the_array_ends(ptx_engine, access, offset):
    found = ptx_engine.run(f"{OF_THREAD}\n{access.format(offset)} // here", ints(32))
    assert found == ({("out of bounds", "here", None)} if offset else set())


def test_what_is_out_of_bounds_is_not_written(ptx_engine):
    array, neighbour = ints(32), ints(32)
    ptx_engine.run(f"{OF_THREAD}\nst.global.b32 [%rd11+2048], 7;\nst.global.b32 [%rd11+64], 7;", array, neighbour)
    assert neighbour.tolist() == list(range(32))
    assert array.tolist() == list(range(16)) + [7] * 16


def test_views_end_before_their_array(ptx_engine):
    array = ints(32)
    address = ptx_engine.place(array)
    for start, end, found in ((0, 128, set()), (0, 124, {"out of bounds"}), (4, 128, {"out of bounds"})):
        ptx_engine.lib.region_bounds(address, address + start, address + end)
        assert {kind for kind, *_ in ptx_engine.run(f"{OF_THREAD}\nld.global.b32 %r9, [%rd11];", array)} == found


@pytest.mark.parametrize(("shared", "found"), [(128, set()), (127, {("out of bounds", "here", None)})])
def test_shared_memory_ends(ptx_engine, shared, found):
    assert ptx_engine.run(f"{OF_THREAD}\nst.shared.b32 [%r4], %r1; // here", shared=shared) == found


def test_nothing_lies_at_address_zero(ptx_engine):
    found = ptx_engine.run(
        "mov.b64 %rd5, 0; mov.b32 %r5, 0;\nld.global.b32 %r9, [%rd5]; // a\nld.shared.b32 %r9, [%r5]; // b"
    )
    assert found == {("out of bounds", "a", None), ("out of bounds", "b", None)}


@pytest.mark.parametrize(("offset", "found"), [(8, set()), (4, {("misaligned", "here", None)})])
@pytest.mark.parametrize("access", ["ld.global.v2.b32 {{%r8, %r9}}, [%rd1+{}];", "st.shared.b64 [global_smem+{}], 1;"])
def test_addresses_are_multiples_of_the_size(ptx_engine, access, offset, found):
    assert ptx_engine.run(f"{access.format(offset)} // here", ints(32)) == found


# Uninitialised --------------------------------------------------------------------------------------------------------

LOAD = "ld.shared.b32 %r9, [global_smem];"
USES = {
    "setp.eq.b32 %p1, %r9, 0; @%p1 bra $over;": "branch or predicate on uninitialised",
    "setp.eq.b32 %p1, %r9, 0; @%p1 mov.b32 %r8, 0;": "branch or predicate on uninitialised",
    "add.s32 %r8, %r3, %r9; ld.shared.b32 %r7, [%r8];": "address uninitialised",
    "add.s32 %r8, %r3, %r9; st.shared.b32 [%r8], 0;": "address uninitialised",
    "add.s32 %r8, %r3, %r9; red.shared.add.u32 [%r8], 0;": "address uninitialised",
    "add.s32 %r8, %r3, %r9; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r8];": "address uninitialised",
    "shfl.sync.bfly.b32 %r7, %r1, %r9, 31, -1;": "shuffle by uninitialised",
}


@pytest.mark.parametrize("use", USES)
def test_uninitialised_values_that_decide(ptx_engine, use):
    body = f"{OF_THREAD} st.shared.b32 [%r4], 0; bar.sync 0;\n{LOAD} bar.sync 0;\n{use} // use\n$over:"
    assert ptx_engine.run(body) == set()
    found = ptx_engine.run(body.replace("st.shared.b32 [%r4], 0;", ""))
    assert (USES[use], "use", None) in found
    assert {kind for kind, *_ in found} <= {USES[use], "out of bounds", "misaligned"}  # an address can be any


@pytest.mark.parametrize(
    ("combine", "tainted"),
    [
        ("mov.b32 %r8, %r9;", True),
        ("add.s32 %r8, %r9, 1;", True),
        ("and.b32 %r8, %r9, 0;", False),
        ("and.b32 %r8, %r9, 1;", True),
        ("and.b32 %r7, %r9, 0x32323232; and.b32 %r8, %r7, 1;", True),  # a 0 that is uninitialised decides nothing
        ("or.b32 %r8, -1, %r9;", False),
        ("mul.rn.f32 %r8, %r9, 0f7FFFFFFF;", False),
        ("fma.rn.f32 %r8, %r9, 0f3F800000, 0f7FFFFFFF;", False),
        ("fma.rn.f32 %r8, %r9, 0f3F800000, 0f3F800000;", True),
        ("selp.b32 %r8, %r9, 3, %p1;", True),
        ("selp.b32 %r8, 3, %r9, %p1;", False),
        ("setp.eq.b32 %p2, %r9, 0; selp.b32 %r8, 1, 2, %p2;", True),
        ("mov.b64 %rd5, {%r9, %r1}; mov.b64 {_, %r8}, %rd5;", True),
        ("shfl.sync.bfly.b32 %r8, %r9, 1, 31, -1;", True),
        ("redux.sync.add.s32 %r8, %r9, -1;", True),
    ],
)
def test_uninitialised_values_are_followed_to_the_result(ptx_engine, combine, tainted):
    out = ints(32)
    body = f"{OF_THREAD} setp.eq.b32 %p1, 0, 0;\n{LOAD}\n{combine}\nst.global.b32 [%rd11], %r8;"
    assert ptx_engine.run(body, out) == set()
    assert ptx_engine.tainted(out) == 128 * tainted


def test_lanes_are_uninitialised_one_by_one(ptx_engine):
    out = ints(32)
    body = f"""{OF_THREAD}
        mov.b32 %r8, 0; setp.eq.b32 %p1, %r1, 7;
        @%p1 {LOAD}
        @%p1 mov.b32 %r8, %r9;
        shfl.sync.bfly.b32 %r7, %r8, 1, 31, -1;
        st.global.b32 [%rd11], %r7;"""
    assert ptx_engine.run(body, out) == set()
    assert ptx_engine.tainted_elements(out) == [6]


def test_bytes_are_uninitialised_one_by_one(ptx_engine):
    out = np.zeros(8, np.uint8)
    ptx_engine.place(out, uninitialised=True)
    body = "setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b8 [%rd1+1], 7;\n@%p1 st.global.b16 [%rd1+4], 7;"
    assert ptx_engine.run(body, out) == set()
    assert ptx_engine.tainted(out) == 5


def test_an_atomic_sum_with_something_uninitialised_is_uninitialised(ptx_engine):
    total = np.zeros(1, np.int32)
    assert ptx_engine.run("red.global.add.u32 [%rd1], %r1;", total) == set()
    assert (total[0], ptx_engine.tainted(total)) == (31 * 16, 0)
    ptx_engine.lib.set_taint(ptx_engine.place(total), 4, True)
    assert ptx_engine.run("red.global.add.u32 [%rd1], 1;", total) == set()
    assert ptx_engine.tainted(total) == 4


def test_an_atomic_sum_of_something_uninitialised_is_uninitialised(ptx_engine):
    total = np.zeros(1, np.int32)
    assert ptx_engine.run(f"{LOAD} red.global.add.u32 [%rd1], %r9;", total) == set()
    assert ptx_engine.tainted(total) == 4


def test_what_lies_at_an_uninitialised_address_is_uninitialised(ptx_engine):
    out = ints(32)
    body = f"""{OF_THREAD}
        {LOAD}
        and.b32 %r8, %r9, 4; add.s32 %r8, %r3, %r8; st.shared.b32 [global_smem+4], 7; bar.sync 0;
        ld.shared.b32 %r7, [%r8];   // load
        st.global.b32 [%rd11], %r7;"""
    assert ptx_engine.run(body, out) == {("address uninitialised", "load", None)}
    assert ptx_engine.tainted(out) == 128


def test_every_load_of_something_uninitialised_on_demand(ptx_engine):
    assert ptx_engine.run(f"{LOAD} // here", flags=1 | 8) == {("load of uninitialised", "here", None)}
    assert ptx_engine.run(f"st.shared.b32 [global_smem], 7; bar.sync 0;\n{LOAD}", flags=1 | 8) == set()


def test_registers_that_nothing_defines_are_any_value(ptx_engine):
    use = "setp.eq.b32 %p1, %r77, 0;\n@%p1 mov.b32 %r8, 0; // use"
    assert ptx_engine.run(use) == set()
    found = ptx_engine.run(f"setp.eq.b32 %p2, %r1, 99;\n@%p2 mov.b32 %r77, 0;\n{use}")
    assert found == {("branch or predicate on uninitialised", "use", None)}


def test_shared_memory_is_uninitialised_in_every_cta(ptx_engine):
    out = ints(2)
    body = f"""
        mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd6, %rd1, %rd5; setp.eq.b32 %p1, %r1, 0;
        {LOAD} bar.sync 0; st.shared.b32 [global_smem], 7;
        @%p1 st.global.b32 [%rd6], %r9;"""
    assert ptx_engine.run(body, out, grid=2) == set()
    assert ptx_engine.tainted(out) == 8


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "tanh.approx.f32 %r2, %r1;",
        "bar.sync 1;",
        "ld.local.b32 %r2, [%r1];",
        "ld.b32 %r2, [%rd1];",
        "add.cc.u32 %r2, %r1, 1;",
        "shfl.sync.bfly.b32 %r2|%p1, %r1, 1, 31, -1;",
        "red.global.max.u32 [%rd1], 1;",
    ],
)
def test_an_unknown_instruction_is_named(ptx_engine, statement):
    with pytest.raises(UnknownInstruction, match=re.escape(f"PTX instruction '{statement[:-1]}' of example")):
        Program(kernel(statement))


def test_seeds_decide_the_order(ptx_engine):
    body = "mov.u32 %r5, %ctaid.x; setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd1], %r5;"

    def last(seed):
        array = ints(1)
        ptx_engine.run(body, array, grid=16, seed=seed)
        return array[0]

    orders = [last(seed) for seed in range(8)]
    assert orders == [last(seed) for seed in range(8)] and len(set(orders)) > 3


def test_instructions_are_counted(ptx_engine):
    ptx_engine.lib.take_executed()
    ptx_engine.run("nop;\nnop;", warps=3, grid=5)
    assert ptx_engine.lib.take_executed() == 3 * 5 * 4  # with the index of the thread, and the end


def test_lanes_that_ended_run_nothing(ptx_engine):
    ptx_engine.lib.take_executed()
    ptx_engine.run("""
        setp.lt.u32 %p1, %r1, 7;
        @%p1 bra $later;
        ret;
        nop; nop; nop;
        $later:
        nop;""")
    assert ptx_engine.lib.take_executed() == 4 + 2


def test_without_a_compiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert engine.compiler() is None
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler.*Remedy"):
        engine.build(tmp_path)
