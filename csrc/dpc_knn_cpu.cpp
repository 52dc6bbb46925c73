// Density peaks with k nearest neighbours, dense and packed: two passes over the rows of s, which threads share, and a
// selection among n scores.
//
// All of it is about similarities: the largest s are the smallest distances, and none is above 0.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "checks.h"
#include "packed.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

constexpr int64_t kVector = 16;   // no instruction set has more lanes
constexpr int64_t kSample = 128;  // columns, in runs of a vector

template <class T>
struct DpcMemory {
  DpcMemory(Memory& memory, int64_t n, int64_t k_nn, int slots)
      : room(std::max(2 * std::min(k_nn, n), kSample)),
        found_stride(room + 2 * kVector),
        cap(memory.take<T>(n + kVector, slots)),
        found(memory.take<T>(found_stride, slots)),
        score(memory.take<double>(n)),
        ranked(memory.take<int64_t>(n)) {}
  int64_t room, found_stride;
  T *cap, *found;  // of each slot
  double* score;
  int64_t* ranked;  // the valid tokens
};

// A bar that at least `others` of the row are above, and few more. The largest of each of many parts of a row are
// among its largest.
template <class T>
T certain_bar(const T* row, const T* cap, int64_t n, int64_t others, T* found) {
  row_ops<T>().column_maxima(row, cap, n, found);
  std::nth_element(found, found + (others - 1), found + kColumns, std::greater<T>());
  return std::nextafter(found[others - 1], -std::numeric_limits<T>::infinity());
}

// The same by a sample of the row: most likely.
template <class T>
T likely_bar(const T* row, const T* cap, int64_t n, int64_t others, int64_t room, T* found) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  int64_t count = 0;
  for (int64_t part = 0; part < kSample / kVector; ++part) {
    const int64_t from = part * n / (kSample / kVector);
    row_ops<T>().collect_above(row, cap, kNone, from, from + kVector, room, found, &count);
  }
  const double expected = static_cast<double>(others) * kSample / static_cast<double>(n);
  const auto rank = static_cast<int64_t>(expected + 3 * std::sqrt(expected)) + 1;
  if (rank >= count) return kNone;
  std::nth_element(found, found + rank, found + count, std::greater<T>());
  return found[rank];
}

// Of a row, the `others` largest come first in found, in no order. cap is 0 of a candidate, -infinity else.
template <class T>
void nearest(const T* row, const T* cap, int64_t n, int64_t others, int64_t room, T* found) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const RowOps<T>& ops = row_ops<T>();
  T bar = kNone;
  if (n >= 2 * kColumns && others <= kColumns / 2) {
    bar = certain_bar(row, cap, n, others, found);
  } else if (n >= 4 * kSample) {
    bar = likely_bar(row, cap, n, others, room, found);
  }
  int64_t count = 0;
  const auto collect = [&] {
    for (int64_t from = 0; from < n;) {
      from = ops.collect_above(row, cap, bar, from, n, room, found, &count);
      if (count <= others) continue;
      std::nth_element(found, found + (others - 1), found + count, std::greater<T>());
      bar = found[others - 1];
      count = others;
    }
  };
  collect();
  if (count >= others) return;
  bar = kNone;  // the sample was none
  count = 0;
  collect();
}

// Minus the mean square of the distances and of a 0, times scale^2; the sum is one of integers, so its order is free.
template <class T>
T density_of(const T* found, int64_t others, double scale_squared) {
  T farthest = 0;
  for (int64_t i = 0; i < others; ++i) farthest = std::max(farthest, 0 - found[i]);
  const Shrink<T> shrink(farthest);
  int64_t sum = 0;
  for (int64_t i = 0; i < others; ++i) {
    const T unit = shrink(0 - found[i]);
    sum += static_cast<int64_t>(unit * unit * T{1099511627776});  // 2^40
  }
  int exponent = 0;
  std::frexp(farthest, &exponent);
  const int half = exponent >> 1;
  double mean = static_cast<double>(sum) / static_cast<double>(others + 1) / 1099511627776.0 * scale_squared;
  for (int twice = 0; twice < 2; ++twice) mean = std::ldexp(std::ldexp(mean, half), exponent - half);
  return 0 - static_cast<T>(std::min(mean, static_cast<double>(std::numeric_limits<T>::max())));
}

