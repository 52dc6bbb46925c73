// What PTX's arithmetic instructions compute, a number at a time. Every function is defined for all arguments, as lanes
// that do not take part hold any bits.
#pragma once

#include <limits>

#include "numbers.h"

namespace ptx {

template <class T>
T same(T a) {
  return a;
}

// Integers; where the sign makes no difference, T is unsigned, so that overflow wraps ---------------------------------

template <class T>
T add(T a, T b) {
  return static_cast<T>(Cell<T>{a} + b);
}
inline u32 add_pair(u32 a, u32 b) { return ((a + (b & 0xffff0000)) & 0xffff0000) | ((a + b) & 0xffff); }
template <class T>
T sub(T a, T b) {
  return static_cast<T>(Cell<T>{a} - b);
}
template <class T>
T mul(T a, T b) {
  return static_cast<T>(Cell<T>{a} * b);
}
template <class T>
T mad(T a, T b, T c) {
  return static_cast<T>(Cell<T>{a} * b + c);
}
template <class T>
T neg(T a) {
  return static_cast<T>(Cell<T>{0} - a);
}
template <class T>
T absolute(T a) {
  return static_cast<std::make_signed_t<T>>(a) < 0 ? neg(a) : a;
}
template <class T>
T div(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(neg<std::make_unsigned_t<T>>(a));
  return a / b;
}
template <class T>
T rem(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? 0 : a % b;
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}
template <class D, class T>
D mul_wide(T a, T b) {
  return static_cast<D>(static_cast<D>(a) * static_cast<D>(b));
}
template <class D, class T>
D mad_wide(T a, T b, D c) {
  return static_cast<D>(add<u64>(static_cast<u64>(mul_wide<D>(a, b)), static_cast<u64>(c)));
}
inline u32 mul_hi(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }

template <class T>
T bits_and(T a, T b) {
  return a & b;
}
template <class T>
T bits_or(T a, T b) {
  return a | b;
}
template <class T>
T bits_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bits_not(T a) {
  return static_cast<T>(~Cell<T>{a});
}
inline bool not_predicate(bool a) { return !a; }

template <class T>
constexpr u32 kBits = 8 * sizeof(T);

template <class T>
T shl(T a, u32 b) {
  return b < kBits<T> ? static_cast<T>(Cell<T>{a} << b) : T{0};
}
template <class T>
T shr(T a, u32 b) {  // signs are shifted in
  return b < kBits<T> ? a >> b : a < 0 ? static_cast<T>(-1) : T{0};
}
inline u32 funnel_left(u32 low, u32 high, u32 count) {  // the upper half of high:low << count
  return static_cast<u32>(((static_cast<u64>(high) << 32 | low) << (count & 31)) >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 count) {
  return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (count & 31));
}

template <class T>
T extract(T a, u32 position,
          u32 length) {  // bfe; a field that goes beyond the top ends in its zeros, or copies its sign
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  if (!length) return 0;
  const T shifted = shr<T>(a, position);
  if (length >= kBits<T>) return shifted;
  const U field = static_cast<U>(shifted) << (kBits<T> - length);
  return shr<T>(static_cast<T>(field), kBits<T> - length);
}

inline u32 permute(u32 a, u32 b, u32 selectors) {  // prmt: bytes of b:a, or their signs
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 selector = selectors >> 4 * k & 15, byte = bytes >> 8 * (selector & 7) & 255;
    result |= (selector & 8 ? (byte >> 7) * 255 : byte) << 8 * k;
  }
  return result;
}

inline u32 population(u32 a) {
  u32 count = 0;
  for (int k = 0; k < 32; ++k) count += a >> k & 1;
  return count;
}
inline u32 leading_zeros(u32 a) {
  for (int k = 1; k < 32; k *= 2) a |= a >> k;
  return 32 - population(a);
}

// Comparisons; of numbers that have NaN, "u" is true for it -----------------------------------------------------------

template <class T>
auto number(T x) {
  if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    return to_f32(x);
  } else {
    return x;
  }
}
template <class T>
bool is_nan(T x) {
  return number(x) != number(x);
}
template <class T>
bool eq(T a, T b) {
  return number(a) == number(b);
}
template <class T>
bool lt(T a, T b) {
  return number(a) < number(b);
}
template <class T>
bool le(T a, T b) {
  return number(a) <= number(b);
}
template <class T>
bool gt(T a, T b) {
  return number(a) > number(b);
}
template <class T>
bool ge(T a, T b) {
  return number(a) >= number(b);
}
template <class T>
bool ne(T a, T b) {
  return lt(a, b) || gt(a, b);
}
template <class T>
bool nan(T a, T b) {
  return is_nan(a) || is_nan(b);
}
template <class T, bool (*compare)(T, T)>
bool negated(T a, T b) {
  return !compare(a, b);
}

