"""The checks of tests/ptx for order: between warps, CTAs and lanes, at barriers, and for what runs meanwhile."""

import numpy as np
import pytest
from ptx.handwritten import OF_THREAD, kernel
from ptx.program import Program

SEEDS = range(5)


def ints(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def over_seeds(ptx_engine, body: str, *arrays: np.ndarray, **options) -> set:
    return set.union(*(ptx_engine.run(body, *arrays, seed=seed, **options) for seed in SEEDS))


def both_ways(kind: str, one: str, other: str) -> set:
    """Which of two comes first is up to the seed."""
    return {(kind, one, other), (kind, other, one)}


# Races ----------------------------------------------------------------------------------------------------------------

OF_ANOTHER = "xor.b32 %r6, %r2, 252; add.s32 %r7, %r3, %r6;"  # %r7: 4 bytes of another of 64 threads


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_between_warps(ptx_engine, seed):
    out = ints(64)
    body = f"""{OF_THREAD} {OF_ANOTHER}
        st.shared.b32 [%r4], %r1;   // write
        bar.sync 0;
        ld.shared.b32 %r9, [%r7];   // read
        st.global.b32 [%rd11], %r9;"""
    assert ptx_engine.run(body, out, warps=2, seed=seed) == set()
    assert out.tolist() == list(range(64))[::-1]
    found = ptx_engine.run(body.replace("bar.sync 0;", ""), out, warps=2, seed=seed)
    assert found & both_ways("race between warps", "read", "write")


def test_a_barrier_before_writing_again(ptx_engine):
    body = f"""{OF_THREAD} {OF_ANOTHER}
        st.shared.b32 [%r4], 0;
        bar.sync 0;
        ld.shared.b32 %r9, [%r7];   // read
        bar.warp.sync -1;
        bar.sync 0;                 // between
        st.shared.b32 [%r4], %r1;   // write"""
    assert over_seeds(ptx_engine, body, warps=2) == set()
    found = over_seeds(ptx_engine, body.replace("bar.sync 0;                 // between", ""), warps=2)
    assert found == both_ways("race between warps", "read", "write")


def test_a_barrier_between_warps_in_global_memory(ptx_engine):
    body = f"""{OF_THREAD}
        xor.b32 %r6, %r1, 63; mul.wide.u32 %rd5, %r6, 4; add.s64 %rd6, %rd1, %rd5;
        st.global.b32 [%rd11], %r1;   // write
        bar.sync 0;
        ld.global.b32 %r9, [%rd6];    // read"""
    assert over_seeds(ptx_engine, body, ints(64), warps=2) == set()
    without = body.replace("bar.sync 0;", "")
    assert over_seeds(ptx_engine, without, ints(64), warps=2) == both_ways("race between warps", "read", "write")
    assert ptx_engine.run(without, ints(64), warps=2, flags=0) == set()


@pytest.mark.parametrize(("first", "second"), [("red", "red"), ("red", "ld"), ("red", "st"), ("st", "red")])
def test_atomics_race_with_what_is_none(ptx_engine, first, second):
    accesses = {
        "red": "red.shared.add.u32 [global_smem], 1;",
        "ld": "ld.shared.b32 %r9, [global_smem];",
        "st": "st.shared.b32 [global_smem], %r6;",
    }
    body = f"""
        setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r1, 32; mov.b32 %r6, 7;
        @%p1 st.shared.b32 [global_smem], 0;
        bar.sync 0;
        @%p1 {accesses[first]}    // first
        @%p2 {accesses[second]}   // second"""
    found = over_seeds(ptx_engine, body, warps=2)
    expected = both_ways("race between warps", "first", "second")
    assert found == (set() if first == second else found & expected) and bool(found) == (first != second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The second warp reads what both add to, or adds to what the first one stores and adds to.
        (
            "red.shared.add.u32 [global_smem], 1;",
            "red.shared.add.u32 [global_smem], 1; ld.shared.b32 %r9, [global_smem];",
        ),
        (
            "st.shared.b32 [global_smem], 7; red.shared.add.u32 [global_smem], 1;",
            "red.shared.add.u32 [global_smem], 1;",
        ),
    ],
)
def test_a_warp_may_not_rely_on_its_own_access_to_be_the_last(ptx_engine, first, second):
    body = f"""
        setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r1, 32;
        @%p1 st.shared.b32 [global_smem], 0;
        bar.sync 0;
        @!%p1 bra $other;
        {first}
        $other:
        @!%p2 bra $over;
        {second}
        $over:"""
    assert all(ptx_engine.run(body, warps=2, seed=seed) for seed in range(20))


