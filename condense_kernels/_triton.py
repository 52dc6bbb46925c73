"""What the Triton kernels share: exact powers of two, the float order on integers, and where to launch."""

import contextlib

import torch
import triton
import triton.language as tl

# Fixed when triton is imported, as triton.jit itself fixes it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
INFINITY_BITS = tl.constexpr(0x7F800000)
NOWHERE = tl.constexpr(0x7FFFFFFF)  # above every index


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's. In the interpreter there is nothing to switch."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def reject_float64(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(
                f"{name}: expected fp32, fp16 or bf16 on the Triton kernels, got float64. "
                f"Remedy: {name}.float(), or CPU tensors, which are computed in fp64."
            )


def strides_of(tensor: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """Zeros for an argument that was left out; its pointer is then any tensor's, and never read."""
    return (0,) * axes if tensor is None else tensor.stride()


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|: they order like |x|, infinity above every finite value and NaN above infinity."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def is_finite(x):
    return magnitude_bits(x) < INFINITY_BITS


@triton.jit
def lesser(x, y):
    """The smaller of two, a NaN only where both are. In Triton 3.6's interpreter tl.minimum lets a NaN win."""
    if INTERPRETED:
        return tl.where((y < x) | (x != x), y, x)
    return tl.minimum(x, y)


@triton.jit
def order_key(x):
    """An int32 that orders like the fp32 x: integer reductions are one instruction a warp, float ones a shuffle tree.

    -0 sorts below +0, and a NaN with a positive sign above infinity.
    """
    bits = bits_of(x)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def power_of_two(exponent):
    """2**exponent as fp32, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def downscale(top):
    """Two factors whose product is 2**-e, where 2**e is the smallest power of two above top (frexp's e).

    Two, as 2**-e itself may not be representable.
    """
    normal = tl.where(top < 1e-30, top * 18446744073709551616.0, top)  # 2**64: top may be subnormal
    exponent = (bits_of(normal) >> 23) - tl.where(top < 1e-30, 126 + 64, 126)
    half = exponent >> 1
    return power_of_two(-half), power_of_two(half - exponent)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x as dtype, rounded to nearest, ties to even. A GPU does so by itself; the interpreter cuts bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = bits_of(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
