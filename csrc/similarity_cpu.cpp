// Similarity of all token pairs (Eq. 3), cosines or negated distances, in tiles of kTile x kTile of which the upper
// ones are computed.
//
// A library's matrix product would not do: its bits depend on the batch, on the number of threads and on the place of
// a token in the matrix, which breaks ties between equal tokens. Here a tile has one shape and one order of
// summation, and belongs to one thread.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "checks.h"
#include "packed.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

constexpr int kWholePanels = 12;  // up to here a thread packs the whole image once a chunk (576 tokens: 295 KB)
constexpr int kBlockPanels = 8;   // above, macro-blocks of 384 x 384 tokens
constexpr int kBlockWidth = kBlockPanels * kTile;
constexpr bool kSymmetric = true, kSummed = true;
constexpr int64_t kRun = 1024;  // channels converted at a time

int64_t panels_of(int64_t n) { return width_of(n) / kTile; }

// The tokens along one side of a product: all, or those that are listed.
struct Side {
  int64_t count;
  const int64_t* tokens = nullptr;

  int64_t at(int64_t i) const { return tokens ? tokens[i] : i; }
  int64_t in_panel(int64_t panel) const { return std::min<int64_t>(kTile, count - panel * kTile); }
};

// Where tiles go.
template <class T>
struct Destination {
  T* data;     // [a, b]; null: they are dropped once they are summed
  int64_t ld;  // length of a row
  bool roomy;  // the last tiles may be written whole
};

// Similarities of the tokens of one side with those of the other, tile by tile. A cosine's bits depend on its two keys
// alone, those of a distance on the scale of the image besides: not on the sides, on the place in the tile, or on where
// the tile goes.
template <class T>
struct PairTiles {
  const RowOps<T>& ops;
  const Rows& keys;
  const KeyFactors<T>& factors;
  Side a, b;
  bool symmetric;  // a is b: the upper tiles are computed, and mirrored
  bool summed;     // into the fixed-point sums
  Destination<T> to;
  Metric metric = Metric::kCosine;
  T unscale = 1;               // of distances
  const T* penalty = nullptr;  // null: nobody asks who is nearest

  bool is_distance() const { return metric == Metric::kNegL2; }
  bool in_pairs() const { return ops.multiply_pairs && keys.dtype == Dtype::kBFloat16 && !is_distance(); }
  int64_t panel_size() const { return in_pairs() ? ops.pairs_panel : kChunk * kTile; }

