// The loops of rowops.h for one instruction set; rowops.cpp includes this file once for each, with
//   CONDENSE_ISA         the namespace
//   CONDENSE_ISA_BYTES   the vector width: 64, 32 or 16
//   CONDENSE_ISA_PAIRS   1 where there is a dot product of bf16 pairs, else 0
// Vectors are the compiler's own (GCC and Clang), so that one text serves all; intrinsics only where the language
// has no word for the operation. No standard header may be included here: its inline functions would be compiled
// for this instruction set and could be linked into code that runs without it.

namespace condense {
namespace CONDENSE_ISA {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(CONDENSE_ISA_BYTES)));
  typedef int32_t I __attribute__((vector_size(CONDENSE_ISA_BYTES)));
  typedef uint32_t U __attribute__((vector_size(CONDENSE_ISA_BYTES)));
  static constexpr int kLanes = CONDENSE_ISA_BYTES / 4;
  static constexpr float kMax = __FLT_MAX__;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(CONDENSE_ISA_BYTES)));
  typedef int64_t I __attribute__((vector_size(CONDENSE_ISA_BYTES)));
  typedef uint64_t U __attribute__((vector_size(CONDENSE_ISA_BYTES)));
  static constexpr int kLanes = CONDENSE_ISA_BYTES / 8;
  static constexpr double kMax = __DBL_MAX__;
};
typedef Simd<float>::V VecF;
typedef Simd<double>::V VecD;
typedef uint16_t Vec16 __attribute__((vector_size(CONDENSE_ISA_BYTES / 2)));
typedef Simd<float>::U Vec32;

// Vector registers.
#if CONDENSE_ISA_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

