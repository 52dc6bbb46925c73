// Similarity of all token pairs (Eq. 3), cosines or negated distances, in tiles of kTile x kTile of which the upper
// ones are computed.
//
// A library's matrix product would not do: its bits depend on the batch, on the number of threads and on the place of
// a token in the matrix, which breaks ties between equal tokens. Here a tile has one shape and one order of
// summation, and belongs to one thread.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "checks.h"
#include "gathered.h"
#include "packed.h"
#include "similarity_tiles.h"
#include "stages.h"
#include "tensors.h"

namespace condense {

constexpr int64_t kStripRows = 4 * kTile;  // a packing of all keys costs as much as 16 of them
template <class T>
void measure_token(const Rows& keys, int64_t i, bool finite_score, const uint8_t* mask, T* row, int8_t* tier, T* scale,
                   T* inv) {
  const RowOps<T>& ops = row_ops<T>();
  *scale = *inv = 0;
  *tier = kMasked;
  if (mask && mask[i] == 0) return;
  const T* values = nullptr;
  const auto load = [&](int64_t c) {
    const int64_t depth = std::min(kRun, keys.d - c);
    values = row_as(keys.run(i, c, depth), 0, row);
    return depth;
  };
  T magnitude = 0;
  for (int64_t c = 0; c < keys.d; c += kRun) {
    const int64_t depth = load(c);
    magnitude = std::max(magnitude, ops.max_magnitude(values, depth));
  }
  *tier = finite_score && magnitude <= std::numeric_limits<T>::max() ? kValid : kNonFinite;
  if (*tier != kValid || magnitude == 0) return;
  constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;  // 126: the factor itself stays a normal number
  *scale = std::ldexp(T{1}, std::clamp(-std::ilogb(magnitude), -kLimit, kLimit));
  double squares = 0;
  for (int64_t c = 0; c < keys.d; c += kRun) {
    const int64_t depth = keys.d > kRun ? load(c) : keys.d;
    squares += ops.sum_of_squares(values, depth, *scale);
  }
  *inv = static_cast<T>(1 / std::sqrt(squares));
}

namespace {

constexpr bool kSymmetric = true, kSummed = true;

// g and the sum of |s|, from the tiles' integers.
template <class T>
double add_sums(const SimilarityMemory<T>& memory, int64_t n, T* g) {
  constexpr double kUnit = 1.0 / (1 << 24);
  int64_t magnitudes = 0;
  for (int slot = 0; slot < memory.slots; ++slot) magnitudes += memory.of_slot[slot].magnitudes;
  for (int64_t i = 0; i < n; ++i) {
    int64_t sum = 0;
    for (int slot = 0; slot < memory.slots; ++slot) sum += memory.of_slot[slot].g[i];
    g[i] = static_cast<T>(static_cast<double>(sum) * kUnit);
  }
  return static_cast<double>(magnitudes) * kUnit;
}

template <class T>
T bounded(double sum) {
  constexpr double kMax = std::numeric_limits<T>::max();
  return static_cast<T>(std::clamp(sum, -kMax, kMax));
}

// Of fp64 and of distances, the sums are plain, in fp64: each row's, of fp64 in index order, and then the rows' in that
// order.
void sum_rows(const float* s, int64_t ld, int64_t rows, int64_t n, Crew& crew, float* g, double* magnitudes) {
  crew.run([&](int slot) {
    const Share share(rows, slot, crew.size());
    for (int64_t i = share.lo; i < share.hi; ++i) {
      const double sum = row_ops<float>().sum_row(s + i * ld, n);
      magnitudes[i] = 0 - sum;  // no distance has the other sign
      g[i] = bounded<float>(sum);
    }
  });
}

// In fp64, row by row to the sums of all columns. s is symmetric: a row's sum in index order is its column's.
void add_columns(const double* s, int64_t ld, int64_t rows, int64_t columns, Crew& crew, double* g,
                 double* magnitudes) {
  constexpr int64_t kColumns = 512;  // whose sums stay in the first-level cache
  crew.run([&](int slot) {
    const Share share(columns, slot, crew.size());
    for (int64_t lo = share.lo; lo < share.hi; lo += kColumns) {
      const int64_t hi = std::min(lo + kColumns, share.hi);
      for (int64_t i = 0; i < rows; ++i) {
        const double* row = s + i * ld;
        for (int64_t j = lo; j < hi; ++j) {
          g[j] += row[j];
          magnitudes[j] += std::fabs(row[j]);
        }
      }
    }
  });
}

// And to the sums of the rows, some of them at a time: each waits for its last addition.
void add_rows(const double* s, int64_t ld, int64_t rows, int64_t columns, Crew& crew, double* g, double* magnitudes) {
  constexpr int64_t kRows = 4;
  crew.run([&](int slot) {
    const Share share((rows + kRows - 1) / kRows, slot, crew.size());
    for (int64_t first = share.lo * kRows; first < std::min(share.hi * kRows, rows); first += kRows) {
      const int64_t count = std::min(kRows, rows - first);
      const double* row[kRows];
      double sum[kRows], magnitude[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t i = first + std::min(r, count - 1);
        row[r] = s + i * ld, sum[r] = g[i], magnitude[r] = magnitudes[i];
      }
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t r = 0; r < kRows; ++r) {
          sum[r] += row[r][j];
          magnitude[r] += std::fabs(row[r][j]);
        }
      }
      for (int64_t r = 0; r < count; ++r) g[first + r] = sum[r], magnitudes[first + r] = magnitude[r];
    }
  });
}

