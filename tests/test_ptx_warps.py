"""The instructions of tests/ptx in which a whole warp takes part: shuffles, reductions, matrices."""

import numpy as np
import pytest
import torch
from ptx import engine
from ptx.handwritten import Device

pytestmark = pytest.mark.skipif(engine.compiler() is None, reason="no C++ compiler")

LANES = np.arange(32)
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
# %rd9, %rd10, ...: the thread's 4 bytes of the arrays; %r4: its 16 bytes of shared memory.
PLACES = "mul.wide.u32 %rd8, %r1, 4; | add.s64 %rd9, %rd1, %rd8; | add.s64 %rd10, %rd2, %rd8;"
SHARED = "shl.b32 %r2, %r1, 4; | mov.b32 %r3, global_smem; | add.s32 %r4, %r3, %r2;"


@pytest.fixture
def device():
    engine.library().regions_clear()
    yield Device()
    engine.library().regions_clear()


def random_ints(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-(1 << 31), 1 << 31, count).astype(np.int32)


def of_a_warp(device, instruction: str, a: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    body = f"{PLACES}\nld.global.b32 %r8, [%rd9];\n{instruction}\nst.global.b32 [%rd10], %r9;"
    assert device.run(body, a, out, warps=len(a) // 32) == set()
    return out


SOURCES = {
    ("bfly", 5, 31): LANES ^ 5,
    ("idx", 7, 31): np.full(32, 7),
    ("idx", 39, 31): np.full(32, 7),
    ("up", 3, 0): np.where(LANES >= 3, LANES - 3, LANES),
    ("down", 3, 31): np.where(LANES < 29, LANES + 3, LANES),
    # Segments of 8: the clamp's bits 8 to 12 hold the bits of a lane that its segment shares.
    ("bfly", 9, 0x1807 | 7): np.where((LANES ^ 9) > (LANES | 7), LANES, LANES ^ 9),
    ("idx", 3, 0x1807): LANES // 8 * 8 + 3,
    ("up", 3, 0x1800): np.where(LANES % 8 >= 3, LANES - 3, LANES),
    ("down", 3, 0x1807): np.where(LANES % 8 < 5, LANES + 3, LANES),
}


@pytest.mark.parametrize(("mode", "distance", "clamp"), SOURCES)
def test_shuffles(device, mode, distance, clamp):
    a = random_ints(64)
    found = of_a_warp(device, f"shfl.sync.{mode}.b32 %r9, %r8, {distance}, {clamp}, -1;", a)
    sources = SOURCES[mode, distance, clamp]
    assert found.tolist() == [*a[sources], *a[32 + sources]]


@pytest.mark.parametrize(
    ("name", "f", "dtype"),
    [
        ("add.s32", np.add, np.int32),
        ("min.s32", np.minimum, np.int32),
        ("max.s32", np.maximum, np.int32),
        ("min.u32", np.minimum, np.uint32),
        ("max.u32", np.maximum, np.uint32),
        ("and.b32", np.bitwise_and, np.uint32),
        ("or.b32", np.bitwise_or, np.uint32),
        ("xor.b32", np.bitwise_xor, np.uint32),
    ],
)
def test_reductions(device, name, f, dtype):
    a = random_ints(64)
    if name in ("and.b32", "or.b32"):
        a &= random_ints(64) | 0x0F0F0F0F if name == "or.b32" else -1
        a = a | 0x10101010 if name == "and.b32" else a & 0x0FFF0FFF
    found = of_a_warp(device, f"redux.sync.{name} %r9, %r8, -1;", a)
    first, second = (f.reduce(part.view(dtype), dtype=dtype) for part in (a[:32], a[32:]))
    assert found.view(dtype).tolist() == [first] * 32 + [second] * 32


def test_atomics_return_what_was_there(device):
    total, before = np.zeros(1, np.int32), np.zeros(64, np.int32)
    body = "mul.wide.u32 %rd8, %r1, 4; | add.s64 %rd10, %rd2, %rd8;\natom.global.gpu.relaxed.add.u32 %r9, [%rd1], 2;\nst.global.b32 [%rd10], %r9;"
    assert device.run(body, total, before, warps=2) == set()
    assert total[0] == 128 and sorted(before.tolist()) == list(range(0, 128, 2))


@pytest.mark.parametrize(("kind", "dtype"), [("u64", np.uint64), ("f32", np.float32)])
def test_atomic_sums(device, kind, dtype):
    total, values = np.array([2], dtype), np.arange(32).astype(dtype)
    size = values.itemsize
    register = "%r9" if size == 4 else "%rd11"
    body = f"mul.wide.u32 %rd8, %r1, {size}; | add.s64 %rd9, %rd2, %rd8;\nld.global.b{8 * size} {register}, [%rd9];\nred.global.gpu.relaxed.add.{kind} [%rd1], {register};"
    assert device.run(body, total, values) == set()
    assert total[0] == 2 + 31 * 16


# Matrices -------------------------------------------------------------------------------------------------------------


def matrices(count: int) -> np.ndarray:
    return np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)


def registers_of(matrix: np.ndarray) -> np.ndarray:
    """What a warp's lanes hold of 8 x 8 halves: two by two, row after row."""
    return np.ascontiguousarray(matrix).reshape(32, 2).view(np.uint32).reshape(32)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_loading_matrices(device, count, trans):
    source, out = matrices(4), np.zeros((count, 32), np.uint32)
    rows = "mul.wide.u32 %rd5, %r1, 16; | add.s64 %rd6, %rd1, %rd5; | ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd6];"
    registers = ", ".join(f"%r{20 + k}" for k in range(count))
    stores = " | ".join(f"st.global.b32 [%rd10+{128 * k}], %r{20 + k};" for k in range(count))
    body = f"{PLACES} | {SHARED}\n{rows} | st.shared.v4.b32 [%r4], {{%r10, %r11, %r12, %r13}};\nbar.sync 0;\nldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r4];\n{stores}"
    assert device.run(body, source, out) == set()
    expected = source.swapaxes(1, 2) if trans else source
    assert all((out[k] == registers_of(expected[k])).all() for k in range(count))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_storing_matrices(device, count):
    source, out = matrices(count), np.zeros((4, 8, 8), np.uint16)
    values = np.stack([registers_of(matrix) for matrix in source])
    loads = " | ".join(f"ld.global.b32 %r{20 + k}, [%rd9+{128 * k}];" for k in range(count))
    registers = ", ".join(f"%r{20 + k}" for k in range(count))
    rows = "mul.wide.u32 %rd5, %r1, 16; | add.s64 %rd6, %rd2, %rd5; | st.global.v4.b32 [%rd6], {%r10, %r11, %r12, %r13};"
    body = f"{PLACES} | {SHARED} | st.shared.v4.b32 [%r4], {{0, 0, 0, 0}}; | bar.sync 0;\n{loads}\nstmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r4], {{{registers}}};\nbar.sync 0;\nld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r4];\n{rows}"
    assert device.run(body, values, out) == set()
    assert (out[:count] == source).all() and not out[count:].any()


def test_rows_of_matrices_are_aligned(device):
    body = f"{SHARED} | st.shared.v4.b32 [%r4], {{{{0, 0, 0, 0}}}}; | bar.sync 0;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {{{{%r9}}}}, [%r4+{{}}];"
    assert device.run(body.format(16)) == set()
    assert device.run(body.format(8)) == {("misaligned", 2, None)}


# Products -------------------------------------------------------------------------------------------------------------


def random_halves(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def bits(halves: torch.Tensor) -> np.ndarray:
    return halves.contiguous().view(torch.int16).numpy().view(np.uint16)


def quarters(a: np.ndarray) -> list[np.ndarray]:
    """The registers of a 16 x 16 operand: upper left, lower left, upper right, lower right."""
    return [registers_of(a[row : row + 8, column : column + 8]) for column in (0, 8) for row in (0, 8)]


def mma(device, kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, **options) -> torch.Tensor:
    """m16n8k16: a [16, 16] @ b [16, 8] + c [16, 8]."""
    b_columns = bits(b.T)
    c_registers = [c[row : row + 8].reshape(32, 2)[:, k].numpy().view(np.uint32) for row in (0, 8) for k in (0, 1)]
    inputs = np.stack([*quarters(bits(a)), registers_of(b_columns[:, :8]), registers_of(b_columns[:, 8:]), *c_registers])
    out = np.zeros((4, 32), np.uint32)
    loads = " | ".join(f"ld.global.b32 %r{20 + k}, [%rd9+{128 * k}];" for k in range(10))
    lists = ["%r40, %r41, %r42, %r43", "%r20, %r21, %r22, %r23", "%r24, %r25", "%r26, %r27, %r28, %r29"]
    operands = ", ".join(f"{{{registers}}}" for registers in lists)
    stores = " | ".join(f"st.global.b32 [%rd10+{128 * k}], %r{40 + k};" for k in range(4))
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {operands};"
    assert device.run(f"{PLACES}\n{loads}\n{product}\n{stores}", inputs, out, **options) == set()
    halves = [np.stack([out[2 * half], out[2 * half + 1]], axis=1).view(np.float32).reshape(8, 8) for half in (0, 1)]
    return torch.from_numpy(np.concatenate(halves))


@pytest.mark.parametrize("kind", HALVES)
def test_products_of_a_warp(device, kind):
    a, b = random_halves(HALVES[kind], 16, 16), random_halves(HALVES[kind], 16, 8)
    c = torch.randn(16, 8)
    assert torch.equal(mma(device, kind, a, b, c), (a.double() @ b.double() + c.double()).float())


def test_products_of_something_uninitialised(device):
    out = np.zeros((4, 32), np.uint32)
    zeros = ", ".join(["0"] * 4)
    stores = " | ".join(f"st.global.b32 [%rd10+{128 * k}], %r{40 + k};" for k in range(4))
    product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r40, %r41, %r42, %r43}}, {{{a}}}, {{{b}}}, {{{c}}};"
    # Lane 0 of A holds a part of row 0, lane 4 of B a part of column 1.
    for at, a, b, count in (("0", f"%r9, {zeros[3:]}", "0, 0", 8), ("4", zeros, "%r9, 0", 16)):
        load = f"mov.b32 %r9, 0; | setp.eq.b32 %p1, %r1, {at}; | @%p1 ld.shared.b32 %r9, [global_smem];"
        assert device.run(f"{PLACES} | {load}\n{product.format(a=a, b=b, c=zeros)}\n{stores}", out, out) == set()
        assert device.tainted(out) == 4 * count


