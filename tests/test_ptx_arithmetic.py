"""The instructions of tests/ptx against numpy, torch and exact sums."""

import fractions

import numpy as np
import pytest
from ptx.handwritten import TYPES, compute, edges, equal, pairs

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
def test_integers(ptx_engine, name, kind):
    a, b = pairs(kind.replace("b", "u"))
    with np.errstate(over="ignore"):
        expected = BINARY[name][0](a, b)
    assert equal(compute(ptx_engine, f"{name}.{kind} D, A, B;", TYPES[kind], a, b), expected)


def test_pairs_of_integers(ptx_engine):
    a, b = pairs("u32")
    expected = (a.view(np.uint16) + b.view(np.uint16)).view(np.uint32)
    for kind in ("s16x2", "u16x2"):
        assert equal(compute(ptx_engine, f"add.{kind} D, A, B;", np.uint32, a, b), expected)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(ptx_engine, kind):
    wide = kind[0] + str(2 * int(kind[1:]))
    a, b = pairs(kind)
    expected = a.astype(TYPES[wide]) * b.astype(TYPES[wide])
    assert equal(compute(ptx_engine, f"mul.wide.{kind} D, A, B;", TYPES[wide], a, b), expected)
    if kind[1:] == "32":
        c = np.resize(edges(wide), len(a))
        expected = expected + c
        assert equal(compute(ptx_engine, f"mad.wide.{kind} D, A, B, C;", TYPES[wide], a, b, c), expected)


def test_parts_of_products(ptx_engine):
    a, b = pairs("u32")
    high = (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)
    assert equal(compute(ptx_engine, "mul.hi.u32 D, A, B;", np.uint32, a, b), high)
    for size in (32, 64):
        a, b = pairs(f"u{size}")
        assert equal(compute(ptx_engine, f"mad.lo.s{size} D, A, B, B;", a.dtype, a, b), a * b + b)


@pytest.mark.parametrize("size", [32, 64])
def test_signs(ptx_engine, size):
    a = edges(f"s{size}")
    with np.errstate(over="ignore"):
        assert equal(compute(ptx_engine, f"neg.s{size} D, A;", a.dtype, a), -a)
        assert equal(compute(ptx_engine, f"abs.s{size} D, A;", a.dtype, a), np.abs(a))


