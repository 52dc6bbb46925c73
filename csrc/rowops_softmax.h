// The loops of rowops.h that make probabilities of a row and add them up; a part of rowops_isa.h, which includes it in
// the namespace of an instruction set.

template <class T>
inline typename Simd<T>::I lane_numbers() {
  typename Simd<T>::I lanes;
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

template <class T>
T max_row(const T* x, int64_t n) {
  typedef typename Simd<T>::V V;
  typedef typename RowOps<T>::Index Index;
  constexpr int kLanes = Simd<T>::kLanes, kChains = 4;
  const T lowest = -static_cast<T>(__builtin_inf());
  V best[kChains];
  for (V& chain : best) chain = lowest - V{};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const V y = load<V>(x + i + c * kLanes);
      best[c] = y > best[c] ? y : best[c];
    }
  }
  for (; i < n; i += kLanes) {  // rows are padded, so that all of the last vector can be read
    const V y = lane_numbers<T>() < static_cast<Index>(n - i) ? load<V>(x + i) : lowest - V{};
    best[0] = y > best[0] ? y : best[0];
  }
  T most = lowest;
  for (const V& chain : best) {
    for (int lane = 0; lane < kLanes; ++lane) most = chain[lane] > most ? chain[lane] : most;
  }
  return most;
}

// 2^x: of its Taylor series as many terms as the type has digits for, at the distance from the nearest integer.
template <class T>
struct PowerOfTwo {
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::U U;
  static constexpr int kTerms = sizeof(T) == 4 ? 8 : 14;
  static constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  static constexpr T kBias = sizeof(T) == 4 ? 127 : 1023;
  // Where the last bit is worth one; what is added to this, rounds, and its last bits are 2^n as an exponent.
  static constexpr T kInteger = (sizeof(T) == 4 ? T{12582912} : T{6755399441055744}) + kBias;

  T term[kTerms];  // log(2)^k / k!
  constexpr PowerOfTwo() : term() {
    double next = 1;
    for (int k = 0; k < kTerms; ++k) {
      term[k] = static_cast<T>(next);
      next *= 0.693147180559945309417 / (k + 1);
    }
  }

  // Below the normal numbers 0, above the largest infinity, NaN of NaN.
  inline V operator()(V x) const {
    x = x < -kBias ? -kBias - V{} : x;
    x = x > kBias + 1 ? kBias + 1 - V{} : x;
    const V rounded = x + kInteger;
    const V rest = x - (rounded - kInteger);
    V sum = term[kTerms - 1] - V{};
#pragma GCC unroll 16
    for (int k = kTerms - 2; k >= 0; --k) sum = fma(sum, rest, term[k] - V{});
    return sum * bits_as<V>(bits_as<U>(rounded) << kMantissa);
  }
};

template <class T>
double exp_row(T* x, int64_t n, int64_t end, T scale, T shift) {
  typedef typename Simd<T>::V V;
  typedef typename RowOps<T>::Index Index;
  constexpr int kLanes = Simd<T>::kLanes, kChains = 4, kBlock = 1024;
  static constexpr PowerOfTwo<T> power;
  constexpr T kLog2 = static_cast<T>(1.44269504088896340736);
  const auto probability = [&](int64_t i) { return power(fma(load<V>(x + i), scale - V{}, -shift - V{}) * kLog2); };
  double total = 0;
  int64_t i = 0;
  while (i + kChains * kLanes <= n) {  // in blocks, so that no chain of fp32 additions is long
    const int64_t stop = i + kBlock < n ? i + kBlock : n;
    V sum[kChains] = {};
    for (; i + kChains * kLanes <= stop; i += kChains * kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const V p = probability(i + c * kLanes);
        store(x + i + c * kLanes, p);
        sum[c] += p;
      }
    }
    const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(all[lane]);
  }
  V sum = {};
  for (; i < n; i += kLanes) {
    const V p = lane_numbers<T>() < static_cast<Index>(n - i) ? probability(i) : V{};
    store(x + i, p);
    sum += p;
  }
  for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum[lane]);
  for (; i < end; i += kLanes) store(x + i, V{});
  return total;
}

template <class T>
void sum_columns(const T* x, int64_t ld, int64_t rows, const T* weights, int64_t n, T* sums) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes, kVectors = 3;
  static_assert(kTile % (kVectors * kLanes) == 0, "blocks tile the row");
  for (int64_t j = 0; j < n; j += kVectors * kLanes) {
    V sum[2][kVectors] = {};  // of the even rows and of the odd ones
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const V weight = weights[r + half] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[half][v] = fma(weight, load<V>(x + (r + half) * ld + j + v * kLanes), sum[half][v]);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      if (r < rows) sum[0][v] = fma(weights[r] - V{}, load<V>(x + r * ld + j + v * kLanes), sum[0][v]);
      store(sums + j + v * kLanes, sum[0][v] + sum[1][v]);
    }
  }
}
