"""The instructions of tests/ptx in which a whole warp takes part: shuffles, reductions, matrices and their products."""

import numpy as np
import pytest
import torch
from ptx.handwritten import HALVES, OF_THREAD, bits, load_all, numbered, quarters, registers_of, store_all

LANES = np.arange(32)


def random_ints(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-(1 << 31), 1 << 31, count).astype(np.int32)


def in_warps(ptx_engine, instruction: str, a: np.ndarray) -> np.ndarray:
    """What ``instruction`` makes of %r8 in %r9, a number a thread."""
    out = np.zeros_like(a)
    body = f"{OF_THREAD}\nld.global.b32 %r8, [%rd11];\n{instruction}\nst.global.b32 [%rd12], %r9;"
    assert ptx_engine.run(body, a, out, warps=len(a) // 32) == set()
    return out


SOURCES = {
    ("bfly", 5, 31): LANES ^ 5,
    ("idx", 7, 31): np.full(32, 7),
    ("idx", 39, 31): np.full(32, 7),
    ("up", 3, 0): np.where(LANES >= 3, LANES - 3, LANES),
    ("down", 3, 31): np.where(LANES < 29, LANES + 3, LANES),
    # Segments of 8: bits 8 to 12 of the clamp are those of a lane that its segment shares.
    ("bfly", 9, 0x1807): np.where((LANES ^ 9) > (LANES | 7), LANES, LANES ^ 9),
    ("idx", 3, 0x1807): LANES // 8 * 8 + 3,
    ("up", 3, 0x1800): np.where(LANES % 8 >= 3, LANES - 3, LANES),
    ("down", 3, 0x1807): np.where(LANES % 8 < 5, LANES + 3, LANES),
}


@pytest.mark.parametrize(("mode", "distance", "clamp"), SOURCES)
def test_shuffles(ptx_engine, mode, distance, clamp):
    a, sources = random_ints(64), SOURCES[mode, distance, clamp]
    found = in_warps(ptx_engine, f"shfl.sync.{mode}.b32 %r9, %r8, {distance}, {clamp}, -1;", a)
    assert found.tolist() == [*a[sources], *a[32 + sources]]


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("add.s32", np.add),
        ("min.s32", np.minimum),
        ("max.s32", np.maximum),
        ("min.u32", np.minimum),
        ("max.u32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("or.b32", np.bitwise_or),
        ("xor.b32", np.bitwise_xor),
    ],
)
def test_reductions(ptx_engine, name, f):
    a = random_ints(64)
    if name == "and.b32":
        a |= 0x10203040
    elif name == "or.b32":
        a &= 0x10203040
    dtype = np.int32 if name.endswith("s32") else np.uint32
    first, second = (f.reduce(part.view(dtype), dtype=dtype) for part in (a[:32], a[32:]))
    found = in_warps(ptx_engine, f"redux.sync.{name} %r9, %r8, -1;", a)
    assert found.view(dtype).tolist() == [first] * 32 + [second] * 32


def test_atomics_return_what_was_there(ptx_engine):
    total, before = np.zeros(1, np.int32), np.zeros(64, np.int32)
    body = f"{OF_THREAD}\natom.global.gpu.relaxed.add.u32 %r9, [%rd1], 2;\nst.global.b32 [%rd12], %r9;"
    assert ptx_engine.run(body, total, before, warps=2) == set()
    assert total[0] == 128 and sorted(before.tolist()) == list(range(0, 128, 2))


@pytest.mark.parametrize(
    ("kind", "dtype", "register"), [("u32", np.uint32, "%r9"), ("u64", np.uint64, "%rd9"), ("f32", np.float32, "%r9")]
)
def test_atomic_sums(ptx_engine, kind, dtype, register):
    total, values = np.array([2], dtype), np.arange(32).astype(dtype)
    body = f"""
        mul.wide.u32 %rd8, %r1, {values.itemsize}; add.s64 %rd5, %rd2, %rd8;
        ld.global.b{8 * values.itemsize} {register}, [%rd5];
        {{}}.global.gpu.relaxed.add.{kind} {{}}[%rd1], {register};"""
    assert ptx_engine.run(body.format("red", ""), total, values) == set()
    assert total[0] == 2 + 31 * 16
    assert ptx_engine.run(body.format("atom", f"{register}, "), total, values) == set()
    assert total[0] == 2 + 31 * 32


# Matrices -------------------------------------------------------------------------------------------------------------