#if CONDENSE_ISA_BYTES == 64
inline VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
inline VecF sqrt(VecF x) { return (VecF)_mm512_sqrt_ps((__m512)x); }
inline VecD sqrt(VecD x) { return (VecD)_mm512_sqrt_pd((__m512d)x); }
inline VecF widen_half(Vec16 h) { return (VecF)_mm512_cvtph_ps((__m256i)h); }
inline Vec16 narrow_half(VecF x) { return (Vec16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif CONDENSE_ISA_BYTES == 32
inline VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
inline VecF sqrt(VecF x) { return (VecF)_mm256_sqrt_ps((__m256)x); }
inline VecD sqrt(VecD x) { return (VecD)_mm256_sqrt_pd((__m256d)x); }
inline VecF widen_half(Vec16 h) { return (VecF)_mm256_cvtph_ps((__m128i)h); }
inline Vec16 narrow_half(VecF x) { return (Vec16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
inline VecF fma(VecF a, VecF b, VecF c) { return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline VecD fma(VecD a, VecD b, VecD c) { return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
inline VecF sqrt(VecF x) { return (VecF)vsqrtq_f32((float32x4_t)x); }
inline VecD sqrt(VecD x) { return (VecD)vsqrtq_f64((float64x2_t)x); }
inline VecF widen_half(Vec16 h) { return (VecF)vcvt_f32_f16((float16x4_t)h); }
inline Vec16 narrow_half(VecF x) { return (Vec16)vcvt_f16_f32((float32x4_t)x); }
#else
// Without fused multiply-add in the instruction set a product is rounded before it is added.
inline VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
inline VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
inline VecF sqrt(VecF x) {
  for (int i = 0; i < 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline VecD sqrt(VecD x) {
  for (int i = 0; i < 2; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
inline VecF widen_half(Vec16 h) {
  VecF x;
  for (int i = 0; i < 4; ++i) x[i] = c10::detail::fp16_ieee_to_fp32_value(h[i]);
  return x;
}
inline Vec16 narrow_half(VecF x) {
  Vec16 h;
  for (int i = 0; i < 4; ++i) h[i] = c10::detail::fp16_ieee_from_fp32_value(x[i]);
  return h;
}
#endif

inline VecF widen_bfloat(Vec16 b) { return bits_as<VecF>(__builtin_convertvector(b, Vec32) << 16); }

inline Vec16 narrow_bfloat(VecF x) {
  const Vec32 bits = bits_as<Vec32>(x);
  const Vec32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;              // to nearest, ties to even
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, Vec16);  // a NaN stays one
}

inline VecF widen(const float* p) { return load<VecF>(p); }
inline VecF widen(const c10::BFloat16* p) { return widen_bfloat(load<Vec16>(p)); }
inline VecF widen(const c10::Half* p) { return widen_half(load<Vec16>(p)); }
inline void narrow(VecF x, float* p) { store(p, x); }
inline void narrow(VecF x, c10::BFloat16* p) { store(p, narrow_bfloat(x)); }
inline void narrow(VecF x, c10::Half* p) { store(p, narrow_half(x)); }

template <class In>
void load_typed(const In* src, int64_t stride, int64_t n, float scale, float* dst) {
  constexpr int kLanes = Simd<float>::kLanes;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(dst + i, widen(src + i) * scale);
  }
  for (; i < n; ++i) dst[i] = static_cast<float>(src[i * stride]) * scale;
}

template <class In>
void load_typed(const In* src, int64_t stride, int64_t n, double scale, double* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<double>(src[i * stride]) * scale;
}

template <class T>
void load_row(const void* src, Dtype dtype, int64_t stride, int64_t n, T scale, T* dst) {
  switch (dtype) {
    case Dtype::kFloat32:
      return load_typed(static_cast<const float*>(src), stride, n, scale, dst);
    case Dtype::kFloat16:
      return load_typed(static_cast<const c10::Half*>(src), stride, n, scale, dst);
    case Dtype::kBFloat16:
      return load_typed(static_cast<const c10::BFloat16*>(src), stride, n, scale, dst);
    case Dtype::kFloat64:
      for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(static_cast<const double*>(src)[i * stride]) * scale;
  }
}

template <class Out>
void store_typed(const float* src, int64_t n, Out* dst) {
  constexpr int kLanes = Simd<float>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow(load<VecF>(src + i), dst + i);
  for (; i < n; ++i) dst[i] = static_cast<Out>(src[i]);
}

// x as a float whose last bit says whether x lies off it: rounding it again, to fewer bits, is then rounding x once.
inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || !(__builtin_fabsf(nearest) <= __FLT_MAX__)) return nearest;
  const bool away = __builtin_fabs(static_cast<double>(nearest)) > __builtin_fabs(x);
  return bits_as<float>((bits_as<uint32_t>(nearest) - away) | 1u);
}

template <class Out>
void store_typed(const double* src, int64_t n, Out* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<Out>(round_to_odd(src[i]));
}

inline void store_typed(const double* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

template <class T>
void store_row(const T* src, Dtype dtype, int64_t n, void* dst) {
  switch (dtype) {
    case Dtype::kFloat32:
      return store_typed(src, n, static_cast<float*>(dst));
    case Dtype::kFloat16:
      return store_typed(src, n, static_cast<c10::Half*>(dst));
    case Dtype::kBFloat16:
      return store_typed(src, n, static_cast<c10::BFloat16*>(dst));
    case Dtype::kFloat64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(dst)[i] = static_cast<double>(src[i]);
  }
}

template <class T>
T max_magnitude(const T* x, int64_t n) {
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  typedef typename RowOps<T>::Index Index;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr Index kMagnitude = static_cast<Index>(~(Index{1} << (sizeof(T) * 8 - 1)));
  // The bits of magnitudes order like integers, and those of NaN and infinity lie above all finite ones.
  I most{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const I bits = bits_as<I>(load<V>(x + i)) & kMagnitude;
    most = bits > most ? bits : most;
  }
  Index best = 0;
  for (int lane = 0; lane < kLanes; ++lane) best = most[lane] > best ? most[lane] : best;
  for (; i < n; ++i) {
    const Index bits = bits_as<Index>(x[i]) & kMagnitude;
    best = bits > best ? bits : best;
  }
  const T magnitude = bits_as<T>(best);
  return magnitude <= Simd<T>::kMax ? magnitude : static_cast<T>(__builtin_inf());
}

template <class T>
double sum_of_squares(const T* x, int64_t n, T scale) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  V part[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int v = 0; v < 2; ++v) {
      const V y = load<V>(x + i + v * kLanes) * scale;
      part[v] = fma(y, y, part[v]);
    }
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(part[0][lane]) + part[1][lane];
  for (; i < n; ++i) {
    const T y = x[i] * scale;
    sum += static_cast<double>(y) * y;
  }
  return sum;
}

template <class T>
double sum_row(const T* x, int64_t n) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::kLanes * sizeof(T))));
  constexpr int kLanes = Simd<double>::kLanes, kParts = 4;
  VecD part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts * kLanes <= n; i += kParts * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kParts; ++v) part[v] += __builtin_convertvector(load<Narrow>(x + i + v * kLanes), VecD);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int v = 0; v < kParts; ++v) sum += part[v][lane];
  }
  for (; i < n; ++i) sum += x[i];
  return sum;
}

