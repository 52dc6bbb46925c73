// The tests of what goes along a row.
#pragma once

#include <algorithm>
#include <functional>

#include "tiles.h"

namespace plain {

using condense::Combine;
using condense::Dtype;

template <class T>
T finite_or_0(T x) {
  return std::isfinite(x) ? x : T{};
}

// Any bits of a dtype: subnormal numbers, infinities and NaN among them.
inline uint64_t any_bits(Source& source, Dtype dtype) {
  const uint64_t bits = uint64_t{source.generator()} << 32 | source.generator();
  if (source.generator() % 2) return bits;
  const double x = source.hostile<double>();  // near 1, where there is something to round
  uint64_t wide;
  std::memcpy(&wide, &x, 8);
  const float narrow = static_cast<float>(x);
  uint32_t word;
  std::memcpy(&word, &narrow, 4);
  return dtype == Dtype::kFloat64    ? wide
         : dtype == Dtype::kFloat32  ? word
         : dtype == Dtype::kBFloat16 ? word >> 16
                                     : bits;
}

template <class T>
void test_loading(Source& source) {
  in_test = "load_row";
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64}) {
    for (int64_t stride : {1, 3}) {
      for (int64_t n : kSizes) {
        Stored stored(dtype, n * stride);
        for (int64_t i = 0; i < n * stride; ++i) stored.set(i, any_bits(source, dtype));
        std::vector<T> x(n + 1, T{9}), expected(n + 1, T{9});
        const T scale = T{0.25};
        for (int64_t i = 0; i < n; ++i) expected[i] = static_cast<T>(stored.at(i * stride)) * scale;
        condense::row_ops<T>().load_row(stored.bytes.data(), dtype, stride, n, scale, x.data());
        expect_same(x, expected, n);
      }
    }
  }
}

template <class T>
void test_storing(Source& source) {
  in_test = "store_row";
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64}) {
    const Format& format = dtype == Dtype::kFloat16 ? kHalf : dtype == Dtype::kBFloat16 ? kBFloat : kSingle;
    for (int64_t n : kSizes) {
      auto x = source.row<T>(n, true);
      for (T& value : x) {
        if (source.generator() % 2) value = static_cast<T>(std::ldexp(value, source.generator() % 40 - 28));
        if (source.generator() % 4 == 0) {  // halfway between two, or as little off it as T can tell
          value = static_cast<T>(rounded(value, format)) * (1 + std::ldexp(T{1}, -format.digits));
          if (source.generator() % 2) value = std::nextafter(value, source.generator() % 2 ? T(kInfinity) : T{});
        }
      }
      Stored stored(dtype, n);
      condense::row_ops<T>().store_row(x.data(), dtype, n, stored.bytes.data());
      for (int64_t i = 0; i < n; ++i) {
        const bool whole = dtype == Dtype::kFloat64 || (sizeof(T) == 4 && dtype == Dtype::kFloat32);
        expect_same(stored.at(i), whole ? double{x[i]} : rounded(x[i], format), i, n);
      }
      expect_same(int64_t{stored.bytes[n * Stored::size(dtype)]}, int64_t{'x'}, n, n);
    }
  }
}