// ln x, of operations that are rounded alike everywhere; see reference.py.
double portable_log(double x) {
  constexpr int kTerms = 10;
  if (x == 0) return -std::numeric_limits<double>::infinity();
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70703125) {
    m *= 2;
    --exponent;
  }
  const double z = (m - 1) / (m + 1), w = z * z;
  double series = 1.0 / (2 * kTerms + 1);
  for (int i = kTerms - 1; i >= 0; --i) series = series * w + 1.0 / (2 * i + 1);
  return exponent * 0.6931471805599453 + 2 * z * series;
}

// The farthest of the others; 0 of none.
template <class T>
T farthest_of(const T* row, const T* cap, int64_t n) {
  T least = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (cap[j] == 0 && std::isfinite(row[j])) least = std::min(least, row[j]);
  }
  return 0 - least;
}

// order [k], density [n], peak_distance [n].
template <class T>
void dpc_knn_image(const T* s, int64_t ld, const int8_t* tier, int64_t n, int64_t k, int64_t k_nn, T scale, Crew& crew,
                   const DpcMemory<T>& memory, int64_t* order, T* density, T* peak_distance) {
  const RowOps<T>& ops = row_ops<T>();
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const auto is_valid = [&](int64_t i) { return !tier || tier[i] == kValid; };
  int64_t valid = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (is_valid(i)) memory.ranked[valid++] = i;
  }
  const int64_t others = std::max<int64_t>(std::min(k_nn, valid) - 1, 0);
  const double scale_squared = static_cast<double>(scale) * static_cast<double>(scale);
  const auto cap_of = [&](int slot) {
    T* cap = memory.cap + slot * (n + kVector);
    for (int64_t i = 0; i < n; ++i) cap[i] = is_valid(i) ? T{0} : -kInfinity;
    return cap;
  };
  crew.run([&](int slot) {
    const Share share(n, slot, crew.size());
    T *cap = cap_of(slot), *found = memory.found + slot * memory.found_stride;
    for (int64_t i = share.lo; i < share.hi; ++i) {
      density[i] = -kInfinity;
      if (!is_valid(i)) continue;
      cap[i] = -kInfinity;  // itself is counted at distance 0
      if (others > 0) nearest(s + i * ld, cap, n, others, memory.room, found);
      density[i] = density_of(found, others, scale_squared);
      cap[i] = 0;
    }
  });
  crew.run([&](int slot) {
    const Share share(n, slot, crew.size());
    for (int64_t i = share.lo; i < share.hi; ++i) {
      peak_distance[i] = 0;
      if (!is_valid(i)) continue;
      const T* row = s + i * ld;
      const T at_least = std::nextafter(density[i], -kInfinity);  // an equal one of a lower index counts as denser
      const T nearer = std::max(ops.max_where(row, density, at_least, i),
                                ops.max_where(row + i + 1, density + i + 1, density[i], n - i - 1));
      T peak = 0 - nearer;
      if (nearer == -kInfinity) {  // the densest of all
        T* cap = cap_of(slot);
        cap[i] = -kInfinity;
        peak = farthest_of(row, cap, n);
      }
      peak_distance[i] = peak * scale;
      memory.score[i] = portable_log(static_cast<double>(peak)) + static_cast<double>(density[i]);
    }
  });
  const auto before = [&](int64_t i, int64_t j) {
    return memory.score[i] > memory.score[j] || (memory.score[i] == memory.score[j] && i < j);
  };
  const int64_t picks = std::min(k, valid);
  if (picks < valid) std::nth_element(memory.ranked, memory.ranked + picks, memory.ranked + valid, before);
  std::sort(memory.ranked, memory.ranked + picks, before);
  std::copy(memory.ranked, memory.ranked + picks, order);
  int64_t step = picks;
  for (const int8_t leftover : {kNonFinite, kMasked}) {  // k distinct tokens are due even where fewer are valid
    for (int64_t i = 0; tier && i < n && step < k; ++i) {
      if (tier[i] == leftover) order[step++] = i;
    }
  }
  std::fill(order + step, order + k, -1);
}

