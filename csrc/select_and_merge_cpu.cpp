// The flagship: the stages in a row. s lives only while its image does: at most one a thread.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

struct Options {
  int64_t num_anchors, num_background;
  double suppression, spatial_weight;
};

// The kept tokens, ascending: anchors by score (Eq. 2), then background by global similarity (Eq. 4).
template <class T>
void select_image(const T* s, const T* sbar, const T* scores, const T* g, const int8_t* tier, int64_t n,
                  const Options& options, int64_t* indices) {
  const auto suppression = static_cast<T>(options.suppression);
  greedy_select_image<T>(s, n, scores, sbar, tier, n, options.num_anchors, suppression, indices);
  Buffer<int8_t> rest(n);  // an anchor is no candidate for the background
  std::copy(tier, tier + n, rest.get());
  for (int64_t a = 0; a < options.num_anchors; ++a) rest[indices[a]] = kTaken;
  greedy_select_image<T>(s, n, g, sbar, rest.get(), n, options.num_background, suppression,
                         indices + options.num_anchors);
  std::sort(indices, indices + options.num_anchors + options.num_background);
}

// S: the working type of the similarities, M: that of the merge.
template <class S, class M>
std::tuple<Tensor, Tensor, Tensor, Tensor> select_and_merge_as(const Tensor& features, const Tensor& scores,
                                                               const Tensor& keys, const Options& options,
                                                               const std::optional<std::vector<int64_t>>& grid,
                                                               const std::optional<Tensor>& positions,
                                                               const std::optional<Tensor>& mask) {
  const int64_t B = features.size(0), N = features.size(1), D = features.size(2);
  const int64_t K = options.num_anchors + options.num_background;
  const Tensor a = contiguous_as(scores, kScalarType<S>), weights = contiguous_as(scores, kScalarType<M>);
  const auto valid = contiguous_as(mask, ScalarType::Bool), places = contiguous_as(positions, ScalarType::Double);
  const Tensor merged = torch::stable::empty({B, K, D}, features.scalar_type());
  const Tensor indices = torch::stable::empty({B, K}, ScalarType::Long);
  const Tensor assignment = torch::stable::empty({B, N}, ScalarType::Long);
  const Tensor mass = torch::stable::empty({B, K}, kScalarType<M>);

  for_each_image(B, static_cast<double>(N) * N * keys.size(2), [&](int64_t b, int slots) {
    Buffer<S> s(N * N), g(N);
    Buffer<int8_t> tier(N);
    S sbar = 0;
    const Rows tokens = rows_of(features, b);
    const S* score = data_of<S>(a) + b * N;
    int64_t *kept = output<int64_t>(indices) + b * K, *rows = output<int64_t>(assignment) + b * N;
    similarity_image<S>(rows_of(keys, b), score, row_of<uint8_t>(valid, b, N), slots, s.get(), &sbar, g.get(),
                        tier.get());
    select_image<S>(s.get(), &sbar, score, g.get(), tier.get(), N, options, kept);
    const Layout<S> layout = layout_of<S>(grid, places, b, N, tier.get(), options.spatial_weight);
    assign_image<S>(s.get(), N, kept, tier.get(), layout, N, K, slots, rows);
    merge_image<M>(tokens, data_of<M>(weights) + b * N, kept, rows, K, slots,
                   output<char>(merged) + b * K * D * tokens.element_size(), output<M>(mass) + b * K);
  });
  return {merged, indices, assignment, mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_and_merge(const Tensor& features, const Tensor& scores,
                                                            int64_t num_anchors, int64_t num_background,
                                                            std::optional<Tensor> keys,
                                                            std::optional<std::vector<int64_t>> grid,
                                                            std::optional<Tensor> positions, std::optional<Tensor> mask,
                                                            double suppression, double spatial_weight) {
  check_rank("features", features, "B N D", 3);
  check_floating("features", features);
  check_not_empty("features", features, 1, "token");
  check_not_empty("features", features, 2, "channel");
  const int64_t B = features.size(0), N = features.size(1);
  check_shape("scores", scores, "B N", {B, N});
  check_floating("scores", scores);
  check_budget(num_anchors, num_background, N);
  if (keys) {
    check_rank("keys", *keys, "B N Dk", 3);
    check_shape("keys", *keys, "B N Dk", {B, N, keys->size(2)});
    check_floating("keys", *keys);
    check_not_empty("keys", *keys, 2, "channel");
  }
  if (mask) {
    check_shape("mask", *mask, "B N", {B, N});
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  check_weight("suppression", suppression);
  check_weight("spatial_weight", spatial_weight);
  check_where(grid, positions, spatial_weight, B, N);

  const Tensor& k = keys ? *keys : features;
  const Options options{num_anchors, num_background, suppression, spatial_weight};
  const bool wide_scores = is_double(scores);
  const bool wide_s = wide_scores || is_double(k), wide_m = wide_scores || is_double(features);
  const auto run = wide_s ? (wide_m ? select_and_merge_as<double, double> : select_and_merge_as<double, float>)
                          : (wide_m ? select_and_merge_as<float, double> : select_and_merge_as<float, float>);
  return run(features, scores, k, options, grid, positions, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("select_and_merge", TORCH_BOX(&select_and_merge)); }

}  // namespace condense