@pytest.mark.parametrize("name", ["shl.b", "shr.u", "shr.s"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_shifts_by_any_number(ptx_engine, name, size):
    a, b = pairs(f"{'s' if name == 'shr.s' else 'u'}{size}", "u32")
    fits = np.minimum(b, size - 1).astype(a.dtype)
    expected = a << fits if name == "shl.b" else a >> fits
    if name != "shr.s":
        expected[b >= size] = 0
    assert equal(compute(ptx_engine, f"{name}{size} D, A, B;", a.dtype, a, b), expected)


def test_bits(ptx_engine):
    a = edges("u32")
    counts = [f"{x:b}".count("1") for x in a.tolist()]
    assert compute(ptx_engine, "popc.b32 D, A;", np.uint32, a).tolist() == counts
    assert compute(ptx_engine, "clz.b32 D, A;", np.uint32, a).tolist() == [32 - x.bit_length() for x in a.tolist()]
    for size in (16, 32, 64):
        a = edges(f"u{size}")
        assert equal(compute(ptx_engine, f"not.b{size} D, A;", a.dtype, a), ~a)


def test_funnel_shifts(ptx_engine):
    low, high = pairs("u32")
    count = np.resize(np.arange(70, dtype=np.uint32), len(low))
    both = [h << 32 | x for x, h in zip(low.tolist(), high.tolist(), strict=True)]
    left = [x << (n & 31) >> 32 & 0xFFFFFFFF for x, n in zip(both, count.tolist(), strict=True)]
    right = [x >> (n & 31) & 0xFFFFFFFF for x, n in zip(both, count.tolist(), strict=True)]
    assert compute(ptx_engine, "shf.l.wrap.b32 D, A, B, C;", np.uint32, low, high, count).tolist() == left
    assert compute(ptx_engine, "shf.r.wrap.b32 D, A, B, C;", np.uint32, low, high, count).tolist() == right


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(ptx_engine, kind):
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
    assert equal(compute(ptx_engine, f"bfe.{kind} D, A, B, C;", value.dtype, value, position, length), expected)


def test_permuted_bytes(ptx_engine):
    a, b = pairs("u32")
    selectors = np.random.default_rng(0).integers(0, 1 << 32, len(a), np.uint32)

    def permuted(x, y, selector):
        parts = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
        chosen = [(selector >> 4 * k & 15) for k in range(4)]
        return int.from_bytes([(parts[s & 7] >> 7) * 255 if s & 8 else parts[s & 7] for s in chosen], "little")

    expected = [permuted(*triple) for triple in zip(a.tolist(), b.tolist(), selectors.tolist(), strict=True)]
    assert compute(ptx_engine, "prmt.b32 D, A, B, C;", np.uint32, a, b, selectors).tolist() == expected


# Comparisons ----------------------------------------------------------------------------------------------------------

ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64", "f16", "f32", "f64"])
def test_comparisons(ptx_engine, kind):
    a, b = pairs(kind)
    nan = np.isnan(a) | np.isnan(b)
    for name, compare in ORDER.items():
        chosen = "selp.b32 D, 1, 0, %p1;"
        found = compute(ptx_engine, f"setp.{name}.{kind} %p1, A, B; {chosen}", np.uint32, a, b)
        assert equal(found != 0, compare(a, b) & ~nan)
        if kind[0] == "f":
            found = compute(ptx_engine, f"setp.{name}u.{kind} %p1, A, B; {chosen}", np.uint32, a, b)
            assert equal(found != 0, compare(a, b) | nan)
    if kind[0] == "f":
        assert equal(compute(ptx_engine, f"setp.nan.{kind} %p1, A, B; {chosen}", np.uint32, a, b) != 0, nan)
        assert equal(compute(ptx_engine, f"setp.num.{kind} %p1, A, B; {chosen}", np.uint32, a, b) != 0, ~nan)


def test_comparisons_of_bf16(ptx_engine):
    a, b = pairs("f32")
    a, b = (x.view(np.uint32) >> np.uint32(16) for x in (a, b))
    wide = [(x << np.uint32(16)).view(np.float32) for x in (a, b)]
    nan = np.isnan(wide[0]) | np.isnan(wide[1])
    halves = [x.astype(np.uint16) for x in (a, b)]
    for name, compare in ORDER.items():
        for u in ("", "u"):
            text = f"setp.{name}{u}.bf16 %p1, A, B; selp.b32 D, 1, 0, %p1;"
            expected = compare(*wide) | nan if u else compare(*wide) & ~nan
            assert equal(compute(ptx_engine, text, np.uint32, *halves) != 0, expected)
    for name, expected in (("nan", nan), ("num", ~nan)):
        text = f"setp.{name}.bf16 %p1, A, B; selp.b32 D, 1, 0, %p1;"
        assert equal(compute(ptx_engine, text, np.uint32, *halves) != 0, expected)


def test_predicates(ptx_engine):
    a, b = (array.copy() for array in np.array([[0, 0, 1, 1], [0, 1, 0, 1]], np.uint32))
    two = "setp.ne.b32 %p1, A, 0; setp.ne.b32 %p2, B, 0;"
    for name, expected in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        found = compute(ptx_engine, f"{two} {name}.pred %p3, %p1, %p2; selp.b32 D, 1, 0, %p3;", np.uint32, a, b)
        assert equal(found, expected)
    assert equal(compute(ptx_engine, f"{two} not.pred %p3, %p1; selp.b32 D, 1, 0, %p3;", np.uint32, a, b), 1 - a)
    assert compute(ptx_engine, "mov.pred %p3, -1; selp.b32 D, 1, 0, %p3;", np.uint32, a).all()


# Floating point -------------------------------------------------------------------------------------------------------


def ieee(f):
    def quiet(*arrays):
        with np.errstate(all="ignore"):
            return f(*arrays)

    return quiet


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("add", np.add),
        ("sub", np.subtract),
        ("mul", np.multiply),
        ("div", np.divide),
        ("add.rn", np.add),
        ("mul.rn", np.multiply),
    ],
)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rounding_to_nearest(ptx_engine, name, f, kind):
    a, b = pairs(kind)
    name = "div.rn" if name == "div" else name
    assert equal(compute(ptx_engine, f"{name}.{kind} D, A, B;", a.dtype, a, b), ieee(f)(a, b))


def test_nan_is_the_canonical_one(ptx_engine):
    a = np.array([np.nan, -np.nan, np.inf, 0xFFFF_FFFF], np.float32)
    a.view(np.uint32)[3] = 0xFFFF_FFFF
    found = compute(ptx_engine, "sub.rn.f32 D, A, A;", np.float32, a)
    assert (found.view(np.uint32) == 0x7FFF_FFFF).all()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs_and_square_roots(ptx_engine, kind):
    a = edges(kind)
    assert equal(compute(ptx_engine, f"sqrt.rn.{kind} D, A;", a.dtype, a), ieee(np.sqrt)(a))
    assert equal(compute(ptx_engine, f"neg.{kind} D, A;", a.dtype, a), -a)
    assert equal(compute(ptx_engine, f"abs.{kind} D, A;", a.dtype, a), np.abs(a))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_signs_of_halves(ptx_engine, kind):
    a = edges("u16")
    assert equal(compute(ptx_engine, f"neg.{kind} D, A;", np.uint16, a), a ^ np.uint16(0x8000))
    assert equal(compute(ptx_engine, f"abs.{kind} D, A;", np.uint16, a), a & np.uint16(0x7FFF))
    a = edges("u32")
    assert equal(compute(ptx_engine, f"neg.{kind}x2 D, A;", np.uint32, a), a ^ np.uint32(0x80008000))
    assert equal(compute(ptx_engine, f"abs.{kind}x2 D, A;", np.uint32, a), a & np.uint32(0x7FFF7FFF))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_sums_are_rounded_once(ptx_engine, kind):
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(320).astype(TYPES[kind]) for _ in range(3))
    c[::2] = -(a * b)[::2]  # what remains is what the product's rounding took
    found = compute(ptx_engine, f"fma.rn.{kind} D, A, B, C;", TYPES[kind], a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        exact = fractions.Fraction(x) * fractions.Fraction(y) + fractions.Fraction(z)
        assert abs(fractions.Fraction(result) - exact) * 2 <= np.spacing(TYPES[kind].type(abs(result)))
    assert found[::2].any()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_extremes_of_two(ptx_engine, kind):
    a, b = pairs(kind)
    below = (a < b) | ((a == b) & np.signbit(a))
    for name, expected in {"min": np.where(below, a, b), "max": np.where(below, b, a)}.items():
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, expected))
        assert equal(compute(ptx_engine, f"{name}.{kind} D, A, B;", a.dtype, a, b), expected)
        if kind == "f32":
            expected = np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), expected)
            assert equal(compute(ptx_engine, f"{name}.NaN.f32 D, A, B;", a.dtype, a, b), expected)