  // kTile tokens of channels [c, c + channels), scaled, zeros beyond; `depth` numbers or pairs a token.
  void pack(const Side& side, int64_t panel, int64_t c, int64_t channels, int64_t depth, TileMemory<T>& memory,
            T* packed) const {
    const int64_t filled = side.in_panel(panel), padded = (depth + kStep - 1) / kStep * kStep;
    for (int64_t r = 0; r < kTile; ++r) {
      T* row = memory.rows + r * kChunk;
      const int64_t i = r < filled ? side.at(panel * kTile + r) : -1;
      const int64_t length = i >= 0 && factors.inv[i] != 0 ? depth : 0;
      if (length > 0 && in_pairs()) {
        ops.load_pairs(keys.at(i, c), keys.stride_d, channels, factors.scale[i], row);
      } else if (length > 0) {
        ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, channels, factors.scale[i], row);
      }
      std::fill(row + length, row + padded, T{0});
    }
    (in_pairs() ? ops.pack_pairs : ops.pack_panel)(memory.rows, padded, packed);
  }

  // Adds one chunk's products to a tile of `rows` x `columns` tokens, which lies in rows of ld_tile.
  void multiply(const T* pa, const T* pb, int64_t depth, int64_t rows, int64_t columns, T* sums, int64_t ld_tile,
                bool accumulate, TileMemory<T>& memory) const {
    const auto multiply_tile = is_distance() ? ops.distance_tile : in_pairs() ? ops.multiply_pairs : ops.multiply_tile;
    if (to.roomy || !to.data || (rows == kTile && columns == kTile)) {
      return multiply_tile(pa, pb, depth, rows, sums, ld_tile, accumulate);
    }
    T* tile = memory.tile;
    multiply_tile(pa, pb, depth, rows, tile, kTile, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        sums[i * ld_tile + j] = accumulate ? sums[i * ld_tile + j] + tile[i * kTile + j] : tile[i * kTile + j];
      }
    }
  }

  void load_inverses(const Side& side, int64_t panel, T* inv) const {
    const int64_t filled = side.in_panel(panel);
    for (int64_t r = 0; r < kTile; ++r) inv[r] = r < filled ? factors.inv[side.at(panel * kTile + r)] : T{0};
  }

  // Scales tile (I, J), puts it where it belongs, on both sides of the diagonal, and adds it to the sums.
  void finish(int64_t I, int64_t J, T* sums, int64_t ld_tile, TileMemory<T>& memory) const {
    const int64_t rows = a.in_panel(I), columns = b.in_panel(J);
    const bool mirrored = symmetric && I != J;
    T *tile = memory.tile, *mirror = memory.mirror;
    T inv_i[kTile], inv_j[kTile];
    load_inverses(a, I, inv_i);
    load_inverses(b, J, inv_j);
    if (rows < kTile || columns < kTile) std::memset(tile, 0, kTile * kTile * sizeof(T));
    for (int64_t i = 0; i < rows; ++i) std::memcpy(tile + i * kTile, sums + i * ld_tile, columns * sizeof(T));
    if (is_distance()) {  // squares of tokens without similarities become 0 before their root is taken
      ops.scale_tile(tile, inv_i, inv_j, nullptr);
      ops.negate_root_tile(tile, unscale);
      std::fill(inv_i, inv_i + kTile, T{1});
      std::fill(inv_j, inv_j + kTile, T{1});
    }
    ops.scale_tile(tile, inv_i, inv_j, to.data && mirrored ? mirror : nullptr);
    if (to.data) {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(sums + i * ld_tile, tile + i * kTile, columns * sizeof(T));
      for (int64_t j = 0; j < columns && mirrored; ++j) {
        std::memcpy(to.data + (J * kTile + j) * to.ld + I * kTile, mirror + j * kTile, rows * sizeof(T));
      }
    }
    if constexpr (sizeof(T) == 4) {
      if (summed) {
        const int64_t magnitudes = ops.sum_tile(tile, memory.g + I * kTile, mirrored ? memory.g + J * kTile : nullptr);
        memory.magnitudes += mirrored ? 2 * magnitudes : magnitudes;
      }
    }
    if (!penalty) return;
    for (int64_t i = 0; I == J && i < kTile; ++i) tile[i * (kTile + 1)] = -std::numeric_limits<T>::infinity();
    ops.nearest_tile(tile, penalty + I * kTile, penalty + J * kTile, memory.nearest + I * kTile,
                     mirrored ? memory.nearest + J * kTile : nullptr);
  }

  // The tiles [lo, hi) of a block of panels [I0, I1) x [J0, J1), counted along its rows; I <= J where symmetric.
  void block(int64_t I0, int64_t I1, int64_t J0, int64_t J1, int64_t lo, int64_t hi, TileMemory<T>& memory) const {
    const bool diagonal = symmetric && I0 == J0;
    T* pa = memory.panels;
    T* pb = diagonal ? pa : pa + (I1 - I0) * panel_size();
    const int64_t ld_tile = to.data ? to.ld : kBlockWidth;
    const auto for_each_tile = [&](const auto& f) {
      int64_t t = 0;
      for (int64_t I = I0; I < I1; ++I) {
        for (int64_t J = diagonal ? I : J0; J < J1; ++J, ++t) {
          if (t < lo || t >= hi) continue;
          f(I, J,
            to.data ? to.data + I * kTile * to.ld + J * kTile
                    : memory.block + ((I - I0) * kBlockWidth + (J - J0)) * kTile);
        }
      }
    };
    int64_t first_row = I1, last_row = I0, first_column = J1, last_column = J0;
    for_each_tile([&](int64_t I, int64_t J, T*) {
      first_row = std::min(first_row, I), last_row = std::max(last_row, I);
      first_column = std::min(first_column, J), last_column = std::max(last_column, J);
    });
    const int64_t most = in_pairs() ? 2 * kChunk : kChunk;
    for (int64_t c = 0; c < keys.d; c += most) {
      const int64_t channels = std::min(most, keys.d - c), depth = in_pairs() ? (channels + 1) / 2 : channels;
      const int64_t last_packed = diagonal ? std::max(last_row, last_column) : last_row;
      for (int64_t I = first_row; I <= last_packed; ++I) {
        pack(a, I, c, channels, depth, memory, pa + (I - I0) * panel_size());
      }
      for (int64_t J = first_column; J <= last_column && !diagonal; ++J) {
        pack(b, J, c, channels, depth, memory, pb + (J - J0) * panel_size());
      }
      for_each_tile([&](int64_t I, int64_t J, T* sums) {
        multiply(pa + (I - I0) * panel_size(), pb + (J - J0) * panel_size(), depth, a.in_panel(I), b.in_panel(J), sums,
                 ld_tile, c > 0, memory);
      });
    }
    for_each_tile([&](int64_t I, int64_t J, T* sums) { finish(I, J, sums, ld_tile, memory); });
  }

  // This slot's equal share of all tiles, taken block by block.
  void run(int slot, int slots, TileMemory<T>& memory) const {
    const int64_t rows = panels_of(a.count), columns = panels_of(b.count);
    const int64_t side = to.data && symmetric && rows <= kWholePanels ? rows : kBlockPanels;
    const Share share(symmetric ? rows * (rows + 1) / 2 : rows * columns, slot, slots);
    int64_t t = 0;  // tiles before this block
    for (int64_t I0 = 0; I0 < rows; I0 += side) {
      for (int64_t J0 = symmetric ? I0 : 0; J0 < columns; J0 += side) {
        const int64_t I1 = std::min(I0 + side, rows), J1 = std::min(J0 + side, columns);
        const int64_t tiles = symmetric && I0 == J0 ? (I1 - I0) * (I1 - I0 + 1) / 2 : (I1 - I0) * (J1 - J0);
        const int64_t lo = std::max(share.lo - t, int64_t{0}), hi = std::min(share.hi - t, tiles);
        if (lo < hi) block(I0, I1, J0, J1, lo, hi, memory);
        t += tiles;
      }
    }
  }
};

