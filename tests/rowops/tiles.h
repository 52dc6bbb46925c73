// The tests of what makes tiles of similarities.
#pragma once

#include <algorithm>

#include "plain.h"

namespace plain {

using condense::kChunk;
using condense::kTile;

// fma of the instruction set in use: SSE2 has none, and rounds twice.
template <class T>
T multiply_add(T a, T b, T c) {
#if defined(__x86_64__)
  static const bool rounds_twice = !std::strcmp(condense::row_ops<T>().instruction_set, "default");
  if (rounds_twice) return a * b + c;
#endif
  return std::fma(a, b, c);
}

// A panel of tokens, and as the loops want it: [depth, kTile].
template <class T>
struct Panel {
  std::vector<T> rows, packed;
  Panel(std::vector<T> tokens, int64_t depth) : rows(std::move(tokens)), packed(kTile * kChunk, T(kNaN)) {
    for (int64_t first = 0; first < kTile; first += condense::kStep) {
      condense::row_ops<T>().pack_rows(rows.data() + first * kChunk, first, depth, packed.data());
    }
  }
};

template <class T>
void test_packing(Source& source) {
  in_test = "pack_rows";
  for (int64_t depth : {0, 16, 48, 128}) {
    const Panel<T> panel(source.row<T>(kTile * kChunk, true), depth);
    for (int64_t c = 0; c < depth; ++c) {
      for (int64_t r = 0; r < kTile; ++r) expect_same(panel.packed[c * kTile + r], panel.rows[r * kChunk + c], r, c);
    }
    for (int64_t i = depth * kTile; i < kTile * kChunk; ++i) expect_same(panel.packed[i], T(kNaN), i, depth);
  }
}

// Products, or squares of differences, one after the other from the first channel on: the same bits in every place. Of
// a panel with itself, what lies below the diagonal may be anything.
template <class T, class Multiply, class Add>
void test_products(Source& source, const Multiply& multiply, const Add& add) {
  constexpr int64_t kWidth = kTile + 5;
  for (int64_t depth : {16, 17, 48, 127, 128}) {
    const int64_t padded = (depth + 15) / 16 * 16;
    const Panel<T> a(source.row<T>(kTile * kChunk, false), padded), other(source.row<T>(kTile * kChunk, false), padded);
    for (int64_t wanted : {1, 5, 40, 48}) {
      for (const Panel<T>* b : {&other, &a}) {
        std::vector<T> c(kTile * kWidth, T{3});
        for (bool accumulate : {false, true}) {
          const std::vector<T> before = c;
          multiply(a.packed.data(), b->packed.data(), depth, wanted, c.data(), kWidth, accumulate);
          for (int64_t i = 0; i < kTile; ++i) {
            for (int64_t j = 0; j < kWidth; ++j) {
              const T old = before[i * kWidth + j], found = c[i * kWidth + j];
              if (j >= kTile) expect_same(found, old, i, j);
              if (j >= kTile || i >= wanted || (b == &a && j < i)) continue;
              T sum = 0;
              for (int64_t k = 0; k < depth; ++k) sum = add(a.rows[i * kChunk + k], b->rows[j * kChunk + k], sum);
              expect_same(found, accumulate ? old + sum : sum, i, j);
            }
          }
        }
      }
    }
  }
}

// Words of two bf16; sums of small integers, which are exact in any order.
inline void test_pairs(Source& source) {
  const auto& ops = condense::row_ops<float>();
  if (!ops.multiply_pairs) return;
  in_test = "load_pairs, pack_pairs, multiply_pairs";
  for (int64_t channels : {1, 2, 31, 33, 255, 256}) {
    for (int64_t stride : {1, 3}) {
      const int64_t words = (channels + 1) / 2;
      const auto values = source.integers<float>(kTile * channels, 4);
      std::vector<float> rows(kTile * kChunk), panel(ops.pairs_panel), c(kTile * kTile);
      for (int64_t i = 0; i < kTile; ++i) {
        Stored stored(condense::Dtype::kBFloat16, channels * stride);
        for (int64_t d = 0; d < channels; ++d) {
          uint32_t bits;
          std::memcpy(&bits, &values[i * channels + d], 4);
          stored.set(d * stride, bits >> 16);
        }
        ops.load_pairs(stored.bytes.data(), stride, channels, 0.5f, rows.data() + i * kChunk);
      }
      for (int64_t first = 0; first < kTile; first += condense::kStep) {
        ops.pack_pairs(rows.data() + first * kChunk, first, (words + 15) / 16 * 16, panel.data());
      }
      ops.multiply_pairs(panel.data(), panel.data(), words, kTile, c.data(), kTile, false);
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t j = i; j < kTile; ++j) {
          float sum = 0;
          for (int64_t d = 0; d < channels; ++d) sum += values[i * channels + d] * values[j * channels + d];
          expect_same(c[i * kTile + j], sum / 4, i, j);
        }
      }
    }
  }
}

