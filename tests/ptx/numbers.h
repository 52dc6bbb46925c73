// Numbers as PTX has them: what lies in a register, and how it is rounded.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

constexpr int kLanes = 32;
using Mask = u32;  // a bit for each lane of a warp
constexpr Mask kAll = ~0u;

inline int first_lane(Mask mask) {
  int lane = 0;
  while (lane < kLanes - 1 && !(mask >> lane & 1)) ++lane;
  return lane;
}

template <class To, class From>
inline To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline f32 canonical(f32 x) { return x == x ? x : same_bits<f32>(0x7fffffffu); }  // the NaN of arithmetic on f32
inline f64 canonical(f64 x) { return x; }

inline f32 flushed(f32 x) {  // .ftz: a subnormal number is a zero of its sign
  const u32 bits = same_bits<u32>(x);
  return bits & 0x7f800000 ? x : same_bits<f32>(bits & 0x80000000);
}

inline f32 to_f32(bf16 x) { return same_bits<f32>(static_cast<u32>(x.bits) << 16); }

inline f32 to_f32(f16 x) {
  const u32 sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude > 0x7c00) return canonical(same_bits<f32>(0x7fc00000u));
  if (magnitude == 0x7c00) return same_bits<f32>(sign | 0x7f800000);
  if (magnitude >= 0x400) return same_bits<f32>(sign | ((magnitude << 13) + (112u << 23)));
  const f32 subnormal = static_cast<f32>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline bf16 to_bf16(f32 x) {
  const u32 bits = same_bits<u32>(x);
  if (x != x) return {0x7fff};
  return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline f16 to_f16(f32 x) {
  const u32 bits = same_bits<u32>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<u16>(sign | 0x7c00)};  // rounds to 2^16 or more
  if (magnitude >= 0x38800000) {
    const u32 rebased = magnitude - (112u << 23);
    return {static_cast<u16>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13)};
  }
  // Below 2^-14 the unit is 2^-24: adding 0.5, whose last bit is 2^-24, rounds to it.
  const u32 units = same_bits<u32>(same_bits<f32>(magnitude) + 0.5f) - 0x3f000000;
  return {static_cast<u16>(sign | units)};
}

// A lane's part of a register is 4 or 8 bytes; what is narrower lies there zero-extended, a predicate as 0 or 1.
template <class T>
using Cell = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline T from_cell(Cell<T> cell) {
  if constexpr (std::is_same_v<T, bool>) {
    return cell != 0;
  } else if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    return {static_cast<u16>(cell)};
  } else if constexpr (std::is_floating_point_v<T>) {
    return same_bits<T>(cell);
  } else {
    return static_cast<T>(cell);
  }
}

template <class T>
inline Cell<T> to_cell(T value) {
  if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
    return value.bits;
  } else if constexpr (std::is_floating_point_v<T>) {
    return same_bits<Cell<T>>(value);
  } else if constexpr (std::is_signed_v<T>) {
    return static_cast<std::make_unsigned_t<T>>(value);
  } else {
    return value;
  }
}

}  // namespace ptx
