// Each cluster's weighted mean (Eq. 8), sum, or mean blended with its centre: tokens sorted by row, then one pass over
// each row's tokens.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "checks.h"
#include "gathered.h"
#include "merge.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

constexpr int64_t kFold = 32;  // members summed before the partial sum is folded: long clusters lose less

template <class T>
struct Merger {
  const RowOps<T>& ops;
  const Rows& features;
  const T* scores;  // null: each is 1
  Merging merging;
  const int64_t *first, *members;
  T *row, *part, *total;  // [d] each

  T score(int64_t i) const { return scores ? scores[i] : T{1}; }

  void copy(int64_t i, char* to) const {
    const int64_t size = features.element_size();
    if (features.stride_d == 1) {
      std::memcpy(to, features.at(i, 0), features.d * size);
    } else {
      for (int64_t c = 0; c < features.d; ++c) std::memcpy(to + c * size, features.at(i, c), size);
    }
  }

  void add(int64_t i) const { ops.accumulate_row(row_as(features, i, row), score(i), features.d, part); }

  // The token whose bits the row of members [lo, hi) is, -1 for none.
  int64_t copied(int64_t lo, int64_t hi, int64_t own, T mass) const {
    const bool alone = hi - lo == 1;
    if (merging.mode == MergeMode::kSum) return alone && !scores ? members[lo] : -1;
    return mass == 0 || (alone && members[lo] == own) ? own : -1;
  }

  // total = centre_weight * centre + (1 - centre_weight) * total, by way of part.
  void blend(int64_t centre) const {
    const T weight = merging.of_centre<T>();
    std::fill(part, part + features.d, T{0});
    ops.accumulate_row(total, T{1} - weight, features.d, part);
    ops.accumulate_row(row_as(features, centre, row), weight, features.d, part);
    std::copy(part, part + features.d, total);
  }

  void merge_row(int64_t r, int64_t own, char* to, T* mass) const {
    const int64_t lo = first[r], hi = first[r + 1];
    double sum = 0;
    for (int64_t t = lo; t < hi; ++t) sum += static_cast<double>(score(members[t]));
    *mass = own < 0 ? T{0} : static_cast<T>(sum);
    if (own < 0) return void(std::memset(to, 0, features.d * features.element_size()));
    if (const int64_t token = copied(lo, hi, own, *mass); token >= 0) return copy(token, to);
    std::fill(part, part + features.d, T{0});
    std::fill(total, total + features.d, T{0});
    for (int64_t t = lo; t < hi; ++t) {
      add(members[t]);
      if ((t - lo + 1) % kFold == 0) ops.fold_row(part, features.d, total);
    }
    ops.fold_row(part, features.d, total);
    if (merging.mode != MergeMode::kSum) ops.divide_row(total, *mass, features.d);
    if (merging.mode == MergeMode::kLerp) blend(own);
    ops.store_row(total, features.dtype, features.d, to);
  }
};

}  // namespace

void sort_by_row(const int64_t* assignment, int64_t n, int64_t k, int64_t* first, int64_t* members) {
  std::fill(first, first + k + 2, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (assignment[i] >= 0) ++first[assignment[i] + 2];
  }
  for (int64_t r = 2; r < k + 2; ++r) first[r] += first[r - 1];
  for (int64_t i = 0; i < n; ++i) {
    if (assignment[i] >= 0) members[first[assignment[i] + 1]++] = i;
  }
}

template <class T>
void merge_image(const Rows& features, const T* scores, const int64_t* indices, const int64_t* assignment, int64_t k,
                 Crew& crew, const MergeMemory<T>& memory, void* merged, T* mass, const Merging& merging) {
  sort_by_row(assignment, features.n, k, memory.first, memory.members);
  const int64_t cost = features.n + k;  // tokens to read and rows to write: what a slot gets an equal share of
  crew.run([&](int slot) {
    T* row = memory.rows + 3 * slot * features.d;
    const Merger<T> merger{row_ops<T>(), features,         scores,
                           merging,      memory.first,     memory.members,
                           row,          row + features.d, row + 2 * features.d};
    const Share share(cost, slot, crew.size());
    for (int64_t r = 0; r < k; ++r) {
      const int64_t before = memory.first[r] + r;
      if (before < share.lo || before >= share.hi) continue;
      merger.merge_row(r, indices[r], static_cast<char*>(merged) + r * features.d * features.element_size(), mass + r);
    }
  });
}

template void merge_image<float>(const Rows&, const float*, const int64_t*, const int64_t*, int64_t, Crew&,
                                 const MergeMemory<float>&, void*, float*, const Merging&);
template void merge_image<double>(const Rows&, const double*, const int64_t*, const int64_t*, int64_t, Crew&,
                                  const MergeMemory<double>&, void*, double*, const Merging&);

namespace {

template <class T>
std::tuple<Tensor, Tensor> merge_as(const Tensor& features, const std::optional<Tensor>& scores, const Tensor& indices,
                                    const Tensor& assignment, const Merging& merging) {
  const int64_t B = features.size(0), N = features.size(1), D = features.size(2), K = indices.size(1);
  const auto a = contiguous_as("scores", scores, kScalarType<T>);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long),
               rows = contiguous_as("assignment", assignment, ScalarType::Long);
  check_values("indices", data_of<int64_t>(kept), B * K, -1, N);
  check_values("assignment", data_of<int64_t>(rows), B * N, -1, K);
  const Tensor merged = empty("merged", {B, K, D}, features.scalar_type());
  const Tensor mass = empty("mass", {B, K}, kScalarType<T>);
  const auto pieces = [&](Memory& memory, int slots) {
    return std::pair{Gathered(memory, rows_of(features), N), MergeMemory<T>(memory, N, D, K, slots)};
  };
  for_each_image(B, N * D, pieces, [&](int64_t b, auto& taken, Crew& crew) {
    auto& [gathered, memory] = taken;
    const Rows image = gathered.of(rows_of(features, b), crew);
    merge_image<T>(image, row_of<T>(a, b, N), data_of<int64_t>(kept) + b * K, data_of<int64_t>(rows) + b * N, K, crew,
                   memory, output<char>(merged) + b * K * D * image.element_size(), output<T>(mass) + b * K, merging);
  });
  return {merged, mass};
}

std::tuple<Tensor, Tensor> merge(const Tensor& features, std::optional<Tensor> scores, const Tensor& indices,
                                 const Tensor& assignment, const Text& mode, double centre_weight) {
  check_channels("features", features, "B N D");
  check_clusters(features.size(0), features.size(1), scores, indices, assignment);
  const Merging merging = merging_of(mode, centre_weight);
  const auto run = works_in_double(features, scores) ? merge_as<double> : merge_as<float>;
  return run(features, scores, indices, assignment, merging);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("merge", TORCH_BOX(&merge)); }

}  // namespace condense
