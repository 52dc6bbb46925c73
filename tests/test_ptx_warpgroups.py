"""wgmma in tests/ptx: products of four warps, which run on until they are waited for."""

import numpy as np
import pytest
import torch
from ptx import engine
from ptx.encoding import UnknownInstruction
from ptx.handwritten import HALVES, OF_THREAD, bits, load_all, numbered, quarters, store_all


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


COMMIT = "wgmma.commit_group.sync.aligned;"
# Operands of m64n8k16 in shared memory: A has 2048 bytes of it, B the 256 bytes that follow.
ZEROS = f"""{OF_THREAD} setp.eq.b32 %p1, 0, 0; setp.ne.b32 %p2, 0, 0; setp.lt.u32 %p3, %r1, 32;
    {" ".join(f"st.shared.b32 [%r4+{k}], 0;" for k in range(0, 2560, 512))}
    {" ".join(f"mov.b32 %r{first + k}, 0;" for first in (20, 30) for k in range(4))}
    bar.sync 0;"""


def small_product(accumulators: int = 20, adds: str = "%p1", b: str = "") -> str:
    base = engine.library().shared_base()
    b = b or str(descriptor(base + 2048, 16))
    operands = f"{{{numbered(accumulators, 4)}}}, {descriptor(base, 16)}, {b}, {adds}, 1, 1, 0, 0"
    return f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {operands};"


def stored(ptx_engine, body: str, **options) -> tuple[set, int, int]:
    """What is found, and how many of the numbers in %r20 to %r23, and in %r30 to %r33, are uninitialised at the end."""
    out, other = np.zeros((4, 128), np.uint32), np.zeros((4, 128), np.uint32)
    stores = f"{store_all(20, 4, '%rd11', 512)} {store_all(30, 4, '%rd12', 512)}"
    found = ptx_engine.run(body.replace("STORE", stores), out, other, warps=4, shared=2564, **options)
    return found, ptx_engine.tainted(out) // 4, ptx_engine.tainted(other) // 4


def test_groups_of_products_are_waited_for_in_order(ptx_engine):
    first, second = f"{small_product(20)} {COMMIT}", f"{small_product(30)} {COMMIT}"
    for under_way, expected in ((0, (set(), 0, 0)), (1, (set(), 0, 512)), (2, (set(), 512, 512))):
        wait = f"wgmma.wait_group.sync.aligned {under_way};"
        assert stored(ptx_engine, f"{ZEROS}\n{first}\n{second}\n{wait}\nSTORE\n{WAIT}") == expected


def test_a_product_of_no_group_is_not_waited_for(ptx_engine):
    found = stored(ptx_engine, f"{ZEROS}\n{small_product(20)} {COMMIT}\n{small_product(30)} // open\n{WAIT}\nSTORE")
    assert found == ({("not waited for", "open", None)}, 0, 512)


@pytest.mark.parametrize(("adds", "numbers"), [("%p1", 512), ("%p2", 0)])
def test_products_that_are_not_added_need_no_accumulators(ptx_engine, adds, numbers):
    loads = " ".join(f"ld.shared.b32 %r{20 + k}, [global_smem+2560];" for k in range(4))
    body = f"{ZEROS}\n{loads}\n{small_product(adds=adds)} {COMMIT}\n{WAIT}\nSTORE"
    assert stored(ptx_engine, body)[:2] == (set(), numbers)


@pytest.mark.parametrize(
    ("lost", "numbers"),
    [
        ("[%r4+0]", 16 * 8),  # 128 threads store 512 bytes, which are 16 rows of A
        ("[%r4+2048]", 64 * 8),  # B
    ],
)
def test_products_of_something_uninitialised_in_shared_memory(ptx_engine, lost, numbers):
    body = ZEROS.replace(f"st.shared.b32 {lost}, 0;", "")
    assert stored(ptx_engine, f"{body}\n{small_product()} {COMMIT}\n{WAIT}\nSTORE")[:2] == (set(), numbers)


def test_a_descriptor_is_the_same_for_all_lanes(ptx_engine):
    base = engine.library().shared_base()
    b = f"mov.b64 %rd5, {descriptor(base + 2048, 16)};"
    body = f"{ZEROS} {b}\n{small_product(b='%rd5')} // product\n{COMMIT}\n{WAIT}"
    assert stored(ptx_engine, body)[0] == set()
    found = stored(ptx_engine, body.replace(b, f"{b} cvt.u64.u32 %rd6, %r1; add.s64 %rd5, %rd5, %rd6;"))[0]
    assert ("lanes store different values", "product", None) in found


@pytest.mark.parametrize(
    "program",
    [
        "STORE_A PRODUCT SYNC WAIT",
        "SYNC PRODUCT STORE_A WAIT",
        "PRODUCT SYNC STORE_A WAIT",
        "PRODUCT SYNC STORE_A SYNC WAIT",
        "PRODUCT WAIT STORE_A",
    ],
)
def test_operands_are_left_alone_until_the_product_is_there(ptx_engine, program):
    pieces = {
        "STORE_A": "@%p3 st.shared.b32 [%r4+512], 1;  // store",  # by the first warp, to rows of the second
        "PRODUCT": f"{small_product()} // product\n{COMMIT}",
        "SYNC": "bar.sync 0;",
        "WAIT": WAIT,
    }

    def found(order: str, seed: int) -> set:
        text = "\n".join(pieces[name] for name in order.split())
        return stored(ptx_engine, f"{ZEROS}\n{text}", seed=seed, grid=2)[0]

    for seed in range(3):
        assert found("STORE_A SYNC PRODUCT WAIT SYNC STORE_A", seed) == set()
        lines = {(one, other) for _, one, other in found(program, seed)}
        assert lines and lines <= {("store", "product"), ("product", "store")}


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
    with pytest.raises(UnknownInstruction, match="PTX instruction 'wgmma.mma_async"):
        ptx_engine.run(body.replace(*change), *np.zeros((3, 1), np.int32))