// tier, scale and inv of token i; row holds kRun channels.
template <class T>
void measure_token(const Rows& keys, int64_t i, bool finite_score, const uint8_t* mask, T* row, int8_t* tier, T* scale,
                   T* inv) {
  const RowOps<T>& ops = row_ops<T>();
  *scale = *inv = 0;
  *tier = kMasked;
  if (mask && mask[i] == 0) return;
  T magnitude = 0;
  for (int64_t c = 0; c < keys.d; c += kRun) {
    const int64_t depth = std::min(kRun, keys.d - c);
    ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, depth, T{1}, row);
    magnitude = std::max(magnitude, ops.max_magnitude(row, depth));
  }
  *tier = finite_score && magnitude <= std::numeric_limits<T>::max() ? kValid : kNonFinite;
  if (*tier != kValid || magnitude == 0) return;
  constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;  // 126: the factor itself stays a normal number
  *scale = std::ldexp(T{1}, std::clamp(-std::ilogb(magnitude), -kLimit, kLimit));
  double squares = 0;
  for (int64_t c = 0; c < keys.d; c += kRun) {
    const int64_t depth = std::min(kRun, keys.d - c);
    ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, depth, *scale, row);
    squares += ops.sum_of_squares(row, depth);
  }
  *inv = static_cast<T>(1 / std::sqrt(squares));
}

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

// Of fp64 and of distances, the sums are plain, in fp64: each row's and then the rows' in index order.
template <class T>
void sum_rows(const T* s, int64_t ld, int64_t rows, int64_t n, Crew& crew, T* g, double* magnitudes) {
  crew.run([&](int slot) {
    const Share share(rows, slot, crew.size());
    for (int64_t i = share.lo; i < share.hi; ++i) {
      double sum = 0;
      magnitudes[i] = 0;
      for (int64_t j = 0; j < n; ++j) {
        sum += s[i * ld + j];
        magnitudes[i] += std::fabs(s[i * ld + j]);
      }
      constexpr double kMax = std::numeric_limits<T>::max();
      g[i] = static_cast<T>(sum > kMax ? kMax : sum < -kMax ? -kMax : sum);
    }
  });
}