def test_what_was_before_a_barrier_is_over(ptx_engine):
    body = """
        setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r1, 32;
        @%p1 st.shared.b32 [global_smem], 0;
        @%p1 ld.shared.b32 %r9, [global_smem];
        bar.sync 0;
        @%p2 ld.shared.b32 %r9, [global_smem];
        @%p2 st.shared.b32 [global_smem], 1;
        @%p2 ld.shared.b32 %r9, [global_smem];
        @%p2 st.shared.b32 [global_smem], 2;"""
    assert over_seeds(ptx_engine, body, warps=2) == set()


def test_warps_that_store_the_same(ptx_engine):
    found = ptx_engine.run("st.shared.b32 [global_smem], 7; // here", warps=2)
    assert found == {("race between warps, same value", "here", "here")}


@pytest.mark.parametrize(
    ("access", "kind"),
    [
        ("st.global.b32 [%rd6], %r5;", None),
        ("st.global.b32 [%rd1], %r5;", "race between CTAs"),
        ("st.global.b32 [%rd1], 99;", "race between CTAs, same value"),
        ("red.global.add.u32 [%rd1], %r5;", None),
        ("ld.global.b32 %r9, [%rd1];", None),
    ],
)
def test_ctas_of_a_launch(ptx_engine, access, kind):
    body = f"""
        mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd6, %rd1, %rd5;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 {access}   // here"""
    assert ptx_engine.run(body, ints(8), grid=4) == ({(kind, "here", "here")} if kind else set())


def test_ctas_that_read_what_another_writes(ptx_engine):
    body = """
        mov.u32 %r5, %ctaid.x; setp.eq.b32 %p1, %r5, 0;
        @%p1 st.global.b32 [%rd1], 7;    // write
        @!%p1 ld.global.b32 %r9, [%rd1]; // read"""
    runs = [ptx_engine.run(body, ints(1), grid=3, seed=seed) for seed in range(8)]
    assert all(runs) and set.union(*runs) == both_ways("race between CTAs", "read", "write")


def test_a_cta_that_writes_what_it_and_others_have_read(ptx_engine):
    body = """
        mov.u32 %r5, %ctaid.x; setp.eq.b32 %p1, %r5, 0; setp.eq.b32 %p2, %r1, 0;
        @%p2 ld.global.b32 %r9, [%rd1];   // read
        bar.sync 0;
        and.pred %p3, %p1, %p2;
        @%p3 st.global.b32 [%rd1], 7;     // write"""
    assert ptx_engine.run(body, ints(1), grid=1) == set()
    runs = [ptx_engine.run(body, ints(1), grid=2, seed=seed) for seed in range(8)]
    assert all(runs) and set.union(*runs) == both_ways("race between CTAs", "read", "write")


def test_launches_do_not_race(ptx_engine):
    array = ints(1)
    for value in (1, 2):
        body = f"setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd1], {value};"
        assert ptx_engine.run(body, array) == set() and array[0] == value


def test_lanes_hand_over(ptx_engine):
    body = f"""{OF_THREAD}
        xor.b32 %r6, %r4, 4;
        st.shared.b32 [%r4], %r1;   // write
        bar.warp.sync -1;
        ld.shared.b32 %r9, [%r6];   // read"""
    assert ptx_engine.run(body) == set()
    assert ptx_engine.run(body.replace("bar.warp.sync -1;", "")) == {("hazard within a warp", "read", "write")}


def test_lanes_write_what_others_have_read(ptx_engine):
    body = f"""{OF_THREAD}
        xor.b32 %r6, %r4, 4; st.shared.b32 [%r4], 99;
        bar.sync 0;
        ld.shared.b32 %r9, [%r6];   // read
        bar.warp.sync -1;
        st.shared.b32 [%r4], %r1;   // write"""
    assert ptx_engine.run(body) == set()
    assert ptx_engine.run(body.replace("bar.warp.sync -1;", "")) == {("hazard within a warp", "write", "read")}


