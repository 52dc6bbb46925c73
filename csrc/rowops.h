// The inner loops, free of torch: vectorised, compiled once per instruction set, picked at run time.
//
// Every loop works on one row or one tile and fixes its own order of operations, so that a result depends on its
// inputs alone: not on the batch, the number of threads or how the work was split among them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace condense {

enum class Dtype { kFloat32, kFloat16, kBFloat16, kFloat64 };

constexpr int kTile = 48;    // tokens a side of a similarity tile: a multiple of every microkernel's rows and columns
constexpr int kChunk = 128;  // channels, or pairs, summed in registers before a partial dot product is stored
constexpr int kStep = 16;    // they are packed in so many at a time, zeros beyond the last: a multiple of every vector

constexpr int kColumns = 64;  // of column_maxima: a multiple of every vector

// How a token's score comes from its utility u and m, its largest similarity to a pick: u - suppression * m, or
// u * (1 - suppression * m) with u >= 0. Every operation is rounded; of the second, the factor is finite.
enum class Combine { kSub, kMul };

constexpr int kFactorBlock = 64;  // tokens whose columns of a Cholesky factor lie together: [rows, kFactorBlock]
constexpr int kFactorRows = 4;    // rows that are made at once, so that those before them are read once for all

// Rows [done, done + count) of a Cholesky factor, one for each pick, of one block of tokens.
template <class T>
struct FactorRows {
  int64_t done;
  int count;                   // 1 to kFactorRows
  const T* rows[kFactorRows];  // each pick's similarities to the block's tokens; one that is not finite counts as 0
  const T* quality;            // of those tokens; null: the kernel is the similarity itself
  T picked_quality[kFactorRows];
  const T* picked[kFactorRows];  // [done + r] the rows before, at the pick itself
  T root[kFactorRows];           // of its gain
};

constexpr int kGainLanes = 128;  // partial sums of a gain in coverage_select

// T is the working type: float, or double where an input is fp64.
template <class T>
struct RowOps {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

  const char* instruction_set;

  // dst[0, n) = src[0, n) * scale; stride in elements.
  void (*load_row)(const void* src, Dtype dtype, int64_t stride, int64_t n, T scale, T* dst);
  // dst[0, n) = src[0, n), rounded to dtype; dst is contiguous.
  void (*store_row)(const T* src, Dtype dtype, int64_t n, void* dst);

  // The largest magnitude of x[0, n); infinity where x has a NaN or an infinity.
  T (*max_magnitude)(const T* x, int64_t n);
  double (*sum_of_squares)(const T* x, int64_t n, T scale);  // of x * scale
  double (*sum_row)(const T* x, int64_t n);
  // sums[0, n) += x * weight, in fp64: of fp32 the product is exact.
  void (*add_wide)(const T* x, T weight, int64_t n, double* sums);
  // The sum of x * y, in fp64.
  double (*dot_wide)(const T* x, const double* y, int64_t n);

  // panel[depth, first ... first + kStep) of [depth, kTile] = rows[kStep, kChunk], transposed; depth is a multiple of
  // kStep.
  void (*pack_rows)(const T* rows, int64_t first, int64_t depth, T* panel);
  // c[kTile, kTile] = a^T b over depth channels of two panels, added to what c holds if accumulate. Rows from `rows` on
  // may be left out and, where a is b, what lies below the diagonal.
  void (*multiply_tile)(const T* a, const T* b, int64_t depth, int64_t rows, T* c, int64_t ldc, bool accumulate);
  // Pairs of bf16 values as 32-bit words, where the processor multiplies them as such; null elsewhere. Products are
  // exact and sums fp32, like those of multiply_tile, but values below 2^-126 count as 0.
  // words[0, (n + 1) / 2) = src[0, n) * scale, a power of two.
  void (*load_pairs)(const void* src, int64_t stride, int64_t n, T scale, T* words);
  // pack_rows as multiply_pairs wants it: of pairs_panel numbers.
  void (*pack_pairs)(const T* rows, int64_t first, int64_t depth, T* panel);
  int64_t pairs_panel;
  // As multiply_tile, over depth words.
  void (*multiply_pairs)(const T* a, const T* b, int64_t depth, int64_t rows, T* c, int64_t ldc, bool accumulate);
  // As multiply_tile, of squares of differences instead of products.
  void (*distance_tile)(const T* a, const T* b, int64_t depth, int64_t rows, T* c, int64_t ldc, bool accumulate);
  // t = -sqrt(t) * unscale, at most the largest number in magnitude; never -0.
  void (*negate_root_tile)(T* t, T unscale);
  // most_i = max(most_i, rows of t + penalty_j), and unless it is null most_j = max(most_j, columns of t + penalty_i).
  void (*nearest_tile)(const T* t, const T* penalty_i, const T* penalty_j, T* most_i, T* most_j);
  // t[i, j] *= inv_i[i] * inv_j[j] and, unless it is null, mirror = t^T; all three kTile wide.
  void (*scale_tile)(T* t, const T* inv_i, const T* inv_j, T* mirror);
  // Fixed-point sums of a scaled tile: rows into g_i, columns into g_j (unless null), magnitudes returned.
  int64_t (*sum_tile)(const T* t, int64_t* g_i, int64_t* g_j);