def test_subnormal_numbers_are_flushed_where_it_says_so(ptx_engine):
    tiny = np.float32(2**-130)
    a = np.array([tiny, -tiny, 1], np.float32)
    assert compute(ptx_engine, "fma.rn.ftz.f32 D, A, 0f7F000000, A;", np.float32, a).tolist() == [0, 0, 2**127]
    assert compute(ptx_engine, "mul.rn.ftz.f32 D, A, 0f00200000;", np.float32, a).tolist() == [0, 0, 0]
    assert compute(ptx_engine, "add.rn.ftz.f32 D, A, A;", np.float32, a).tolist() == [0, 0, 2]
    assert compute(ptx_engine, "sub.rn.ftz.f32 D, 0f3F800000, A;", np.float32, a).tolist() == [1, 1, 0]
    assert compute(ptx_engine, "cvt.rmi.ftz.f32.f32 D, A;", np.float32, a).tolist() == [0, 0, 1]
    assert compute(ptx_engine, "cvt.rmi.f32.f32 D, A;", np.float32, a).tolist() == [0, -1, 1]


APPROXIMATE = {
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "rcp.approx": lambda a: 1 / a,
    "rsqrt.approx": lambda a: 1 / np.sqrt(a),
    "sqrt.approx": np.sqrt,
}


def ulps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found.astype(np.float64) - expected) / np.spacing(np.abs(expected.astype(np.float32)))


@pytest.mark.parametrize("name", APPROXIMATE)
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_approximate_instructions(ptx_engine, name, ftz):
    a = np.random.default_rng(0).uniform(0.1, 30, 640).astype(np.float32)
    exact = APPROXIMATE[name](a.astype(np.float64))
    found = compute(ptx_engine, f"{name}{ftz}.f32 D, A;", np.float32, a)
    assert ulps(found, exact).max() <= 1
    off = ulps(compute(ptx_engine, f"{name}{ftz}.f32 D, A;", np.float32, a, flags=1 | 4), exact)
    assert off.max() <= 3.1 and 0.5 < off.mean() < 2
    tiny = np.array([2.0**-140], np.float32)
    found = compute(ptx_engine, f"{name}{ftz}.f32 D, A;", np.float32, tiny)
    with np.errstate(divide="ignore", over="ignore"):
        assert equal(found, APPROXIMATE[name](tiny * np.float32(not ftz)).astype(np.float32))


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_inexact_division(ptx_engine, ftz):
    a, b = np.random.default_rng(0).uniform(0.1, 30, (2, 640)).astype(np.float32)
    assert equal(compute(ptx_engine, f"div.full{ftz}.f32 D, A, B;", np.float32, a, b), a / b)
    off = ulps(compute(ptx_engine, f"div.full{ftz}.f32 D, A, B;", np.float32, a, b, flags=1 | 4), a / b)
    assert set(off.tolist()) == {0, 1, 2}
    assert equal(compute(ptx_engine, "div.rn.f32 D, A, B;", np.float32, a, b, flags=1 | 4), a / b)
    assert equal(compute(ptx_engine, "rcp.rn.f32 D, A;", np.float32, a, flags=1 | 4), 1 / a)
    ends = np.array([2.0**-126, np.finfo(np.float32).max, np.inf, 0, np.nan], np.float32)
    moved = compute(ptx_engine, "div.full.f32 D, A, 0f3F800000;", np.float32, ends, flags=1 | 4)
    assert moved[2] == np.inf and moved[3] == 0 and np.isfinite(moved[:2]).all() and (moved[:2] > 0).all()


def test_moves_and_choices(ptx_engine):
    for size in (16, 32, 64):
        a, b = pairs(f"u{size}")
        assert equal(compute(ptx_engine, f"mov.b{size} D, A;", a.dtype, a), a)
        chosen = compute(ptx_engine, f"setp.lt.u{size} %p1, A, B; selp.b{size} D, A, B, %p1;", a.dtype, a, b)
        assert equal(chosen, np.minimum(a, b))