template <class T>
void add_wide(const T* x, T weight, int64_t n, double* sums) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::kLanes * sizeof(T))));
  constexpr int kLanes = Simd<double>::kLanes;
  const double factor = weight;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(sums + i, load<VecD>(sums + i) + __builtin_convertvector(load<Narrow>(x + i), VecD) * factor);
  }
  for (; i < n; ++i) sums[i] += static_cast<double>(x[i]) * factor;
}

template <class T>
double dot_wide(const T* x, const double* y, int64_t n) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::kLanes * sizeof(T))));
  constexpr int kLanes = Simd<double>::kLanes, kParts = 4;
  VecD part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts * kLanes <= n; i += kParts * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kParts; ++v) {
      const int64_t at = i + v * kLanes;
      part[v] += __builtin_convertvector(load<Narrow>(x + at), VecD) * load<VecD>(y + at);
    }
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int v = 0; v < kParts; ++v) sum += part[v][lane];
  }
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

// Lanes of two vectors, those of the second counted on from the first's. They are constants: SSE2 and NEON have no
// shuffle by others, and would go by single numbers.
template <class T, int... lanes>
inline typename Simd<T>::V shuffle(typename Simd<T>::V first, typename Simd<T>::V second) {
#if defined(__clang__)
  return __builtin_shufflevector(first, second, lanes...);
#else
  return __builtin_shuffle(first, second, typename Simd<T>::I{lanes...});
#endif
}

template <class T>
using Lanes = std::make_integer_sequence<int, Simd<T>::kLanes>;

// Exchanges the blocks of d x d off the diagonal in two rows.
template <class T, int d, int... i>
inline void exchange_blocks(typename Simd<T>::V& upper, typename Simd<T>::V& lower, std::integer_sequence<int, i...>) {
  constexpr int kLanes = Simd<T>::kLanes;
  const typename Simd<T>::V u = upper, l = lower;
  upper = shuffle<T, (i & d ? kLanes + i - d : i)...>(u, l);
  lower = shuffle<T, (i & d ? kLanes + i : i + d)...>(u, l);
}

template <class T, int d = 1>
inline void transpose_rows(typename Simd<T>::V* row) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (!(r & d)) exchange_blocks<T, d>(row[r], row[r + d], Lanes<T>());
  }
  if constexpr (2 * d < kLanes) transpose_rows<T, 2 * d>(row);
}

// dst[c, r] = src[r, c] for one block of kLanes x kLanes.
template <class T>
inline void transpose_block(const T* src, int64_t ld_src, T* dst, int64_t ld_dst) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  V row[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) row[r] = load<V>(src + r * ld_src);
  transpose_rows<T>(row);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) store(dst + r * ld_dst, row[r]);
}

template <class T>
void pack_rows(const T* rows, int64_t first, int64_t depth, T* panel) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int r = 0; r < kStep; r += kLanes) {
    for (int64_t c = 0; c < depth; c += kLanes) {
      transpose_block(rows + r * kChunk + c, kChunk, panel + c * kTile + first + r, kTile);
    }
  }
}

// What a channel adds to a dot product, or, in words of two bf16, a pair of channels.
template <class T>
struct Channel {
  typedef typename Simd<T>::V V;
  static constexpr int kRows = kRegisters == 32 ? 8 : CONDENSE_ISA_BYTES == 32 ? 6 : 4;
  static inline V broadcast(const T* p) { return *p - V{}; }
  static inline V add(V a, V b, V sum) { return fma(a, b, sum); }
};

// What it adds to a squared distance: no product cancels, so that tokens close to each other keep their distance.
template <class T>
struct Difference {
  typedef typename Simd<T>::V V;
  static constexpr int kRows = CONDENSE_ISA_BYTES == 64 ? 8 : CONDENSE_ISA_BYTES == 32 ? 6 : 4;
  static inline V broadcast(const T* p) { return *p - V{}; }
  static inline V add(V a, V b, V sum) {
    const V apart = a - b;
    return fma(apart, apart, sum);
  }
};

#if CONDENSE_ISA_PAIRS
struct Pair {
  static constexpr int kRows = 8;
  static inline VecF broadcast(const float* word) { return (VecF)_mm512_set1_epi32(load<int32_t>(word)); }
  static inline VecF add(VecF a, VecF b, VecF sum) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, bits_as<__m512bh>(a), bits_as<__m512bh>(b));
  }
};
#endif