template <class T>
void test_sums(Source& source) {
  const auto& ops = condense::row_ops<T>();
  const double epsilon = std::numeric_limits<T>::epsilon();
  for (int64_t n : kSizes) {
    for (bool hostile : {false, true}) {
      in_test = "max_magnitude";
      const auto x = source.row<T>(n, hostile);
      T most = 0;
      for (T value : x) most = std::isfinite(value) ? std::max(most, std::fabs(value)) : T(kInfinity);
      expect_same(ops.max_magnitude(x.data(), n), most, -1, n);
    }
    const auto x = source.row<T>(n, false), mean = source.row<T>(n, false), g = source.row<T>(n, false);
    auto wide = source.row<double>(n, false), added = wide;
    double squares = 0, sum = 0, slope = 0, dot = 0, sizes = 0;
    for (int64_t i = 0; i < n; ++i) {
      squares += double{x[i]} * x[i], sum += x[i], slope += (double{x[i]} - mean[i]) * g[i], sizes += std::fabs(x[i]);
      dot += x[i] * wide[i];
      added[i] = added[i] + double{x[i]} * T(0.3);
    }
    in_test = "sum_of_squares";
    expect_near(ops.sum_of_squares(x.data(), n, T{4}), 16 * squares, n * epsilon * 16 * squares, n);
    in_test = "dot_wide";
    expect_near(ops.dot_wide(x.data(), wide.data(), n), dot, n * 2.3e-16 * sizes, n);
    in_test = "add_wide";
    ops.add_wide(x.data(), T(0.3), n, wide.data());
    expect_same(wide, added, n);
    in_test = "sum_row";
    expect_near(ops.sum_row(x.data(), n), sum, n * 2.3e-16 * sizes, n);
    in_test = "gradient_row";
    std::vector<T> dx(n + 1, T{9}), expected(n + 1, T{9});
    for (int64_t i = 0; i < n; ++i) expected[i] = T{0.7} * g[i];
    expect_near(ops.gradient_row(x.data(), mean.data(), g.data(), T{0.7}, n, dx.data()), slope, n * epsilon * 4, n);
    expect_same(dx, expected, n);
  }
}

// One rounded operation after the other, as the contract says.
template <class T>
T score_of(T m, T nu, T suppression, Combine combine) {
  const T product = suppression * m;
  if (combine == Combine::kSub) return product + nu;
  const T most = std::numeric_limits<T>::max(), factor = 1 - product;
  return nu * (factor > -most ? factor < most ? factor : most : -most);
}

template <class T>
int64_t lowest_of(const std::vector<T>& scores, const std::vector<T>& candidates) {
  int64_t pick = -1;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (candidates[i] != candidates[i] || scores[i] != scores[i]) continue;
    if (pick < 0 || scores[i] < scores[pick]) pick = static_cast<int64_t>(i);
  }
  return pick;
}

template <class T>
void test_picking(Source& source) {
  const auto& ops = condense::row_ops<T>();
  for (int64_t n : kSizes) {
    auto nu = source.row<T>(n, true);
    in_test = "first_pick";
    expect_same(ops.first_pick(nu.data(), n), lowest_of(nu, nu), -1, n);
    for (Combine combine : {Combine::kSub, Combine::kMul}) {
      for (T suppression : {T{0}, T(0.3), std::numeric_limits<T>::max()}) {
        for (T& value : nu) value = std::isfinite(value) ? value : T(kNaN);
        const auto row = source.row<T>(n, true);
        auto m = source.row<T>(n, false);
        std::vector<T> raised(n), t(n), scores(n);
        for (int64_t i = 0; i < n; ++i) {
          raised[i] = std::max(m[i], finite_or_0(row[i]));
          scores[i] = score_of(raised[i], nu[i], suppression, combine);
        }
        auto alone = m;
        in_test = "next_pick";
        expect_same(ops.next_pick(row.data(), nu.data(), suppression, combine, n, m.data()), lowest_of(scores, nu), -1,
                    n);
        expect_same(m, raised, n);
        in_test = "raise_row";
        ops.raise_row(row.data(), n, alone.data());
        expect_same(alone, raised, n);
        in_test = "score_row";
        ops.score_row(m.data(), nu.data(), suppression, combine, n, t.data());
        expect_same(t, scores, n);
      }
    }
    in_test = "best_gain";
    const auto gain = source.row<T>(n, true), floor = source.row<T>(n, true);
    std::vector<T> negated(n);
    for (int64_t i = 0; i < n; ++i) negated[i] = gain[i] > floor[i] ? -gain[i] : T(kNaN);
    expect_same(ops.best_gain(gain.data(), floor.data(), n), lowest_of(negated, negated), -1, n);
  }
}

