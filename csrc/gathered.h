// Tokens whose channels lie apart, as in x.flatten(2).transpose(1, 2): copied once, so that a token's are neighbours.
// Where they are read in place, every number of a token costs a cache line, and a line that is as far from the next as
// a power of two does not stay in the cache until the next token wants it.
#pragma once

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "stages.h"
#include "threads.h"

namespace condense {

// For up to n tokens that lie as `like` does; no bytes where their channels are neighbours.
struct Gathered {
  Gathered(Memory& memory, const Rows& like, int64_t n)
      : data(memory.take<char>(like.stride_d == 1 || like.d == 1 ? 0 : n, bytes_of(like.d, like.element_size()))) {}

  Rows of(const Rows& rows, Crew& crew) const {
    if (!data || rows.n == 0) return rows;
    switch (rows.element_size()) {
      case 2:
        return copied<uint16_t>(rows, crew);
      case 4:
        return copied<uint32_t>(rows, crew);
      default:
        return copied<uint64_t>(rows, crew);
    }
  }

  char* data;

 private:
  // By blocks: of a channel some cache lines, each read once, and of a token a run of channels, written at once.
  template <class Bits>
  Rows copied(const Rows& rows, Crew& crew) const {
    constexpr int64_t kTokens = 32, kChannels = 64;
    const int64_t blocks = (rows.n + kTokens - 1) / kTokens;
    crew.run([&](int slot) {
      Bits block[kTokens][kChannels + 1];
      const Share share(blocks, slot, crew.size());
      for (int64_t first = share.lo * kTokens; first < std::min(share.hi * kTokens, rows.n); first += kTokens) {
        const int64_t tokens = std::min(kTokens, rows.n - first);
        for (int64_t c = 0; c < rows.d; c += kChannels) {
          const int64_t channels = std::min(kChannels, rows.d - c);
          for (int64_t j = 0; j < channels; ++j) {
            const auto* from = static_cast<const Bits*>(rows.at(first, c + j));
            for (int64_t i = 0; i < tokens; ++i) block[i][j] = from[i * rows.stride_n];
          }
          for (int64_t i = 0; i < tokens; ++i) {
            auto* to = reinterpret_cast<Bits*>(data) + (first + i) * rows.d + c;
            std::memcpy(to, block[i], channels * sizeof(Bits));
          }
        }
      }
    });
    return {data, rows.dtype, rows.n, rows.d, rows.d, 1};
  }
};

}  // namespace condense