// Distances of fp32: every tile twice, once for each of its rows.
void sum_unstored(const Rows& keys, Crew& crew, SimilarityMemory<float>& memory, float* g) {
  const int64_t n = keys.n;
  std::vector<int64_t> tokens(kTile);
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t rows = std::min<int64_t>(kTile, n - first);
    std::iota(tokens.begin(), tokens.end(), first);
    similarity_rows(keys, tokens.data(), rows, crew, memory, memory.strip);
    sum_rows(memory.strip, width_of(n), rows, n, crew, g + first, memory.sums + first);
  }
}

// fp64: every tile once. A strip of rows, from the diagonal on, goes to the sums of its columns, and then, but for the
// square at its beginning, to those of its rows: what comes before it they have from the strips before.
void sum_unstored(const Rows& keys, Crew& crew, SimilarityMemory<double>& memory, double* g) {
  const int64_t n = keys.n, ld = width_of(n);
  for (int64_t first = 0; first < n; first += kStripRows) {
    const int64_t rows = std::min(kStripRows, n - first), columns = n - first;
    const Rows rest = keys.part(first, columns);
    KeyFactors<double> factors = memory.factors;
    factors.scale += first;
    factors.inv += first;
    const PairTiles<double> tiles{row_ops<double>(), rest,          factors,  {rows},
                                  {columns},         !kSymmetric,   !kSummed, {memory.strip, ld, true},
                                  memory.metric,     memory.unscale};
    crew.run([&](int slot) { tiles.run(slot, crew.size(), memory.of_slot[slot]); });
    add_columns(memory.strip, ld, rows, columns, crew, g + first, memory.sums + first);
    add_rows(memory.strip + rows, ld, rows, columns - rows, crew, g + first, memory.sums + first);
  }
}

template <class T>
double plain_sums(const Rows& keys, const T* s, int64_t ld, Crew& crew, SimilarityMemory<T>& memory, T* g) {
  const int64_t n = keys.n;
  std::fill(g, g + n, T{0});
  std::fill(memory.sums, memory.sums + n, 0.0);
  if (!s) {
    sum_unstored(keys, crew, memory, g);
  } else if constexpr (sizeof(T) == 8) {
    add_columns(s, ld, n, n, crew, g, memory.sums);
  } else {
    sum_rows(s, ld, n, n, crew, g, memory.sums);
  }
  if constexpr (sizeof(T) == 8) std::transform(g, g + n, g, bounded<T>);
  return std::accumulate(memory.sums, memory.sums + n, 0.0);
}

// The tiles of both sides, into `to`; of all tokens with all also their sums and who is nearest.
template <class T>
void run_tiles(const Rows& keys, const Side& a, const Side& b, bool symmetric, bool summed, bool with_nearest,
               const Destination<T>& to, Crew& crew, SimilarityMemory<T>& memory, const T* packed = nullptr) {
  PairTiles<T> tiles{row_ops<T>(),
                     keys,
                     memory.factors,
                     a,
                     b,
                     symmetric,
                     summed,
                     to,
                     memory.metric,
                     memory.unscale,
                     with_nearest ? memory.penalty : nullptr,
                     packed};
  // Many threads: packed once, the keys take less than what each would pack for itself.
  const int64_t all = panels_of(a.count) * tiles.chunks() * tiles.panel_size();
  if (symmetric && crew.size() > 1 && all <= memory.slots * memory.panels_size) {
    crew.run([&](int slot) { tiles.pack_all(slot, crew.size(), memory.of_slot[slot], memory.panels); });
    tiles.packed = memory.panels;
  }
  crew.run([&](int slot) { tiles.run(slot, crew.size(), memory.of_slot[slot]); });
}