// What row r of a tile's rows from `a` on multiplies.
template <class T, class Step>
struct Left {
  typedef typename Simd<T>::V V;
#if defined(__aarch64__)
  // A multiply-add takes it from any lane, so that one load serves several rows; GCC, had it seen that load, would load
  // the lanes one by one.
  V lanes;
  inline V operator()(const T* a, int r) {
    constexpr int kLanes = Simd<T>::kLanes;
    if (r % kLanes == 0) asm("" : "=w"(lanes) : "0"(load<V>(a + r)));
    return lanes[r % kLanes] - V{};
  }
#else
  inline V operator()(const T* a, int r) { return Step::broadcast(a + r); }
#endif
};

// kRows x kVectors accumulators in registers: all that the instruction set has, less what the operands need.
template <class T, class Step, int kRows, int kVectors>
inline void multiply_block(const T* a, const T* b, int64_t depth, T* c, int64_t ldc, bool accumulate) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  V acc[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V bk[kVectors];
    Left<T, Step> left;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bk[v] = load<V>(b + k * kTile + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V ak = left(a + k * kTile, r);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Step::add(ak, bk[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + r * ldc + v * kLanes;
      store(to, accumulate ? load<V>(to) + acc[r][v] : acc[r][v]);
    }
  }
}

// The upper blocks of a panel with itself, where one vector is a third of the tile's width.
template <class T, class Step, int kRows>
void multiply_diagonal(const T* a, int64_t depth, int64_t rows, T* c, int64_t ldc, bool accumulate) {
  constexpr int kLanes = Simd<T>::kLanes;
  static_assert(kTile == 3 * kLanes && kLanes == 2 * kRows, "three steps down the diagonal");
  const auto multiply = [&](auto block, int i, int j) {
    if (i < rows) block(a + i, a + j, depth, c + i * ldc + j, ldc, accumulate);
  };
  for (int i = 0; i < kLanes; i += kRows) multiply(multiply_block<T, Step, kRows, 3>, i, 0);
  for (int i = kLanes; i < 2 * kLanes; i += kRows) multiply(multiply_block<T, Step, kRows, 2>, i, kLanes);
  // Twice the rows: of half as many sums each would wait for the last.
  const int i = 2 * kLanes;
  if (rows > i + kRows) return multiply(multiply_block<T, Step, 2 * kRows, 1>, i, i);
  multiply(multiply_block<T, Step, kRows, 1>, i, i);
}

template <class T, class Step>
void multiply_tile(const T* a, const T* b, int64_t depth, int64_t rows, T* c, int64_t ldc, bool accumulate) {
  constexpr int kRows = Step::kRows;
  constexpr int kVectors = CONDENSE_ISA_BYTES == 32 ? 2 : 3;
  constexpr int kColumns = kVectors * Simd<T>::kLanes;
  static_assert(kTile % kRows == 0 && kTile % kColumns == 0, "blocks tile the tile");
  if constexpr (kColumns == kTile) {
    if (a == b) return multiply_diagonal<T, Step, kRows>(a, depth, rows, c, ldc, accumulate);
  }
  for (int j = 0; j < kTile; j += kColumns) {
    for (int i = 0; i < rows && (a != b || i < j + kColumns); i += kRows) {
      multiply_block<T, Step, kRows, kVectors>(a + i, b + j, depth, c + i * ldc + j, ldc, accumulate);
    }
  }
}

#if CONDENSE_ISA_PAIRS
void load_pairs(const void* src, int64_t stride, int64_t n, float scale, float* words) {
  constexpr int kValues = 2 * Simd<float>::kLanes;
  const auto* values = static_cast<const c10::BFloat16*>(src);
  auto* to = reinterpret_cast<c10::BFloat16*>(words);
  // In their words, without changing widths. What is rounded is a subnormal number; NaN has zeros where it would be.
  const auto scaled = [scale](Vec32 bits) {
    const Vec32 y = bits_as<Vec32>(bits_as<VecF>(bits) * scale);
    return y + 0x7fffu + ((y >> 16) & 1u);
  };
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kValues <= n; i += kValues) {
      const Vec32 word = load<Vec32>(values + i);
      store(to + i, scaled(word << 16) >> 16 | (scaled(word & 0xffff0000u) & 0xffff0000u));
    }
  }
  for (; i < n; ++i) to[i] = static_cast<float>(values[i * stride]) * scale;
  if (n % 2) to[n] = 0.0f;
}
#endif

template <class T>
void negate_root_tile(T* t, T unscale) {
  typedef typename Simd<T>::V V;
  for (int64_t i = 0; i < kTile * kTile; i += Simd<T>::kLanes) {
    const V distance = sqrt(load<V>(t + i)) * unscale;
    store(t + i, V{} - (distance < Simd<T>::kMax ? distance : Simd<T>::kMax - V{}));
  }
}

