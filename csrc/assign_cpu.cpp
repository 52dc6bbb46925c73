// Every token to the kept token that is most similar and near (Eq. 6, 7): one pass over a row of s for each kept token.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "gathered.h"
#include "packed.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

bool is_masked(const int8_t* tier, int64_t i) { return tier && tier[i] == kMasked; }

// spatial_weight / dmax, dmax the diagonal of the bounding box of the valid tokens; positions [num_axes, n].
template <class T>
T distance_factor(const T* positions, int64_t num_axes, int64_t n, const int8_t* tier, double spatial_weight) {
  T squared = 0;
  for (int64_t p = 0; p < num_axes; ++p) {
    T low = std::numeric_limits<T>::infinity(), high = -low;
    for (int64_t i = 0; i < n; ++i) {
      const T x = positions[p * n + i];
      if (is_masked(tier, i) || std::isnan(x)) continue;
      low = std::min(low, x);
      high = std::max(high, x);
    }
    const T extent = high > low ? high - low : T{0};
    squared += extent * extent;
  }
  if (squared == 0) return 0;
  return std::min(static_cast<T>(spatial_weight) / std::sqrt(squared), std::numeric_limits<T>::max());
}

}  // namespace

template <class T>
void Layout<T>::set_grid(const int64_t* grid, int64_t n, const int8_t* tier, double spatial_weight) {
  int64_t inner = n;  // tokens per step of the axis
  for (int64_t p = 0; p < num_axes; ++p) {
    inner /= grid[p];
    for (int64_t i = 0; i < n; ++i) positions[p * n + i] = static_cast<T>(i / inner % grid[p]);
  }
  factor = distance_factor(positions, num_axes, n, tier, spatial_weight);
}

template <class T>
void Layout<T>::set_positions(const double* places, int64_t n, const int8_t* tier, double spatial_weight) {
  const auto finite = [&](int64_t i) {
    bool all = true;
    for (int64_t p = 0; p < num_axes; ++p) all = all && std::isfinite(places[p * n + i]);
    return all;
  };
  double extent = 0, half_extent = 0;
  for (int64_t p = 0; p < num_axes; ++p) {
    double high = -std::numeric_limits<double>::infinity();
    low[p] = -high;
    for (int64_t i = 0; i < n; ++i) {
      if (is_masked(tier, i) || !finite(i)) continue;
      low[p] = std::min(low[p], places[p * n + i]);
      high = std::max(high, places[p * n + i]);
    }
    extent = std::max(extent, high - low[p]);
    half_extent = std::max(half_extent, high * 0.5 - low[p] * 0.5);
  }
  const double part = std::isinf(extent) ? 0.5 : 1.0;  // halves, where whole numbers are too far apart for a double
  // Moved to the origin and scaled in fp64: what T then rounds is small beside the extent, wherever the tokens are.
  const Shrink<double> shrink(std::isinf(extent) ? half_extent : extent);
  for (int64_t i = 0; i < n; ++i) {
    const bool has_place = finite(i);  // NaN makes every distance from and to it 0
    for (int64_t p = 0; p < num_axes; ++p) {
      positions[p * n + i] = has_place ? static_cast<T>(shrink(places[p * n + i] * part - low[p] * part))
                                       : std::numeric_limits<T>::quiet_NaN();
    }
  }
  factor = distance_factor(positions, num_axes, n, tier, spatial_weight);
}

template <class T>
void assign_image(const int64_t* indices, const int8_t* tier, const Layout<T>& layout, int64_t n, int64_t k, Crew& crew,
                  const AssignMemory<T>& memory, int64_t* assignment) {
  using Index = typename RowOps<T>::Index;
  const RowOps<T>& ops = row_ops<T>();
  T* best = memory.best;
  Index* best_row = memory.best_row;
  const auto takes_tokens = [&](int64_t row) { return indices[row] >= 0 && !is_masked(tier, indices[row]); };
  int64_t first = 0;
  while (first < k && !takes_tokens(first)) ++first;

  constexpr int64_t kBlock = 2048;  // best and best_row stay in the first-level cache
  crew.run([&](int slot) {
    const Share share(n, slot, crew.size());
    for (int64_t lo = share.lo; lo < share.hi; lo += kBlock) {
      const int64_t hi = std::min(lo + kBlock, share.hi);
      std::fill(best + lo, best + hi, -std::numeric_limits<T>::infinity());
      std::fill(best_row + lo, best_row + hi, static_cast<Index>(first < k ? first : -1));
      for (int64_t row = first; row < k; ++row) {
        if (!takes_tokens(row)) continue;
        ops.consider_row(memory.s_rows[row], layout.positions, n, layout.num_axes, indices[row], layout.factor, lo, hi,
                         row, best, best_row);
      }
    }
    for (int64_t i = share.lo; i < share.hi; ++i) assignment[i] = is_masked(tier, i) ? -1 : best_row[i];
  });
  for (int64_t row = k - 1; row >= 0; --row) {
    if (takes_tokens(row)) assignment[indices[row]] = row;
  }
}

