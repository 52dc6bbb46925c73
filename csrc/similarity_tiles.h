// Similarities in tiles of kTile x kTile tokens, which threads share.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "stages.h"

namespace condense {

// Tiles are taken in square blocks, whose panels of rows (768 tokens: 393 KB) stay in the second-level cache.
constexpr int kBlockPanels = 16;
constexpr int kStreamedPanels = 8;  // where tiles are not stored, and a block of them (384 x 384) stays there
constexpr int kStreamedWidth = kStreamedPanels * kTile;
inline int64_t panels_of(int64_t n) { return width_of(n) / kTile; }
inline int64_t panels_of_thread(int64_t n) { return std::min<int64_t>(panels_of(n), kBlockPanels) + 1; }

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
  const T* packed = nullptr;   // [panels, chunks]: side b, packed once for all threads; null: each packs what it needs

  bool is_distance() const { return metric == Metric::kNegL2; }
  bool in_pairs() const { return ops.multiply_pairs && keys.dtype == Dtype::kBFloat16 && !is_distance(); }
  int64_t panel_size() const { return in_pairs() ? ops.pairs_panel : kChunk * kTile; }

  int64_t most_channels() const { return in_pairs() ? 2 * kChunk : kChunk; }
  int64_t chunks() const { return (keys.d + most_channels() - 1) / most_channels(); }
  int64_t channels_of(int64_t chunk) const { return std::min(most_channels(), keys.d - chunk * most_channels()); }
  int64_t depth_of(int64_t chunk) const { return in_pairs() ? (channels_of(chunk) + 1) / 2 : channels_of(chunk); }

  // A chunk of kTile tokens, scaled, zeros beyond them.
  void pack(const Side& side, int64_t panel, int64_t chunk, TileMemory<T>& memory, T* packed) const {
    const int64_t c = chunk * most_channels(), channels = channels_of(chunk), depth = depth_of(chunk);
    const int64_t filled = side.in_panel(panel), padded = (depth + kStep - 1) / kStep * kStep;
    for (int64_t r = 0; r < kTile; ++r) {
      T* row = memory.rows + r % kStep * kChunk;
      const int64_t i = r < filled ? side.at(panel * kTile + r) : -1;
      const int64_t length = i >= 0 && factors.inv[i] != 0 ? depth : 0;
      if (length > 0 && in_pairs()) {
        ops.load_pairs(keys.at(i, c), keys.stride_d, channels, factors.scale[i], row);
      } else if (length > 0) {
        ops.load_row(keys.at(i, c), keys.dtype, keys.stride_d, channels, factors.scale[i], row);
      }
      std::fill(row + length, row + padded, T{0});
      // A few rows at a time: while their memory is waited for, those before them are put into their places.
      if (r % kStep == kStep - 1)
        (in_pairs() ? ops.pack_pairs : ops.pack_rows)(memory.rows, r + 1 - kStep, padded, packed);
    }
  }

  // A chunk of a token on its way into the second-level cache. A row is not read on from there: no
  // processor would know that by itself.
  void prefetch(const Side& side, int64_t i, int64_t chunk) const {
    if (keys.stride_d != 1 || i >= side.count) return;
    const int64_t bytes = channels_of(chunk) * keys.element_size();
    const auto* at = static_cast<const char*>(keys.at(side.at(i), chunk * most_channels()));
    for (int64_t b = 0; b < bytes; b += Memory::kLine) __builtin_prefetch(at + b);
    __asm__ volatile("");  // else GCC sees no effect and drops the call
  }

  // Where a chunk of a panel of side b is in `all`.
  template <class P>
  P* at(P* all, int64_t panel, int64_t chunk) const {
    return all + (panel * chunks() + chunk) * panel_size();
  }

  // This slot's share of side b into `all`.
  void pack_all(int slot, int slots, TileMemory<T>& memory, T* all) const {
    const Share share(panels_of(b.count) * chunks(), slot, slots);
    for (int64_t i = share.lo; i < share.hi; ++i) {
      pack(b, i / chunks(), i % chunks(), memory, all + i * panel_size());
    }
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
    const bool diagonal = symmetric && I == J;
    ops.scale_tile(tile, inv_i, inv_j, diagonal || (to.data && mirrored) ? mirror : nullptr);
    for (int64_t i = 0; diagonal && i < kTile; ++i) std::memcpy(tile + i * kTile, mirror + i * kTile, i * sizeof(T));
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

  // The tiles [lo, hi) of a block of panels [I0, I1) x [J0, J1), counted down its columns; I <= J where symmetric.
  void block(int64_t I0, int64_t I1, int64_t J0, int64_t J1, int64_t lo, int64_t hi, TileMemory<T>& memory) const {
    const bool diagonal = symmetric && I0 == J0;
    const int64_t ld_tile = to.data ? to.ld : kStreamedWidth;
    const auto for_each_tile = [&](const auto& f) {
      int64_t t = 0;
      for (int64_t J = J0; J < J1; ++J) {
        for (int64_t I = I0; I < (diagonal ? J + 1 : I1); ++I, ++t) {
          if (t < lo || t >= hi) continue;
          f(I, J,
            to.data ? to.data + I * kTile * to.ld + J * kTile : memory.block + ((I - I0) * ld_tile + J - J0) * kTile);
        }
      }
    };
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      // Of the rows all panels are kept, of the columns the last one: a tile packs what is not there yet.
      T* packed_rows[kBlockPanels] = {};
      const auto row_panel = [&](int64_t I) -> const T* {
        if (packed && symmetric) return at(packed, I, chunk);
        T*& panel = packed_rows[I - I0];
        if (!panel) pack(a, I, chunk, memory, panel = memory.panels + (I - I0) * panel_size());
        return panel;
      };
      T* const last = memory.panels + (I1 - I0) * panel_size();
      int64_t column = -1;
      const auto column_panel = [&](int64_t J) -> const T* {
        if (packed) return at(packed, J, chunk);
        if (diagonal) return row_panel(J);
        if (J != column) pack(b, column = J, chunk, memory, last);
        return last;
      };
      // The rows of what is packed next, some with each tile.
      const auto prefetch_share = [&](const Side& side, int64_t panel, int64_t part, int64_t parts) {
        const Share share(kTile, static_cast<int>(part), static_cast<int>(parts));
        for (int64_t r = share.lo; r < share.hi; ++r) prefetch(side, panel * kTile + r, chunk);
      };
      for_each_tile([&](int64_t I, int64_t J, T* sums) {
        const T* pb = column_panel(J);
        const T* pa = row_panel(I);
        if (!diagonal && J == J0 && I + 1 < I1 && !(packed && symmetric)) prefetch_share(a, I + 1, 0, 1);
        if (J + 1 < J1 && !packed) prefetch_share(b, J + 1, I - I0, diagonal ? J + 1 - J0 : I1 - I0);
        multiply(pa, pb, depth_of(chunk), a.in_panel(I), b.in_panel(J), sums, ld_tile, chunk > 0, memory);
      });
    }
    for_each_tile([&](int64_t I, int64_t J, T* sums) { finish(I, J, sums, ld_tile, memory); });
  }

  // This slot's equal share of all tiles, taken block by block.
  void run(int slot, int slots, TileMemory<T>& memory) const {
    const int64_t rows = panels_of(a.count), columns = panels_of(b.count);
    const int64_t side = to.data ? kBlockPanels : kStreamedPanels;
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

}  // namespace condense
