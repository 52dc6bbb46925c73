// Cosine similarity of all token pairs (Eq. 3), in tiles of kTile x kTile of which the upper ones are computed.
//
// A library's matrix product would not do: its bits depend on the batch, on the number of threads and on the place of
// a token in the matrix, which breaks ties between equal tokens. Here a tile has one shape and one order of
// summation, and belongs to one thread.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

constexpr int kWholePanels = 12;  // up to here a thread packs the whole image once a chunk (576 tokens: 295 KB)
constexpr int kBlockPanels = 8;   // above, macro-blocks of 384 x 384 tokens

int64_t panels_of(int64_t n) { return (n + kTile - 1) / kTile; }

// What a thread works in.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n)
      : rows(kTile * kChunk),
        panels(std::min<int64_t>(panels_of(n), std::max(kWholePanels, 2 * kBlockPanels)) * kChunk * kTile),
        tile(kTile * kTile),
        mirror(kTile * kTile),
        g(panels_of(n) * kTile) {
    std::memset(g.get(), 0, panels_of(n) * kTile * sizeof(int64_t));
  }
  Buffer<T> rows, panels, tile, mirror;
  Buffer<int64_t> g;  // fixed point
  int64_t magnitudes = 0;
};

template <class T>
struct Gram {
  const RowOps<T>& ops;
  const Rows& keys;
  const T* scale;  // [n] power of two, exact
  const T* inv;    // [padded n] 1 / norm of the scaled key, 0 for a token without similarities
  T* s;            // [n, n]

  int64_t n() const { return keys.n; }

