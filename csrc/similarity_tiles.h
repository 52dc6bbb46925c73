// Similarities in tiles of kTile x kTile tokens, which threads share.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "stages.h"

namespace condense {

constexpr int kWholePanels = 12;  // up to here a thread packs the whole image once a chunk (576 tokens: 295 KB)
constexpr int kBlockPanels = 8;   // above, macro-blocks of 384 x 384 tokens
constexpr int kBlockWidth = kBlockPanels * kTile;
inline int64_t panels_of(int64_t n) { return width_of(n) / kTile; }

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
  const T* packed = nullptr;   // [chunks, panels]: side b, where it is packed already

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

  int64_t channels_of_chunk() const { return in_pairs() ? 2 * kChunk : kChunk; }

  // Calls f(c, channels, depth) for every chunk: channels from c on, as so many numbers or pairs.
  template <class F>
  void for_each_chunk(const F& f) const {
    const int64_t most = channels_of_chunk();
    for (int64_t c = 0; c < keys.d; c += most) {
      const int64_t channels = std::min(most, keys.d - c);
      f(c, channels, in_pairs() ? (channels + 1) / 2 : channels);
    }
  }

  // Where chunk c of a panel of side b is in `all`.
  template <class P>
  P* at(P* all, int64_t panel, int64_t c) const {
    return all + (c / channels_of_chunk() * panels_of(b.count) + panel) * panel_size();
  }

  // This slot's share of side b into `all`.
  void pack_all(int slot, int slots, TileMemory<T>& memory, T* all) const {
    const Share share(panels_of(b.count), slot, slots);
    for (int64_t J = share.lo; J < share.hi; ++J) {
      for_each_chunk(
          [&](int64_t c, int64_t channels, int64_t depth) { pack(b, J, c, channels, depth, memory, at(all, J, c)); });
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
    for_each_chunk([&](int64_t c, int64_t channels, int64_t depth) {
      const int64_t last_packed = diagonal ? std::max(last_row, last_column) : last_row;
      for (int64_t I = first_row; I <= last_packed; ++I) {
        pack(a, I, c, channels, depth, memory, pa + (I - I0) * panel_size());
      }
      for (int64_t J = first_column; J <= last_column && !diagonal && !packed; ++J) {
        pack(b, J, c, channels, depth, memory, pb + (J - J0) * panel_size());
      }
      for_each_tile([&](int64_t I, int64_t J, T* sums) {
        multiply(pa + (I - I0) * panel_size(), packed ? at(packed, J, c) : pb + (J - J0) * panel_size(), depth,
                 a.in_panel(I), b.in_panel(J), sums, ld_tile, c > 0, memory);
      });
    });
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

}  // namespace condense
