"""The instructions of tests/ptx in which a whole warp takes part: shuffles, reductions, matrices and their products."""

import numpy as np
import pytest
import torch
from ptx import engine
from ptx.handwritten import OF_THREAD

LANES = np.arange(32)
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


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


def registers_of(matrix: np.ndarray) -> np.ndarray:
    """What a warp's lanes hold of 8 x 8 halves: two by two, row after row."""
    return np.ascontiguousarray(matrix).reshape(32, 2).view(np.uint32).reshape(32)


def numbered(first: int, count: int) -> str:
    return ", ".join(f"%r{first + k}" for k in range(count))


def load_all(first: int, count: int, address: str, stride: int) -> str:
    return " ".join(f"ld.global.b32 %r{first + k}, [{address}+{stride * k}];" for k in range(count))


def store_all(first: int, count: int, address: str, stride: int) -> str:
    return " ".join(f"st.global.b32 [{address}+{stride * k}], %r{first + k};" for k in range(count))


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


# Products -------------------------------------------------------------------------------------------------------------


def bits(halves: torch.Tensor) -> np.ndarray:
    return halves.contiguous().view(torch.int16).numpy().view(np.uint16)


def quarters(a: np.ndarray) -> list[np.ndarray]:
    """The registers of a 16 x 16 operand: upper left, lower left, upper right, lower right."""
    return [registers_of(a[row : row + 8, column : column + 8]) for column in (0, 8) for row in (0, 8)]


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


# Warpgroups -----------------------------------------------------------------------------------------------------------


def swizzled(matrix: np.ndarray) -> np.ndarray:
    """Rows of 16, 32 or 64 halves; pieces of 16 bytes change places as their addresses' bits from the 7th on say."""
    width, flat = matrix.shape[1], np.zeros(matrix.size, np.uint16)
    for row, values in enumerate(matrix):
        for k in range(0, width, 8):
            place = 2 * (row * width + k)
            place ^= (place >> 7 & (width // 8 - 1)) << 4
            flat[place // 2 : place // 2 + 8] = values[k : k + 8]
    return flat


def descriptor(address: int, width: int) -> int:
    mode = {64: 1, 32: 2, 16: 3}[width]
    return address >> 4 | (8 * width * 2 >> 4) << 32 | mode << 62


WAIT = "wgmma.wait_group.sync.aligned 0;"


def product(kind: str, columns: int, width: int, a_registers: bool, wait: str = WAIT) -> str:
    base, a_bytes, b_bytes = engine.library().shared_base(), 2 * 64 * width, 2 * columns * width
    a = f"{{{numbered(11, 4)}}}" if a_registers else descriptor(base, width)
    operands = f"{{{numbered(20, columns // 2)}}}, {a}, {descriptor(base + a_bytes, width)}, %p1, 1, 1, 0"
    operands += "" if a_registers else ", 0"
    parts = range(0, a_bytes + b_bytes, 512)
    return f"""{OF_THREAD} setp.eq.b32 %p1, 0, 0;
        {" ".join(f"ld.global.b32 %r9, [%rd11+{k}]; st.shared.b32 [%r4+{k}], %r9;" for k in parts)}
        bar.sync 0;
        {load_all(11, 4, "%rd13", 512) if a_registers else ""}
        {" ".join(f"mov.b32 %r{20 + j}, 0f3F800000;" for j in range(columns // 2))}
        fence.proxy.async.shared::cta;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {operands}; // product
        wgmma.commit_group.sync.aligned;
        {wait}
        {store_all(20, columns // 2, "%rd12", 512)}"""


def wgmma(ptx_engine, kind: str, columns: int, width: int, a_registers: bool, wait: str = WAIT):
    """What is found; 1 + a product of random operands and what it should be; the array that it was stored to."""
    a, b = torch.randn(64, width).to(HALVES[kind]), torch.randn(columns, width).to(HALVES[kind])
    operands = np.concatenate([swizzled(bits(a)), swizzled(bits(b))])
    by_warps = [np.stack(quarters(bits(a[row : row + 16, :16]))) for row in range(0, 64, 16)]
    out, a_of_threads = np.zeros((columns // 2, 128), np.float32), np.concatenate(by_warps, axis=1)
    body = product(kind, columns, width, a_registers, wait)
    found = ptx_engine.run(body, operands, out, a_of_threads, warps=4, shared=1 << 15)
    # Of eight columns a thread holds two in a row, and two that are eight rows below.
    parts = torch.from_numpy(out).view(columns // 8, 2, 2, 4, 8, 4)  # eight columns, row, column, warp, row, column
    result = parts.permute(3, 1, 4, 0, 5, 2).reshape(64, columns)
    return found, result, (1 + a[:, :16].double() @ b[:, :16].double().T).float(), out


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("a_registers", [False, True], ids=["A in shared memory", "A in registers"])
def test_products_of_a_warpgroup(ptx_engine, kind, columns, width, a_registers):
    found, result, expected, _ = wgmma(ptx_engine, kind, columns, width, a_registers)
    assert found == set() and torch.equal(result, expected)


def test_a_product_that_nobody_waited_for(ptx_engine):
    found, _, _, out = wgmma(ptx_engine, "bf16", 64, 64, False, wait="")
    assert found == {("not waited for", "product", None)} and ptx_engine.tainted(out) == out.nbytes


def test_operands_are_left_alone_until_the_product_is_there(ptx_engine):
    overwrite = "bar.sync 0; st.shared.b32 [%r4], 0; // overwrite"
    found, *_ = wgmma(ptx_engine, "bf16", 64, 64, False, wait=f"{WAIT}\n{overwrite}")
    assert found == set()
    found, *_ = wgmma(ptx_engine, "bf16", 64, 64, False, wait=f"{overwrite}\n{WAIT}")
    assert all({one, other} == {"overwrite", "product"} for _, one, other in found)
    assert "race between warps" in {kind for kind, *_ in found}


@pytest.mark.parametrize(
    "change",
    [
        ("k16.f32.bf16.bf16 ", "k8.f32.tf32.tf32 "),
        (", 1, 1, 0, 0;", ", 1, 1, 0, 1;"),
        (", 1, 1, 0, 0;", ", -1, 1, 0, 0;"),
    ],
)
def test_other_products_are_refused(ptx_engine, change):
    body = product("bf16", 64, 64, False)
    with pytest.raises(NotImplementedError, match="PTX instruction 'wgmma.mma_async"):
        ptx_engine.run(body.replace(*change), *np.zeros((3, 1), np.int32))