template <class T>
void nearest_tile(const T* t, const T* penalty_i, const T* penalty_j, T* most_i, T* most_j) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes, kVectors = kTile / kLanes;
  const V lowest = -static_cast<T>(__builtin_inf()) - V{};
  V columns[kVectors];
  for (V& column : columns) column = lowest;
  for (int i0 = 0; i0 < kTile; i0 += kLanes) {
    T rows[kLanes * kLanes], across[kLanes * kLanes];
    for (int r = 0; r < kLanes; ++r) {
      V row = lowest;
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) {
        const V x = load<V>(t + (i0 + r) * kTile + v * kLanes);
        const V of_row = x + load<V>(penalty_j + v * kLanes), of_column = x + penalty_i[i0 + r];
        row = of_row > row ? of_row : row;
        columns[v] = of_column > columns[v] ? of_column : columns[v];
      }
      store(rows + r * kLanes, row);
    }
    transpose_block(rows, kLanes, across, kLanes);
    V most = load<V>(most_i + i0);
    for (int r = 0; r < kLanes; ++r) {
      const V other = load<V>(across + r * kLanes);
      most = other > most ? other : most;
    }
    store(most_i + i0, most);
  }
  for (int v = 0; most_j && v < kVectors; ++v) {
    const V before = load<V>(most_j + v * kLanes);
    store(most_j + v * kLanes, columns[v] > before ? columns[v] : before);
  }
}

template <class T>
void scale_tile(T* t, const T* inv_i, const T* inv_j, T* mirror) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; j += kLanes) {
      store(t + i * kTile + j, load<V>(t + i * kTile + j) * (load<V>(inv_j + j) * inv_i[i]));
    }
  }
  for (int i = 0; mirror && i < kTile; i += kLanes) {
    for (int j = 0; j < kTile; j += kLanes) transpose_block(t + i * kTile + j, kTile, mirror + j * kTile + i, kTile);
  }
}

template <class T>
int64_t sum_tile(const T* t, int64_t* g_i, int64_t* g_j) {
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kVectors = kTile / kLanes;
  I columns[kVectors] = {}, magnitudes[kVectors] = {};  // at most 48 * 2^24 each: they fit an int32
  for (int i = 0; i < kTile; ++i) {
    I row{};
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) {
      const I q = __builtin_convertvector(load<V>(t + i * kTile + v * kLanes) * T{16777216}, I);  // truncates
      row += q;
      columns[v] += q;
      magnitudes[v] += q < 0 ? -q : q;
    }
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += row[lane];
    g_i[i] += sum;
  }
  int64_t total = 0;
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) {
      total += magnitudes[v][lane];
      if (g_j) g_j[v * kLanes + lane] += columns[v][lane];
    }
  }
  return total;
}

// The lowest index of the smallest score; score(i, V{}) is a vector from i on, score(i, T{}) one value.
template <class T, class Score>
inline int64_t lowest(int64_t n, Score score) {
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  constexpr int kLanes = Simd<T>::kLanes;
  const T infinity = static_cast<T>(__builtin_inf());
  V best = infinity - V{};
  I best_index = typename RowOps<T>::Index{-1} - I{};
  I index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V t = score(i, V{});
    const I less = t < best;  // false for a NaN
    best = less ? t : best;
    best_index = less ? index : best_index;
    index += kLanes;
  }
  T lowest_score = infinity;
  int64_t pick = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool tied = best[lane] == lowest_score && best_index[lane] < pick;
    if (best_index[lane] >= 0 && (best[lane] < lowest_score || tied)) {
      lowest_score = best[lane];
      pick = best_index[lane];
    }
  }
  for (; i < n; ++i) {
    const T t = score(i, T{});
    if (t < lowest_score) {
      lowest_score = t;
      pick = i;
    }
  }
  return pick;
}

// All scores that are left are +infinity (a suppression that overflows): the first candidate.
template <class T>
int64_t first_candidate(const T* nu, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (nu[i] == nu[i]) return i;
  }
  return -1;
}

template <class T>
struct FirstScore {
  const T* nu;
  template <class V>
  inline V operator()(int64_t i, V) const {
    return load<V>(nu + i);
  }
};

template <class T>
int64_t first_pick(const T* nu, int64_t n) {
  const int64_t pick = lowest<T>(n, FirstScore<T>{nu});
  return pick >= 0 ? pick : first_candidate(nu, n);
}

