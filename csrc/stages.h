// The stages on one image, as the operators and the flagship share them. T is the working type, float or double.
//
// `crew` are the threads that share the image; the result does not depend on their number.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "memory.h"
#include "rowops.h"
#include "threads.h"

namespace condense {

constexpr int8_t kValid = 0, kNonFinite = 1, kMasked = 2, kTaken = 3;  // tiers

// Token rows of any layout: [n, d] with strides in elements.
struct Rows {
  const char* data;
  Dtype dtype;
  int64_t n, d, stride_n, stride_d;

  int64_t element_size() const { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
  const void* at(int64_t i, int64_t c) const { return data + (i * stride_n + c * stride_d) * element_size(); }
  // Channels [c, c + count) of token i.
  Rows run(int64_t i, int64_t c, int64_t count) const {
    return {static_cast<const char*>(at(i, c)), dtype, 1, count, stride_n, stride_d};
  }
  // Tokens [first, first + count).
  Rows part(int64_t first, int64_t count) const {
    return {static_cast<const char*>(at(first, 0)), dtype, count, d, stride_n, stride_d};
  }
};

// Row i as numbers of type T: in its place if they are, else converted into `to`.
template <class T>
const T* row_as(const Rows& rows, int64_t i, T* to) {
  if (rows.stride_d == 1 && rows.element_size() == sizeof(T)) return static_cast<const T*>(rows.at(i, 0));
  row_ops<T>().load_row(rows.at(i, 0), rows.dtype, rows.stride_d, rows.d, T{1}, to);
  return to;
}

// Two factors whose product is 2^-e, where 2^e is the smallest power of two above magnitude (frexp's e): 2^-e itself
// may not be representable.
template <class T>
struct Shrink {
  explicit Shrink(T magnitude) {
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    first = std::ldexp(T{1}, -(exponent / 2));
    second = std::ldexp(T{1}, exponent / 2 - exponent);
  }
  T operator()(T x) const { return x * first * second; }
  T first, second;
};

// What a similarity is: a cosine, or a Euclidean distance, negated.
enum class Metric { kCosine, kNegL2 };

// A key as the similarities use it.
template <class T>
struct KeyFactors {
  KeyFactors(Memory& memory, int64_t n) : scale(memory.take<T>(n)), inv(memory.take<T>(n)) {}
  T* scale;  // [n] power of two, exact; of distances the same for all tokens
  T* inv;    // [n] 1 / norm of the scaled key, of distances 1; 0 for a token without similarities
};

// What one thread multiplies tiles in.
template <class T>
struct TileMemory {
  TileMemory(Memory& memory, T* panels, int64_t n, bool stored, bool with_nearest);
  T *rows, *panels, *tile, *mirror, *block, *run;
  int64_t* g;  // [n padded] fixed point
  T* nearest;  // [n padded]
  int64_t magnitudes;
};

template <class T>
struct SimilarityMemory {
  SimilarityMemory(Memory& memory, int64_t n, int slots, bool stored, Metric metric = Metric::kCosine,
                   bool with_nearest = false, int64_t packed_channels = 0);
  bool sums_are_plain() const { return sizeof(T) == 8 || metric != Metric::kCosine; }