// Floating point: rounded to nearest, NaN canonical -------------------------------------------------------------------

template <class T>
T fadd(T a, T b) {
  return canonical(a + b);
}
template <class T>
T fsub(T a, T b) {
  return canonical(a - b);
}
template <class T>
T fmul(T a, T b) {
  return canonical(a * b);
}
template <class T>
T fma(T a, T b, T c) {
  return canonical(std::fma(a, b, c));
}
template <class T>
T fdiv(T a, T b) {
  return canonical(a / b);
}
template <class T>
T fsqrt(T a) {
  return canonical(std::sqrt(a));
}
inline f32 rcp(f32 a) { return canonical(1 / a); }
inline f32 rsqrt(f32 a) { return canonical(static_cast<f32>(1 / std::sqrt(static_cast<f64>(a)))); }
inline f32 ex2(f32 a) { return canonical(std::exp2(a)); }
inline f32 lg2(f32 a) { return canonical(std::log2(a)); }

template <class T>
T fneg(T a) {
  constexpr Cell<T> sign = Cell<T>{1} << (kBits<T> - 1);
  return from_cell<T>(to_cell<T>(a) ^ sign);
}
template <class T>
T fabs(T a) {
  constexpr Cell<T> sign = Cell<T>{1} << (kBits<T> - 1);
  return from_cell<T>(to_cell<T>(a) & ~sign);
}
inline u32 fabs_pair(u32 a) { return a & 0x7fff7fff; }
inline u32 fneg_pair(u32 a) { return a ^ 0x80008000; }

// The smaller one, with -0 < +0; of a number and NaN the number.
template <class T>
T fmin(T a, T b) {
  if (is_nan(a) || is_nan(b)) return canonical(is_nan(a) ? b : a);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T fmax(T a, T b) {
  if (is_nan(a) || is_nan(b)) return canonical(is_nan(a) ? b : a);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <f32 (*f)(f32, f32)>
f32 or_nan(f32 a, f32 b) {  // .NaN: of a number and NaN, NaN
  return nan(a, b) ? canonical(std::numeric_limits<f32>::quiet_NaN()) : f(a, b);
}

template <auto f>
struct Flush;
template <class... A, f32 (*f)(A...)>
struct Flush<f> {
  static f32 call(A... a) { return flushed(f(flushed(a)...)); }
};
template <auto f>
constexpr auto ftz = &Flush<f>::call;

// An approximate instruction, off by up to 2 units in the last place, always the same for the same arguments.
template <auto f>
struct Inexact;
template <class... A, f32 (*f)(A...)>
struct Inexact<f> {
  static f32 call(A... a) {
    const f32 exact = f(a...);
    if (!std::isnormal(exact)) return exact;
    u32 hash = 0;
    ((hash = (hash ^ same_bits<u32>(a)) * 2654435761u), ...);
    const f32 moved = same_bits<f32>(same_bits<u32>(exact) + (hash >> 13) % 5 - 2);
    return std::isnormal(moved) ? moved : exact;
  }
};

// Conversions ---------------------------------------------------------------------------------------------------------

template <class D, class S>
D convert(S x) {  // to a wider integer, the low part of one, or the nearest number
  return static_cast<D>(x);
}
template <class D, class S>
D convert_low(u64 x) {
  return static_cast<S>(x);
}
template <class D, class S>
D convert_float(S x) {
  return canonical(static_cast<D>(number(x)));
}
template <class D, class S>
D truncated(S x) {  // .rzi: toward zero, clamped; NaN is 0, or the smallest number of 64 bits
  constexpr S limit = static_cast<S>(std::numeric_limits<D>::max() / 2 + 1) * 2;
  constexpr D lowest = std::numeric_limits<D>::min(), highest = std::numeric_limits<D>::max();
  if (x != x) return sizeof(D) == 8 ? static_cast<D>(u64{1} << 63) : D{0};
  if (x >= limit) return highest;
  return x < static_cast<S>(lowest) ? lowest : static_cast<D>(x);
}
inline f32 floored(f32 x) { return canonical(std::floor(x)); }
inline f32 ceiled(f32 x) { return canonical(std::ceil(x)); }
inline f32 integral(f32 x) { return canonical(std::trunc(x)); }
inline f32 nearest_even(f32 x) { return canonical(std::nearbyint(x)); }
inline bf16 narrow_bf16(f32 x) { return to_bf16(x); }
inline f16 narrow_f16(f32 x) { return to_f16(x); }
template <auto narrow>
u32 narrow_pair(f32 high, f32 low) {
  return static_cast<u32>(narrow(high).bits) << 16 | narrow(low).bits;
}

}  // namespace ptx