// All scores are 0 if each operation is rounded, so token 0 is first; a fused one would leave what the rounding
// dropped.
template <class T>
void test_that_scores_are_not_fused(Source& source) {
  in_test = "next_pick, not fused";
  const auto& ops = condense::row_ops<T>();
  constexpr int64_t n = 333;
  const T suppression = T(0.7);
  std::vector<T> nu(n), m(n, T{-1}), row(n);
  for (int64_t i = 0; i < n; ++i) {
    row[i] = std::fabs(source.usual<T>());
    nu[i] = -(suppression * row[i]);
  }
  expect_same(ops.next_pick(row.data(), nu.data(), suppression, Combine::kSub, n, m.data()), int64_t{0});
  m.assign(n, T{-1});
  nu = source.row<T>(n, false);
  for (int64_t i = 0; i < n; ++i) {
    do {  // two factors whose product rounds to 1
      row[i] = 1 / suppression + std::numeric_limits<T>::epsilon() * (static_cast<int>(source.generator() % 5) - 2);
    } while (suppression * row[i] != 1);
  }
  expect_same(ops.next_pick(row.data(), nu.data(), suppression, Combine::kMul, n, m.data()), int64_t{0});
}

template <class T>
void test_searching(Source& source) {
  const auto& ops = condense::row_ops<T>();
  constexpr int kColumns = condense::kColumns;
  for (int64_t n : kSizes) {
    const auto row = source.row<T>(n, true), key = source.row<T>(n, true);
    const auto cap = source.row<T>(n, false);
    std::vector<T> cut(n), maxima(kColumns), expected(kColumns, -T(kInfinity));
    for (int64_t i = 0; i < n; ++i) {
      cut[i] = std::min(finite_or_0(row[i]), cap[i]);
      expected[i % kColumns] = std::max(expected[i % kColumns], cut[i]);
    }
    in_test = "column_maxima";
    ops.column_maxima(row.data(), cap.data(), n, maxima.data());
    for (int c = 0; c < kColumns; ++c) expect_same(maxima[c] + T{}, expected[c] + T{}, c, n);
    in_test = "max_where";
    T most = -T(kInfinity);
    for (int64_t i = 0; i < n; ++i) {
      if (key[i] > T(0.1)) most = std::max(most, finite_or_0(row[i]));
    }
    expect_same(ops.max_where(row.data(), key.data(), T(0.1), n), most < 0 ? most : T{}, -1, n);
    in_test = "collect_above";
    std::vector<T> found(n + 128), wanted;
    int64_t count = 0, from = 0;
    while (from < n) {
      const int64_t room = count + 1;
      const int64_t stop = ops.collect_above(row.data(), cap.data(), T(0.05), from, n, room, found.data(), &count);
      for (; from < stop; ++from) {
        if (cut[from] > T(0.05)) wanted.push_back(cut[from]);
      }
      expect_same(count, static_cast<int64_t>(wanted.size()), stop, n);
      expect_same(int64_t{stop == n || count > room}, int64_t{1}, stop, n);
    }
    expect_same(found, wanted, n);
    in_test = "max_row";
    auto padded = row;
    padded.resize(n + 64, T{2});
    T top = -T(kInfinity);
    for (T x : row) top = x > top ? x : top;
    expect_same(ops.max_row(padded.data(), n) + T{}, top + T{}, -1, n);
  }
}