template <class T, Combine kCombine>
struct Score {
  T suppression;
  // t, for vectors and for single values.
  template <class V>
  inline V operator()(V m, V nu) const {
    if constexpr (kCombine == Combine::kSub) return suppression * m + nu;
    V factor = 1 - suppression * m;  // finite, as 0 times infinity would be no score
    factor = factor > -Simd<T>::kMax ? factor : -Simd<T>::kMax - V{};
    factor = factor < Simd<T>::kMax ? factor : Simd<T>::kMax - V{};
    return nu * factor;
  }
};

template <class V>
inline V finite_or_0(V s) {
  return s - s == 0 ? s : V{};  // infinity minus itself is NaN
}

template <class T, Combine kCombine>
struct NextScore {
  const T* row;
  const T* nu;
  Score<T, kCombine> score;
  T* m;
  template <class V>
  inline V operator()(int64_t i, V) const {
    const V s = finite_or_0(load<V>(row + i));
    const V before = load<V>(m + i);
    const V most = s > before ? s : before;
    store(m + i, most);
    return score(most, load<V>(nu + i));
  }
};

template <class T>
int64_t next_pick(const T* row, const T* nu, T suppression, Combine combine, int64_t n, T* m) {
  const int64_t pick = combine == Combine::kSub ? lowest<T>(n, NextScore<T, Combine::kSub>{row, nu, {suppression}, m})
                                                : lowest<T>(n, NextScore<T, Combine::kMul>{row, nu, {suppression}, m});
  return pick >= 0 ? pick : first_candidate(nu, n);
}

template <class T>
void column_maxima(const T* row, const T* cap, int64_t n, T* maxima) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes, kVectors = kColumns / kLanes;
  V most[kVectors];
#pragma GCC unroll 32
  for (int v = 0; v < kVectors; ++v) most[v] = -static_cast<T>(__builtin_inf()) - V{};
  int64_t i = 0;
  for (; i + kColumns <= n; i += kColumns) {
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v) {
      V x = load<V>(row + i + v * kLanes);
      x = x - x == 0 ? x : V{};
      const V limit = load<V>(cap + i + v * kLanes);
      x = x < limit ? x : limit;
      most[v] = x > most[v] ? x : most[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) store(maxima + v * kLanes, most[v]);
  for (int column = 0; i < n; ++i, ++column) {
    T x = row[i] - row[i] == 0 ? row[i] : T{};
    x = x < cap[i] ? x : cap[i];
    maxima[column] = x > maxima[column] ? x : maxima[column];
  }
}

// Appends the lanes of x where `chosen` is true to found[count ...); a vector may be written. Returns the new count.
template <class V, class I, class T>
inline int64_t append_lanes(V x, I chosen, T* found, int64_t count) {
#if CONDENSE_ISA_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __mmask16 lanes = _mm512_movepi32_mask((__m512i)chosen);
    store(found + count, _mm512_maskz_compress_ps(lanes, (__m512)x));
    return count + __builtin_popcount(lanes);
  } else {
    const __mmask8 lanes = _mm512_movepi64_mask((__m512i)chosen);
    store(found + count, _mm512_maskz_compress_pd(lanes, (__m512d)x));
    return count + __builtin_popcount(lanes);
  }
#elif CONDENSE_ISA_BYTES == 32
  unsigned lanes;
  if constexpr (sizeof(T) == 4) {
    lanes = static_cast<unsigned>(_mm256_movemask_ps((__m256)chosen));
  } else {
    lanes = static_cast<unsigned>(_mm256_movemask_pd((__m256d)chosen));
  }
  for (; lanes; lanes &= lanes - 1) found[count++] = x[__builtin_ctz(lanes)];
  return count;
#else
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) {
    if (chosen[lane]) found[count++] = x[lane];
  }
  return count;
#endif
}

template <class T>
int64_t collect_above(const T* row, const T* cap, T bar, int64_t from, int64_t n, int64_t room, T* found,
                      int64_t* count) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t i = from, c = *count;
  for (; i + kLanes <= n && c <= room; i += kLanes) {
    V x = load<V>(row + i);
    x = x - x == 0 ? x : V{};
    const V most = load<V>(cap + i);
    x = x < most ? x : most;
    c = append_lanes(x, x > bar, found, c);
  }
  if (i + kLanes > n && c <= room) {
    for (; i < n; ++i) {
      T x = row[i] - row[i] == 0 ? row[i] : T{};
      x = x < cap[i] ? x : cap[i];
      if (x > bar) found[c++] = x;
    }
  }
  *count = c;
  return i;
}