// Of distances: one power of two for all tokens of the image, from scale, where each token's own is. It brings the
// largest key into [2^48, 2^49), of fp64 [2^384, 2^385): squares of differences of up to 2^25 channels do not overflow,
// and the smallest distances keep theirs.
template <class T>
void share_scale(int64_t n, const int8_t* tier, SimilarityMemory<T>& memory) {
  constexpr int kHigh = std::numeric_limits<T>::max_exponent * 3 / 8, kMost = std::numeric_limits<T>::max_exponent - 2;
  T scale = std::numeric_limits<T>::max();
  for (int64_t i = 0; i < n; ++i) {
    if (memory.factors.scale[i] > 0) scale = std::min(scale, memory.factors.scale[i]);
  }
  const bool is_any = scale < std::numeric_limits<T>::max();  // else zeros, or no token at all
  scale = is_any ? std::ldexp(T{1}, std::min(std::ilogb(scale) + kHigh, kMost)) : T{1};
  for (int64_t i = 0; i < n; ++i) {
    memory.factors.scale[i] = scale;
    memory.factors.inv[i] = tier[i] == kValid ? T{1} : T{0};
  }
  memory.unscale = 1 / scale;
}

// penalty, and nothing found yet.
template <class T>
void begin_nearest(int64_t n, const int8_t* tier, SimilarityMemory<T>& memory) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < width_of(n); ++i) memory.penalty[i] = i < n && tier[i] == kValid ? T{0} : kLowest;
  for (int slot = 0; slot < memory.slots; ++slot) {
    std::fill(memory.of_slot[slot].nearest, memory.of_slot[slot].nearest + width_of(n), kLowest);
  }
}

template <class T>
void end_nearest(int64_t n, const int8_t* tier, const SimilarityMemory<T>& memory, T* nearest) {
  for (int64_t i = 0; i < n; ++i) {
    T most = std::numeric_limits<T>::lowest();
    for (int slot = 0; slot < memory.slots && tier[i] == kValid; ++slot) {
      most = std::max(most, memory.of_slot[slot].nearest[i]);
    }
    nearest[i] = most + T{0};  // never -0, of which a maximum takes the one or the other
  }
}

}  // namespace

template <class T>
TileMemory<T>::TileMemory(Memory& memory, T* panels, int64_t n, bool stored, bool with_nearest)
    : rows(memory.take<T>(kTile * kChunk)),
      panels(panels),
      tile(rows),  // what was packed is not needed when products are finished
      mirror(rows ? rows + kTile * kTile : nullptr),
      block(stored ? nullptr : memory.take<T>(kStreamedWidth * kStreamedWidth)),
      run(memory.take<T>(kRun)),
      g(memory.take<int64_t>(width_of(n))),
      nearest(with_nearest ? memory.take<T>(width_of(n)) : nullptr),
      magnitudes(0) {}

template <class T>
SimilarityMemory<T>::SimilarityMemory(Memory& memory, int64_t n, int slots, bool stored, Metric metric,
                                      bool with_nearest, int64_t packed_channels)
    : metric(metric),
      factors(memory, n),
      of_slot(memory.take<TileMemory<T>>(slots)),
      slots(slots),
      panels_size(panels_of_thread(n) * std::max<int64_t>(kChunk * kTile, row_ops<T>().pairs_panel)),
      panels(memory.take<T>(panels_size, slots)),
      sums(sums_are_plain() ? memory.take<double>(n) : nullptr),
      strip(sums_are_plain() && !stored ? memory.take<T>((sizeof(T) == 8 ? kStripRows : kTile) * width_of(n))
                                        : nullptr),
      penalty(with_nearest ? memory.take<T>(width_of(n)) : nullptr),
      packed(packed_channels > 0 ? memory.take<T>((packed_channels + kChunk - 1) / kChunk * panels_of(n),
                                                  std::max<int64_t>(kChunk * kTile, row_ops<T>().pairs_panel))
                                 : nullptr) {
  for (int slot = 0; slot < slots; ++slot) {
    const TileMemory<T> of_this(memory, panels ? panels + slot * panels_size : nullptr, n, stored, with_nearest);
    if (of_slot) new (of_slot + slot) TileMemory<T>(of_this);
  }
}