#define CONDENSE_INSTANTIATE(T)                                                                           \
  template struct Layout<T>;                                                                              \
  template void assign_image<T>(const int64_t*, const int8_t*, const Layout<T>&, int64_t, int64_t, Crew&, \
                                const AssignMemory<T>&, int64_t*);
CONDENSE_INSTANTIATE(float)
CONDENSE_INSTANTIATE(double)
#undef CONDENSE_INSTANTIATE

namespace {

// Who may not be merged, and is not kept, goes nowhere.
void leave_alone(const uint8_t* sources, const int64_t* indices, int64_t n, int64_t* assignment) {
  if (!sources) return;
  for (int64_t i = 0; i < n; ++i) {
    if (sources[i] == 0 && assignment[i] >= 0 && indices[assignment[i]] != i) assignment[i] = -1;
  }
}

template <class T>
Tensor assign_as(const Tensor& s, const Tensor& indices, const std::optional<Tensor>& tier,
                 const std::optional<std::vector<int64_t>>& grid, const std::optional<Tensor>& positions,
                 double spatial_weight, const std::optional<Tensor>& sources) {
  const int64_t B = s.size(0), N = s.size(1), K = indices.size(1);
  const Matrices matrices(s);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long);
  check_values("indices", data_of<int64_t>(kept), B * K, -1, N);
  const auto tiers = contiguous_as("tier", tier, ScalarType::Char);
  const auto may_merge = contiguous_as("sources", sources, ScalarType::Bool);
  const Space first = space_of(grid, positions, spatial_weight, 0);
  const Tensor assignment = empty("assignment", {B, N}, ScalarType::Long);
  const auto pieces = [&](Memory& memory, int) {
    return std::pair{SpaceMemory<T>(memory, first, N), AssignMemory<T>(memory, N, K)};
  };
  for_each_image(B, N * K, pieces, [&](int64_t b, auto& taken, Crew& crew) {
    auto& [where, memory] = taken;
    const int8_t* image_tier = row_of<int8_t>(tiers, b, N);
    const int64_t* image_kept = data_of<int64_t>(kept) + b * K;
    where.fill(space_of(grid, positions, spatial_weight, b), N, image_tier);
    for (int64_t row = 0; row < K; ++row) {
      memory.s_rows[row] = matrices.at<T>(b) + std::max<int64_t>(image_kept[row], 0) * matrices.ld;
    }
    int64_t* rows = output<int64_t>(assignment) + b * N;
    assign_image<T>(image_kept, image_tier, where.layout, N, K, crew, memory, rows);
    leave_alone(row_of<uint8_t>(may_merge, b, N), image_kept, N, rows);
  });
  return assignment;
}

Tensor assign(const Tensor& s, const Tensor& indices, std::optional<Tensor> tier,
              std::optional<std::vector<int64_t>> grid, std::optional<Tensor> positions, double spatial_weight,
              std::optional<Tensor> sources) {
  check_rank("s", s, "B N N", 3);
  check_shape("s", s, "B N N", {s.size(0), s.size(1), s.size(1)});
  check_working("s", s);
  check_rank("indices", indices, "B K", 2);
  check_shape("indices", indices, "B K", {s.size(0), indices.size(1)});
  check_dtype("indices", indices, {ScalarType::Long}, "int64");
  if (tier) {
    check_shape("tier", *tier, "B N", {s.size(0), s.size(1)});
    check_dtype("tier", *tier, {ScalarType::Char}, "int8");
  }
  check_weight("spatial_weight", spatial_weight);
  check_where(grid, positions, spatial_weight, s.size(0), s.size(1));
  if (sources) {
    check_shape("sources", *sources, "B N", {s.size(0), s.size(1)});
    check_dtype("sources", *sources, {ScalarType::Bool}, "bool");
  }
  return is_double(s) ? assign_as<double>(s, indices, tier, grid, positions, spatial_weight, sources)
                      : assign_as<float>(s, indices, tier, grid, positions, spatial_weight, sources);
}

