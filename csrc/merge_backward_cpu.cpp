// The gradient of the merge (Eq. 8). A token's needs the token, its row and its row's centre alone; tokens are taken
// sorted by row, so that a row is converted once for all its members.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "merge.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

template <class T>
struct GradientMemory {
  GradientMemory(Memory& memory, int64_t n, int64_t d, int64_t k, int slots)
      : first(memory.take<int64_t>(k + 2)),
        members(memory.take<int64_t>(n)),
        copy(memory.take<int64_t>(n)),
        rows(memory.take<T>(d, 5 * slots)) {}
  int64_t *first, *members;
  int64_t* copy;  // [n] the row that has the token itself in it, whatever its score, -1 for most
  T* rows;        // [slots, 5, d]
};

// One image.
template <class T>
struct Gradient {
  Merging merging;
  Rows grad_merged, features, merged;   // [K, D], [N, D], [K, D]; the last two without data where they are not given
  const T *grad_mass, *scores, *mass;   // [K], [N], [K]; scores may be null: 1 each
  const int64_t *indices, *assignment;  // [K], [N]
  char *grad_features,
      *grad_scores;  // [N, D], [N], contiguous; the second null where scores are no numbers to derive by
  Dtype scores_dtype;
  int64_t scores_size, N;

  int64_t K() const { return grad_merged.n; }
  bool is(MergeMode mode) const { return merging.mode == mode; }
  bool is_row(int64_t r) const { return r >= 0 && indices[r] >= 0; }
  bool weighs_members(int64_t r) const { return is_row(r) && (is(MergeMode::kSum) || mass[r] != 0); }
  T of_members() const { return T{1} - merging.of_centre<T>(); }

  // d merged_r / d features_i, but for what the token is to the row as its centre.
  T of_member(int64_t i, int64_t r) const {
    const T score = scores ? scores[i] : T{1};
    if (is(MergeMode::kSum)) return score;
    return is(MergeMode::kLerp) ? of_members() * (score / mass[r]) : score / mass[r];
  }
  // And that.
  T of_centre(int64_t r) const { return mass[r] == 0 ? T{1} : merging.of_centre<T>(); }

  void find_copies(int64_t* copy) const {
    std::fill(copy, copy + N, -1);
    if (is(MergeMode::kSum)) return;
    for (int64_t r = 0; r < K(); ++r) {
      if (is_row(r) && (is(MergeMode::kLerp) || mass[r] == 0)) copy[indices[r]] = r;
    }
  }
};

// What one thread computes tokens with.
template <class T>
struct TokenGradient {
  TokenGradient(const Gradient<T>& image, const int64_t* copy, T* rows)
      : image(image), copy(copy), x(rows), from(x + D()), slope(from + D()), narrow(slope + D()), added(narrow + D()) {}

  int64_t D() const { return image.grad_merged.d; }

  bool of_scores() const { return image.grad_scores && image.features.data; }

  // Where row r is differentiated from by a score: its mean, its centre, or 0. Of a centre what is left, along the
  // slope.
  void load(int64_t r) {
    loaded = r;
    row_slope = row_as(image.grad_merged, r, slope);
    row_from = row_slope;
    along = 0;
    if (!of_scores()) return;
    if (image.is(MergeMode::kMean)) {
      row_from = row_as(image.merged, r, from);
    } else if (image.is(MergeMode::kSum)) {
      std::fill(from, from + D(), T{0});
      row_from = from;
    } else {
      row_from = row_as(image.features, image.indices[r], from);
      along = ops.gradient_row(row_as(image.merged, r, x), row_from, row_slope, T{0}, D(), added);
    }
  }

  double of_score(double sum, int64_t r) const {
    if (image.is(MergeMode::kMean)) return sum / image.mass[r];
    if (image.is(MergeMode::kSum)) return sum;
    return (image.of_members() * sum - along) / image.mass[r];
  }

  // Token i of row r, which is -1 for a token of none.
  void compute(int64_t i, int64_t r) {
    char* out = image.grad_features + i * D() * image.grad_merged.element_size();
    const bool in_place = image.grad_merged.element_size() == sizeof(T);
    T* dx = in_place ? reinterpret_cast<T*>(out) : narrow;
    double grad_score = image.is_row(r) ? image.grad_mass[r] : T{0};
    if (image.weighs_members(r)) {
      if (r != loaded) load(r);
      const T* token = of_scores() ? row_as(image.features, i, x) : row_slope;  // any row: the sum is not asked for
      const double sum = ops.gradient_row(token, row_from, row_slope, image.of_member(i, r), D(), dx);
      if (of_scores()) grad_score += of_score(sum, r);
    } else {
      std::fill(dx, dx + D(), T{0});
    }
    if (const int64_t own = copy[i]; own >= 0) {
      ops.accumulate_row(row_as(image.grad_merged, own, added), image.of_centre(own), D(), dx);
    }
    if (!in_place) ops.store_row(dx, image.grad_merged.dtype, D(), out);
    if (!image.grad_scores) return;
    row_ops<double>().store_row(&grad_score, image.scores_dtype, 1, image.grad_scores + i * image.scores_size);
  }

  const RowOps<T>& ops = row_ops<T>();
  const Gradient<T>& image;
  const int64_t* copy;
  T *x, *from, *slope, *narrow, *added;  // [D] each
  const T *row_from = nullptr, *row_slope = nullptr;
  double along = 0;
  int64_t loaded = -1;
};

