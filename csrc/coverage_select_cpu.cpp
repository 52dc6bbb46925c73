// Greedy facility location: the next pick is the token that covers most of what is not covered yet.
//
// Lazy, and exact (Minoux 1978): what is covered only grows, so a score only falls, in rounded arithmetic too, as
// every operation of it is monotone and a sum has one order. An old score is a bound, and the best of a heap is the
// pick once it is fresh: by the heap's order, all others come behind it, whatever theirs may have fallen to.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "checks.h"
#include "packed.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

int64_t padded(int64_t rows) { return (rows + kGainLanes - 1) / kGainLanes * kGainLanes; }

template <class T>
struct Score {
  T value;
  int64_t token;
  int64_t picks;  // how many had been made when it was computed

  // The order of std's heaps: the last of all is the best score, of equals the lowest token.
  bool operator<(const Score& other) const {
    return value < other.value || (value == other.value && token > other.token);
  }
};

template <class T>
struct CoverageMemory {
  CoverageMemory(Memory& memory, int64_t m, int64_t n)
      : columns(memory.take<T>(padded(m), n)), covered(memory.take<T>(padded(m))), heap(memory.take<Score<T>>(n)) {}
  T* columns;  // [n, padded(m)] c transposed, as a gain reads a column, zeros behind it
  T* covered;  // [padded(m)]
  Score<T>* heap;
};

// One image: c [m, n] with rows of ld.
template <class T>
struct Coverage {
  const T* c;
  int64_t ld, m, n;
  const T* weight;            // [n] null: gains alone
  const uint8_t* candidates;  // [n] null: all are
  bool multiplied;

  // Columns [lo, hi) and their first scores, in blocks that stay in the cache.
  void start(int64_t lo, int64_t hi, const CoverageMemory<T>& memory) const {
    constexpr int64_t kBlock = 32;
    const int64_t length = padded(m);
    T* columns = memory.columns;
    for (int64_t j0 = lo; j0 < hi; j0 += kBlock) {
      const int64_t j1 = std::min(j0 + kBlock, hi);
      row_ops<T>().transpose_finite(c + j0, ld, m, j1 - j0, columns + j0 * length, length);
      for (int64_t j = j0; j < j1; ++j) {
        std::fill(columns + j * length + m, columns + (j + 1) * length, T{0});
        memory.heap[j] = {score(j, memory), j, 0};
      }
    }
  }

  T score(int64_t token, const CoverageMemory<T>& memory) const {
    constexpr T kMax = std::numeric_limits<T>::max();
    const int64_t length = padded(m);
    const T sum = row_ops<T>().coverage_gain(memory.columns + token * length, memory.covered, length);
    const T gain = std::min(sum, kMax);  // 0 times infinity would be no score
    if (!weight) return gain;
    T w = weight[token];
    w = std::isnan(w) ? -kMax : std::clamp(w, -kMax, kMax);
    return multiplied ? gain * std::max(w, T{0}) : gain + w;
  }

  void select(int64_t k, Crew& crew, const CoverageMemory<T>& memory, int64_t* order) const {
    const int64_t length = padded(m);
    std::fill(memory.covered, memory.covered + length, T{0});
    crew.run([&](int slot) {
      const Share share(n, slot, crew.size());
      start(share.lo, share.hi, memory);
    });
    Score<T>* end = memory.heap + n;
    if (candidates) {
      end = std::remove_if(memory.heap, end, [&](const Score<T>& s) { return candidates[s.token] == 0; });
    }
    std::make_heap(memory.heap, end);
    int64_t picks = 0;
    while (picks < k && end > memory.heap) {
      std::pop_heap(memory.heap, end);
      Score<T>& best = end[-1];
      if (best.picks < picks) {
        best = {score(best.token, memory), best.token, picks};
        std::push_heap(memory.heap, end);
        continue;
      }
      order[picks++] = best.token;
      const T* column = memory.columns + best.token * length;
      for (int64_t i = 0; i < length; ++i) memory.covered[i] = std::max(memory.covered[i], column[i]);
      --end;
    }
    std::fill(order + picks, order + k, -1);  // only what is no candidate is left
  }
};

// The arguments but for c and the sizes, as tensors [B, N] or [T].
template <class T>
struct Arguments {
  Arguments(const std::optional<Tensor>& w, const std::optional<Tensor>& allowed, const std::string& combine)
      : weight(contiguous_as("weight", w, kScalarType<T>)),
        candidates(contiguous_as("candidates", allowed, ScalarType::Bool)),
        multiplied(combine == "mul") {}
  Coverage<T> of(const T* c, int64_t ld, int64_t m, int64_t n, int64_t first_token) const {
    return {c, ld, m, n, row_of<T>(weight, first_token, 1), row_of<uint8_t>(candidates, first_token, 1), multiplied};
  }
  std::optional<Tensor> weight, candidates;
  bool multiplied;
};