def test_sums_that_are_cut_off(device):
    """The first half's sum keeps 24 bits below its largest term, and as many guard bits as the flags say."""
    a, b = torch.ones(16, 16).bfloat16(), torch.zeros(16, 8).bfloat16()
    b[0], b[1:5] = 1, 2.0**-25
    kept = {"exact": (1, 2.0**-23), "cut": (1 | 2, 0), "1 guard bit": (1 | 2 | 1 << 8, 0), "2 guard bits": (1 | 2 | 2 << 8, 2.0**-23)}
    for flags, rest in kept.values():
        found = mma(device, "bf16", a, b, torch.zeros(16, 8), flags=flags)
        assert torch.equal(found, torch.full((16, 8), 1 + rest))
    # Toward zero, for negative sums as well; the nearest one would be 1 + 2^-23.
    b[1:5] = 3 * 2.0**-26
    assert torch.equal(mma(device, "bf16", -a, b, torch.zeros(16, 8), flags=1 | 2 | 4 << 8), torch.full((16, 8), -1 - 2.0**-23))
    b[1:5] = 0.875 * 2.0**-25
    assert torch.equal(mma(device, "bf16", -a, b, torch.zeros(16, 8), flags=1 | 2 | 15 << 8), -torch.ones(16, 8))
    assert torch.equal(mma(device, "bf16", -a, b, torch.zeros(16, 8)), torch.full((16, 8), -1 - 2.0**-23))
    # Eight products at a time: what is small is kept where nothing large is among the eight.
    b[1:5], b[8:12] = 0, 2.0**-25
    assert torch.equal(mma(device, "bf16", a, b, torch.zeros(16, 8), flags=1 | 2), torch.ones(16, 8))


