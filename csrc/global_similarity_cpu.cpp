// Global similarity (Eq. 3) without s: each unit key times the sum of all of them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {

// Keys are added up in parts, which threads share, and then those in their order: how many there are depends on the
// number of tokens alone, and so do the bits of the sum.
template <class T>
void global_similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, Crew& crew,
                             const KeyFactors<T>& factors, const GlobalMemory<T>& memory, T* g, int8_t* tier) {
  const RowOps<T>& ops = row_ops<T>();
  const int64_t n = keys.n, d = keys.d;
  const int parts = memory.parts;
  // f(row, c, depth): the channels of token i, scaled, kRun at a time.
  const auto for_each_run = [&](int64_t i, T* row, const auto& f) {
    for (int64_t c = 0; c < d; c += kRun) {
      const int64_t depth = std::min(kRun, d - c);
      ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, depth, factors.scale[i], row);
      f(c, depth);
    }
  };
  crew.run([&](int slot) {
    T* row = memory.rows + slot * kRun;
    const Share mine(parts, slot, crew.size());
    for (int64_t part = mine.lo; part < mine.hi; ++part) {
      double* sums = memory.sums + part * d;
      std::fill(sums, sums + d, 0.0);
      const Share tokens(n, static_cast<int>(part), parts);
      for (int64_t i = tokens.lo; i < tokens.hi; ++i) {
        const bool finite_score = !scores || std::isfinite(scores[i]);
        measure_token(keys, i, finite_score, mask, row, tier + i, factors.scale + i, factors.inv + i);
        if (!g || factors.inv[i] == 0) continue;
        for_each_run(i, row, [&](int64_t c, int64_t depth) { ops.add_wide(row, factors.inv[i], depth, sums + c); });
      }
    }
  });
  if (!g) return;
  for (int part = 1; part < parts; ++part) {
    for (int64_t c = 0; c < d; ++c) memory.sums[c] += memory.sums[part * d + c];
  }
  crew.run([&](int slot) {
    T* row = memory.rows + slot * kRun;
    const Share share(n, slot, crew.size());
    for (int64_t i = share.lo; i < share.hi; ++i) {
      double sum = 0;
      if (factors.inv[i] != 0) {
        for_each_run(i, row, [&](int64_t c, int64_t depth) { sum += ops.dot_wide(row, memory.sums + c, depth); });
      }
      g[i] = static_cast<T>(sum * factors.inv[i]) + T{0};  // never -0
    }
  });
}

#define CONDENSE_INSTANTIATE(T)                                                                                \
  template void global_similarity_image<T>(const Rows&, const T*, const uint8_t*, Crew&, const KeyFactors<T>&, \
                                           const GlobalMemory<T>&, T*, int8_t*);
CONDENSE_INSTANTIATE(float)
CONDENSE_INSTANTIATE(double)
#undef CONDENSE_INSTANTIATE

namespace {

template <class T>
struct OperatorMemory {
  OperatorMemory(Memory& memory, int64_t n, int64_t d, int slots) : factors(memory, n), sums(memory, n, d, slots) {}
  KeyFactors<T> factors;
  GlobalMemory<T> sums;
};

template <class T>
std::tuple<Tensor, Tensor> global_similarity_as(const Tensor& keys, const std::optional<Tensor>& scores,
                                                const std::optional<Tensor>& mask) {
  const int64_t B = keys.size(0), N = keys.size(1), D = keys.size(2);
  const auto finite = contiguous_as("scores", scores, kScalarType<T>);
  const auto valid = contiguous_as("mask", mask, ScalarType::Bool);
  const Tensor g = empty("g", {B, N}, kScalarType<T>);
  const Tensor tier = empty("tier", {B, N}, ScalarType::Char);
  const auto pieces = [&](Memory& memory, int slots) { return OperatorMemory<T>(memory, N, D, slots); };
  for_each_image(
      B, 4.0 * static_cast<double>(N) * static_cast<double>(D), pieces, [&](int64_t b, auto& memory, Crew& crew) {
        global_similarity_image<T>(rows_of(keys, b), row_of<T>(finite, b, N), row_of<uint8_t>(valid, b, N), crew,
                                   memory.factors, memory.sums, output<T>(g) + b * N, output<int8_t>(tier) + b * N);
      });
  return {g, tier};
}

std::tuple<Tensor, Tensor> global_similarity(const Tensor& keys, std::optional<Tensor> scores,
                                             std::optional<Tensor> mask) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
  check_num_tokens("keys", keys);
  check_not_empty("keys", keys, 2, "channel");
  const std::vector<int64_t> tokens = {keys.size(0), keys.size(1)};
  if (scores) {
    check_shape("scores", *scores, "B N", tokens);
    check_floating("scores", *scores);
  }
  if (mask) {
    check_shape("mask", *mask, "B N", tokens);
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  const bool wide = is_double(keys) || (scores && is_double(*scores));
  return wide ? global_similarity_as<double>(keys, scores, mask) : global_similarity_as<float>(keys, scores, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("global_similarity", TORCH_BOX(&global_similarity)); }

}  // namespace condense