template <class T>
Tensor assign_varlen_as(const Tensor& s, const Tensor& indices, const Tensor& cu_seqlens, const Tensor& cu_kept,
                        int64_t max_seqlen, const std::optional<Tensor>& tier, const std::optional<Tensor>& positions,
                        double spatial_weight, const std::optional<Tensor>& sources) {
  const int64_t num_tokens = s.size(0), total_keep = indices.size(0);
  const Tensor rows_of_s = s.stride(1) == 1 || s.size(1) <= 1 ? s : contiguous_as("s", s, s.scalar_type());
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long);
  const auto tiers = contiguous_as("tier", tier, ScalarType::Char);
  const auto may_merge = contiguous_as("sources", sources, ScalarType::Bool);
  const Tensor assignment = empty("assignment", {num_tokens}, ScalarType::Long);
  std::fill(output<int64_t>(assignment), output<int64_t>(assignment) + num_tokens, -1);
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen);
  Work work = 0;
  for (const Part& part : parts) {
    check_values("indices", data_of<int64_t>(kept) + part.first_row, part.num_rows, -1, part.num_tokens);
    work += static_cast<double>(part.num_tokens) * static_cast<double>(part.num_rows);
  }
  const Space space = space_of(std::nullopt, positions, spatial_weight, 0);
  const auto count = static_cast<int64_t>(parts.size()), n = longest(parts), k = most_rows(parts);
  const auto pieces = [&](Memory& memory, int) {
    return std::pair{SpaceMemory<T>(memory, space, n), AssignMemory<T>(memory, n, k)};
  };
  for_each_image(count, work / count, pieces, [&](int64_t p, auto& taken, Crew& crew) {
    auto& [where, memory] = taken;
    const Part& part = parts[p];
    const int64_t first = part.first_token;
    const int8_t* own_tier = row_of<int8_t>(tiers, first, 1);
    const int64_t* own_kept = data_of<int64_t>(kept) + part.first_row;
    where.fill(space.from(first), part.num_tokens, own_tier);
    for (int64_t row = 0; row < part.num_rows; ++row) {
      const int64_t token = first + std::max<int64_t>(own_kept[row], 0);
      memory.s_rows[row] = data_of<T>(rows_of_s) + token * rows_of_s.stride(0);
    }
    int64_t* to = output<int64_t>(assignment) + first;
    assign_image<T>(own_kept, own_tier, where.layout, part.num_tokens, part.num_rows, crew, memory, to);
    leave_alone(row_of<uint8_t>(may_merge, first, 1), own_kept, part.num_tokens, to);
  });
  return assignment;
}

Tensor assign_varlen(const Tensor& s, const Tensor& indices, const Tensor& cu_seqlens, const Tensor& cu_kept,
                     int64_t max_seqlen, std::optional<Tensor> tier, std::optional<Tensor> positions,
                     double spatial_weight, std::optional<Tensor> sources) {
  check_rank("s", s, "T M", 2);
  check_working("s", s);
  const int64_t T = s.size(0);
  check_rank("indices", indices, "total_keep", 1);
  check_dtype("indices", indices, {ScalarType::Long}, "int64");
  check_segments(cu_seqlens, max_seqlen);
  check_rows(cu_kept, cu_seqlens, indices.size(0), T);
  if (s.size(1) < max_seqlen) {
    fail("s: expected rows of at least max_seqlen = ", max_seqlen, " similarities, got ", shape_text(shape_of(s)), ".");
  }
  if (tier) {
    check_shape("tier", *tier, "T", {T});
    check_dtype("tier", *tier, {ScalarType::Char}, "int8");
  }
  check_weight("spatial_weight", spatial_weight);
  check_packed_positions(positions, spatial_weight, T);
  if (sources) {
    check_shape("sources", *sources, "T", {T});
    check_dtype("sources", *sources, {ScalarType::Bool}, "bool");
  }
  const auto run = is_double(s) ? assign_varlen_as<double> : assign_varlen_as<float>;
  return run(s, indices, cu_seqlens, cu_kept, max_seqlen, tier, positions, spatial_weight, sources);
}

