"""The conversions of tests/ptx against numpy and torch."""

import numpy as np
import pytest
import torch
from ptx.handwritten import INTEGERS, TYPES, compute, edges, equal


@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32"])
def test_to_wider_integers(ptx_engine, source):
    a = edges(source)
    for target in (kind for kind in INTEGERS if kind[0] == source[0] and int(kind[1:]) > int(source[1:])):
        found = compute(ptx_engine, f"cvt.{target}.{source} D, A;", TYPES[target], a)
        assert equal(found, a.astype(TYPES[target]))


@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_loading_to_wider_registers(ptx_engine, source, space):
    a = np.resize(edges(source), 32)
    size, out = a.itemsize, np.zeros(32, np.int64)
    register, target = ("%rd9", out.dtype) if source == "s32" else ("%r9", np.dtype(np.int32))
    bits = {1: "%rs8", 2: "%rs8", 4: "%r8"}[size]
    place = {"global": "%rd6", "shared": "%r6"}[space]
    body = f"""
        mul.wide.u32 %rd5, %r1, {size}; add.s64 %rd6, %rd1, %rd5;
        mul.lo.s32 %r5, %r1, {size}; mov.b32 %r6, global_smem; add.s32 %r6, %r6, %r5;
        ld.global.b{8 * size} {bits}, [%rd6];
        st.shared.b{8 * size} [%r6], {bits};
        ld.{space}.{source} {register}, [{place}];
        mul.wide.u32 %rd7, %r1, {target.itemsize}; add.s64 %rd8, %rd2, %rd7;
        st.global.b{8 * target.itemsize} [%rd8], {register};"""
    assert ptx_engine.run(body, a, out) == set()
    assert out.view(target)[:32].tolist() == a.tolist()


@pytest.mark.parametrize(("target", "source"), [("u16", "u32"), ("u16", "u64"), ("u32", "u64")])
def test_to_narrower_integers(ptx_engine, target, source):
    a = edges(source)
    found = compute(ptx_engine, f"cvt.{target}.{source} D, A;", TYPES[target], a)
    assert equal(found, a.astype(TYPES[target]))


def test_from_a_part_of_a_wider_register(ptx_engine):
    a = edges("u64")
    low = a.astype(np.uint32)
    assert equal(compute(ptx_engine, "cvt.s64.s32 D, A;", np.int64, a), low.view(np.int32).astype(np.int64))
    assert equal(compute(ptx_engine, "cvt.u64.u32 D, A;", np.uint64, a), low.astype(np.uint64))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", ["f32", "f64"])
def test_from_integers(ptx_engine, target, source):
    a = edges(source)
    found = compute(ptx_engine, f"cvt.rn.{target}.{source} D, A;", TYPES[target], a)
    assert equal(found, a.astype(TYPES[target]))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ["s32", "s64"])
def test_towards_zero(ptx_engine, target, source):
    info = np.iinfo(TYPES[target])
    ends = [float(info.max), float(info.min), float(info.min) * 1.1, 2.0**31, 2.0**62, 0.9, -0.9]
    a = np.concatenate([edges(source), np.array(ends, TYPES[source])])
    nan = info.min if target == "s64" else 0
    clamped = [nan if x != x else max(info.min, min(info.max, x)) for x in a.tolist()]
    found = compute(ptx_engine, f"cvt.rzi.{target}.{source} D, A;", TYPES[target], a)
    assert found.tolist() == [int(x) for x in clamped]


@pytest.mark.parametrize(("mode", "f"), [("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc), ("rni", np.rint)])
def test_to_integral_numbers(ptx_engine, mode, f):
    a = np.concatenate([edges("f32"), np.arange(-3, 3, 0.5, np.float32)])
    assert equal(compute(ptx_engine, f"cvt.{mode}.f32.f32 D, A;", np.float32, a), f(a))
    flushed = np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)
    assert equal(compute(ptx_engine, f"cvt.{mode}.ftz.f32.f32 D, A;", np.float32, a), f(flushed))


def test_between_widths_of_floats(ptx_engine):
    a = edges("f64")
    with np.errstate(over="ignore"):
        assert equal(compute(ptx_engine, "cvt.rn.f32.f64 D, A;", np.float32, a), a.astype(np.float32))
    a = edges("f32")
    assert equal(compute(ptx_engine, "cvt.f64.f32 D, A;", np.float64, a), a.astype(np.float64))


def as_halves(a: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of the nearest ones; NaN is canonical."""
    bits = torch.from_numpy(a).to(dtype).view(torch.int16).numpy().view(np.uint16).copy()
    bits[np.isnan(a)] = 0x7FFF
    return bits


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves(ptx_engine, kind, dtype):
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    exact = torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy()
    found = compute(ptx_engine, f"cvt.f32.{kind} D, A;", np.float32, halves)
    assert equal(found, exact)
    found = compute(ptx_engine, f"cvt.f64.{kind} D, A;", np.float64, halves)
    with np.errstate(invalid="ignore"):
        assert equal(found, exact.astype(np.float64))
    # Each, its neighbours in fp32, and the ties between it and the next one.
    bits = exact.view(np.uint32)
    step = np.uint32(1 << 12 if kind == "f16" else 1 << 15)
    a = np.concatenate([bits, bits + 1, bits - 1, bits + step, bits + step - 1, bits + step + 1]).view(np.float32)
    assert equal(compute(ptx_engine, f"cvt.rn.{kind}.f32 D, A;", np.uint16, a), as_halves(a, dtype))
    small = edges("f32")
    pair = compute(ptx_engine, f"cvt.rn.{kind}x2.f32 D, A, B;", np.uint32, small, small[::-1].copy())
    low, high = as_halves(small[::-1].copy(), dtype), as_halves(small, dtype)
    assert equal(pair, high.astype(np.uint32) << np.uint32(16) | low)


def test_subnormal_halves(ptx_engine):
    a = np.random.default_rng(0).uniform(-(2**-13), 2**-13, 4096).astype(np.float32)
    assert equal(compute(ptx_engine, "cvt.rn.f16.f32 D, A;", np.uint16, a), as_halves(a, torch.float16))


def test_parts_of_registers(ptx_engine):
    a, b = edges("u32"), edges("u32")[::-1].copy()
    wide = a | b.astype(np.uint64) << np.uint64(32)
    assert equal(compute(ptx_engine, "mov.b64 D, {A, B};", np.uint64, a, b), wide)
    assert equal(compute(ptx_engine, "mov.b64 {D, _}, A;", np.uint32, wide), a)
    assert equal(compute(ptx_engine, "mov.b64 {_, D}, A;", np.uint32, wide), b)
    low, high = a.astype(np.uint16), (a >> np.uint32(16)).astype(np.uint16)
    assert equal(compute(ptx_engine, "mov.b32 D, {A, B};", np.uint32, low, high), a)
    assert equal(compute(ptx_engine, "mov.b32 {D, _}, A;", np.uint16, a), low)
    assert equal(compute(ptx_engine, "mov.b32 {_, D}, A;", np.uint16, a), high)
