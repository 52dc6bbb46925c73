// Greedy MAP inference of a determinantal point process on one image, as the dense and the packed operator share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {

// What an image goes by beside s.
template <class T>
struct Dpp {
  const T* quality;           // [n] null: s is the kernel
  const int8_t* tier;         // [n] null: all tokens are valid
  const uint8_t* candidates;  // [n] 0: never picked. null: all are candidates
  T eps, damping;

  bool may_be_picked(int64_t i) const { return !candidates || candidates[i]; }
  bool is_candidate(int64_t i) const { return (!tier || tier[i] == kValid) && may_be_picked(i); }
};

inline int64_t blocks_of(int64_t n) { return (n + kFactorBlock - 1) / kFactorBlock; }

// Tokens, what each would add, and their columns of the Cholesky factor, a block of tokens after the other.
template <class T>
struct Factored {
  Factored(Memory& memory, int64_t n, int64_t k)
      : k(k),
        gain(memory.take<T>(blocks_of(n), kFactorBlock)),
        floor(memory.take<T>(blocks_of(n), kFactorBlock)),
        quality(memory.take<T>(blocks_of(n), kFactorBlock)),
        factor(memory.take<T>(blocks_of(n) * kFactorBlock, k)) {}
  T* rows_of(int64_t block) const { return factor + block * k * kFactorBlock; }
  T& at(int64_t row, int64_t token) const {
    return rows_of(token / kFactorBlock)[row * kFactorBlock + token % kFactorBlock];
  }

  int64_t k;
  T *gain, *floor, *quality;  // [blocks, kFactorBlock]; behind the last token floor is infinite: no candidate
  T* factor;                  // [blocks, k, kFactorBlock]
};

constexpr int64_t kDppPool = 256;   // tokens that a round picks from
constexpr int64_t kDppAlone = 640;  // up to so many are all in one pool

template <class T>
struct DppMemory {
  DppMemory(Memory& memory, int64_t n, int64_t k);
  Factored<T> all;
  Factored<T> pool;                    // of nothing where all are in one pool
  T* worth;                            // [n] what the rest is picked by
  uint8_t* open;                       // [n] may still be picked
  int64_t* tokens;                     // [n] of the pool
  T *picked, *root, *of_picked, *row;  // of a round's picks: [., k], [.], [.]; [pool]
};

// order [k]. s has rows of ld.
template <class T>
void dpp_select_image(const T* s, int64_t ld, const Dpp<T>& dpp, int64_t n, int64_t k, Crew& crew,
                      const DppMemory<T>& memory, int64_t* order);

// The optional arguments of the operators.
struct DppOptions {
  std::optional<Tensor> quality, tier, candidates;
  double eps, damping;

  void check(const char* axes, const std::vector<int64_t>& tokens) const;
  bool is_wide(const Tensor& t) const { return is_double(t) || (quality && is_double(*quality)); }
};

// Those in the working type: an image's part of them.
template <class T>
struct DppArguments {
  explicit DppArguments(const DppOptions& options)
      : quality(contiguous_as("quality", options.quality, kScalarType<T>)),
        tier(contiguous_as("tier", options.tier, ScalarType::Char)),
        candidates(contiguous_as("candidates", options.candidates, ScalarType::Bool)),
        eps(static_cast<T>(options.eps)),
        damping(static_cast<T>(options.damping)) {}
  // From token `first` of all on.
  Dpp<T> from(int64_t first) const {
    return {row_of<T>(quality, first, 1), row_of<int8_t>(tier, first, 1), row_of<uint8_t>(candidates, first, 1), eps,
            damping};
  }
  std::optional<Tensor> quality, tier, candidates;
  T eps, damping;
};

// Multiply-adds of the loop.
inline double dpp_work(int64_t n, int64_t k) {
  return static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(k + 8) / 2;
}

}  // namespace condense