// What an image's assignment from keys takes: the rows of its kept tokens are all of s that is computed.
template <class T>
struct FromKeysMemory {
  FromKeysMemory(Memory& memory, const Rows& keys, const Space& space, Metric metric, int64_t n, int64_t k, int slots)
      : gathered(memory, keys, n),
        tier(memory.take<int8_t>(n)),
        tokens(memory.take<int64_t>(k)),
        rows(memory.take<T>(k + kTile, width_of(n))),
        where(memory, space, n),
        assign(memory, n, k),
        similarity(memory, n, slots, true, metric) {}
  Gathered gathered;
  int8_t* tier;
  int64_t* tokens;
  T* rows;  // [k, width_of(n)] and room for a tile
  SpaceMemory<T> where;
  AssignMemory<T> assign;
  SimilarityMemory<T> similarity;
};

template <class T>
void assign_from_keys_image(const Rows& given, const int64_t* indices, int64_t k, const uint8_t* mask,
                            const Space& space, const uint8_t* sources, Crew& crew, FromKeysMemory<T>& memory,
                            int64_t* assignment) {
  const Rows keys = memory.gathered.of(given, crew);
  measure_keys<T>(keys, nullptr, mask, crew, memory.similarity, memory.tier);
  for (int64_t row = 0; row < k; ++row) {
    memory.tokens[row] = std::max<int64_t>(indices[row], 0);
    memory.assign.s_rows[row] = memory.rows + row * width_of(keys.n);
  }
  if (k > 0) similarity_rows<T>(keys, memory.tokens, k, crew, memory.similarity, memory.rows);
  memory.where.fill(space, keys.n, memory.tier);
  assign_image<T>(indices, memory.tier, memory.where.layout, keys.n, k, crew, memory.assign, assignment);
  leave_alone(sources, indices, keys.n, assignment);
}

template <class T>
Tensor assign_from_keys_as(const Tensor& keys, const Tensor& indices, const std::optional<Tensor>& mask,
                           const std::optional<std::vector<int64_t>>& grid, const std::optional<Tensor>& positions,
                           double spatial_weight, const std::optional<Tensor>& sources, Metric metric) {
  const int64_t B = keys.size(0), N = keys.size(1), K = indices.size(1);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long);
  check_values("indices", data_of<int64_t>(kept), B * K, -1, N);
  const auto valid = contiguous_as("mask", mask, ScalarType::Bool);
  const auto may_merge = contiguous_as("sources", sources, ScalarType::Bool);
  const Space first = space_of(grid, positions, spatial_weight, 0);
  const Tensor assignment = empty("assignment", {B, N}, ScalarType::Long);
  const auto pieces = [&](Memory& memory, int slots) {
    return FromKeysMemory<T>(memory, rows_of(keys), first, metric, N, K, slots);
  };
  for_each_image(
      B, products(static_cast<double>(N) * K * keys.size(2)), pieces, [&](int64_t b, auto& memory, Crew& crew) {
        assign_from_keys_image<T>(rows_of(keys, b), data_of<int64_t>(kept) + b * K, K, row_of<uint8_t>(valid, b, N),
                                  space_of(grid, positions, spatial_weight, b), row_of<uint8_t>(may_merge, b, N), crew,
                                  memory, output<int64_t>(assignment) + b * N);
      });
  return assignment;
}