  Metric metric;
  KeyFactors<T> factors;
  T unscale = 1;  // of distances
  TileMemory<T>* of_slot;
  int slots;
  int64_t panels_size;  // of a slot's panels, which lie behind each other
  T* panels;
  double* sums;  // [n] plain sums alone
  T* strip;      // [rows, width_of(n)] plain sums alone, where s is not stored
  T* penalty;    // [n padded] -infinity for what is nobody's nearest; with nearest alone
  T* packed;     // all keys as similarity_rows multiplies them, once pack_keys has been called; null: they are packed
                 // again for each product
};

// Length of a row of similarities that is a whole number of tiles.
constexpr int64_t width_of(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

// All similarities of n keys of d channels.
inline double similarity_work(int64_t n, int64_t d) {
  const auto numbers = static_cast<double>(n) * static_cast<double>(d);
  return products(static_cast<double>(n) * numbers) + 5 * numbers;
}

// sbar [1], g [n], tier [n], and s [n, n] contiguous unless it is null: then tiles are dropped once they are summed.
// scores may be null, and so may mask. nearest [n], unless null: the largest similarity to another valid token, the
// lowest number where there is none. ld: the length of a row of s, if not n.
template <class T>
void similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, Crew& crew, SimilarityMemory<T>& memory,
                      T* s, T* sbar, T* g, int8_t* tier, T* nearest = nullptr, int64_t ld = 0);

constexpr int64_t kRun = 1024;  // channels converted at a time

// tier, scale and inv of token i; row holds kRun channels.
template <class T>
void measure_token(const Rows& keys, int64_t i, bool finite_score, const uint8_t* mask, T* row, int8_t* tier, T* scale,
                   T* inv);

// Of global_similarity_image.
template <class T>
struct GlobalMemory {
  GlobalMemory(Memory& memory, int64_t n, int64_t d, int slots)
      : parts(static_cast<int>(std::clamp<int64_t>(n / 64, 1, 16))),
        rows(memory.take<T>(n > 0 ? kRun : 0, slots)),
        sums(memory.take<double>(n > 0 ? d : 0, parts)) {}
  int parts;
  T* rows;       // [slots, kRun]
  double* sums;  // [parts, d]
};

// measure_keys of cosines, and g [n] unless it is null.
template <class T>
void global_similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, Crew& crew,
                             const KeyFactors<T>& factors, const GlobalMemory<T>& memory, T* g, int8_t* tier);

// tier [n], and in memory what similarity_among and similarity_rows go by: of similarity_image the first step.
template <class T>
void measure_keys(const Rows& keys, const T* scores, const uint8_t* mask, Crew& crew, SimilarityMemory<T>& memory,
                  int8_t* tier);

// Fills memory.packed, after measure_keys.
template <class T>
void pack_keys(const Rows& keys, Crew& crew, SimilarityMemory<T>& memory);

// diagonal [n]: of each token with itself, after measure_keys.
template <class T>
void similarity_diagonal(const Rows& keys, Crew& crew, SimilarityMemory<T>& memory, T* diagonal);

// square [count, count]: the similarities among some tokens, or all where tokens is null, after measure_keys; the bits
// of similarity_image.
template <class T>
void similarity_among(const Rows& keys, const int64_t* tokens, int64_t count, Crew& crew, SimilarityMemory<T>& memory,
                      T* square);

// rows [count, width_of(n)]: those of some tokens; its bits. Some rows more, fewer than kTile, may be written: a
// product computes whole groups of rows.
template <class T>
void similarity_rows(const Rows& keys, const int64_t* tokens, int64_t count, Crew& crew, SimilarityMemory<T>& memory,
                     T* rows);

template <class T>
struct GreedyMemory {
  GreedyMemory(Memory& memory, int64_t n) : nu(memory.take<T>(n)), m(memory.take<T>(n)) {}
  T *nu, *m;
};

// What greedy_select goes by beside s; the defaults are those of the operator. The first pick is the one of highest
// utility, unless another rule is given; where a rule finds no candidate, it is that one again.
template <class T>
struct Selection {
  const T* prior = nullptr;             // [n] null: 0 for every token
  const T* sbar = nullptr;              // null: the prior is the utility
  const int8_t* tier = nullptr;         // [n] null: all tokens are valid
  const uint8_t* candidates = nullptr;  // [n] 0: never picked. null: all are candidates
  const T* first_utilities = nullptr;   // [n] what the first pick alone goes by
  int64_t first = -1;                   // the first pick, below n; -1: by utility
  T suppression = 1;
  Combine combine = Combine::kSub;