template <class T>
void measure_keys(const Rows& keys, const T* scores, const uint8_t* mask, Crew& crew, SimilarityMemory<T>& memory,
                  int8_t* tier) {
  crew.run([&](int slot) {
    TileMemory<T>& mine = memory.of_slot[slot];
    std::fill(mine.g, mine.g + width_of(keys.n), 0);
    const Share share(keys.n, slot, crew.size());
    for (int64_t i = share.lo; i < share.hi; ++i) {
      const bool finite_score = !scores || std::isfinite(scores[i]);
      measure_token(keys, i, finite_score, mask, mine.run, tier + i, memory.factors.scale + i, memory.factors.inv + i);
    }
  });
  if (memory.metric == Metric::kNegL2) share_scale(keys.n, tier, memory);
}

template <class T>
void similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, Crew& crew, SimilarityMemory<T>& memory,
                      T* s, T* sbar, T* g, int8_t* tier, T* nearest, int64_t ld) {
  const int64_t n = keys.n;
  if (ld == 0) ld = n;
  measure_keys(keys, scores, mask, crew, memory, tier);
  if (nearest) begin_nearest(n, tier, memory);
  const bool fixed = !memory.sums_are_plain();
  if (s || fixed || nearest) {
    run_tiles<T>(keys, {n}, {n}, kSymmetric, fixed, nearest != nullptr, {s, ld, false}, crew, memory);
  }
  const double magnitude = fixed ? add_sums(memory, n, g) : plain_sums(keys, s, ld, crew, memory, g);
  const auto valid = static_cast<double>(std::count(tier, tier + n, kValid));
  const double mean = valid > 0 ? magnitude / (valid * valid) : 0;
  *sbar = static_cast<T>(std::min<double>(mean, std::numeric_limits<T>::max()));
  if (nearest) end_nearest(n, tier, memory, nearest);
}

template <class T>
void pack_keys(const Rows& keys, Crew& crew, SimilarityMemory<T>& memory) {
  const Side all{keys.n};
  const PairTiles<T> tiles{row_ops<T>(), keys, memory.factors, all, all, !kSymmetric, !kSummed, {}, memory.metric};
  crew.run([&](int slot) { tiles.pack_all(slot, crew.size(), memory.of_slot[slot], memory.packed); });
}

template <class T>
void similarity_diagonal(const Rows& keys, Crew& crew, SimilarityMemory<T>& memory, T* diagonal) {
  crew.run([&](int slot) {
    T square[kTile * kTile];
    const Share share(panels_of(keys.n), slot, crew.size());
    for (int64_t panel = share.lo; panel < share.hi; ++panel) {
      const int64_t first = panel * kTile;
      const Side side{std::min<int64_t>(kTile, keys.n - first)};
      const Rows some = keys.part(first, side.count);
      KeyFactors<T> factors = memory.factors;
      factors.scale += first;
      factors.inv += first;
      const PairTiles<T> tiles{row_ops<T>(),          some,          factors,       side, side, kSymmetric, !kSummed,
                               {square, kTile, true}, memory.metric, memory.unscale};
      tiles.run(0, 1, memory.of_slot[slot]);
      for (int64_t i = 0; i < side.count; ++i) diagonal[first + i] = square[i * (kTile + 1)];
    }
  });
}

template <class T>
void similarity_among(const Rows& keys, const int64_t* tokens, int64_t count, Crew& crew, SimilarityMemory<T>& memory,
                      T* square) {
  const Side side{count, tokens};
  run_tiles<T>(keys, side, side, kSymmetric, !kSummed, false, {square, count, false}, crew, memory);
}

template <class T>
void similarity_rows(const Rows& keys, const int64_t* tokens, int64_t count, Crew& crew, SimilarityMemory<T>& memory,
                     T* rows) {
  const Side some{count, tokens}, all{keys.n};
  run_tiles<T>(keys, some, all, !kSymmetric, !kSummed, false, {rows, width_of(keys.n), true}, crew, memory,
               memory.packed);
}

