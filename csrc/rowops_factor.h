// Rows of a Cholesky factor for blocks of tokens; a part of rowops_isa.h.
//
// Every number is computed by the same operations in the same order, however many rows are made at once: first the
// products with the earlier rows are taken away, one after the other, then comes the quotient.

template <class T, int kRows, int kVectors>
inline void factor_vectors(const FactorRows<T>& task, int first, T* factor, T* gain) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  V x[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + v * kLanes;
      V s = load<V>(task.rows[r] + at);
      s = s - s == 0 ? s : V{};  // infinity minus itself is NaN
      x[r][v] = task.quality ? task.picked_quality[r] * s * load<V>(task.quality + at) : s;
    }
  }
  for (int64_t u = 0; u < task.done; ++u) {
    V earlier[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) earlier[v] = load<V>(factor + u * kFactorBlock + first + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V picked = task.picked[r][u] - V{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[r][v] = x[r][v] - picked * earlier[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = first + v * kLanes;
    V left = load<V>(gain + at);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int before = 0; before < r; ++before) {
        x[r][v] = x[r][v] - task.picked[r][task.done + before] * x[before][v];
      }
      x[r][v] = x[r][v] / task.root[r];
      left = left - x[r][v] * x[r][v];
      store(factor + (task.done + r) * kFactorBlock + at, x[r][v]);
    }
    store(gain + at, left);
  }
}

template <class T, int kRows>
void factor_block(const FactorRows<T>& task, T* factor, T* gain) {
  // As many accumulators as there are registers for, less what the operands need.
  constexpr int kVectors = kRegisters == 32 || kRows == 1 ? 4 : 2;
  constexpr int kStep = kVectors * Simd<T>::kLanes;
  static_assert(kFactorBlock % kStep == 0, "vectors tile the block");
  for (int first = 0; first < kFactorBlock; first += kStep) {
    factor_vectors<T, kRows, kVectors>(task, first, factor, gain);
  }
}

template <class T>
void factor_rows(const FactorRows<T>& task, T* factor, T* gain) {
  static_assert(kFactorRows == 4, "a case for each");
  switch (task.count) {
    case 1:
      return factor_block<T, 1>(task, factor, gain);
    case 2:
      return factor_block<T, 2>(task, factor, gain);
    case 3:
      return factor_block<T, 3>(task, factor, gain);
    default:
      return factor_block<T, 4>(task, factor, gain);
  }
}

template <class T>
struct NegatedGain {
  const T* gain;
  const T* floor;
  template <class V>
  inline V operator()(int64_t i, V) const {
    const V g = load<V>(gain + i);
    return g > load<V>(floor + i) ? -g : static_cast<T>(__builtin_inf()) - V{};
  }
};

template <class T>
int64_t best_gain(const T* gain, const T* floor, int64_t n) {
  return lowest<T>(n, NegatedGain<T>{gain, floor});
}
