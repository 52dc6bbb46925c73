"""Device functions that the Triton kernels share: exact powers of two, the float order on integers, where an image of a
batch is."""

import triton
import triton.language as tl

from . import tables

# Fixed when triton is imported, as triton.jit itself fixes it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
INFINITY_BITS = tl.constexpr(0x7F800000)
NOWHERE = tl.constexpr(0x7FFFFFFF)  # above every index
UNIT = tl.constexpr(tables.UNIT)
ALL_BLOCKS = tl.constexpr(tables.ALL_BLOCKS)


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


@triton.jit
def sum_in_pairs(x):
    """[BLOCK] sums of x [BLOCK, power of two], neighbours first.

    The order in which tl.sum adds follows the layout that the compiler gives x, and that follows the strides of the
    tensors that x comes from: the same keys, permuted in memory, would have other norms.
    """
    if x.shape[1] == 1:
        return tl.reshape(x, [x.shape[0]])
    else:
        left, right = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        return sum_in_pairs(left + right)


@triton.jit
def first_token(packed, s):
    """Offsets may be wrong, as nobody has looked at them: here they are cut to the tokens that exist."""
    return tl.minimum(tl.maximum(tl.load(packed.cu_seqlens + s).to(tl.int64), 0), packed.odd_tokens >> 1)


@triton.jit
def first_row(packed, s):
    row = tl.load(packed.cu_anchors + s).to(tl.int64) + tl.load(packed.cu_background + s).to(tl.int64)
    return tl.minimum(tl.maximum(row, 0), packed.odd_keep >> 1)


@triton.jit
def image_tokens(packed, pid_b, N):
    """Of an image: its place on the batch axis of a tensor of tokens, and how many it has.

    A packed batch has no batch axis: an image is where its first token is, and the axis' stride is that of tokens.
    """
    if packed is None:
        return pid_b, N
    else:
        start = first_token(packed, pid_b)
        size = first_token(packed, pid_b + 1) - start
        size = tl.where((size < 0) | (size > packed.odd_seqlen >> 1), 0, size)
        return start, size.to(tl.int32)


@triton.jit
def tokens_before(packed, at_b, N):
    """How many tokens all images before one have: where it begins in a contiguous tensor."""
    if packed is None:
        return at_b * N
    else:
        return at_b


@triton.jit
def image_rows(packed, pid_b, N, K, num_anchors):
    """Of an image of N tokens: its first row of all, its rows, the anchors among them."""
    if packed is None:
        return pid_b * K, K, num_anchors
    else:
        row = first_row(packed, pid_b)
        due = tl.minimum(tl.maximum(first_row(packed, pid_b + 1) - row, 0), N)
        anchors = tl.load(packed.cu_anchors + pid_b + 1).to(tl.int64) - tl.load(packed.cu_anchors + pid_b)
        return row, due.to(tl.int32), tl.minimum(tl.maximum(anchors, 0), due).to(tl.int32)


@triton.jit
def first_block_of(packed, pid_b, num_blocks, BLOCK: tl.constexpr):
    """The number, among the blocks of all images, of an image's first. In a packed batch nobody has counted them, and
    so many are reserved that they suffice: a segment of n tokens moves the next one's number by n // UNIT + 1 or more,
    or every segment does by as many as the longest needs. A number stands for UNIT // BLOCK blocks.
    """
    if packed is None:
        return pid_b * num_blocks
    else:
        reserved = packed.odd_reserved >> 1
        number = tl.where(reserved == 1, first_token(packed, pid_b) // UNIT + pid_b, pid_b * reserved)
        return number * (UNIT // BLOCK)


@triton.jit
def first_of_group(packed):
    """The number of the first block of the segments whose s is stored together."""
    return (packed.odd_end >> 1) - (packed.odd_blocks >> 1)


@triton.jit
def stored_at(packed, pid_b, at_b):
    """Of an image: its place on the batch axis of s, as in image_tokens; below 0 where s is another group's now.

    The segments of a group are as far apart as their numbers: nobody has counted the tokens before a group.
    """
    if packed is None:
        return pid_b
    else:
        blocks = packed.odd_blocks >> 1
        block = first_block_of(packed, pid_b, 0, UNIT) - first_of_group(packed)
        return tl.where(blocks == ALL_BLOCKS, at_b, tl.where(block < blocks, block * UNIT, -1))


@triton.jit
def segment_of(packed, number, BLOCK: tl.constexpr):
    """The last segment whose first block, or first row where BLOCK is 0, has at most this number; and how far it is."""
    low = tl.zeros([], tl.int64)
    high = low + (packed.odd_segments >> 1)
    while high - low > 1:
        middle = (low + high) // 2
        first = first_row(packed, middle) if BLOCK == 0 else first_block_of(packed, middle, 0, BLOCK)
        low = tl.where(first <= number, middle, low)
        high = tl.where(first <= number, high, middle)
    first = first_row(packed, low) if BLOCK == 0 else first_block_of(packed, low, 0, BLOCK)
    return low, number - first


@triton.jit
def image_of_block(packed, pid, num_blocks, BLOCK: tl.constexpr):
    """The image that a block of tokens is of, and the block's number there, which may not exist: see has_block."""
    if packed is None:
        return (pid // num_blocks).to(tl.int64), pid % num_blocks
    else:
        segment, block = segment_of(packed, first_of_group(packed) * (UNIT // BLOCK) + pid, BLOCK)
        return segment, block.to(tl.int32)


@triton.jit
def has_block(packed, N, block, BLOCK: tl.constexpr):
    if packed is None:
        return True
    else:
        return (block >= 0) & (block * BLOCK < N)


@triton.jit
def image_of_row(packed, pid, K):
    """The image that a row of merged is of, and the row's number there."""
    if packed is None:
        return pid // K, pid % K
    else:
        return segment_of(packed, pid, 0)


@triton.jit
def inside(packed, token, N):
    """A token that may come from memory that no program wrote, where a packed batch's offsets are wrong: in [0, N)."""
    if packed is None:
        return token
    else:
        return tl.minimum(tl.maximum(token, 0), N - 1)