template <class T>
void merge_backward_image(const Gradient<T>& image, Crew& crew, const GradientMemory<T>& memory) {
  const int64_t N = image.N, D = image.grad_merged.d;
  sort_by_row(image.assignment, N, image.K(), memory.first, memory.members);
  image.find_copies(memory.copy);
  const int64_t num_members = memory.first[image.K()];
  crew.run([&](int slot) {
    TokenGradient<T> gradient(image, memory.copy, memory.rows + 5 * slot * D);
    const Share sorted(num_members, slot, crew.size()), all(N, slot, crew.size());
    for (int64_t t = sorted.lo; t < sorted.hi; ++t) {
      gradient.compute(memory.members[t], image.assignment[memory.members[t]]);
    }
    for (int64_t i = all.lo; i < all.hi; ++i) {
      if (image.assignment[i] < 0) gradient.compute(i, -1);
    }
  });
}

template <class T>
std::tuple<Tensor, Tensor> merge_backward_as(const Tensor& grad_merged, const Tensor& grad_mass,
                                             const std::optional<Tensor>& features, const std::optional<Tensor>& scores,
                                             const std::optional<Tensor>& merged, const Tensor& mass,
                                             const Tensor& indices, const Tensor& assignment, const Merging& merging) {
  const int64_t B = assignment.size(0), N = assignment.size(1), D = grad_merged.size(2), K = indices.size(1);
  const auto a = contiguous_as("scores", scores, kScalarType<T>);
  const Tensor total = contiguous_as("mass", mass, kScalarType<T>);
  const Tensor grad_total = contiguous_as("grad_mass", grad_mass, kScalarType<T>);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long),
               rows = contiguous_as("assignment", assignment, ScalarType::Long);
  check_values("indices", data_of<int64_t>(kept), B * K, -1, N);
  check_values("assignment", data_of<int64_t>(rows), B * N, -1, K);
  const bool of_scores = scores && is_floating(*scores);
  const ScalarType scores_type = of_scores ? scores->scalar_type() : kScalarType<T>;
  const Tensor grad_features = empty("grad_features", {B, N, D}, grad_merged.scalar_type());
  const Tensor grad_scores = empty("grad_scores", {B, of_scores ? N : 0}, scores_type);
  const auto scores_size = static_cast<int64_t>(grad_scores.element_size());
  const auto pieces = [&](Memory& memory, int slots) { return GradientMemory<T>(memory, N, D, K, slots); };
  for_each_image(B, N * D, pieces, [&](int64_t b, auto& memory, Crew& crew) {
    const Rows slopes = rows_of(grad_merged, b);
    const Gradient<T> gradient{merging,
                               slopes,
                               features ? rows_of(*features, b) : Rows{},
                               merged ? rows_of(*merged, b) : Rows{},
                               data_of<T>(grad_total) + b * K,
                               row_of<T>(a, b, N),
                               data_of<T>(total) + b * K,
                               data_of<int64_t>(kept) + b * K,
                               data_of<int64_t>(rows) + b * N,
                               output<char>(grad_features) + b * N * D * slopes.element_size(),
                               of_scores ? output<char>(grad_scores) + b * N * scores_size : nullptr,
                               dtype_of(grad_scores),
                               scores_size,
                               N};
    merge_backward_image(gradient, crew, memory);
  });
  return {grad_features, grad_scores};
}

void check_given(const std::optional<Tensor>& features, const std::optional<Tensor>& merged, const Merging& merging) {
  const bool alone = features && !merged && merging.mode == MergeMode::kSum;  // which needs no more
  if (features.has_value() != merged.has_value() && !alone) {
    fail("features, merged: expected both or neither, got ", features ? "features" : "merged",
         " alone. Remedy: give both for the gradient of scores, none for that of features.");
  }
}

std::tuple<Tensor, Tensor> merge_backward(const Tensor& grad_merged, const Tensor& grad_mass,
                                          std::optional<Tensor> features, std::optional<Tensor> scores,
                                          std::optional<Tensor> merged, const Tensor& mass, const Tensor& indices,
                                          const Tensor& assignment, const Text& mode, double centre_weight) {
  const Merging merging = merging_of(mode, centre_weight);
  check_given(features, merged, merging);
  if (features) {
    check_channels("features", *features, "B N D");
  } else {
    check_channels("grad_merged", grad_merged, "B K D");
    if (scores) check_rank("scores", *scores, "B N", 2);
    check_rank("assignment", assignment, "B N", 2);
  }
  const Tensor& like = features ? *features : grad_merged;
  const int64_t N = features ? features->size(1) : scores ? scores->size(1) : assignment.size(1);
  check_clusters(like.size(0), N, scores, indices, assignment);
  const int64_t B = like.size(0), K = indices.size(1), D = like.size(2);
  const bool wide = works_in_double(like, scores);
  const ScalarType narrow = like.scalar_type(), working = wide ? ScalarType::Double : ScalarType::Float;
  const auto check_rows = [&](const char* name, const Tensor& t) {
    check_shape(name, t, "B K D", {B, K, D});
    check_dtype(name, t, {narrow}, dtype_name(narrow).c_str());
  };
  const auto check_masses = [&](const char* name, const Tensor& t) {
    check_shape(name, t, "B K", {B, K});
    check_dtype(name, t, {working}, dtype_name(working).c_str());
  };
  check_rows("grad_merged", grad_merged);
  check_masses("grad_mass", grad_mass);
  if (merged) check_rows("merged", *merged);
  check_masses("mass", mass);
  const auto run = wide ? merge_backward_as<double> : merge_backward_as<float>;
  return run(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment, merging);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("merge_backward", TORCH_BOX(&merge_backward)); }

}  // namespace condense