template <class T>
T max_where(const T* row, const T* key, T bar, int64_t n) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const T nothing = -static_cast<T>(__builtin_inf());
  V most = nothing - V{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    V x = load<V>(row + i);
    x = x - x == 0 ? x : V{};
    x = load<V>(key + i) > bar ? x : nothing - V{};
    most = x > most ? x : most;
  }
  T best = nothing;
  for (int lane = 0; lane < kLanes; ++lane) best = most[lane] > best ? most[lane] : best;
  for (; i < n; ++i) {
    const T x = row[i] - row[i] == 0 ? row[i] : T{};
    if (key[i] > bar && x > best) best = x;
  }
  return best < 0 ? best : T{};
}

template <class T>
void raise_row(const T* row, int64_t n, T* m) {
  for (int64_t i = 0; i < n; ++i) {
    const T s = finite_or_0(row[i]);
    m[i] = s > m[i] ? s : m[i];
  }
}

template <class T>
void score_row(const T* m, const T* nu, T suppression, Combine combine, int64_t n, T* t) {
  if (combine == Combine::kSub) {
    for (int64_t i = 0; i < n; ++i) t[i] = Score<T, Combine::kSub>{suppression}(m[i], nu[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) t[i] = Score<T, Combine::kMul>{suppression}(m[i], nu[i]);
  }
}

// The sums of lanes 0 and 1, of 2 and 3, and so on, of two vectors in a row.
template <class T, int... i>
inline typename Simd<T>::V add_neighbours(typename Simd<T>::V low, typename Simd<T>::V high,
                                          std::integer_sequence<int, i...>) {
  return shuffle<T, 2 * i...>(low, high) + shuffle<T, 2 * i + 1 ...>(low, high);
}

template <class T>
T coverage_gain(const T* column, const T* covered, int64_t n) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes, kVectors = kGainLanes / kLanes;
  V part[kVectors] = {};
  for (int64_t i = 0; i < n; i += kGainLanes) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V more = load<V>(column + i + v * kLanes) - load<V>(covered + i + v * kLanes);
      part[v] = part[v] + (more > 0 ? more : V{});
    }
  }
  for (int left = kVectors / 2; left > 0; left /= 2) {
#pragma GCC unroll 8
    for (int v = 0; v < left; ++v) part[v] = add_neighbours<T>(part[2 * v], part[2 * v + 1], Lanes<T>());
  }
  T lane[kLanes];
  store(lane, part[0]);
  for (int left = kLanes / 2; left > 0; left /= 2) {
    for (int l = 0; l < left; ++l) lane[l] = lane[2 * l] + lane[2 * l + 1];
  }
  return lane[0];
}

template <class T>
void transpose_finite(const T* src, int64_t ld_src, int64_t rows, int64_t columns, T* dst, int64_t ld_dst) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  T block[kLanes * kLanes];
  for (int64_t r = 0; r < whole_rows; r += kLanes) {
    for (int64_t c = 0; c < whole_columns; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const V x = load<V>(src + (r + i) * ld_src + c);
        store(block + i * kLanes, x - x == 0 ? x : V{});
      }
      transpose_block(block, kLanes, dst + c * ld_dst + r, ld_dst);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      const T x = src[r * ld_src + c];
      dst[c * ld_dst + r] = x - x == 0 ? x : T{0};
    }
  }
}

template <class T>
struct RowDistance {
  const T* positions;
  int64_t n, num_axes, kept;
  T factor;
  template <class V>
  inline V operator()(int64_t i, V) const {
    V squared{};
    for (int64_t p = 0; p < num_axes; ++p) {
      const V difference = load<V>(positions + p * n + i) - positions[p * n + kept];
      squared = squared + difference * difference;
    }
    return squared == squared ? factor * root(squared) : V{};  // NaN: a position that is not finite
  }
  static inline T root(T x) { return sizeof(T) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x); }
  static inline typename Simd<T>::V root(typename Simd<T>::V x) { return sqrt(x); }
};

template <class T>
void consider_row(const T* s_row, const T* positions, int64_t n, int64_t num_axes, int64_t kept, T factor, int64_t lo,
                  int64_t hi, int64_t k, T* best, typename RowOps<T>::Index* best_row) {
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  constexpr int kLanes = Simd<T>::kLanes;
  const RowDistance<T> distance{positions, n, num_axes, kept, factor};
  const auto row = static_cast<typename RowOps<T>::Index>(k);
  int64_t i = lo;
  for (; i + kLanes <= hi; i += kLanes) {
    V s = load<V>(s_row + i);
    s = s - s == 0 ? s : V{};
    const V score = s - distance(i, V{});
    const V before = load<V>(best + i);
    const I nearer = score > before;
    store(best + i, nearer ? score : before);
    store(best_row + i, nearer ? row - I{} : load<I>(best_row + i));
  }
  for (; i < hi; ++i) {
    const T s = s_row[i] - s_row[i] == 0 ? s_row[i] : T{};
    const T score = s - distance(i, T{});
    if (score > best[i]) {
      best[i] = score;
      best_row[i] = row;
    }
  }
}

