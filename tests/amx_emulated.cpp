// csrc/rowops_amx.h on a processor without AMX: the tile instructions as Intel's manual defines them, and their use
// compared with plain sums. Prints what is wrong, if anything, and returns their number.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

struct Register {
  float word[16][16];  // an accumulator's number, or a pair of bf16
};
Register registers[8];
int row_bytes[8], rows[8];
bool configured = false;
int failures = 0;

void expect(bool condition, const char* what, int64_t i, int64_t j) {
  if (condition) return;
  ++failures;
  std::printf("%s at %lld, %lld\n", what, static_cast<long long>(i), static_cast<long long>(j));
}

float number_of(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void _tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  expect(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0", bytes[0], bytes[1]);
  for (int i = 2; i < 16; ++i) expect(bytes[i] == 0, "reserved byte", i, bytes[i]);
  for (int t = 0; t < 8; ++t) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * t, 2);
    row_bytes[t] = width, rows[t] = bytes[48 + t];
    expect(width <= 64 && rows[t] <= 16, "too large a tile", width, rows[t]);
  }
  for (int t = 8; t < 16; ++t) expect(bytes[16 + 2 * t] == 0 && bytes[48 + t] == 0, "a ninth register", t, 0);
  std::memset(registers, 0, sizeof registers);
  configured = true;
}

void _tile_release() { configured = false; }

void _tile_zero(int t) {
  expect(configured, "not configured", t, 0);
  std::memset(&registers[t], 0, sizeof(Register));
}

void _tile_loadd(int t, const void* base, int64_t stride) {
  expect(configured, "not configured", t, 0);
  std::memset(&registers[t], 0, sizeof(Register));
  for (int r = 0; r < rows[t]; ++r) {
    std::memcpy(registers[t].word[r], static_cast<const char*>(base) + r * stride, row_bytes[t]);
  }
}

void _tile_stored(int t, void* base, int64_t stride) {
  for (int r = 0; r < rows[t]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, registers[t].word[r], row_bytes[t]);
  }
}

void _tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < rows[c]; ++m) {
    for (int k = 0; k < row_bytes[a] / 4; ++k) {
      for (int n = 0; n < row_bytes[c] / 4; ++n) {
        uint16_t x[2], y[2];
        std::memcpy(x, &registers[a].word[m][k], 4);
        std::memcpy(y, &registers[b].word[k][n], 4);
        registers[c].word[m][n] += number_of(x[0]) * number_of(y[0]) + number_of(x[1]) * number_of(y[1]);
      }
    }
  }
}

}  // namespace

#include "rowops_amx.h"

using condense::kChunk;
using condense::kTile;

int main() {
  std::mt19937 generator(0);
  std::uniform_int_distribution<int> small(-8, 8);  // sums of small integers are exact: nothing to tolerate
  const int64_t ldc = kTile + 5;
  for (int64_t depth : {1, 15, 16, 17, 100, kChunk}) {
    for (int64_t wanted : {1, 16, 17, 40, kTile}) {
      std::vector<float> a(condense::isa_amx::kPanel), b(a.size()), c(kTile * ldc);
      std::vector<double> x(kTile * kChunk * 2), y(x.size());
      for (auto [panel, values] : {std::pair{&a, &x}, std::pair{&b, &y}}) {
        for (int64_t r = 0; r < kTile; ++r) {
          for (int64_t k = 0; k < depth; ++k) {
            uint16_t pair[2];
            for (int half = 0; half < 2; ++half) {
              const float value = static_cast<float>(small(generator));
              uint32_t bits;
              std::memcpy(&bits, &value, 4);
              pair[half] = static_cast<uint16_t>(bits >> 16);
              (*values)[(r * kChunk + k) * 2 + half] = value;
            }
            std::memcpy(&(*panel)[r * kChunk + k], pair, 4);
            std::memcpy(&(*panel)[kChunk * kTile + k * kTile + r], pair, 4);
          }
        }
      }
      for (int pass = 0; pass < 2; ++pass) {  // the second adds to the first
        condense::isa_amx::multiply_pairs(a.data(), b.data(), depth, wanted, c.data(), ldc, pass > 0);
        for (int64_t i = 0; i < wanted; ++i) {
          for (int64_t j = 0; j < kTile; ++j) {
            double sum = 0;
            for (int64_t k = 0; k < 2 * kChunk; ++k) sum += x[i * kChunk * 2 + k] * y[j * kChunk * 2 + k];
            expect(c[i * ldc + j] == (pass + 1) * sum, "wrong sum", i, j);
          }
        }
        for (int64_t i = 0; i < kTile; ++i) {
          for (int64_t j = kTile; j < ldc; ++j) expect(c[i * ldc + j] == 0, "written past the tile", i, j);
        }
      }
      expect(!configured, "not released", depth, wanted);
    }
  }
  return failures;
}