#define CONDENSE_INSTANTIATE(T)                                                                                     \
  template struct TileMemory<T>;                                                                                    \
  template struct SimilarityMemory<T>;                                                                              \
  template void measure_token<T>(const Rows&, int64_t, bool, const uint8_t*, T*, int8_t*, T*, T*);                  \
  template void measure_keys<T>(const Rows&, const T*, const uint8_t*, Crew&, SimilarityMemory<T>&, int8_t*);       \
  template void similarity_image<T>(const Rows&, const T*, const uint8_t*, Crew&, SimilarityMemory<T>&, T*, T*, T*, \
                                    int8_t*, T*, int64_t);                                                          \
  template void pack_keys<T>(const Rows&, Crew&, SimilarityMemory<T>&);                                             \
  template void similarity_diagonal<T>(const Rows&, Crew&, SimilarityMemory<T>&, T*);                               \
  template void similarity_among<T>(const Rows&, const int64_t*, int64_t, Crew&, SimilarityMemory<T>&, T*);         \
  template void similarity_rows<T>(const Rows&, const int64_t*, int64_t, Crew&, SimilarityMemory<T>&, T*);
CONDENSE_INSTANTIATE(float)
CONDENSE_INSTANTIATE(double)
#undef CONDENSE_INSTANTIATE