def test_what_was_before_a_barrier_of_the_warp_is_over(ptx_engine):
    body = """
        setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r1, 1;
        @%p1 st.shared.b32 [global_smem], 0;
        @%p1 ld.shared.b32 %r9, [global_smem];
        bar.warp.sync -1;
        @%p2 ld.shared.b32 %r9, [global_smem];
        @%p2 st.shared.b32 [global_smem], 1;"""
    assert ptx_engine.run(body) == set()


@pytest.mark.parametrize(("value", "kinds"), [("7", set()), ("%r1", {"lanes store different values"})])
def test_lanes_that_store_to_one_place(ptx_engine, value, kinds):
    found = ptx_engine.run(f"st.shared.b32 [global_smem], {value}; // here")
    assert found == {(kind, "here", "here") for kind in kinds}


def test_a_mutated_program(ptx_engine):
    def without_barriers(statements, labels):
        return [("nop" if text.startswith("bar.sync") else text, place) for text, place in statements], labels

    text = kernel(f"{OF_THREAD} {OF_ANOTHER} st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r9, [%r7];", warps=2)
    assert Program(text).run(b"", (1,), 256) == []
    found = Program(text, without_barriers).run(b"", (1,), 256)
    assert {one["kind"] for one in found} == {"race between warps"}


# Barriers and whole warps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [32, 16])
@pytest.mark.parametrize(
    "instruction",
    ["bar.sync 0;", "bar.warp.sync -1;", "shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;", "redux.sync.add.s32 %r7, %r1, -1;"],
)
def test_lanes_that_took_another_way(ptx_engine, instruction, threads):
    body = f"setp.ge.u32 %p1, %r1, {threads};\n@%p1 bra $over;\n{instruction} // here\n$over:"
    assert ptx_engine.run(body) == ({("not converged", "here", None)} if threads < 32 else set())
    body = f"setp.lt.u32 %p1, %r1, {threads};\n@%p1 {instruction} // here"
    assert ptx_engine.run(body) == ({("not converged", "here", None)} if threads < 32 else set())


def test_members_are_the_whole_warp(ptx_engine):
    found = ptx_engine.run("redux.sync.add.s32 %r7, %r1, 65535; // here")
    assert found == {("not converged", "here", None)}


def test_lanes_that_ended(ptx_engine):
    body = "setp.ge.u32 %p1, %r1, {};\n@%p1 ret;\nshfl.sync.bfly.b32 %r7, %r1, 1, 31, -1; // here"
    assert ptx_engine.run(body.format(32)) == set()
    assert ptx_engine.run(body.format(16)) == {("not converged", "here", None)}


def test_lanes_meet_again(ptx_engine):
    out = ints(32)
    body = f"""{OF_THREAD} mov.b32 %r7, 0;
        $loop:
        add.s32 %r7, %r7, 1; setp.lt.s32 %p1, %r7, %r1;
        @%p1 bra $loop;
        redux.sync.add.s32 %r8, %r7, -1;
        st.global.b32 [%rd11], %r8;"""
    assert ptx_engine.run(body, out) == set()
    assert out.tolist() == [1 + sum(range(32))] * 32


@pytest.mark.parametrize("warps", [1, 2])
def test_warps_at_different_barriers(ptx_engine, warps):
    body = """
        setp.lt.u32 %p1, %r1, 32;
        @%p1 bra $other;
        bar.sync 0;   // one
        bra $over;
        $other:
        bar.sync 0;   // other
        $over:"""
    found = ptx_engine.run(body, warps=warps)
    assert found == ({("barriers differ", "other", "one")} if warps == 2 else set())


@pytest.mark.parametrize("warps", [1, 2])
def test_warps_that_end_before_a_barrier(ptx_engine, warps):
    found = ptx_engine.run("setp.ge.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0; // here", warps=warps)
    assert found == ({("barriers differ", "here", None)} if warps == 2 else set())


def test_a_kernel_that_does_not_end(ptx_engine):
    body = """mov.b32 %r2, 0;
        $loop:
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p1, %r2, {};
        @%p1 bra $loop;"""
    assert ptx_engine.run(body.format(1000), limit=10_000) == set()
    assert {kind for kind, *_ in ptx_engine.run(body.format(100_000), limit=10_000)} == {"does not end"}
    assert ptx_engine.run("$self:\nbra $self; // here", limit=10_000) == {("does not end", "here", None)}


def test_a_kernel_that_ends_at_the_limit(ptx_engine):
    assert ptx_engine.run("nop;\nnop;", limit=4) == set()
    assert {kind for kind, *_ in ptx_engine.run("nop;\nnop;", limit=3)} == {"does not end"}