template <class T>
double plain_sums(const Rows& keys, const T* s, Crew& crew, SimilarityMemory<T>& memory, T* g) {
  const int64_t n = keys.n;
  if (s) {
    sum_rows(s, n, n, n, crew, g, memory.sums);
  } else {  // every tile twice, once for each of its rows
    std::vector<int64_t> tokens(kTile);
    for (int64_t first = 0; first < n; first += kTile) {
      const int64_t rows = std::min<int64_t>(kTile, n - first);
      std::iota(tokens.begin(), tokens.end(), first);
      similarity_rows(keys, tokens.data(), rows, crew, memory, memory.strip);
      sum_rows(memory.strip, width_of(n), rows, n, crew, g + first, memory.sums + first);
    }
  }
  return std::accumulate(memory.sums, memory.sums + n, 0.0);
}

// The tiles of both sides, into `to`; of all tokens with all also their sums and who is nearest.
template <class T>
void run_tiles(const Rows& keys, const Side& a, const Side& b, bool symmetric, bool summed, bool with_nearest,
               const Destination<T>& to, Crew& crew, SimilarityMemory<T>& memory) {
  const PairTiles<T> tiles{row_ops<T>(),
                           keys,
                           memory.factors,
                           a,
                           b,
                           symmetric,
                           summed,
                           to,
                           memory.metric,
                           memory.unscale,
                           with_nearest ? memory.penalty : nullptr};
  crew.run([&](int slot) { tiles.run(slot, crew.size(), memory.of_slot[slot]); });
}

// Of distances: one power of two for all tokens of the image, found in scale, where each token's own is.
template <class T>
void share_scale(int64_t n, const int8_t* tier, SimilarityMemory<T>& memory) {
  T least = std::numeric_limits<T>::max();
  for (int64_t i = 0; i < n; ++i) {
    if (memory.factors.scale[i] > 0) least = std::min(least, memory.factors.scale[i]);
  }
  if (least == std::numeric_limits<T>::max()) least = 1;  // zeros, or no token at all
  for (int64_t i = 0; i < n; ++i) {
    memory.factors.scale[i] = least;
    memory.factors.inv[i] = tier[i] == kValid ? T{1} : T{0};
  }
  memory.unscale = 1 / least;
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
    nearest[i] = most;
  }
}

}  // namespace

template <class T>
TileMemory<T>::TileMemory(Memory& memory, int64_t n, bool stored, bool with_nearest)
    : rows(memory.take<T>(kTile * kChunk)),
      panels(memory.take<T>(std::min<int64_t>(2 * panels_of(n), std::max(kWholePanels, 2 * kBlockPanels)) *
                            std::max<int64_t>(kChunk * kTile, row_ops<T>().pairs_panel))),
      tile(rows),  // what was packed is not needed when products are finished
      mirror(rows ? rows + kTile * kTile : nullptr),
      block(stored ? nullptr : memory.take<T>(kBlockWidth * kBlockWidth)),
      run(memory.take<T>(kRun)),
      g(memory.take<int64_t>(width_of(n))),
      nearest(with_nearest ? memory.take<T>(width_of(n)) : nullptr),
      magnitudes(0) {}