# %r7: the thread's 16 bytes of shared memory; %rd5, %rd6: those of the first arrays.
ROWS = f"""{OF_THREAD}
    shl.b32 %r6, %r1, 4; add.s32 %r7, %r3, %r6; mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd1, %rd4;
    add.s64 %rd6, %rd2, %rd4;"""


def matrices(count: int) -> np.ndarray:
    return np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_loading_matrices(ptx_engine, count, trans):
    source, out = matrices(4), np.zeros((count, 32), np.uint32)
    body = f"""{ROWS}
        ld.global.v4.b32 {{{numbered(10, 4)}}}, [%rd5];
        st.shared.v4.b32 [%r7], {{{numbered(10, 4)}}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{numbered(20, count)}}}, [%r7];
        {store_all(20, count, "%rd12", 128)}"""
    assert ptx_engine.run(body, source, out) == set()
    expected = source.swapaxes(1, 2) if trans else source
    assert all((out[k] == registers_of(expected[k])).all() for k in range(count))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_storing_matrices(ptx_engine, count):
    source, out = matrices(count), np.zeros((4, 8, 8), np.uint16)
    values = np.stack([registers_of(matrix) for matrix in source])
    body = f"""{ROWS}
        st.shared.v4.b32 [%r7], {{0, 0, 0, 0}};
        bar.sync 0;
        {load_all(20, count, "%rd11", 128)}
        stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r7], {{{numbered(20, count)}}};
        bar.sync 0;
        ld.shared.v4.b32 {{{numbered(10, 4)}}}, [%r7];
        st.global.v4.b32 [%rd6], {{{numbered(10, 4)}}};"""
    assert ptx_engine.run(body, values, out) == set()
    assert (out[:count] == source).all() and not out[count:].any()


@pytest.mark.parametrize(("offset", "found"), [(16, set()), (8, {("misaligned", "here", None)})])
@pytest.mark.parametrize(
    "access",
    [
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r7+OFFSET];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7+OFFSET], {%r1};",
    ],
)
def test_rows_of_matrices_are_aligned(ptx_engine, access, offset, found):
    zeros = "st.shared.v4.b32 [%r7], {0, 0, 0, 0}; bar.sync 0;"
    assert ptx_engine.run(f"{ROWS} {zeros}\n{access.replace('OFFSET', str(offset))} // here") == found


@pytest.mark.parametrize(("trans", "lanes"), [("", [5]), (".trans", [8, 12])])
def test_loading_matrices_of_something_uninitialised(ptx_engine, trans, lanes):
    """Row 1, columns 2 and 3: lane 5's; of the transposed matrix row 2 and row 3, column 1."""
    out = np.zeros(32, np.uint32)
    body = f"""{OF_THREAD} shl.b32 %r6, %r1, 4; add.s32 %r7, %r3, %r6; setp.ne.b32 %p1, %r1, 5;
        @%p1 st.shared.b32 [%r4], 0;
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r9}}, [%r7];
        st.global.b32 [%rd11], %r9;"""
    assert ptx_engine.run(body, out) == set()
    assert ptx_engine.tainted_elements(out) == lanes


def test_storing_matrices_of_something_uninitialised(ptx_engine):
    out = np.zeros(32, np.uint32)
    body = f"""{OF_THREAD} shl.b32 %r6, %r1, 4; add.s32 %r7, %r3, %r6; setp.eq.b32 %p1, %r1, 5; mov.b32 %r9, 0;
        @%p1 ld.shared.b32 %r9, [global_smem+512];
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {{%r9}};
        bar.sync 0;
        ld.shared.b32 %r8, [%r4];
        st.global.b32 [%rd11], %r8;"""
    assert ptx_engine.run(body, out) == set()
    assert ptx_engine.tainted_elements(out) == [5]


# Products -------------------------------------------------------------------------------------------------------------


def mma(ptx_engine, kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, **options) -> torch.Tensor:
    """m16n8k16: a [16, 16] @ b [16, 8] + c [16, 8]."""
    columns = bits(b.T)
    c_registers = [c[row : row + 8].reshape(32, 2)[:, k].numpy().view(np.uint32) for row in (0, 8) for k in (0, 1)]
    inputs = np.stack([*quarters(bits(a)), registers_of(columns[:, :8]), registers_of(columns[:, 8:]), *c_registers])
    out = np.zeros((4, 32), np.uint32)
    operands = ", ".join(f"{{{numbered(*registers)}}}" for registers in ((40, 4), (20, 4), (24, 2), (26, 4)))
    body = f"""{OF_THREAD}
        {load_all(20, 10, "%rd11", 128)}
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {operands};
        {store_all(40, 4, "%rd12", 128)}"""
    assert ptx_engine.run(body, inputs, out, **options) == set()
    halves = [np.stack([out[2 * half], out[2 * half + 1]], axis=1).view(np.float32).reshape(8, 8) for half in (0, 1)]
    return torch.from_numpy(np.concatenate(halves))


