// What the tests of the row loops share: inputs, conversions written from the formats' definitions, and how two numbers
// are compared. Nothing here is vectorised by hand, and no operation is fused with another (-ffp-contract=off).
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "rowops.h"

namespace plain {

inline int failures = 0;
inline const char* in_test = "";

template <class T>
bool same(T a, T b) {  // -0 is not +0; any NaN is as good as another
  return a == b ? std::signbit(a) == std::signbit(b) : a != a && b != b;
}
inline bool same(int64_t a, int64_t b) { return a == b; }

template <class T>
void expect_same(T found, T expected, int64_t at = -1, int64_t n = -1) {
  if (same(found, expected) || ++failures > 20) return;
  std::printf("%s: %.17g, expected %.17g, at %" PRId64 " of %" PRId64 "\n", in_test, double(found), double(expected),
              at, n);
}

template <class T>
void expect_same(const std::vector<T>& found, const std::vector<T>& expected, int64_t n = -1) {
  for (size_t i = 0; i < expected.size(); ++i) expect_same(found[i], expected[i], static_cast<int64_t>(i), n);
}

inline void expect_near(double found, double expected, double tolerance, int64_t n = -1) {
  if (std::fabs(found - expected) <= tolerance || ++failures > 20) return;
  std::printf("%s: %.17g, expected %.17g within %g, of %" PRId64 "\n", in_test, found, expected, tolerance, n);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kSizes[] = {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 67, 128, 200, 577};

// Numbers of a row: usual ones, ties, and now and then what no row should hold.
struct Source {
  std::mt19937 generator{7};
  template <class T>
  T usual() {
    return static_cast<T>(std::uniform_real_distribution<double>(-1, 1)(generator));
  }
  template <class T>
  T hostile() {
    static constexpr double kValues[] = {kNaN, -kNaN, kInfinity, -kInfinity, 0.0, -0.0, 0.25, -0.25, 1.0, 1e-40};
    const auto draw = generator();
    if (draw % 4) return usual<T>();
    if (draw % 64 == 0) return std::numeric_limits<T>::max();
    return static_cast<T>(kValues[draw / 64 % 10]);
  }
  template <class T>
  std::vector<T> row(int64_t n, bool hostile_too) {
    std::vector<T> x(n);
    for (T& value : x) value = hostile_too ? hostile<T>() : usual<T>();
    return x;
  }
  template <class T>
  std::vector<T> integers(int64_t n, int most) {  // whose sums of products are exact
    std::vector<T> x(n);
    for (T& value : x) value = static_cast<T>(std::uniform_int_distribution<int>(-most, most)(generator));
    return x;
  }
};

// A binary format below fp32: `digits` bits of mantissa, the leading one among them, exponents from `lowest` on.
struct Format {
  int digits, lowest;
  double most;
};
constexpr Format kHalf{11, -14, 65504}, kBFloat{8, -126, 3.3895313892515355e38},
    kSingle{24, -126, std::numeric_limits<float>::max()};

// x to the nearest number of the format, ties to even.
inline double rounded(double x, const Format& format) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.lowest) - format.digits + 1;
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return std::fabs(nearest) > format.most ? std::copysign(kInfinity, x) : std::copysign(nearest, x);
}

inline double value_of_bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline double value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? kNaN : sign * kInfinity;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// A row of numbers in memory, n of them `stride` apart.
struct Stored {
  condense::Dtype dtype;
  std::vector<char> bytes;

  static int size(condense::Dtype dtype) {
    return dtype == condense::Dtype::kFloat64 ? 8 : dtype == condense::Dtype::kFloat32 ? 4 : 2;
  }
  Stored(condense::Dtype type, int64_t n) : dtype(type), bytes(n * size(type) + 64, 'x') {}
  double at(int64_t i) const {
    const char* p = bytes.data() + i * size(dtype);
    if (size(dtype) == 8) return read<double>(p);
    if (size(dtype) == 4) return read<float>(p);
    return dtype == condense::Dtype::kFloat16 ? value_of_half(read<uint16_t>(p)) : value_of_bfloat(read<uint16_t>(p));
  }
  void set(int64_t i, uint64_t bits) { std::memcpy(bytes.data() + i * size(dtype), &bits, size(dtype)); }

 private:
  template <class V>
  static V read(const char* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
};

}  // namespace plain