void check_options(int64_t k_nn, const std::optional<Tensor>& tier, const char* axes,
                   const std::vector<int64_t>& tokens, double scale) {
  if (k_nn < 1 || k_nn > kMostTokens) {
    fail("k_nn: expected 1 <= k_nn <= ", kMostTokens, " (tokens, a token itself among them), got ", k_nn, ".");
  }
  if (tier) {
    check_shape("tier", *tier, axes, tokens);
    check_dtype("tier", *tier, {ScalarType::Char}, "int8");
  }
  check_weight("scale", scale);
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Results dpc_knn_as(const Tensor& s, int64_t k, int64_t k_nn, const std::optional<Tensor>& tier, double scale) {
  const int64_t B = s.size(0), N = s.size(1);
  const Matrices matrices(s);
  const auto tiers = contiguous_as("tier", tier, ScalarType::Char);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  const Tensor density = empty("density", {B, N}, kScalarType<T>);
  const Tensor peak_distance = empty("peak_distance", {B, N}, kScalarType<T>);
  const auto pieces = [&](Memory& memory, int slots) { return DpcMemory<T>(memory, N, k_nn, slots); };
  for_each_image(B, static_cast<double>(N) * static_cast<double>(N), pieces, [&](int64_t b, auto& memory, Crew& crew) {
    dpc_knn_image<T>(matrices.at<T>(b), matrices.ld, row_of<int8_t>(tiers, b, N), N, k, k_nn, static_cast<T>(scale),
                     crew, memory, output<int64_t>(order) + b * k, output<T>(density) + b * N,
                     output<T>(peak_distance) + b * N);
  });
  return {order, density, peak_distance};
}

Results dpc_knn(const Tensor& s, int64_t k, int64_t k_nn, std::optional<Tensor> tier, double scale) {
  check_rank("s", s, "B N N", 3);
  check_shape("s", s, "B N N", {s.size(0), s.size(1), s.size(1)});
  check_working("s", s);
  check_num_tokens("s", s);
  check_count("k", k, s.size(1));
  check_options(k_nn, tier, "B N", {s.size(0), s.size(1)}, scale);
  return is_double(s) ? dpc_knn_as<double>(s, k, k_nn, tier, scale) : dpc_knn_as<float>(s, k, k_nn, tier, scale);
}

template <class T>
Results dpc_knn_varlen_as(const Tensor& s, const Tensor& cu_seqlens, const Tensor& cu_kept, int64_t total_keep,
                          int64_t max_seqlen, int64_t k_nn, const std::optional<Tensor>& tier, double scale) {
  const int64_t tokens = s.size(0);
  const Tensor rows = s.stride(1) == 1 || s.size(1) == 1 ? s : contiguous_as("s", s, kScalarType<T>);
  const auto tiers = contiguous_as("tier", tier, ScalarType::Char);
  const Tensor order = empty("order", {total_keep}, ScalarType::Long);
  const Tensor density = empty("density", {tokens}, kScalarType<T>);
  const Tensor peak_distance = empty("peak_distance", {tokens}, kScalarType<T>);
  std::fill(output<int64_t>(order), output<int64_t>(order) + total_keep, -1);
  for (const Tensor& t : {density, peak_distance}) std::fill(output<T>(t), output<T>(t) + tokens, T{0});
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, tokens, total_keep, max_seqlen);
  const int64_t most = longest(parts);
  Work work = 0;
  for (const Part& part : parts) work += static_cast<double>(part.num_tokens) * static_cast<double>(part.num_tokens);
  const auto count = static_cast<int64_t>(parts.size());
  const auto pieces = [&](Memory& memory, int slots) { return DpcMemory<T>(memory, most, k_nn, slots); };
  for_each_image(count, work / count, pieces, [&](int64_t i, auto& memory, Crew& crew) {
    const Part& part = parts[i];
    dpc_knn_image<T>(data_of<T>(rows) + part.first_token * rows.stride(0), rows.stride(0),
                     tiers ? data_of<int8_t>(*tiers) + part.first_token : nullptr, part.num_tokens, part.num_rows, k_nn,
                     static_cast<T>(scale), crew, memory, output<int64_t>(order) + part.first_row,
                     output<T>(density) + part.first_token, output<T>(peak_distance) + part.first_token);
  });
  return {order, density, peak_distance};
}

Results dpc_knn_varlen(const Tensor& s, const Tensor& cu_seqlens, const Tensor& cu_kept, int64_t total_keep,
                       int64_t max_seqlen, int64_t k_nn, std::optional<Tensor> tier, double scale) {
  check_rank("s", s, "T max_seqlen", 2);
  check_working("s", s);
  check_segments(cu_seqlens, max_seqlen);
  check_shape("s", s, "T max_seqlen", {s.size(0), max_seqlen});
  check_rows(cu_kept, cu_seqlens, total_keep, s.size(0));
  check_options(k_nn, tier, "T", {s.size(0)}, scale);
  const auto run = is_double(s) ? dpc_knn_varlen_as<double> : dpc_knn_varlen_as<float>;
  return run(s, cu_seqlens, cu_kept, total_keep, max_seqlen, k_nn, tier, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("dpc_knn", TORCH_BOX(&dpc_knn));
  m.impl("dpc_knn_varlen", TORCH_BOX(&dpc_knn_varlen));
}

}  // namespace condense