@pytest.mark.parametrize("kind", HALVES)
def test_products_of_a_warp(ptx_engine, kind):
    a, b, c = torch.randn(16, 16).to(HALVES[kind]), torch.randn(16, 8).to(HALVES[kind]), torch.randn(16, 8)
    assert torch.equal(mma(ptx_engine, kind, a, b, c), (a.double() @ b.double() + c.double()).float())


@pytest.mark.parametrize(("operand", "lane", "numbers"), [(4, 0, 8), (8, 4, 16), (10, 5, 1)], ids=["A", "B", "C"])
def test_products_of_something_uninitialised(ptx_engine, operand, lane, numbers):
    """Lane 0 of A holds a part of a row, lane 4 of B a part of a column, lane 5 of C a number."""
    out, registers = np.zeros((4, 32), np.uint32), ["0"] * 14
    registers[:4], registers[operand] = ["%r40", "%r41", "%r42", "%r43"], "%r9"
    operands = ", ".join(f"{{{', '.join(registers[at])}}}" for at in map(slice, (0, 4, 8, 10), (4, 8, 10, 14)))
    body = f"""{OF_THREAD} mov.b32 %r9, 0; setp.eq.b32 %p1, %r1, {lane};
        @%p1 ld.shared.b32 %r9, [global_smem];
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {operands};
        {store_all(40, 4, "%rd11", 128)}"""
    assert ptx_engine.run(body, out) == set()
    assert ptx_engine.tainted(out) == 4 * numbers


CUT, GUARD_BITS = 2, 1 << 8


@pytest.mark.parametrize(
    ("small", "rest", "flags"),
    [
        # Four times 2^-25 beside 1, whose last bit is 2^-23: kept whole, cut off one by one, or kept by guard bits.
        (2.0**-25, 2.0**-23, 0),
        (2.0**-25, 0, CUT),
        (2.0**-25, 0, CUT | GUARD_BITS),
        (2.0**-25, 2.0**-23, CUT | 2 * GUARD_BITS),
        # The sum is cut off as well: 3.5 times 2^-25 are rounded up, and cut to nothing.
        (0.875 * 2.0**-25, 2.0**-23, 0),
        (0.875 * 2.0**-25, 0, CUT | 15 * GUARD_BITS),
    ],
)
def test_sums_that_are_cut_off(ptx_engine, small, rest, flags):
    a, b = torch.ones(16, 16).bfloat16(), torch.zeros(16, 8).bfloat16()
    b[0], b[1:5] = 1, small
    for sign in (1, -1):  # toward zero
        found = mma(ptx_engine, "bf16", sign * a, b, torch.zeros(16, 8), flags=1 | flags)
        assert torch.equal(found, torch.full((16, 8), sign * (1 + rest)))


def test_sums_are_cut_off_eight_at_a_time(ptx_engine):
    a, b = torch.ones(16, 16).bfloat16(), torch.zeros(16, 8).bfloat16()
    b[0:2], b[8:12] = torch.tensor([[1.0], [-1.0]]), 2.0**-25
    exact = torch.full((16, 8), 4 * 2.0**-25)
    assert torch.equal(mma(ptx_engine, "bf16", a, b, torch.zeros(16, 8), flags=1 | CUT), exact)
    b[8:12], b[2:6] = 0, 2.0**-25
    assert torch.equal(mma(ptx_engine, "bf16", a, b, torch.zeros(16, 8), flags=1 | CUT), torch.zeros(16, 8))
    assert torch.equal(mma(ptx_engine, "bf16", a, b, torch.zeros(16, 8)), exact)


def test_sums_without_end_are_not_cut_off(ptx_engine):
    a, b = torch.ones(16, 16).bfloat16(), torch.zeros(16, 8).bfloat16()
    b[0, 0], b[0, 1] = float("inf"), float("nan")
    found = mma(ptx_engine, "bf16", a, b, torch.ones(16, 8), flags=1 | CUT)
    assert found[:, 0].isinf().all() and found[:, 1].isnan().all() and (found[:, 2:] == 1).all()
