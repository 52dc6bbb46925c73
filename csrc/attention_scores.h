// Attention scores of the query heads that share one key head, for the operators that lead to it: an image of a batch,
// or a segment of a packed one.
#pragma once

#include <optional>

#include "stages.h"
#include "tensors.h"

namespace condense {

// One key head with its query heads. Strides are in elements.
template <class T>
struct HeadGroup {
  Rows keys;                // [N, d]
  Rows queries;             // [M, d] of the first head
  int64_t heads, per_head;  // how many query heads, and the stride from one to the next
  const T* lse;             // [heads, M] in rows of ld_lse; null: it is computed
  int64_t ld_lse;
  const uint8_t* mask;  // [N]; null: all keys are there
  const int64_t* rows;  // [num_rows] in [-1, M); null: all queries
  int64_t num_rows;
  T scale;
  bool causal;
  T* scores;  // [heads, N] in rows of ld_scores
  int64_t ld_scores;

  Rows queries_of(int64_t head) const {
    Rows of_head = queries;
    of_head.data += head * per_head * queries.element_size();
    return of_head;
  }
  double work() const {  // an exponential a pair costs as much as 40 channels
    return products(static_cast<double>(heads) * num_rows * keys.n * (keys.d + 40));
  }
};

// What one thread computes a strip of kTile rows with.
template <class T>
struct StripMemory {
  T *rows, *queries, *strip, *weights, *sums;
};

template <class T>
struct AttentionMemory {
  // Of at most n keys, num_rows rows and d channels.
  AttentionMemory(Memory& memory, int64_t n, int64_t num_rows, int64_t d, bool in_pairs, int slots);
  T* panels;             // the keys, [chunk, panel of kTile keys], as multiply_tile wants them
  int64_t *keys, *rows;  // [n] and [num_rows]: those that there are
  int64_t* before;       // [n + 1]: how many of the keys there are come before the i-th
  double* totals;        // [n] of a head
  StripMemory<T>* of_slot;
};

bool multiplies_in_pairs(const Rows& keys);

template <class T>
void attention_scores_of(const HeadGroup<T>& group, Crew& crew, const AttentionMemory<T>& memory);

// 1 / sqrt(d) unless it is given.
double scale_of(const std::optional<double>& scale, int64_t d);

// The dtypes, the channels and the heads, which are axis 1, of [B, H, M, d] or [T, H, d].
void check_heads(const Tensor& queries, const Tensor& keys, const char* axes, const char* axes_of_keys, int64_t rank);

// [n, d] of a head: the tokens from an offset on, which counts elements.
Rows rows_of_head(const Tensor& t, int64_t offset, int64_t n, int64_t stride_n);

}  // namespace condense