# Warpgroups: operands in shared memory, in rows of 64 halves that are swizzled by 128 bytes ------------------------------


def swizzled(matrix: np.ndarray, width: int) -> np.ndarray:
    """Rows of ``width`` halves; pieces of 16 bytes change places by the row, as their addresses' bits 7 to 9 say."""
    flat = np.zeros(matrix.size, np.uint16)
    for row, values in enumerate(matrix):
        for k in range(0, width, 8):
            place = 2 * (row * width + k)
            place ^= (place >> 7 & width // 8 - 1) << 4
            flat[place // 2 : place // 2 + 8] = values[k : k + 8]
    return flat


def descriptor(address: int, width: int, rows: int = 8) -> int:
    mode = {64: 1, 32: 2, 16: 3}[width]
    return address >> 4 | (rows * width * 2 >> 4) << 32 | mode << 62


def wgmma_body(columns: int, width: int, a_bytes: int, from_registers: bool, kind: str, wait: str) -> str:
    base = engine.library().shared_base()
    copies = "mul.wide.u32 %rd5, %r1, 4; | cvt.u64.u32 %rd6, %r1;"
    words = (a_bytes + columns * width * 2) // 4
    copy = " | ".join(
        f"ld.global.b32 %r9, [%rd9+{512 * k}]; | st.shared.b32 [%r4+{512 * k}], %r9;" for k in range(words // 128)
    )
    accumulators = ", ".join(f"%r{20 + j}" for j in range(columns // 2))
    zeros = " | ".join(f"mov.b32 %r{20 + j}, 0f3F800000;" for j in range(columns // 2))
    a = "{%r11, %r12, %r13, %r14}" if from_registers else str(descriptor(base, width))
    load_a = " | ".join(f"ld.global.b32 %r{11 + k}, [%rd12+{512 * k}];" for k in range(4)) if from_registers else "nop;"
    transposed = "0" if from_registers else "0, 0"
    product = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{accumulators}}}, {a}, {descriptor(base + a_bytes, width)}, %p1, 1, 1, {transposed};"
    stores = " | ".join(f"st.global.b32 [%rd10+{512 * j}], %r{20 + j};" for j in range(columns // 2))
    return "\n".join(
        [
            f"{PLACES} | {copies} | add.s64 %rd12, %rd3, %rd8; | shl.b32 %r2, %r1, 2; | mov.b32 %r3, global_smem; | add.s32 %r4, %r3, %r2;",
            copy,
            "bar.sync 0;",
            f"{zeros} | {load_a} | setp.eq.b32 %p1, 0, 0;",
            "fence.proxy.async.shared::cta; | wgmma.fence.sync.aligned;",
            product,
            "wgmma.commit_group.sync.aligned;",
            wait,
            stores,
        ]
    )


def wgmma(device, kind, columns, width, from_registers, wait="wgmma.wait_group.sync.aligned 0;"):
    """What is found, the product of random operands plus 1, and what it should be."""
    a, b = random_halves(HALVES[kind], 64, width), random_halves(HALVES[kind], columns, width)
    inputs = np.concatenate([swizzled(bits(a), width), swizzled(bits(b), width)])
    by_warps = np.concatenate([np.stack(quarters(bits(a[row : row + 16, :16]))) for row in range(0, 64, 16)], axis=1)
    out = np.zeros((columns // 2, 128), np.float32)
    body = wgmma_body(columns, width, 128 * width, from_registers, kind, wait)
    found = device.run(body, inputs, out, np.ascontiguousarray(by_warps), warps=4, shared=1 << 16)
    # A thread's numbers: two in a row, two 8 rows below, then the next 8 columns.
    threads = out.reshape(columns // 8, 2, 2, 4, 8, 4)  # columns by 8, row by 8, column, warp, row, column by 2
    result = torch.from_numpy(threads.transpose(3, 1, 4, 0, 5, 2).reshape(64, columns).copy())
    return found, result, (1 + a[:, :16].double() @ b[:, :16].double().T).float(), out


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("from_registers", [False, True], ids=["A in shared memory", "A in registers"])
def test_products_of_a_warpgroup(device, kind, columns, width, from_registers):
    found, result, expected, _ = wgmma(device, kind, columns, width, from_registers)
    assert found == set() and torch.equal(result, expected)


def test_a_product_that_nobody_waited_for(device):
    found, _, _, out = wgmma(device, "bf16", 64, 64, False, wait="nop;")
    assert found == {("not waited for", 6, None)} and device.tainted(out) == out.nbytes


def test_operands_are_left_alone_until_the_product_is_there(device):
    overwrite = "bar.sync 0; | st.shared.b32 [%r4], 0;"
    found, *_ = wgmma(device, "bf16", 64, 64, False, wait=f"{overwrite} | wgmma.wait_group.sync.aligned 0;")
    assert {tuple(sorted((at, other))) for _, at, other in found} == {(6, 8)}
    assert "race between warps" in {kind for kind, _, _ in found}
    found, *_ = wgmma(device, "bf16", 64, 64, False, wait=f"wgmma.wait_group.sync.aligned 0; | {overwrite}")
    assert found == set()


@pytest.mark.parametrize("change", [("k16.f32.bf16.bf16 ", "k8.f32.tf32.tf32 "), (", 1, 1, 0, 0;", ", 1, 1, 0, 1;"), (", 1, 1, 0, 0;", ", -1, 1, 0, 0;")])
def test_other_products_are_refused(device, change):
    body = wgmma_body(64, 64, 8192, False, "bf16", "nop;")
    with pytest.raises(NotImplementedError, match="PTX instruction 'wgmma.mma_async"):
        device.run(body.replace(*change), *np.zeros((3, 1), np.int32))