Tensor assign_from_keys(const Tensor& keys, const Tensor& indices, std::optional<Tensor> mask,
                        std::optional<std::vector<int64_t>> grid, std::optional<Tensor> positions,
                        double spatial_weight, std::optional<Tensor> sources, Text metric) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
  check_num_tokens("keys", keys);
  check_not_empty("keys", keys, 2, "channel");
  const std::vector<int64_t> tokens = {keys.size(0), keys.size(1)};
  check_rank("indices", indices, "B K", 2);
  check_shape("indices", indices, "B K", {keys.size(0), indices.size(1)});
  check_dtype("indices", indices, {ScalarType::Long}, "int64");
  if (mask) {
    check_shape("mask", *mask, "B N", tokens);
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  check_weight("spatial_weight", spatial_weight);
  check_where(grid, positions, spatial_weight, keys.size(0), keys.size(1));
  if (sources) {
    check_shape("sources", *sources, "B N", tokens);
    check_dtype("sources", *sources, {ScalarType::Bool}, "bool");
  }
  const auto run = is_double(keys) ? assign_from_keys_as<double> : assign_from_keys_as<float>;
  return run(keys, indices, mask, grid, positions, spatial_weight, sources, metric_of(metric));
}

template <class T>
Tensor assign_from_keys_varlen_as(const Tensor& keys, const Tensor& indices, const Tensor& cu_seqlens,
                                  const Tensor& cu_kept, int64_t max_seqlen, const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& positions, double spatial_weight,
                                  const std::optional<Tensor>& sources, Metric metric) {
  const int64_t num_tokens = keys.size(0);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long);
  const auto valid = contiguous_as("mask", mask, ScalarType::Bool);
  const auto may_merge = contiguous_as("sources", sources, ScalarType::Bool);
  const Tensor assignment = empty("assignment", {num_tokens}, ScalarType::Long);
  std::fill(output<int64_t>(assignment), output<int64_t>(assignment) + num_tokens, -1);
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, num_tokens, indices.size(0), max_seqlen);
  Work work = 0;
  for (const Part& part : parts) {
    check_values("indices", data_of<int64_t>(kept) + part.first_row, part.num_rows, -1, part.num_tokens);
    work += products(static_cast<double>(part.num_tokens) * part.num_rows * keys.size(1));
  }
  const Space space = space_of(std::nullopt, positions, spatial_weight, 0);
  const auto count = static_cast<int64_t>(parts.size()), n = longest(parts), k = most_rows(parts);
  const auto pieces = [&](Memory& memory, int slots) {
    return FromKeysMemory<T>(memory, rows_of(keys), space, metric, n, k, slots);
  };
  for_each_image(count, work / count, pieces, [&](int64_t p, auto& memory, Crew& crew) {
    const Part& part = parts[p];
    const int64_t first = part.first_token;
    assign_from_keys_image<T>(rows_of(keys).part(first, part.num_tokens), data_of<int64_t>(kept) + part.first_row,
                              part.num_rows, row_of<uint8_t>(valid, first, 1), space.from(first),
                              row_of<uint8_t>(may_merge, first, 1), crew, memory, output<int64_t>(assignment) + first);
  });
  return assignment;
}

Tensor assign_from_keys_varlen(const Tensor& keys, const Tensor& indices, const Tensor& cu_seqlens,
                               const Tensor& cu_kept, int64_t max_seqlen, std::optional<Tensor> mask,
                               std::optional<Tensor> positions, double spatial_weight, std::optional<Tensor> sources,
                               Text metric) {
  check_rank("keys", keys, "T Dk", 2);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "channel");
  check_rank("indices", indices, "total_keep", 1);
  check_dtype("indices", indices, {ScalarType::Long}, "int64");
  check_segments(cu_seqlens, max_seqlen);
  check_rows(cu_kept, cu_seqlens, indices.size(0), keys.size(0));
  if (mask) {
    check_shape("mask", *mask, "T", {keys.size(0)});
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  check_weight("spatial_weight", spatial_weight);
  check_packed_positions(positions, spatial_weight, keys.size(0));
  if (sources) {
    check_shape("sources", *sources, "T", {keys.size(0)});
    check_dtype("sources", *sources, {ScalarType::Bool}, "bool");
  }
  const auto run = is_double(keys) ? assign_from_keys_varlen_as<double> : assign_from_keys_varlen_as<float>;
  return run(keys, indices, cu_seqlens, cu_kept, max_seqlen, mask, positions, spatial_weight, sources,
             metric_of(metric));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("assign", TORCH_BOX(&assign));
  m.impl("assign_varlen", TORCH_BOX(&assign_varlen));
  m.impl("assign_from_keys", TORCH_BOX(&assign_from_keys));
  m.impl("assign_from_keys_varlen", TORCH_BOX(&assign_from_keys_varlen));
}

}  // namespace condense