template <class T>
void test_finished_tiles(Source& source) {
  const auto& ops = condense::row_ops<T>();
  const auto inv_i = source.row<T>(kTile, false), inv_j = source.row<T>(kTile, false);
  const auto before = source.row<T>(kTile * kTile, false);

  in_test = "scale_tile";
  auto tile = before;
  std::vector<T> mirror(kTile * kTile);
  ops.scale_tile(tile.data(), inv_i.data(), inv_j.data(), mirror.data());
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t j = 0; j < kTile; ++j) {
      expect_same(tile[i * kTile + j], before[i * kTile + j] * (inv_i[i] * inv_j[j]), i, j);
      expect_same(mirror[j * kTile + i], tile[i * kTile + j], i, j);
    }
  }
  auto alone = before;
  ops.scale_tile(alone.data(), inv_i.data(), inv_j.data(), nullptr);
  expect_same(alone, tile);

  in_test = "sum_tile";
  std::vector<int64_t> g_i(kTile, 5), g_j(kTile, 7), of_rows = g_i, of_columns = g_j;
  int64_t magnitudes = 0;
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t j = 0; j < kTile; ++j) {
      const auto q = static_cast<int64_t>(before[i * kTile + j] * T{16777216});
      of_rows[i] += q, of_columns[j] += q, magnitudes += q < 0 ? -q : q;
    }
  }
  expect_same(ops.sum_tile(before.data(), g_i.data(), g_j.data()), magnitudes);
  expect_same(g_i, of_rows);
  expect_same(g_j, of_columns);
  expect_same(ops.sum_tile(before.data(), g_i.data(), nullptr), magnitudes);

  in_test = "negate_root_tile";
  tile = before;
  for (T& x : tile) x = x < -T(0.9) ? T{} : x > T(0.9) ? T(kInfinity) : std::fabs(x);
  const auto squares = tile;
  ops.negate_root_tile(tile.data(), T{4});
  for (size_t i = 0; i < tile.size(); ++i) {
    const T distance = std::min(std::sqrt(squares[i]) * 4, std::numeric_limits<T>::max());
    expect_same(tile[i], distance == 0 ? T{} : -distance, static_cast<int64_t>(i));
  }

  in_test = "nearest_tile";
  auto most_i = source.row<T>(kTile, false), most_j = source.row<T>(kTile, false), rows = most_i, columns = most_j;
  auto penalty_i = inv_i, penalty_j = inv_j;
  penalty_i[3] = penalty_j[40] = -T(kInfinity);
  for (int64_t i = 0; i < kTile; ++i) {
    for (int64_t j = 0; j < kTile; ++j) {
      rows[i] = std::max(rows[i], before[i * kTile + j] + penalty_j[j]);
      columns[j] = std::max(columns[j], before[i * kTile + j] + penalty_i[i]);
    }
  }
  const auto start = most_i;
  ops.nearest_tile(before.data(), penalty_i.data(), penalty_j.data(), most_i.data(), most_j.data());
  expect_same(most_i, rows);
  expect_same(most_j, columns);
  most_i = start;
  ops.nearest_tile(before.data(), penalty_i.data(), penalty_j.data(), most_i.data(), nullptr);
  expect_same(most_i, rows);
}

template <class T>
void test_tiles() {
  Source source;
  const auto& ops = condense::row_ops<T>();
  test_packing<T>(source);
  in_test = "multiply_tile";
  test_products<T>(source, ops.multiply_tile, [](T a, T b, T sum) { return multiply_add(a, b, sum); });
  in_test = "distance_tile";
  test_products<T>(source, ops.distance_tile, [](T a, T b, T sum) { return multiply_add(a - b, a - b, sum); });
  if constexpr (sizeof(T) == 4) test_pairs(source);
  test_finished_tiles<T>(source);
}

}  // namespace plain
