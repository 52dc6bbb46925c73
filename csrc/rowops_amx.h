// Dot products of bf16 pairs on the tile registers of AMX. Included by rowops.cpp for processors that have them, and by
// tests/amx_emulated.cpp, which supplies the tile instructions as plain functions for those that have not.
//
// A product wants its left operand by tokens and its right one by pairs of channels, so a panel is packed both ways:
// [kTile, kChunk] words and, behind them, the transposed [kChunk, kTile].
#pragma once

#include <cstdint>
#include <cstring>

#include "rowops.h"

namespace condense {
namespace isa_amx {

constexpr int kSide = 16;  // rows of a tile register, and 32-bit words of a row
static_assert(kStep % kSide == 0, "what a step reads is packed");
constexpr int64_t kPanel = 2 * int64_t{kChunk} * kTile;

// What ldtilecfg reads: all registers are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the processor defines it");

// c[kTile, kTile] = the products over depth words of two panels, added to what c holds if accumulate; rows beyond
// `rows` may be left out. Words from depth on, to the next multiple of 16, are zeros.
inline void multiply_pairs(const float* a, const float* b, int64_t depth, int64_t rows, float* c, int64_t ldc,
                           bool accumulate) {
  static_assert(kTile == 3 * kSide && kChunk % kSide == 0, "three accumulators, whole steps");
  constexpr int kRowBytes = kChunk * 4, kColumnBytes = kTile * 4;
  static const TileConfig config;
  float sums[kSide * kTile];
  const float* by_pairs = b + kChunk * kTile;
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < rows; i += kSide) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t k = 0; k < depth; k += kSide) {
      _tile_loadd(3, a + i * kChunk + k, kRowBytes);
      _tile_loadd(4, by_pairs + k * kTile, kColumnBytes);
      _tile_loadd(5, by_pairs + k * kTile + kSide, kColumnBytes);
      _tile_loadd(6, by_pairs + k * kTile + 2 * kSide, kColumnBytes);
      _tile_dpbf16ps(0, 3, 4);
      _tile_dpbf16ps(1, 3, 5);
      _tile_dpbf16ps(2, 3, 6);
    }
    _tile_stored(0, sums, kColumnBytes);
    _tile_stored(1, sums + kSide, kColumnBytes);
    _tile_stored(2, sums + 2 * kSide, kColumnBytes);
    for (int64_t r = 0; r < kSide; ++r) {
      float* to = c + (i + r) * ldc;
      const float* from = sums + r * kTile;
      for (int j = 0; j < kTile; ++j) to[j] = accumulate ? to[j] + from[j] : from[j];
    }
  }
  _tile_release();  // else every change of threads would save the registers
}

}  // namespace isa_amx
}  // namespace condense