template <class T>
SimilarityMemory<T>::SimilarityMemory(Memory& memory, int64_t n, int slots, bool stored, Metric metric,
                                      bool with_nearest)
    : metric(metric),
      factors(memory, n),
      of_slot(memory.take<TileMemory<T>>(slots)),
      slots(slots),
      sums(sums_are_plain() ? memory.take<double>(n) : nullptr),
      strip(sums_are_plain() && !stored ? memory.take<T>(kTile * width_of(n)) : nullptr),
      penalty(with_nearest ? memory.take<T>(width_of(n)) : nullptr) {
  for (int slot = 0; slot < slots; ++slot) {
    const TileMemory<T> of_this(memory, n, stored, with_nearest);
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
                      T* s, T* sbar, T* g, int8_t* tier, T* nearest) {
  const int64_t n = keys.n;
  measure_keys(keys, scores, mask, crew, memory, tier);
  if (nearest) begin_nearest(n, tier, memory);
  const bool fixed = !memory.sums_are_plain();
  if (s || fixed || nearest) {
    run_tiles<T>(keys, {n}, {n}, kSymmetric, fixed, nearest != nullptr, {s, n, false}, crew, memory);
  }
  const double magnitude = fixed ? add_sums(memory, n, g) : plain_sums(keys, s, crew, memory, g);
  const auto valid = static_cast<double>(std::count(tier, tier + n, kValid));
  const double mean = valid > 0 ? magnitude / (valid * valid) : 0;
  *sbar = static_cast<T>(std::min<double>(mean, std::numeric_limits<T>::max()));
  if (nearest) end_nearest(n, tier, memory, nearest);
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
  run_tiles<T>(keys, some, all, !kSymmetric, !kSummed, false, {rows, width_of(keys.n), true}, crew, memory);
}

#define CONDENSE_INSTANTIATE(T)                                                                                     \
  template struct TileMemory<T>;                                                                                    \
  template struct SimilarityMemory<T>;                                                                              \
  template void measure_keys<T>(const Rows&, const T*, const uint8_t*, Crew&, SimilarityMemory<T>&, int8_t*);       \
  template void similarity_image<T>(const Rows&, const T*, const uint8_t*, Crew&, SimilarityMemory<T>&, T*, T*, T*, \
                                    int8_t*, T*);                                                                   \
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
    return SimilarityMemory<T>(memory, N, slots, true, arguments.metric, arguments.with_nearest);
  };
  for_each_image(B, static_cast<double>(N) * N * keys.size(2), pieces, [&](int64_t b, auto& memory, Crew& crew) {
    similarity_image<T>(rows_of(keys, b), row_of<T>(arguments.scores, b, N), row_of<uint8_t>(arguments.mask, b, N),
                        crew, memory, output<T>(s) + b * N * N, output<T>(sbar) + b, output<T>(g) + b * N,
                        output<int8_t>(tier) + b * N, arguments.with_nearest ? output<T>(nearest) + b * N : nullptr);
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
                             std::string metric) {
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
  std::fill(output<T>(s), output<T>(s) + tokens * max_seqlen, T{0});
  std::fill(output<T>(sbar), output<T>(sbar) + segments, T{0});
  std::fill(output<T>(g), output<T>(g) + tokens, T{0});
  std::fill(output<int8_t>(tier), output<int8_t>(tier) + tokens, kMasked);
  std::fill(output<T>(nearest), output<T>(nearest) + tokens, std::numeric_limits<T>::lowest());
  const std::vector<Part> parts = parts_of(cu_seqlens, std::nullopt, tokens, 0, max_seqlen);
  const int64_t most = longest(parts);
  const double work = static_cast<double>(most) * most * keys.size(1);
  const Schedule schedule = Schedule::for_batch(static_cast<int64_t>(parts.size()), work);
  const auto take = [&](Memory& memory, int64_t n) {
    T* square = memory.take<T>(n * n);
    return std::pair{square, SimilarityMemory<T>(memory, n, schedule.slots, true, arguments.metric, true)};
  };
  Memory count;
  take(count, most);
  const Workspace workspace(schedule.at_a_time * count.taken());
  for_each_image(static_cast<int64_t>(parts.size()), schedule, workspace, count.taken(),
                 [&](int64_t p, Memory memory, Crew& crew) {
                   const Part& part = parts[p];
                   const int64_t first = part.first_token, n = part.num_tokens;
                   auto [square, similarity] = take(memory, n);
                   similarity_image<T>(rows_of(keys).part(first, n), row_of<T>(arguments.scores, first, 1),
                                       row_of<uint8_t>(arguments.mask, first, 1), crew, similarity, square,
                                       output<T>(sbar) + part.number, output<T>(g) + first,
                                       output<int8_t>(tier) + first, output<T>(nearest) + first);
                   for (int64_t i = 0; i < n; ++i) {
                     std::copy_n(square + i * n, n, output<T>(s) + (first + i) * max_seqlen);
                   }
                 });
  return {s, sbar, g, tier, nearest};
}

Pairs similarity_varlen(const Tensor& keys, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<Tensor> scores,
                        std::optional<Tensor> mask, std::string metric) {
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
