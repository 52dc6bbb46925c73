// The gradient of the merge (Eq. 8). A token's needs the token and its row alone; tokens are taken sorted by row, so
// that a row is converted once for all its members.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "checks.h"
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
  int64_t* copy;  // [n] the row of zero mass that is a copy of the token, -1 for most
  T* rows;        // [slots, 5, d]
};

// One image.
template <class T>
struct Gradient {
  Rows grad_merged, features, merged;   // [K, D], [N, D], [K, D]; the last two without data where they are not given
  const T *grad_mass, *scores, *mass;   // [K], [N], [K]
  const int64_t *indices, *assignment;  // [K], [N]
  char *grad_features, *grad_scores;    // [N, D], [N], contiguous
  Dtype scores_dtype;
  int64_t scores_size, N;

  int64_t K() const { return grad_merged.n; }
  bool is_row(int64_t r) const { return r >= 0 && indices[r] >= 0; }

  void find_copies(int64_t* copy) const {
    std::fill(copy, copy + N, -1);
    for (int64_t r = 0; r < K(); ++r) {
      if (is_row(r) && mass[r] == 0) copy[indices[r]] = r;
    }
  }
};

// What one thread computes tokens with.
template <class T>
struct TokenGradient {
  TokenGradient(const Gradient<T>& image, const int64_t* copy, T* rows)
      : image(image), copy(copy), x(rows), mean(x + D()), slope(mean + D()), narrow(slope + D()), added(narrow + D()) {}

  int64_t D() const { return image.grad_merged.d; }

  bool of_scores() const { return image.features.data != nullptr; }

  // Token i of row r, which is -1 for a token of none.
  void compute(int64_t i, int64_t r) {
    char* out = image.grad_features + i * D() * image.grad_merged.element_size();
    const bool in_place = image.grad_merged.element_size() == sizeof(T);
    T* dx = in_place ? reinterpret_cast<T*>(out) : narrow;
    double grad_score = image.is_row(r) ? image.grad_mass[r] : T{0};
    if (image.is_row(r) && image.mass[r] != 0) {
      if (r != loaded) {
        row_slope = row_as(image.grad_merged, r, slope);
        row_mean = of_scores() ? row_as(image.merged, r, mean) : row_slope;
        loaded = r;
      }
      const T mass = image.mass[r];
      const T* token = of_scores() ? row_as(image.features, i, x) : row_slope;  // any row: the sum is not asked for
      const double sum = ops.gradient_row(token, row_mean, row_slope, image.scores[i] / mass, D(), dx);
      if (of_scores()) grad_score += sum / mass;
    } else {
      std::fill(dx, dx + D(), T{0});
    }
    if (copy[i] >= 0) ops.accumulate_row(row_as(image.grad_merged, copy[i], added), T{1}, D(), dx);
    if (!in_place) ops.store_row(dx, image.grad_merged.dtype, D(), out);
    row_ops<double>().store_row(&grad_score, image.scores_dtype, 1, image.grad_scores + i * image.scores_size);
  }

  const RowOps<T>& ops = row_ops<T>();
  const Gradient<T>& image;
  const int64_t* copy;
  T *x, *mean, *slope, *narrow, *added;  // [D] each
  const T *row_mean = nullptr, *row_slope = nullptr;
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
                                             const std::optional<Tensor>& features, const Tensor& scores,
                                             const std::optional<Tensor>& merged, const Tensor& mass,
                                             const Tensor& indices, const Tensor& assignment) {
  const int64_t B = scores.size(0), N = scores.size(1), D = grad_merged.size(2), K = indices.size(1);
  const Tensor a = contiguous_as("scores", scores, kScalarType<T>), total = contiguous_as("mass", mass, kScalarType<T>);
  const Tensor grad_total = contiguous_as("grad_mass", grad_mass, kScalarType<T>);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long),
               rows = contiguous_as("assignment", assignment, ScalarType::Long);
  check_values("indices", data_of<int64_t>(kept), B * K, -1, N);
  check_values("assignment", data_of<int64_t>(rows), B * N, -1, K);
  const Tensor grad_features = empty("grad_features", {B, N, D}, grad_merged.scalar_type());
  const Tensor grad_scores = empty("grad_scores", {B, N}, scores.scalar_type());
  const auto scores_size = static_cast<int64_t>(scores.element_size());
  const auto pieces = [&](Memory& memory, int slots) { return GradientMemory<T>(memory, N, D, K, slots); };
  for_each_image(B, N * D, pieces, [&](int64_t b, auto& memory, Crew& crew) {
    const Rows slopes = rows_of(grad_merged, b);
    const Gradient<T> gradient{slopes,
                               features ? rows_of(*features, b) : Rows{},
                               merged ? rows_of(*merged, b) : Rows{},
                               data_of<T>(grad_total) + b * K,
                               data_of<T>(a) + b * N,
                               data_of<T>(total) + b * K,
                               data_of<int64_t>(kept) + b * K,
                               data_of<int64_t>(rows) + b * N,
                               output<char>(grad_features) + b * N * D * slopes.element_size(),
                               output<char>(grad_scores) + b * N * scores_size,
                               dtype_of(scores),
                               scores_size,
                               N};
    merge_backward_image(gradient, crew, memory);
  });
  return {grad_features, grad_scores};
}

std::tuple<Tensor, Tensor> merge_backward(const Tensor& grad_merged, const Tensor& grad_mass,
                                          std::optional<Tensor> features, const Tensor& scores,
                                          std::optional<Tensor> merged, const Tensor& mass, const Tensor& indices,
                                          const Tensor& assignment) {
  if (features.has_value() != merged.has_value()) {
    fail("features, merged: expected both or neither, got ", features ? "features" : "merged",
         " alone. Remedy: give both for the gradient of scores, none for that of features.");
  }
  if (features) {
    check_channels("features", *features, "B N D");
  } else {
    check_channels("grad_merged", grad_merged, "B K D");
    check_rank("scores", scores, "B N", 2);
  }
  const Tensor& like = features ? *features : grad_merged;
  check_clusters(like.size(0), features ? features->size(1) : scores.size(1), scores, indices, assignment);
  const int64_t B = like.size(0), K = indices.size(1), D = like.size(2);
  const bool wide = is_double(like) || is_double(scores);
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
  return run(grad_merged, grad_mass, features, scores, merged, mass, indices, assignment);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("merge_backward", TORCH_BOX(&merge_backward)); }

}  // namespace condense