template <class T>
void accumulate_row(const T* x, T weight, int64_t n, T* acc) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const V w = weight - V{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(acc + i, fma(w, load<V>(x + i), load<V>(acc + i)));
  for (; i < n; ++i) acc[i] = fma(w, x[i] - V{}, acc[i] - V{})[0];
}

template <class T>
void fold_row(T* part, int64_t n, T* total) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += part[i];
    part[i] = 0;
  }
}

template <class T>
void divide_row(T* x, T divisor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

#include "rowops_factor.h"
#include "rowops_softmax.h"

template <class T>
double gradient_row(const T* x, const T* mean, const T* g, T weight, int64_t n, T* dx) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  V part[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int v = 0; v < 2; ++v) {
      const int64_t at = i + v * kLanes;
      const V slope = load<V>(g + at);
      part[v] = fma(load<V>(x + at) - load<V>(mean + at), slope, part[v]);
      store(dx + at, weight * slope);
    }
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(part[0][lane]) + part[1][lane];
  for (; i < n; ++i) {
    sum += static_cast<double>(x[i] - mean[i]) * g[i];
    dx[i] = weight * g[i];
  }
  return sum;
}

// The accumulators of multiply_tile, without its loads. Each starts elsewhere, so that none is another's copy.
template <class T, class Step>
int64_t spin(int64_t rounds) {
  typedef typename Simd<T>::V V;
  constexpr int kChains = CONDENSE_ISA_BYTES == 64 ? 24 : 12;
  volatile T value = T{0.5};
  V acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = value * i - V{};
  const V a = value - V{}, b = value * value - V{};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = Step::add(a, b, acc[i]);
  }
  for (int i = 0; i < kChains; ++i) value = acc[i][0];
  return rounds * kChains * Simd<T>::kLanes;
}

template <class T>
constexpr RowOps<T> table() {
  RowOps<T> ops = {};
  ops.instruction_set = CONDENSE_ISA_NAME;
  ops.load_row = load_row<T>;
  ops.store_row = store_row<T>;
#if CONDENSE_ISA_PAIRS
  if constexpr (sizeof(T) == 4) {
    ops.load_pairs = load_pairs;
    ops.pack_pairs = pack_rows<T>;
    ops.pairs_panel = kChunk * kTile;
    ops.multiply_pairs = multiply_tile<T, Pair>;
    ops.spin_pairs = [](int64_t rounds) { return 2 * spin<T, Pair>(rounds); };
  }
#endif
  ops.max_magnitude = max_magnitude<T>;
  ops.sum_of_squares = sum_of_squares<T>;
  ops.sum_row = sum_row<T>;
  ops.add_wide = add_wide<T>;
  ops.dot_wide = dot_wide<T>;
  ops.pack_rows = pack_rows<T>;
  ops.multiply_tile = multiply_tile<T, Channel<T>>;
  ops.distance_tile = multiply_tile<T, Difference<T>>;
  ops.negate_root_tile = negate_root_tile<T>;
  ops.nearest_tile = nearest_tile<T>;
  ops.scale_tile = scale_tile<T>;
  ops.sum_tile = sum_tile<T>;
  ops.first_pick = first_pick<T>;
  ops.next_pick = next_pick<T>;
  ops.column_maxima = column_maxima<T>;
  ops.collect_above = collect_above<T>;
  ops.max_where = max_where<T>;
  ops.raise_row = raise_row<T>;
  ops.score_row = score_row<T>;
  ops.factor_rows = factor_rows<T>;
  ops.best_gain = best_gain<T>;
  ops.coverage_gain = coverage_gain<T>;
  ops.transpose_finite = transpose_finite<T>;
  ops.consider_row = consider_row<T>;
  ops.accumulate_row = accumulate_row<T>;
  ops.fold_row = fold_row<T>;
  ops.divide_row = divide_row<T>;
  ops.max_row = max_row<T>;
  ops.exp_row = exp_row<T>;
  ops.sum_columns = sum_columns<T>;
  ops.gradient_row = gradient_row<T>;
  ops.spin = spin<T, Channel<T>>;
  return ops;
}

}  // namespace

template <class T>
const RowOps<T>& row_ops() {
  static constexpr RowOps<T> kOps = table<T>();
  return kOps;
}

}  // namespace CONDENSE_ISA
}  // namespace condense