template <class T>
void test_factor(Source& source) {
  in_test = "factor_rows";
  constexpr int kBlock = condense::kFactorBlock, kMost = condense::kFactorRows;
  for (int64_t done : {0, 1, 37}) {
    for (int count = 1; count <= kMost; ++count) {
      for (bool with_quality : {false, true}) {
        condense::FactorRows<T> task{};
        task.done = done, task.count = count;
        const auto quality = source.row<T>(kBlock, false);
        task.quality = with_quality ? quality.data() : nullptr;
        std::vector<std::vector<T>> rows(count), picked(count);
        for (int r = 0; r < count; ++r) {
          rows[r] = source.row<T>(kBlock, true), picked[r] = source.row<T>(done + count, false);
          task.rows[r] = rows[r].data(), task.picked[r] = picked[r].data();
          task.picked_quality[r] = source.usual<T>(), task.root[r] = 1 + source.usual<T>() / 2;
        }
        auto factor = source.row<T>((done + count) * kBlock, false), gain = source.row<T>(kBlock, false);
        auto expected = factor, left = gain;
        for (int c = 0; c < kBlock; ++c) {
          for (int r = 0; r < count; ++r) {
            const T s = finite_or_0(rows[r][c]);
            T x = with_quality ? task.picked_quality[r] * s * quality[c] : s;
            for (int64_t u = 0; u < done + r; ++u) x = x - picked[r][u] * expected[u * kBlock + c];
            x = x / task.root[r];
            left[c] = left[c] - x * x;
            expected[(done + r) * kBlock + c] = x;
          }
        }
        condense::row_ops<T>().factor_rows(task, factor.data(), gain.data());
        expect_same(factor, expected, done);
        expect_same(gain, left, done);
      }
    }
  }
}

template <class T>
void test_coverage(Source& source) {
  constexpr int kLanes = condense::kGainLanes;
  in_test = "coverage_gain";
  for (int64_t n : {0, kLanes, 5 * kLanes}) {
    const auto column = source.row<T>(n, false), covered = source.row<T>(n, false);
    std::vector<T> lane(kLanes);
    for (int64_t i = 0; i < n; ++i) lane[i % kLanes] += std::max(column[i] - covered[i], T{});
    for (int left = kLanes / 2; left > 0; left /= 2) {
      for (int l = 0; l < left; ++l) lane[l] = lane[2 * l] + lane[2 * l + 1];
    }
    expect_same(condense::row_ops<T>().coverage_gain(column.data(), covered.data(), n), lane[0], -1, n);
  }
  in_test = "transpose_finite";
  for (int64_t rows : {1, 7, 16, 35}) {
    for (int64_t columns : {1, 15, 16, 50}) {
      const auto x = source.row<T>(rows * (columns + 3), true);
      std::vector<T> y(columns * (rows + 2), T{9}), expected = y;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) expected[c * (rows + 2) + r] = finite_or_0(x[r * (columns + 3) + c]);
      }
      condense::row_ops<T>().transpose_finite(x.data(), columns + 3, rows, columns, y.data(), rows + 2);
      expect_same(y, expected, rows);
    }
  }
}

template <class T>
void test_assigning(Source& source) {
  in_test = "consider_row";
  using Index = typename condense::RowOps<T>::Index;
  for (int64_t n : kSizes) {
    const int64_t axes = n % 4, lo = n / 5, hi = n - n / 7, kept = n / 2;
    const auto s = source.row<T>(n, true), positions = source.row<T>(axes * n, n % 2);
    auto best = source.row<T>(n, false), expected = best;
    std::vector<Index> row(n, 4);
    std::vector<int64_t> expected_row(n, 4);
    for (int64_t i = lo; i < hi; ++i) {
      T squared = 0;
      for (int64_t p = 0; p < axes; ++p) {
        const T difference = positions[p * n + i] - positions[p * n + kept];
        squared = squared + difference * difference;
      }
      const T score = finite_or_0(s[i]) - (squared == squared ? T(0.3) * std::sqrt(squared) : T{});
      if (score > expected[i]) expected[i] = score, expected_row[i] = 6;
    }
    condense::row_ops<T>().consider_row(s.data(), positions.data(), n, axes, kept, T(0.3), lo, hi, 6, best.data(),
                                        row.data());
    expect_same(best, expected, n);
    expect_same(std::vector<int64_t>(row.begin(), row.end()), expected_row, n);
  }
}