# What runs meanwhile --------------------------------------------------------------------------------------------------

COPY = f"""{OF_THREAD} mov.b32 %r5, 4; st.shared.b32 [%r4], 99; bar.sync 0;
    cp.async.ca.shared.global [%r4+0], [%rd11+0], 4, %r5; // copy
    cp.async.commit_group;"""
LOADED = "ld.shared.b32 %r9, [%r4];\nst.global.b32 [%rd12], %r9;"


@pytest.mark.parametrize("under_way", [0, 1])
def test_a_copy_is_waited_for(ptx_engine, under_way):
    source, out = ints(32), ints(32)[::-1].copy()
    body = f"{COPY}\ncp.async.wait_group {under_way};\n{LOADED}\ncp.async.wait_group 0;"
    assert ptx_engine.run(body, source, out) == set()
    assert ptx_engine.tainted(out) == 128 * under_way and (out == source).all() == (not under_way)


@pytest.mark.parametrize("which", [0, 128])
def test_groups_of_copies_arrive_in_order(ptx_engine, which):
    source, out = ints(32), np.zeros(32, np.int32)
    body = f"""{COPY}
        cp.async.ca.shared.global [%r4+128], [%rd11+0], 4, %r5;
        cp.async.commit_group;
        cp.async.wait_group 1;
        {LOADED.replace("[%r4]", f"[%r4+{which}]")}
        cp.async.wait_group 0;"""
    assert ptx_engine.run(body, source, out) == set()
    assert ptx_engine.tainted(out) == which


@pytest.mark.parametrize(("taken", "result"), [("2", 0xFFFF), ("0; add.s64 %rd11, %rd11, 9999", 0)])
def test_a_copy_of_fewer_bytes_ends_in_zeros(ptx_engine, taken, result):
    source, out = np.full(32, -1, np.int32), np.ones(32, np.int32)
    body = f"{COPY}\ncp.async.wait_group 0;\n{LOADED}".replace("mov.b32 %r5, 4;", f"mov.b32 %r5, {taken};")
    assert ptx_engine.run(body, source, out) == set()  # nothing is read where nothing is taken
    assert out.tolist() == [result] * 32


@pytest.mark.parametrize("committed", [True, False])
def test_a_copy_that_nobody_waited_for(ptx_engine, committed):
    body = COPY if committed else COPY.replace("cp.async.commit_group;", "")
    assert ptx_engine.run(body, ints(32)) == {("not waited for", "copy", None)}


def test_a_copy_lands_when_it_is_waited_for(ptx_engine):
    wait, barrier = "cp.async.wait_group 0;\n", "bar.sync 0;\n"
    read = "xor.b32 %r6, %r4, 128; ld.shared.b32 %r9, [%r6]; // read\n"
    assert over_seeds(ptx_engine, f"{COPY}\n{wait}{barrier}{read}", ints(64), warps=2) == set()
    found = over_seeds(ptx_engine, f"{COPY}\n{barrier}{read}{wait}", ints(64), warps=2)
    assert found == both_ways("race between warps", "read", "copy")


def test_a_copy_of_something_uninitialised(ptx_engine):
    source, out = ints(32), ints(32)
    ptx_engine.place(source, uninitialised=True)
    ptx_engine.lib.set_taint(ptx_engine.place(source), 64, False)
    assert ptx_engine.run(f"{COPY}\ncp.async.wait_group 0;\n{LOADED}", source, out) == set()
    assert ptx_engine.tainted(out) == 64


def test_a_copy_comes_from_a_multiple_of_its_size(ptx_engine):
    body = f"""{OF_THREAD} mov.b32 %r5, {{}}; shl.b32 %r6, %r1, 3; add.s32 %r6, %r3, %r6; add.s64 %rd5, %rd11, %rd8;
        cp.async.ca.shared.global [%r6], [%rd5+{{}}], 8, %r5;   // copy
        cp.async.commit_group;
        cp.async.wait_group 0;"""
    assert ptx_engine.run(body.format(8, 8), ints(66)) == set()
    assert ptx_engine.run(body.format(8, 4), ints(66)) == {("misaligned", "copy", None)}
    assert ptx_engine.run(body.format(4, 4), ints(66)) == {("misaligned", "copy", None)}
