"""The instructions of tests/ptx against numpy, torch and exact sums."""

import fractions
import functools

import numpy as np
import pytest
import torch
from ptx import engine
from ptx.handwritten import Device

pytestmark = pytest.mark.skipif(engine.compiler() is None, reason="no C++ compiler")

REGISTER = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
INTEGERS = {f"{sign}{8 * size}": np.dtype(f"{'i' if sign == 's' else 'u'}{size}") for sign in "su" for size in (1, 2, 4, 8)}
FLOATS = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
TYPES = {**INTEGERS, **FLOATS, "b16": INTEGERS["u16"], "b32": INTEGERS["u32"], "b64": INTEGERS["u64"]}


@pytest.fixture
def device():
    engine.library().regions_clear()
    yield Device()
    engine.library().regions_clear()


def compute(device, instruction: str, result, *operands: np.ndarray, **options) -> np.ndarray:
    """``instruction`` of arrays, an element a thread: {d} stands for its result, {a}, {b}, {c} for its operands."""
    padded = [np.resize(operand, -(-len(operand) // 32) * 32) for operand in operands]
    out = np.zeros(len(padded[0]), result)
    body, names = ["mov.u32 %r90, %ctaid.x; | shl.b32 %r90, %r90, 5; | add.s32 %r91, %r90, %r1;"], {}
    for k, (array, name) in enumerate(zip([*padded, out], "abc"[: len(padded)] + "d", strict=True)):
        size = array.itemsize
        names[name] = f"{REGISTER[size]}{80 + k}"
        body += [f"mul.wide.u32 %rd70, %r91, {size}; | add.s64 %rd{71 + k}, %rd{k + 1}, %rd70;"]
        if name != "d":
            body += [f"ld.global.b{8 * size} {names[name]}, [%rd{71 + k}];"]
    body += [instruction.format(**names), f"st.global.b{8 * out.itemsize} [%rd{71 + len(padded)}], {names['d']};"]
    assert device.run("\n".join(body), *padded, out, grid=len(out) // 32, **options) == set()
    return out[: len(operands[0])]


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but for NaN, which are all one."""
    assert a.dtype == b.dtype
    if a.dtype.kind == "f":
        same = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
        return bool((same | (np.isnan(a) & np.isnan(b))).all())
    return bool((a == b).all())


@functools.cache
def edges(kind: str) -> np.ndarray:
    """The ends of a type's range, numbers around zero and of all magnitudes."""
    random = np.random.default_rng(0)
    if kind in FLOATS:
        info = np.finfo(FLOATS[kind])
        special = [0.0, 1, 0.5, 1.5, 2, 3, info.max, info.tiny, info.smallest_subnormal, info.tiny * 0.75, 1 + info.eps, np.inf]
        values = np.concatenate([special, random.standard_normal(20) * 2.0 ** random.integers(-12, 12, 20)])
        return np.concatenate([values, -values, [np.nan]]).astype(FLOATS[kind])
    info = np.iinfo(INTEGERS[kind])
    special = [0, 1, 2, 3, 7, 31, 32, 33, 64, info.max, info.max - 1, info.min, info.min + 1, info.max // 3, info.min // 5]
    special += [-1, -2, -7] if info.min else [info.max - 7]
    return np.concatenate([np.array(special, INTEGERS[kind]), random.integers(info.min, info.max, 20, INTEGERS[kind])])


def pairs(kind: str, other: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    a, b = edges(kind), edges(other or kind)
    return tuple(grid.reshape(-1).copy() for grid in np.meshgrid(a, b))


# Integers: numpy wraps as PTX does ------------------------------------------------------------------------------------


def towards_zero(a, b):
    """Python's quotient and remainder with the signs of C; by zero -1 and the number, the smallest one by -1 wraps."""
    quotients, remainders = [], []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        quotient = -1 if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        quotients.append(quotient), remainders.append(x if y == 0 else x - quotient * y)
    bits = (1 << 8 * a.itemsize) - 1
    return tuple(np.array([x & bits for x in xs], f"u{a.itemsize}").view(a.dtype) for xs in (quotients, remainders))


BINARY = {
    "add": (np.add, "s16 s32 s64 u32 u64"),
    "sub": (np.subtract, "s16 s32 s64 u32 u64"),
    "mul.lo": (np.multiply, "s16 s32 s64 u32 u64"),
    "min": (np.minimum, "s16 u16 s32 u32 s64 u64"),
    "max": (np.maximum, "s16 u16 s32 u32 s64 u64"),
    "and": (np.bitwise_and, "b16 b32 b64"),
    "or": (np.bitwise_or, "b16 b32 b64"),
    "xor": (np.bitwise_xor, "b16 b32 b64"),
    "div": (lambda a, b: towards_zero(a, b)[0], "s32 u32 s64 u64"),
    "rem": (lambda a, b: towards_zero(a, b)[1], "s32 u32 s64 u64"),
}


def cases(table):
    return [(name, kind) for name, (_, kinds) in table.items() for kind in kinds.split()]


@pytest.mark.parametrize(("name", "kind"), cases(BINARY))
def test_integers(device, name, kind):
    a, b = pairs(kind.replace("b", "u"))
    with np.errstate(over="ignore"):
        expected = BINARY[name][0](a, b)
    assert equal(compute(device, f"{name}.{kind} {{d}}, {{a}}, {{b}};", TYPES[kind], a, b), expected)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(device, kind):
    wide = kind[0] + str(2 * int(kind[1:]))
    a, b = pairs(kind)
    expected = a.astype(TYPES[wide]) * b.astype(TYPES[wide])
    assert equal(compute(device, f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", TYPES[wide], a, b), expected)
    if kind[1:] == "32":
        c = np.resize(edges(wide), len(a))
        expected = expected + c
        assert equal(compute(device, f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", TYPES[wide], a, b, c), expected)


def test_parts_of_products(device):
    a, b = pairs("u32")
    high = (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)
    assert equal(compute(device, "mul.hi.u32 {d}, {a}, {b};", np.uint32, a, b), high)
    for size in (32, 64):
        a, b = pairs(f"u{size}")
        assert equal(compute(device, f"mad.lo.s{size} {{d}}, {{a}}, {{b}}, {{b}};", a.dtype, a, b), a * b + b)


@pytest.mark.parametrize("size", [32, 64])
def test_signs(device, size):
    a = edges(f"s{size}")
    with np.errstate(over="ignore"):
        assert equal(compute(device, f"neg.s{size} {{d}}, {{a}};", a.dtype, a), -a)
        assert equal(compute(device, f"abs.s{size} {{d}}, {{a}};", a.dtype, a), np.abs(a))


@pytest.mark.parametrize("name", ["shl.b", "shr.u", "shr.s"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_shifts_by_any_number(device, name, size):
    a, b = pairs(f"{'s' if name == 'shr.s' else 'u'}{size}", "u32")
    fits = np.minimum(b, size - 1).astype(a.dtype)
    expected = a << fits if name == "shl.b" else a >> fits
    if name != "shr.s":
        expected[b >= size] = 0
    assert equal(compute(device, f"{name}{size} {{d}}, {{a}}, {{b}};", a.dtype, a, b), expected)


def test_bits(device):
    a = edges("u32")
    counts = [f"{x:b}".count("1") for x in a.tolist()]
    assert compute(device, "popc.b32 {d}, {a};", np.uint32, a).tolist() == counts
    assert compute(device, "clz.b32 {d}, {a};", np.uint32, a).tolist() == [32 - x.bit_length() for x in a.tolist()]
    for size in (16, 32, 64):
        a = edges(f"u{size}")
        assert equal(compute(device, f"not.b{size} {{d}}, {{a}};", a.dtype, a), ~a)


def test_funnel_shifts(device):
    low, high = pairs("u32")
    count = np.resize(np.arange(70, dtype=np.uint32), len(low))
    both = [h << 32 | x for x, h in zip(low.tolist(), high.tolist(), strict=True)]
    left = [x << (n & 31) >> 32 & 0xFFFFFFFF for x, n in zip(both, count.tolist(), strict=True)]
    right = [x >> (n & 31) & 0xFFFFFFFF for x, n in zip(both, count.tolist(), strict=True)]
    assert compute(device, "shf.l.wrap.b32 {d}, {a}, {b}, {c};", np.uint32, low, high, count).tolist() == left
    assert compute(device, "shf.r.wrap.b32 {d}, {a}, {b}, {c};", np.uint32, low, high, count).tolist() == right


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(device, kind):
    size, signed = int(kind[1:]), kind[0] == "s"
    value, position = pairs(kind, "u32")
    length = np.resize(np.array([0, 1, 5, 31, 32, 33, 64, 200, 257], np.uint32), len(value))

    def field(x, at, count):
        at, count = at & 255, count & 255
        taken = x >> at & (1 << count) - 1  # of a number with as many copies of its sign as one likes
        if signed and count and x >> min(at + count - 1, size - 1) & 1:
            taken -= 1 << count
        return taken if signed else taken & (1 << size) - 1

    triples = zip(value.tolist(), position.tolist(), length.tolist(), strict=True)
    expected = np.array([field(*triple) for triple in triples], dtype=object).astype(value.dtype)
    assert equal(compute(device, f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", value.dtype, value, position, length), expected)


def test_permuted_bytes(device):
    a, b = pairs("u32")
    selectors = np.random.default_rng(0).integers(0, 1 << 32, len(a), np.uint32)

    def permuted(x, y, selector):
        parts = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
        chosen = [(selector >> 4 * k & 15) for k in range(4)]
        return int.from_bytes([(parts[s & 7] >> 7) * 255 if s & 8 else parts[s & 7] for s in chosen], "little")

    expected = [permuted(*triple) for triple in zip(a.tolist(), b.tolist(), selectors.tolist(), strict=True)]
    assert compute(device, "prmt.b32 {d}, {a}, {b}, {c};", np.uint32, a, b, selectors).tolist() == expected


# Comparisons ----------------------------------------------------------------------------------------------------------

ORDER = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64", "f16", "f32", "f64"])
def test_comparisons(device, kind):
    a, b = pairs(kind)
    nan = np.isnan(a) | np.isnan(b)
    for name, compare in ORDER.items():
        chosen = "selp.b32 {d}, 1, 0, %p1;"
        found = compute(device, f"setp.{name}.{kind} %p1, {{a}}, {{b}}; | {chosen}", np.uint32, a, b)
        assert equal(found != 0, compare(a, b) & ~nan)
        if kind[0] == "f":
            found = compute(device, f"setp.{name}u.{kind} %p1, {{a}}, {{b}}; | {chosen}", np.uint32, a, b)
            assert equal(found != 0, compare(a, b) | nan)
    if kind[0] == "f":
        assert equal(compute(device, f"setp.nan.{kind} %p1, {{a}}, {{b}}; | {chosen}", np.uint32, a, b) != 0, nan)
        assert equal(compute(device, f"setp.num.{kind} %p1, {{a}}, {{b}}; | {chosen}", np.uint32, a, b) != 0, ~nan)


def test_predicates(device):
    a, b = (array.copy() for array in np.array([[0, 0, 1, 1], [0, 1, 0, 1]], np.uint32))
    two = "setp.ne.b32 %p1, {a}, 0; | setp.ne.b32 %p2, {b}, 0;"
    for name, expected in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        found = compute(device, f"{two} | {name}.pred %p3, %p1, %p2; | selp.b32 {{d}}, 1, 0, %p3;", np.uint32, a, b)
        assert equal(found, expected)
    assert equal(compute(device, f"{two} | not.pred %p3, %p1; | selp.b32 {{d}}, 1, 0, %p3;", np.uint32, a, b), 1 - a)
    assert compute(device, "mov.pred %p3, -1; | selp.b32 {d}, 1, 0, %p3;", np.uint32, a).all()


# Floating point -------------------------------------------------------------------------------------------------------


def ieee(f):
    def quiet(*arrays):
        with np.errstate(all="ignore"):
            return f(*arrays)

    return quiet


@pytest.mark.parametrize(
    ("name", "f"),
    [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide), ("add.rn", np.add), ("mul.rn", np.multiply)],
)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rounding_to_nearest(device, name, f, kind):
    a, b = pairs(kind)
    name = "div.rn" if name == "div" else name
    assert equal(compute(device, f"{name}.{kind} {{d}}, {{a}}, {{b}};", a.dtype, a, b), ieee(f)(a, b))


def test_nan_is_the_canonical_one(device):
    a = np.array([np.nan, -np.nan, np.inf, 0xFFFF_FFFF], np.float32)
    a.view(np.uint32)[3] = 0xFFFF_FFFF
    found = compute(device, "sub.rn.f32 {d}, {a}, {a};", np.float32, a)
    assert (found.view(np.uint32) == 0x7FFF_FFFF).all()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs_and_square_roots(device, kind):
    a = edges(kind)
    assert equal(compute(device, f"sqrt.rn.{kind} {{d}}, {{a}};", a.dtype, a), ieee(np.sqrt)(a))
    assert equal(compute(device, f"neg.{kind} {{d}}, {{a}};", a.dtype, a), -a)
    assert equal(compute(device, f"abs.{kind} {{d}}, {{a}};", a.dtype, a), np.abs(a))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_signs_of_halves(device, kind):
    a = edges("u16")
    assert equal(compute(device, f"neg.{kind} {{d}}, {{a}};", np.uint16, a), a ^ np.uint16(0x8000))
    assert equal(compute(device, f"abs.{kind} {{d}}, {{a}};", np.uint16, a), a & np.uint16(0x7FFF))
    a = edges("u32")
    assert equal(compute(device, f"neg.{kind}x2 {{d}}, {{a}};", np.uint32, a), a ^ np.uint32(0x80008000))
    assert equal(compute(device, f"abs.{kind}x2 {{d}}, {{a}};", np.uint32, a), a & np.uint32(0x7FFF7FFF))


def test_fused_sums_are_rounded_once(device):
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(320).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2]  # what remains is what the product's rounding took
    exact = [fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    found = compute(device, "fma.rn.f32 {d}, {a}, {b}, {c};", np.float32, a, b, c)
    spacing = np.spacing(np.abs(found))
    assert all(abs(fractions.Fraction(float(x)) - y) * 2 <= float(s) for x, y, s in zip(found, exact, spacing, strict=True))
    assert found[0] != 0 or exact[0] == 0


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_extremes_of_two(device, kind):
    a, b = pairs(kind)
    below = (a < b) | ((a == b) & np.signbit(a))
    for name, expected in {"min": np.where(below, a, b), "max": np.where(below, b, a)}.items():
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, expected))
        assert equal(compute(device, f"{name}.{kind} {{d}}, {{a}}, {{b}};", a.dtype, a, b), expected)
        if kind == "f32":
            expected = np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), expected)
            assert equal(compute(device, f"{name}.NaN.f32 {{d}}, {{a}}, {{b}};", a.dtype, a, b), expected)


def test_subnormal_numbers_are_flushed_where_it_says_so(device):
    tiny = np.float32(2**-130)
    a = np.array([tiny, -tiny, 1], np.float32)
    assert compute(device, "fma.rn.ftz.f32 {d}, {a}, 0f7F000000, {a};", np.float32, a).tolist() == [0, 0, 2**127]
    assert compute(device, "mul.rn.ftz.f32 {d}, {a}, 0f00200000;", np.float32, a).tolist() == [0, 0, 0]
    assert compute(device, "cvt.rmi.ftz.f32.f32 {d}, {a};", np.float32, a).tolist() == [0, 0, 1]
    assert compute(device, "cvt.rmi.f32.f32 {d}, {a};", np.float32, a).tolist() == [0, -1, 1]


APPROXIMATE = {
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.ftz.f32": lambda a: 1 / a,
    "rsqrt.approx.f32": lambda a: 1 / np.sqrt(a),
    "sqrt.approx.f32": np.sqrt,
}


def ulps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found.astype(np.float64) - expected) / np.spacing(np.abs(expected.astype(np.float32)))


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_instructions(device, name):
    a = np.random.default_rng(0).uniform(0.1, 30, 640).astype(np.float32)
    exact = APPROXIMATE[name](a.astype(np.float64))
    assert ulps(compute(device, f"{name} {{d}}, {{a}};", np.float32, a), exact).max() <= 1
    off = ulps(compute(device, f"{name} {{d}}, {{a}};", np.float32, a, flags=1 | 4), exact)
    assert off.max() <= 3.1 and 0.5 < off.mean() < 2


def test_inexact_division(device):
    a, b = np.random.default_rng(0).uniform(0.1, 30, (2, 640)).astype(np.float32)
    assert equal(compute(device, "div.full.f32 {d}, {a}, {b};", np.float32, a, b), a / b)
    off = ulps(compute(device, "div.full.f32 {d}, {a}, {b};", np.float32, a, b, flags=1 | 4), a / b)
    assert set(off.tolist()) == {0, 1, 2}
    assert equal(compute(device, "div.rn.f32 {d}, {a}, {b};", np.float32, a, b, flags=1 | 4), a / b)


# Conversions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32"])
def test_to_wider_integers(device, source):
    a = edges(source)
    for target in (kind for kind in INTEGERS if kind[0] == source[0] and int(kind[1:]) > int(source[1:])):
        found = compute(device, f"cvt.{target}.{source} {{d}}, {{a}};", TYPES[target], a)
        assert equal(found, a.astype(TYPES[target]))


@pytest.mark.parametrize(("target", "source"), [("u16", "u32"), ("u16", "u64"), ("u32", "u64")])
def test_to_narrower_integers(device, target, source):
    a = edges(source)
    found = compute(device, f"cvt.{target}.{source} {{d}}, {{a}};", TYPES[target], a)
    assert equal(found, a.astype(TYPES[target]))


def test_from_a_part_of_a_wider_register(device):
    a = edges("u64")
    low = a.astype(np.uint32)
    assert equal(compute(device, "cvt.s64.s32 {d}, {a};", np.int64, a), low.view(np.int32).astype(np.int64))
    assert equal(compute(device, "cvt.u64.u32 {d}, {a};", np.uint64, a), low.astype(np.uint64))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", ["f32", "f64"])
def test_from_integers(device, target, source):
    a = edges(source)
    found = compute(device, f"cvt.rn.{target}.{source} {{d}}, {{a}};", TYPES[target], a)
    assert equal(found, a.astype(TYPES[target]))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ["s32", "s64"])
def test_towards_zero(device, target, source):
    info = np.iinfo(TYPES[target])
    ends = [float(info.max), float(info.min), float(info.min) * 1.1, 2.0**31, 2.0**62, 0.9, -0.9]
    a = np.concatenate([edges(source), np.array(ends, TYPES[source])])
    nan = info.min if target == "s64" else 0
    clamped = [nan if x != x else max(info.min, min(info.max, x)) for x in a.tolist()]
    found = compute(device, f"cvt.rzi.{target}.{source} {{d}}, {{a}};", TYPES[target], a)
    assert found.tolist() == [int(x) for x in clamped]


@pytest.mark.parametrize(("mode", "f"), [("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc), ("rni", np.rint)])
def test_to_integral_numbers(device, mode, f):
    a = np.concatenate([edges("f32"), np.arange(-3, 3, 0.5, np.float32)])
    assert equal(compute(device, f"cvt.{mode}.f32.f32 {{d}}, {{a}};", np.float32, a), f(a))


def test_between_widths_of_floats(device):
    a = edges("f64")
    with np.errstate(over="ignore"):
        assert equal(compute(device, "cvt.rn.f32.f64 {d}, {a};", np.float32, a), a.astype(np.float32))
    a = edges("f32")
    assert equal(compute(device, "cvt.f64.f32 {d}, {a};", np.float64, a), a.astype(np.float64))


def as_halves(a: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of the nearest ones; NaN is canonical."""
    bits = torch.from_numpy(a).to(dtype).view(torch.int16).numpy().view(np.uint16).copy()
    bits[np.isnan(a)] = 0x7FFF
    return bits


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves(device, kind, dtype):
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    exact = torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy()
    found = compute(device, f"cvt.f32.{kind} {{d}}, {{a}};", np.float32, halves)
    assert equal(found, exact)
    # Each, its neighbours in fp32, and the ties between it and the next one.
    bits = exact.view(np.uint32)
    step = np.uint32(1 << 12 if kind == "f16" else 1 << 15)
    a = np.concatenate([bits, bits + 1, bits - 1, bits + step, bits + step - 1, bits + step + 1]).view(np.float32)
    assert equal(compute(device, f"cvt.rn.{kind}.f32 {{d}}, {{a}};", np.uint16, a), as_halves(a, dtype))
    small = edges("f32")
    pair = compute(device, f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, small, small[::-1].copy())
    low, high = as_halves(small[::-1].copy(), dtype), as_halves(small, dtype)
    assert equal(pair, high.astype(np.uint32) << np.uint32(16) | low)


def test_subnormal_halves(device):
    a = np.random.default_rng(0).uniform(-(2**-13), 2**-13, 4096).astype(np.float32)
    assert equal(compute(device, "cvt.rn.f16.f32 {d}, {a};", np.uint16, a), as_halves(a, torch.float16))


def test_parts_of_registers(device):
    a, b = edges("u32"), edges("u32")[::-1].copy()
    wide = a | b.astype(np.uint64) << np.uint64(32)
    assert equal(compute(device, "mov.b64 {d}, {{{{{a}, {b}}}}};".format(a="{a}", b="{b}", d="{d}"), np.uint64, a, b), wide)
    assert equal(compute(device, "mov.b64 {{{d}, _}}, {a};", np.uint32, wide), a)
    assert equal(compute(device, "mov.b64 {{_, {d}}}, {a};", np.uint32, wide), b)
    assert equal(compute(device, "mov.b32 {{_, {d}}}, {a};", np.uint16, a), (a >> np.uint32(16)).astype(np.uint16))