  bool may_be_picked(int64_t i) const { return !candidates || candidates[i]; }
  bool is_candidate(int64_t i) const { return (!tier || tier[i] == kValid) && may_be_picked(i); }
};

// order [k]. s has rows of ld. With max_min the first pick is the candidate whose nearest other candidate is farthest,
// whatever `selection` says of it.
template <class T>
void greedy_select_image(const T* s, int64_t ld, const Selection<T>& selection, bool max_min, int64_t n, int64_t k,
                         Crew& crew, const GreedyMemory<T>& memory, int64_t* order);

// The same from `made` picks on, 1 or more, that greedy_select_streamed has left in memory.
template <class T>
void greedy_select_resumed(const T* s, int64_t ld, const Selection<T>& selection, int64_t n, int64_t made, int64_t k,
                           const GreedyMemory<T>& memory, int64_t* order);

constexpr int64_t kPool = 512;  // tokens of a round of greedy_select_streamed, at most: 1 MB of similarities among them

// As many as k picks are worth.
constexpr int64_t pool_of(int64_t n, int64_t k) { return std::min({n, kPool, width_of(k) + kTile}); }

struct Rounds {
  int64_t most = std::numeric_limits<int64_t>::max();  // after these it ends, be the picks complete or not
  bool keep_rows = true;                               // else `rows` are those of one round
};

template <class T>
struct StreamedGreedyMemory {
  StreamedGreedyMemory(Memory& memory, int64_t n, int64_t most = kPool);
  int64_t most;  // tokens of a round
  GreedyMemory<T> all, pool;
  T *t, *pool_t, *square;
  int64_t* tokens;
};

// The same picks without s, whose rows are computed once they are needed: rows [picks, width_of(n)] are those of the
// picked tokens, in the order of the picks. Returns their number; what follows in order has no similarities.
template <class T>
int64_t greedy_select_streamed(const Rows& keys, const Selection<T>& selection, int64_t k, Crew& crew,
                               SimilarityMemory<T>& similarity, const StreamedGreedyMemory<T>& memory, int64_t* order,
                               T* rows, Rounds rounds = {});

// The first pick by max_min, -1 where there is no candidate; rows [kTile, width_of(n)] are scratch.
template <class T>
int64_t pick_farthest_streamed(const Rows& keys, const Selection<T>& selection, Crew& crew,
                               SimilarityMemory<T>& similarity, const GreedyMemory<T>& memory, T* rows);

// Coordinates as [num_axes, n], scaled, and what Eq. 6 multiplies a distance with.
template <class T>
struct Layout {
  Layout(Memory& memory, int64_t n, int64_t num_axes)
      : positions(memory.take<T>(n, num_axes)), low(memory.take<double>(num_axes)), num_axes(num_axes), factor(0) {}
  // Row-major grid of num_axes sizes, whose product is n.
  void set_grid(const int64_t* grid, int64_t n, const int8_t* tier, double spatial_weight);
  // places [num_axes, n].
  void set_positions(const double* places, int64_t n, const int8_t* tier, double spatial_weight);

  T* positions;
  double* low;       // [num_axes] the lowest position along each
  int64_t num_axes;  // 0: no distance
  T factor;
};

template <class T>
struct AssignMemory {
  AssignMemory(Memory& memory, int64_t n, int64_t k)
      : best(memory.take<T>(n)),
        best_row(memory.take<typename RowOps<T>::Index>(n)),
        s_rows(memory.take<const T*>(k)) {}
  T* best;
  typename RowOps<T>::Index* best_row;
  const T** s_rows;  // [k] the similarities of each kept token, filled by the caller
};

// assignment [n]. indices [k] in [-1, n).
template <class T>
void assign_image(const int64_t* indices, const int8_t* tier, const Layout<T>& layout, int64_t n, int64_t k, Crew& crew,
                  const AssignMemory<T>& memory, int64_t* assignment);

// Sorts the tokens by row: those of row r become members[first[r], first[r + 1]), in token order. first is [k + 2].
void sort_by_row(const int64_t* assignment, int64_t n, int64_t k, int64_t* first, int64_t* members);

// What a row becomes of its tokens: their weighted mean, their weighted sum, or the mean blended with the kept token.
enum class MergeMode { kMean, kSum, kLerp };

struct Merging {
  MergeMode mode = MergeMode::kMean;
  double centre_weight = 0;  // of a kLerp

  template <class T>
  T of_centre() const {
    return static_cast<T>(centre_weight);
  }
};

template <class T>
struct MergeMemory {
  MergeMemory(Memory& memory, int64_t n, int64_t d, int64_t k, int slots)
      : first(memory.take<int64_t>(k + 2)), members(memory.take<int64_t>(n)), rows(memory.take<T>(d, 3 * slots)) {}
  int64_t *first, *members;
  T* rows;  // [slots, 3, d]
};

// merged [k, d] contiguous in the dtype of features, mass [k]. scores may be null: 1 each. indices in [-1, n),
// assignment in [-1, k).
template <class T>
void merge_image(const Rows& features, const T* scores, const int64_t* indices, const int64_t* assignment, int64_t k,
                 Crew& crew, const MergeMemory<T>& memory, void* merged, T* mass, const Merging& merging = {});

}  // namespace condense