namespace {

using Pairs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // s, sbar, g, tier, nearest

// What the operators are given beside keys, for each token: [B, N] or [T].
template <class T>
struct Arguments {
  Arguments(const std::optional<Tensor>& scores, const std::optional<Tensor>& mask, Metric metric, bool with_nearest)
      : scores(contiguous_as("scores", scores, kScalarType<T>)),
        mask(contiguous_as("mask", mask, ScalarType::Bool)),
        metric(metric),
        with_nearest(with_nearest) {}
  std::optional<Tensor> scores, mask;
  Metric metric;
  bool with_nearest;
};

template <class T>
Pairs similarity_as(const Tensor& keys, const Arguments<T>& arguments) {
  const int64_t B = keys.size(0), N = keys.size(1);
  const Tensor s = empty("s", {B, N, N}, kScalarType<T>);
  const Tensor sbar = empty("sbar", {B}, kScalarType<T>);
  const Tensor g = empty("g", {B, N}, kScalarType<T>);
  const Tensor tier = empty("tier", {B, N}, ScalarType::Char);
  const Tensor nearest = arguments.with_nearest ? empty("nearest", {B, N}, kScalarType<T>) : g;
  const auto pieces = [&](Memory& memory, int slots) {
    return std::pair{Gathered(memory, rows_of(keys), N),
                     SimilarityMemory<T>(memory, N, slots, true, arguments.metric, arguments.with_nearest)};
  };
  for_each_image(B, similarity_work(N, keys.size(2)), pieces, [&](int64_t b, auto& taken, Crew& crew) {
    auto& [gathered, memory] = taken;
    similarity_image<T>(gathered.of(rows_of(keys, b), crew), row_of<T>(arguments.scores, b, N),
                        row_of<uint8_t>(arguments.mask, b, N), crew, memory, output<T>(s) + b * N * N,
                        output<T>(sbar) + b, output<T>(g) + b * N, output<int8_t>(tier) + b * N,
                        arguments.with_nearest ? output<T>(nearest) + b * N : nullptr);
  });
  return {s, sbar, g, tier, nearest};
}

bool check_options(const Tensor& keys, const std::optional<Tensor>& scores, const std::optional<Tensor>& mask,
                   const char* axes, const std::vector<int64_t>& tokens) {
  if (scores) {
    check_shape("scores", *scores, axes, tokens);
    check_floating("scores", *scores);
  }
  if (mask) {
    check_shape("mask", *mask, axes, tokens);
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  return is_double(keys) || (scores && is_double(*scores));
}

Pairs pairs_of(const Tensor& keys, const std::optional<Tensor>& scores, const std::optional<Tensor>& mask,
               Metric metric, bool with_nearest) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
  check_num_tokens("keys", keys);
  check_not_empty("keys", keys, 2, "channel");
  const bool wide = check_options(keys, scores, mask, "B N", {keys.size(0), keys.size(1)});
  return wide ? similarity_as<double>(keys, {scores, mask, metric, with_nearest})
              : similarity_as<float>(keys, {scores, mask, metric, with_nearest});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity(const Tensor& keys, std::optional<Tensor> scores,
                                                      std::optional<Tensor> mask) {
  const auto [s, sbar, g, tier, _] = pairs_of(keys, scores, mask, Metric::kCosine, false);
  return {s, sbar, g, tier};
}

Pairs similarity_and_nearest(const Tensor& keys, std::optional<Tensor> scores, std::optional<Tensor> mask,
                             Text metric) {
  return pairs_of(keys, scores, mask, metric_of(metric), true);
}

// Rows of s are as long as the longest segment's: its own tokens, then zeros.
template <class T>
Pairs similarity_varlen_as(const Tensor& keys, const Tensor& cu_seqlens, int64_t max_seqlen,
                           const Arguments<T>& arguments) {
  const int64_t tokens = keys.size(0), segments = cu_seqlens.size(0) - 1;
  const Tensor s = empty("s", {tokens, max_seqlen}, kScalarType<T>);
  const Tensor sbar = empty("sbar", {segments}, kScalarType<T>);
  const Tensor g = empty("g", {tokens}, kScalarType<T>);
  const Tensor tier = empty("tier", {tokens}, ScalarType::Char);
  const Tensor nearest = empty("nearest", {tokens}, kScalarType<T>);
  std::fill_n(output<T>(sbar), segments, T{0});
  const auto fill_until = [&](int64_t first, int64_t end) {  // tokens of no segment
    std::fill_n(output<T>(s) + first * max_seqlen, (end - first) * max_seqlen, T{0});
    std::fill(output<T>(g) + first, output<T>(g) + end, T{0});
    std::fill(output<int8_t>(tier) + first, output<int8_t>(tier) + end, kMasked);
    std::fill(output<T>(nearest) + first, output<T>(nearest) + end, std::numeric_limits<T>::lowest());
  };
  const std::vector<Part> parts = parts_of(cu_seqlens, std::nullopt, tokens, 0, max_seqlen);
  int64_t end = 0;
  Work work = 0;
  for (const Part& part : parts) {
    fill_until(end, part.first_token);
    end = part.first_token + part.num_tokens;
    work += similarity_work(part.num_tokens, keys.size(1));
  }
  fill_until(end, tokens);
  const auto count = static_cast<int64_t>(parts.size());
  const auto pieces = [&](Memory& memory, int slots) {
    return std::pair{Gathered(memory, rows_of(keys), longest(parts)),
                     SimilarityMemory<T>(memory, longest(parts), slots, true, arguments.metric, true)};
  };
  for_each_image(count, work / count, pieces, [&](int64_t p, auto& taken, Crew& crew) {
    auto& [gathered, memory] = taken;
    const Part& part = parts[p];
    const int64_t first = part.first_token, n = part.num_tokens;
    T* rows = output<T>(s) + first * max_seqlen;
    similarity_image<T>(gathered.of(rows_of(keys).part(first, n), crew), row_of<T>(arguments.scores, first, 1),
                        row_of<uint8_t>(arguments.mask, first, 1), crew, memory, rows, output<T>(sbar) + part.number,
                        output<T>(g) + first, output<int8_t>(tier) + first, output<T>(nearest) + first, max_seqlen);
    for (int64_t i = 0; i < n; ++i) std::fill_n(rows + i * max_seqlen + n, max_seqlen - n, T{0});
  });
  return {s, sbar, g, tier, nearest};
}

Pairs similarity_varlen(const Tensor& keys, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<Tensor> scores,
                        std::optional<Tensor> mask, Text metric) {
  check_rank("keys", keys, "T Dk", 2);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "channel");
  check_segments(cu_seqlens, max_seqlen);
  const bool wide = check_options(keys, scores, mask, "T", {keys.size(0)});
  return wide ? similarity_varlen_as<double>(keys, cu_seqlens, max_seqlen, {scores, mask, metric_of(metric), true})
              : similarity_varlen_as<float>(keys, cu_seqlens, max_seqlen, {scores, mask, metric_of(metric), true});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("similarity", TORCH_BOX(&similarity));
  m.impl("similarity_and_nearest", TORCH_BOX(&similarity_and_nearest));
  m.impl("similarity_varlen", TORCH_BOX(&similarity_varlen));
}

}  // namespace condense