void check_options(const std::optional<Tensor>& weight, const std::string& combine,
                   const std::optional<Tensor>& candidates, const char* axes, const std::vector<int64_t>& tokens) {
  if (weight) {
    check_shape("weight", *weight, axes, tokens);
    check_floating("weight", *weight);
  }
  check_choice("combine", combine, {"mul", "add"});
  if (candidates) {
    check_shape("candidates", *candidates, axes, tokens);
    check_dtype("candidates", *candidates, {ScalarType::Bool}, "bool");
  }
}

bool is_wide(const Tensor& c, const std::optional<Tensor>& weight) {
  return is_double(c) || (weight && is_double(*weight));
}

// The first gains are shared; of others, lazily, twice as many were seen.
Work coverage_work(int64_t m, int64_t n) {
  const double gains = static_cast<double>(m) * static_cast<double>(n);
  return {3 * gains, gains};
}

template <class T>
Tensor coverage_select_as(const Tensor& c, int64_t k, const Arguments<T>& arguments) {
  const int64_t B = c.size(0), M = c.size(1), N = c.size(2);
  const Matrices matrices(c.scalar_type() == kScalarType<T> ? c : contiguous_as("c", c, kScalarType<T>));
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  const auto pieces = [&](Memory& memory, int) { return CoverageMemory<T>(memory, M, N); };
  for_each_image(B, coverage_work(M, N), pieces, [&](int64_t b, auto& memory, Crew& crew) {
    arguments.of(matrices.at<T>(b), matrices.ld, M, N, b * N).select(k, crew, memory, output<int64_t>(order) + b * k);
  });
  return order;
}

Tensor coverage_select(const Tensor& c, int64_t k, std::optional<Tensor> weight, Text combine,
                       std::optional<Tensor> candidates) {
  check_rank("c", c, "B M N", 3);
  check_working("c", c);
  check_count("k", k, c.size(2));
  check_options(weight, combine, candidates, "B N", {c.size(0), c.size(2)});
  return is_wide(c, weight) ? coverage_select_as<double>(c, k, {weight, candidates, combine})
                            : coverage_select_as<float>(c, k, {weight, candidates, combine});
}

template <class T>
Tensor coverage_select_varlen_as(const Tensor& c, const std::vector<Part>& parts, int64_t total_keep,
                                 const Arguments<T>& arguments) {
  const Tensor matrix = contiguous_as("c", c, kScalarType<T>);
  const int64_t ld = c.size(1), most = longest(parts);
  const Tensor order = empty("order", {total_keep}, ScalarType::Long);
  std::fill(output<int64_t>(order), output<int64_t>(order) + total_keep, -1);
  const auto pieces = [&](Memory& memory, int) { return CoverageMemory<T>(memory, most, most); };
  const auto images = static_cast<int64_t>(parts.size());
  for_each_image(images, coverage_work(most, most), pieces, [&](int64_t s, auto& memory, Crew& crew) {
    const Part& part = parts[s];
    if (part.num_rows == 0) return;
    arguments.of(data_of<T>(matrix) + part.first_token * ld, ld, part.num_tokens, part.num_tokens, part.first_token)
        .select(part.num_rows, crew, memory, output<int64_t>(order) + part.first_row);
  });
  return order;
}

Tensor coverage_select_varlen(const Tensor& c, const Tensor& cu_seqlens, const Tensor& cu_kept, int64_t total_keep,
                              int64_t max_seqlen, std::optional<Tensor> weight, Text combine,
                              std::optional<Tensor> candidates) {
  check_rank("c", c, "T max_seqlen", 2);
  check_working("c", c);
  const int64_t T = c.size(0);
  check_segments(cu_seqlens, max_seqlen);
  check_rows(cu_kept, cu_seqlens, total_keep, T);
  check_shape("c", c, "T max_seqlen", {T, max_seqlen});
  check_options(weight, combine, candidates, "T", {T});
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, T, total_keep, max_seqlen);
  return is_wide(c, weight) ? coverage_select_varlen_as<double>(c, parts, total_keep, {weight, candidates, combine})
                            : coverage_select_varlen_as<float>(c, parts, total_keep, {weight, candidates, combine});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("coverage_select", TORCH_BOX(&coverage_select));
  m.impl("coverage_select_varlen", TORCH_BOX(&coverage_select_varlen));
}

}  // namespace condense