  // Scores are negated, t, as utilities are, nu: the best is the smallest, and NaN is no candidate.
  // The smallest of nu[0, n), lowest index first; NaN never wins; -1 where all are NaN.
  int64_t (*first_pick)(const T* nu, int64_t n);
  // m = max(m, row); the smallest t, as above. A row value that is not finite counts as 0.
  int64_t (*next_pick)(const T* row, const T* nu, T suppression, Combine combine, int64_t n, T* m);

  // maxima[c] = the largest of row[c], row[c + kColumns], ..., each cut to its cap and 0 where it is not finite.
  void (*column_maxima)(const T* row, const T* cap, int64_t n, T* maxima);
  // Appends to found those of row[from, n), likewise cut, that are above bar, and stops when there are more than room:
  // where it did is returned. found holds two vectors more.
  int64_t (*collect_above)(const T* row, const T* cap, T bar, int64_t from, int64_t n, int64_t room, T* found,
                           int64_t* count);
  // The largest of row[0, n) whose key is above bar, cut to 0 and 0 where it is not finite; -infinity of none.
  T (*max_where)(const T* row, const T* key, T bar, int64_t n);

  // m = max(m, row); a row value that is not finite counts as 0.
  void (*raise_row)(const T* row, int64_t n, T* m);
  // t of every token
  void (*score_row)(const T* m, const T* nu, T suppression, Combine combine, int64_t n, T* t);

  // Writes the rows into factor [>= done + count, kFactorBlock], and takes their squares from gain [kFactorBlock].
  void (*factor_rows)(const FactorRows<T>& task, T* factor, T* gain);
  // The token with the largest gain of those above floor, lowest index first; NaN never wins; -1 where there is none.
  int64_t (*best_gain)(const T* gain, const T* floor, int64_t n);

  // The sum of max(0, column - covered) over n rows, a multiple of kGainLanes: row i is added to lane i % kGainLanes,
  // then neighbouring lanes to each other, and so on.
  T (*coverage_gain)(const T* column, const T* covered, int64_t n);
  // dst[c, r] = src[r, c], 0 where it is not finite.
  void (*transpose_finite)(const T* src, int64_t ld_src, int64_t rows, int64_t columns, T* dst, int64_t ld_dst);

  // best[lo, hi), best_row: where row k, that of token kept, is strictly nearer than the best so far, take it.
  // positions is [num_axes, n]; score = s - factor * distance.
  void (*consider_row)(const T* s_row, const T* positions, int64_t n, int64_t num_axes, int64_t kept, T factor,
                       int64_t lo, int64_t hi, int64_t k, T* best, Index* best_row);

  // acc[0, n) = weight * x + acc, fused.
  void (*accumulate_row)(const T* x, T weight, int64_t n, T* acc);
  // total += part; part = 0.
  void (*fold_row)(T* part, int64_t n, T* total);
  void (*divide_row)(T* x, T divisor, int64_t n);

  // The largest of x[0, n); NaN never wins; -infinity of none.
  T (*max_row)(const T* x, int64_t n);
  // x[0, n) = exp(scale * x - shift), zeros from there to `end`, a multiple of kTile; the sum is returned.
  double (*exp_row)(T* x, int64_t n, int64_t end, T scale, T shift);
  // sums[0, n) = the rows of x [rows, ld], each times its weight, added; n is a multiple of kTile.
  void (*sum_columns)(const T* x, int64_t ld, int64_t rows, const T* weights, int64_t n, T* sums);

  // dx[0, n) = weight * g; the sum of (x - mean) * g is returned. dx may be x.
  double (*gradient_row)(const T* x, const T* mean, const T* g, T weight, int64_t n, T* dx);

  // For benchmarks: `rounds` rounds of multiply-adds that wait for nothing, whose number is returned; of pairs, two for
  // each, and null where multiply_pairs is or has units of its own.
  int64_t (*spin)(int64_t rounds);
  int64_t (*spin_pairs)(int64_t rounds);
};

// The loops for the best instruction set of this machine that the environment allows (environment.h).
template <class T>
const RowOps<T>& row_ops();

}  // namespace condense