  // kTile tokens of channels [c, c + depth), scaled, zeros beyond.
  void pack(int64_t panel, int64_t c, int64_t depth, Scratch<T>& scratch, T* to) const {
    for (int64_t r = 0, i = panel * kTile; r < kTile; ++r, ++i) {
      T* row = scratch.rows.get() + r * kChunk;
      const int64_t filled = i < n() && inv[i] != 0 ? depth : 0;
      if (filled > 0) ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, filled, scale[i], row);
      std::fill(row + filled, row + kChunk, T{0});
    }
    ops.pack_panel(scratch.rows.get(), to);
  }

  // Adds one chunk's products to tile (I, J) of s.
  void multiply(int64_t I, int64_t J, const T* a, const T* b, int64_t depth, bool accumulate,
                Scratch<T>& scratch) const {
    const int64_t i0 = I * kTile, j0 = J * kTile;
    const int64_t rows = std::min<int64_t>(kTile, n() - i0), columns = std::min<int64_t>(kTile, n() - j0);
    T* to = s + i0 * n() + j0;
    if (rows == kTile && columns == kTile) return ops.multiply_tile(a, b, depth, to, n(), accumulate);
    T* tile = scratch.tile.get();
    ops.multiply_tile(a, b, depth, tile, kTile, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        to[i * n() + j] = accumulate ? to[i * n() + j] + tile[i * kTile + j] : tile[i * kTile + j];
      }
    }
  }

  // Scales tile (I, J), stores it on both sides of the diagonal and adds it to the fixed-point sums.
  void finish(int64_t I, int64_t J, Scratch<T>& scratch) const {
    const int64_t i0 = I * kTile, j0 = J * kTile;
    const int64_t rows = std::min<int64_t>(kTile, n() - i0), columns = std::min<int64_t>(kTile, n() - j0);
    T *tile = scratch.tile.get(), *mirror = scratch.mirror.get();
    if (rows < kTile || columns < kTile) std::memset(tile, 0, kTile * kTile * sizeof(T));
    for (int64_t i = 0; i < rows; ++i) std::memcpy(tile + i * kTile, s + (i0 + i) * n() + j0, columns * sizeof(T));
    ops.scale_tile(tile, inv + i0, inv + j0, mirror);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(s + (i0 + i) * n() + j0, tile + i * kTile, columns * sizeof(T));
    if (I != J) {
      for (int64_t j = 0; j < columns; ++j) std::memcpy(s + (j0 + j) * n() + i0, mirror + j * kTile, rows * sizeof(T));
    }
    if constexpr (sizeof(T) == 4) {
      int64_t* g = scratch.g.get();
      const int64_t magnitudes = ops.sum_tile(tile, g + i0, I == J ? nullptr : g + j0);
      scratch.magnitudes += I == J ? magnitudes : 2 * magnitudes;
    }
  }

  // The tiles [lo, hi) of a macro-block of panels [I0, I1) x [J0, J1), counted along its rows, I <= J.
  void block(int64_t I0, int64_t I1, int64_t J0, int64_t J1, int64_t lo, int64_t hi, Scratch<T>& scratch) const {
    const bool diagonal = I0 == J0;
    T* a = scratch.panels.get();
    T* b = diagonal ? a : a + (I1 - I0) * kChunk * kTile;
    const auto for_each_tile = [&](const auto& f) {
      int64_t t = 0;
      for (int64_t I = I0; I < I1; ++I) {
        for (int64_t J = diagonal ? I : J0; J < J1; ++J, ++t) {
          if (lo <= t && t < hi) f(I, J);
        }
      }
    };
    int64_t first_row = I1, last_row = I0, first_column = J1, last_column = J0;
    for_each_tile([&](int64_t I, int64_t J) {
      first_row = std::min(first_row, I), last_row = std::max(last_row, I);
      first_column = std::min(first_column, J), last_column = std::max(last_column, J);
    });
    for (int64_t c = 0; c < keys.d; c += kChunk) {
      const int64_t depth = std::min<int64_t>(kChunk, keys.d - c);
      const int64_t last_packed = diagonal ? std::max(last_row, last_column) : last_row;
      for (int64_t I = first_row; I <= last_packed; ++I) pack(I, c, depth, scratch, a + (I - I0) * kChunk * kTile);
      for (int64_t J = first_column; J <= last_column && !diagonal; ++J) {
        pack(J, c, depth, scratch, b + (J - J0) * kChunk * kTile);
      }
      for_each_tile([&](int64_t I, int64_t J) {
        multiply(I, J, a + (I - I0) * kChunk * kTile, b + (J - J0) * kChunk * kTile, depth, c > 0, scratch);
      });
    }
    for_each_tile([&](int64_t I, int64_t J) { finish(I, J, scratch); });
  }

  // This slot's equal share of all upper tiles, taken block by block.
  void run(int slot, int slots, Scratch<T>& scratch) const {
    const int64_t panels = panels_of(n());
    const int64_t side = panels <= kWholePanels ? panels : kBlockPanels;
    const Share share(panels * (panels + 1) / 2, slot, slots);
    int64_t t = 0;  // tiles before this block
    for (int64_t I0 = 0; I0 < panels; I0 += side) {
      for (int64_t J0 = I0; J0 < panels; J0 += side) {
        const int64_t I1 = std::min(I0 + side, panels), J1 = std::min(J0 + side, panels);
        const int64_t tiles = I0 == J0 ? (I1 - I0) * (I1 - I0 + 1) / 2 : (I1 - I0) * (J1 - J0);
        const int64_t lo = std::max(share.lo - t, int64_t{0}), hi = std::min(share.hi - t, tiles);
        if (lo < hi) block(I0, I1, J0, J1, lo, hi, scratch);
        t += tiles;
      }
    }
  }
};

constexpr int64_t kPiece = 1024;  // channels converted at a time

// tier, scale and inv of token i; row holds kPiece channels.
template <class T>
void measure_token(const Rows& keys, int64_t i, bool finite_score, const uint8_t* mask, T* row, int8_t* tier, T* scale,
                   T* inv) {
  const RowOps<T>& ops = row_ops<T>();
  *scale = *inv = 0;
  *tier = kMasked;
  if (mask && mask[i] == 0) return;
  T magnitude = 0;
  for (int64_t c = 0; c < keys.d; c += kPiece) {
    const int64_t depth = std::min(kPiece, keys.d - c);
    ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, depth, T{1}, row);
    magnitude = std::max(magnitude, ops.max_magnitude(row, depth));
  }
  *tier = finite_score && magnitude <= std::numeric_limits<T>::max() ? kValid : kNonFinite;
  if (*tier != kValid || magnitude == 0) return;
  constexpr int kLimit = std::numeric_limits<T>::max_exponent - 2;  // 126: the factor itself stays a normal number
  *scale = std::ldexp(T{1}, std::clamp(-std::ilogb(magnitude), -kLimit, kLimit));
  double squares = 0;
  for (int64_t c = 0; c < keys.d; c += kPiece) {
    const int64_t depth = std::min(kPiece, keys.d - c);
    ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, depth, *scale, row);
    squares += ops.sum_of_squares(row, depth);
  }
  *inv = static_cast<T>(1 / std::sqrt(squares));
}

