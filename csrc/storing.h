// Whether all similarities of an image are stored, or dropped once they are summed, and those computed again that the
// picks need. The results are the same, bit for bit.
//
// Costs are in multiply-adds, measured on one thread (docs/design/cpu.md).
#pragma once

#include <algorithm>
#include <cstdint>

#include "environment.h"
#include "stages.h"

namespace condense {

struct Storing {
  int64_t n, k;     // tokens, and how many of them are picked
  int64_t size;     // bytes of a similarity
  double channels;  // multiply-adds of one

  static Storing of(const Rows& keys, int64_t k, int64_t size) {
    const bool in_pairs = keys.dtype == Dtype::kBFloat16 && size == 4 && row_ops<float>().multiply_pairs;
    return {keys.n, k, size, (in_pairs ? 0.5 : 1.0) * static_cast<double>(keys.d)};
  }

  double pairs() const { return static_cast<double>(n) * static_cast<double>(n); }

  // At most what a call may find again (memory.cpp), or some times what is stored anyway, the rows of the picks.
  bool is_allowed() const {
    if (const auto tokens = stored_tokens()) return n <= *tokens;
    constexpr double kMostBytes = 128 << 20, kMostRows = 6;
    return pairs() * static_cast<double>(size) <= kMostBytes ||
           static_cast<double>(n) <= kMostRows * static_cast<double>(k);
  }

  // Writing a number, and its mirror image, beyond the caches; sums of fp64, which have an order, wait for it again.
  double cost() const {
    constexpr double kInCache = 8 << 20;
    const double number = size == 8 ? 56 : 16;
    return number * std::max(0.0, pairs() - kInCache / static_cast<double>(size));
  }

  // Of rounds of greedy_select_streamed and of the picks' rows, in products of two keys. A round has those of its pool,
  // and of a packing of all keys: as long as 16 rows take.
  double products_again(double rounds) const {
    const auto pool = static_cast<double>(pool_of(n, k));
    return static_cast<double>(n) * static_cast<double>(k) +
           rounds * (16.0 * static_cast<double>(n) + 0.5 * pool * pool);
  }

  // Where all similarities are needed once in any case.
  bool is_chosen(double rounds) const {
    return is_allowed() && (stored_tokens() || cost() <= products_again(rounds) * channels);
  }
};

}  // namespace condense