template <class T>
void test_merging(Source& source) {
  const auto& ops = condense::row_ops<T>();
  for (int64_t n : kSizes) {
    const auto x = source.row<T>(n, true);
    auto acc = source.row<T>(n, false), expected = acc, part = x, total = acc;
    in_test = "accumulate_row";
    for (int64_t i = 0; i < n; ++i) expected[i] = multiply_add(T(0.3), x[i], acc[i]);
    ops.accumulate_row(x.data(), T(0.3), n, acc.data());
    expect_same(acc, expected, n);
    in_test = "divide_row";
    for (T& value : expected) value = value / T(0.7);
    ops.divide_row(acc.data(), T(0.7), n);
    expect_same(acc, expected, n);
    in_test = "fold_row";
    expected = total;
    for (int64_t i = 0; i < n; ++i) expected[i] = expected[i] + part[i];
    ops.fold_row(part.data(), n, total.data());
    expect_same(total, expected, n);
    expect_same(part, std::vector<T>(n), n);
  }
}

template <class T>
void test_softmax(Source& source) {
  const auto& ops = condense::row_ops<T>();
  const double epsilon = std::numeric_limits<T>::epsilon();
  for (int64_t n : {0, 1, 17, 48, 577, 3000}) {
    in_test = "exp_row";
    const int64_t end = (n + kTile - 1) / kTile * kTile;
    auto x = source.row<T>(end + 1, false);
    for (T& value : x) value *= 30;
    const auto before = x;
    const double sum = ops.exp_row(x.data(), n, end, T(0.5), T(16));
    double expected = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double argument = 0.5 * double{before[i]} - 16, p = std::exp(argument);
      expected += p;
      expect_near(x[i], p, p * epsilon * (4 + 2 * std::fabs(argument)), n);
    }
    expect_near(sum, expected, expected * epsilon * 64, n);
    for (int64_t i = n; i < end; ++i) expect_same(x[i], T{}, i, n);
    expect_same(x[end], before[end], end, n);
  }
  std::vector<T> edges(kTile, T{-2000});
  edges[0] = T{2000}, edges[1] = T(kNaN), edges[2] = T{}, edges[3] = -T(kInfinity);
  ops.exp_row(edges.data(), 5, kTile, T{1}, T{0});
  expect_same(edges[0], T(kInfinity));
  expect_same(edges[1], T(kNaN));
  expect_same(edges[2], T{1});
  expect_same(edges[3], T{});
  expect_same(edges[4], T{});

  in_test = "sum_columns";
  for (int64_t rows : {1, 2, 47, 48}) {
    for (int64_t n : {kTile, 3 * kTile}) {
      const auto x = source.row<T>(rows * (n + 8), false), weights = source.row<T>(rows, false);
      std::vector<T> sums(n + 1, T{9}), expected(n + 1, T{9});
      for (int64_t j = 0; j < n; ++j) {
        T sum[2] = {};
        for (int64_t r = 0; r < rows; ++r) sum[r % 2] = multiply_add(weights[r], x[r * (n + 8) + j], sum[r % 2]);
        expected[j] = sum[0] + sum[1];
      }
      ops.sum_columns(x.data(), n + 8, rows, weights.data(), n, sums.data());
      expect_same(sums, expected, rows);
    }
  }
}

template <class T>
void test_loops() {
  Source source;
  test_loading<T>(source);
  test_storing<T>(source);
  test_sums<T>(source);
  test_picking<T>(source);
  test_that_scores_are_not_fused<T>(source);
  test_searching<T>(source);
  test_factor<T>(source);
  test_coverage<T>(source);
  test_assigning<T>(source);
  test_merging<T>(source);
  test_softmax<T>(source);
}

}  // namespace plain