// In fp64 the sums are plain, each row's and then the rows' in index order.
void sum_rows(const double* s, int64_t n, int slots, double* g, double* magnitude) {
  Buffer<double> magnitudes(n);
  for_each_slot(slots, [&](int slot) {
    const Share share(n, slot, slots);
    for (int64_t i = share.lo; i < share.hi; ++i) {
      g[i] = magnitudes[i] = 0;
      for (int64_t j = 0; j < n; ++j) {
        g[i] += s[i * n + j];
        magnitudes[i] += std::fabs(s[i * n + j]);
      }
    }
  });
  *magnitude = 0;
  for (int64_t i = 0; i < n; ++i) *magnitude += magnitudes[i];
}

}  // namespace

template <class T>
void similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, int slots, T* s, T* sbar, T* g,
                      int8_t* tier) {
  const int64_t n = keys.n;
  Buffer<T> scale(n), inv(panels_of(n) * kTile), pieces(slots * kPiece);
  std::fill(inv.get() + n, inv.get() + panels_of(n) * kTile, T{0});
  std::vector<Scratch<T>> scratch;
  scratch.reserve(slots);
  for (int slot = 0; slot < slots; ++slot) scratch.emplace_back(n);

  for_each_slot(slots, [&](int slot) {
    const Share share(n, slot, slots);
    for (int64_t i = share.lo; i < share.hi; ++i) {
      const bool finite_score = !scores || std::isfinite(scores[i]);
      measure_token(keys, i, finite_score, mask, pieces.get() + slot * kPiece, tier + i, &scale[i], &inv[i]);
    }
  });
  const Gram<T> gram{row_ops<T>(), keys, scale.get(), inv.get(), s};
  for_each_slot(slots, [&](int slot) { gram.run(slot, slots, scratch[slot]); });

  const auto valid = static_cast<double>(std::count(tier, tier + n, kValid));
  double magnitude = 0;
  if constexpr (sizeof(T) == 4) {
    constexpr double kUnit = 1.0 / (1 << 24);
    int64_t magnitudes = 0;
    for (const Scratch<T>& part : scratch) magnitudes += part.magnitudes;
    magnitude = static_cast<double>(magnitudes) * kUnit;
    for (int64_t i = 0; i < n; ++i) {
      int64_t sum = 0;
      for (const Scratch<T>& part : scratch) sum += part.g[i];
      g[i] = static_cast<T>(static_cast<double>(sum) * kUnit);
    }
  } else {
    sum_rows(s, n, slots, g, &magnitude);
  }
  *sbar = valid > 0 ? static_cast<T>(magnitude / (valid * valid)) : T{0};
}

template void similarity_image<float>(const Rows&, const float*, const uint8_t*, int, float*, float*, float*, int8_t*);
template void similarity_image<double>(const Rows&, const double*, const uint8_t*, int, double*, double*, double*,
                                       int8_t*);

namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_as(const Tensor& keys, const std::optional<Tensor>& scores,
                                                         const std::optional<Tensor>& mask) {
  const int64_t B = keys.size(0), N = keys.size(1);
  const Tensor s = torch::stable::empty({B, N, N}, kScalarType<T>);
  const Tensor sbar = torch::stable::empty({B}, kScalarType<T>);
  const Tensor g = torch::stable::empty({B, N}, kScalarType<T>);
  const Tensor tier = torch::stable::empty({B, N}, ScalarType::Char);
  const auto a = contiguous_as(scores, kScalarType<T>);
  const auto valid = contiguous_as(mask, ScalarType::Bool);
  const auto image = [&](int64_t b, int slots) {
    similarity_image<T>(rows_of(keys, b), row_of<T>(a, b, N), row_of<uint8_t>(valid, b, N), slots,
                        output<T>(s) + b * N * N, output<T>(sbar) + b, output<T>(g) + b * N,
                        output<int8_t>(tier) + b * N);
  };
  for_each_image(B, static_cast<double>(N) * N * keys.size(2), image);
  return {s, sbar, g, tier};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity(const Tensor& keys, std::optional<Tensor> scores,
                                                      std::optional<Tensor> mask) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
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
  return wide ? similarity_as<double>(keys, scores, mask) : similarity_as<float>(keys, scores, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("similarity", TORCH_BOX(&similarity)); }

}  // namespace condense
